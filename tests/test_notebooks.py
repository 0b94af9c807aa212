"""The notebooks of colab/: committed clean; executed top to bottom by a slow test:

python -m pytest -m slow -n 0 tests/test_notebooks.py
"""

import ast
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
SECONDS = 300  # of a cell, so that one that hangs ends


def cells(notebook, kind):
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def by_name(notebook):
    return notebook.stem


def test_there_are_four_and_the_readme_links_them():
    readme = (ROOT / "README.md").read_text()
    assert len(NOTEBOOKS) == 4
    for notebook in NOTEBOOKS:
        assert f"(colab/{notebook.name})" in readme
    links = [
        link
        for notebook in NOTEBOOKS
        for text in cells(notebook, "markdown")
        for link in re.findall(r"\]\(([^)]+\.ipynb)\)", text)
    ]
    assert links and set(links) <= {notebook.name for notebook in NOTEBOOKS}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
def test_it_is_committed_without_outputs_in_sorted_json(notebook):
    text = notebook.read_text()
    found = json.loads(text)
    assert text == json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert len(text) < 20_000
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
def test_its_first_cell_installs_where_scope_jax_is_missing(notebook):
    first = json.loads(notebook.read_text())["cells"][0]
    source = "".join(first["source"])
    assert first["cell_type"] == "code"
    assert 'if importlib.util.find_spec("scope_jax") is None:' in source
    assert '"-m", "pip", "install"' in source
    assert "No public repository of scope_jax is known yet" in source
    done = {}
    exec(source, done)  # scope_jax is here, so nothing is installed
    assert "wanted" not in done


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
def test_its_code_compiles_and_imports_what_exists(notebook):
    import importlib

    for source in cells(notebook, "code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scope_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=by_name)
@pytest.mark.filterwarnings("default")  # of Jupyter's own packages
def test_it_runs_top_to_bottom(notebook, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("XLA_FLAGS")  # one device, and optimised programs, as a reader has
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        nbformat.read(notebook, as_version=4), timeout=SECONDS, kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()  # raises with the cell's traceback where one fails
