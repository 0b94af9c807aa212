"""The documentation site: its code runs, its error texts are the code's, and it builds without a
warning and asks nothing of the network.

A page's Python blocks share a namespace and a folder; a block with title="NAME.py" is a file in it.
What a line `print(..)  # text` says in its comment is what it prints.
"""

import ast
import contextlib
import html
import importlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

import scope_jax
from scope_jax.configlib import flat_keys, load_config
from scope_jax.methods import METHODS, default_config

pytest.importorskip("mkdocs", reason="the documentation needs mkdocs: pip install -e '.[docs]'")

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
_PRINTS = re.compile(r"^print\(.*\)  # (.*)$", re.M)


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def page_name(page: pathlib.Path) -> str:
    return page.relative_to(DOCS).as_posix()


def as_built(page: pathlib.Path) -> str:
    """Returns a page with what it quotes from README and code."""
    place = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=page_name(page)))
    return hooks.on_page_markdown(page.read_text(), place)


def blocks(page: pathlib.Path, language: str) -> list[tuple[str, str]]:
    """Returns (title, text) of a page's blocks in a language."""
    found = _BLOCK.findall(as_built(page))
    return [(title, text) for name, title, text in found if name == language]


def pages_with(language: str) -> list[pathlib.Path]:
    return [page for page in PAGES if blocks(page, language)]


def write_files(page: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the files that a page shows."""
    for title, code in blocks(page, "python"):
        if title:
            (folder / title).write_text(code)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, whose modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


# ---- what the pages quote ------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_fence_is_closed_and_seen(page):
    text = as_built(page)
    fences = re.findall(r"^\s*```", text, re.M)
    assert len(fences) % 2 == 0
    opened = re.findall(r"^```(\w+)", text, re.M)
    assert [name for name, _, _ in _BLOCK.findall(text)] == opened


def test_no_figure_of_the_readme_is_copied():
    """Percentages, intervals and factors stand in the README; pages quote them."""
    for page in PAGES:
        assert not re.search(r"\d ?± ?\d|\d\.\d+x\b", page.read_text()), page_name(page)


def test_quoting_finds_sections_and_says_what_is_missing(monkeypatch):
    text = "# A\n\nx\n```\n# no heading\n```\n## B\n\none\ntwo\n### C\nthree\n## D\n\nfour\n"
    monkeypatch.setattr(hooks, "readme", lambda: text)
    assert hooks.section("B") == "one\ntwo\n### C\nthree"
    assert hooks.section("B", "two", "###") == "two"
    assert hooks.section("D") == "four"
    assert hooks.section("A").endswith("four") and "# no heading" in hooks.section("A")
    for asked in (("no heading",), ("B", "four"), ("B", None, "four")):
        with pytest.raises(hooks.PluginError, match="README.md"):
            hooks.section(*asked)


def test_links_of_the_readme_become_names_and_pictures_move():
    text = (
        "[log](experiments/LOG.md) [L](L) [w](https://a/b) [s](#x) ![p](e/f.png) ![q](docs/q.png)"
    )
    assert hooks.rewrite_links(text, "../") == (
        "log (`experiments/LOG.md`) `L` [w](https://a/b) [s](#x) ![p](../from_readme/e_f.png) "
        "![q](../q.png)"
    )


def test_the_configs_reference_has_every_option_with_its_default():
    text = as_built(DOCS / "configs.md")
    found = dict(re.findall(r"^\| `([\w.]+)` \| <code>(.*?)</code> \|", text, re.M))
    options = flat_keys(default_config().to_dict())
    assert {key: ast.literal_eval(html.unescape(found[key])) for key in options} == options
    assert all(f"| `{name}` |" in text for name in METHODS)
    assert all(f"| `{file.stem}` |" in text for file in (ROOT / "configs").glob("*.py"))


def test_a_comment_of_the_code_is_beside_its_option():
    text = as_built(DOCS / "configs.md")
    row = next(line for line in text.splitlines() if line.startswith("| `optimizer.warmup_steps`"))
    assert row == "| `optimizer.warmup_steps` | <code>0</code> | in optimizer updates |"
    row = next(line for line in text.splitlines() if line.startswith("| `locate.tau`"))
    assert row == "| `locate.tau` | <code>0.5</code> |  |"
    _, _, oracle = text.partition("### oracle\n\n")
    assert oracle.startswith('How often the checker of locator="oracle"')


# ---- what the pages run --------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("python"), ids=page_name)
def test_its_python_runs_and_prints_what_it_says(page, folder):
    namespace = {"__name__": "docs"}
    write_files(page, folder)
    for title, code in blocks(page, "python"):
        if title:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page_name(page), "exec"), namespace)
        expected = _PRINTS.findall(code)
        if expected:
            assert printed.getvalue().splitlines() == expected


def test_recipes_are_short():
    for title, code in blocks(DOCS / "recipes.md", "python"):
        assert len(code.splitlines()) <= 30, title or code


# ---- commands ------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Returns the words of each `python -m scope_jax...` of a shell text."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"python -m (scope_jax\.\w+)([^\n|;&]*)", text)
    return [[module, *words.replace('"', " ").split()] for module, words in found]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_its_commands_exist(page, folder):
    write_files(page, folder)
    inline = re.findall(r"`(python -m [^`]+)`", as_built(page))
    for text in [*(text for _, text in blocks(page, "bash")), *inline]:
        for module, *words in commands(text):
            assert importlib.util.find_spec(module), module
            if "--config" in words:
                spec = words[words.index("--config") + 1]
                if re.fullmatch(r"[\w./:=,]{2,}", spec):  # not C for a config
                    overrides = [word for word in words if word.startswith("--config.")]
                    load_config(spec, overrides)
        for name in re.findall(r"python (experiments/\S+)", text):
            assert (ROOT / name).is_file(), name


RECIPES = "\n".join(text for _, text in blocks(DOCS / "recipes.md", "bash"))


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(RECIPES), ids=lambda words: words[2])
def test_recipes_train(command, folder):
    write_files(DOCS / "recipes.md", folder)
    module, *words = command
    words[words.index("--workdir") + 1] = str(folder / "run")
    path = {"PYTHONPATH": f"{folder}:{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "eval at step 2" in done.stdout


# ---- errors --------------------------------------------------------------------------------------


def templates() -> list[str]:
    """Returns every text of the package with … where a value is filled in."""
    found = []
    for file in (ROOT / "scope_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(map(str, parts)))
    return found


def with_gaps(text: str) -> re.Pattern:
    """Matches a text whatever stands for its … ."""
    return re.compile(".*".join(re.escape(part) for part in text.strip().split("…")), re.S)


def test_the_errors_shown_are_the_codes():
    found = templates()
    errors = [text for _, text in blocks(DOCS / "troubleshooting.md", "text")]
    assert len(errors) > 20
    for text in errors:
        assert any(with_gaps(text).fullmatch(one) for one in found), text
    assert not any(with_gaps("no … such error").fullmatch(one) for one in found)


@pytest.mark.parametrize(
    "text", [text for _, text in blocks(DOCS / "troubleshooting.md", "console")]
)
def test_the_failing_commands_fail_as_shown(text, folder, capsys):
    line, said = text.strip().split("\n", 1)
    ((module, *words),) = commands(line)
    words[words.index("--workdir") + 1] = str(folder / "run")
    assert importlib.import_module(module).main(words) == 2
    assert with_gaps(said).fullmatch(capsys.readouterr().err.strip())


# ---- the site ------------------------------------------------------------------------------------


def test_it_builds_without_warnings_and_asks_nothing_of_the_network(tmp_path):
    done = subprocess.run(  # not --quiet: with it --strict counts no warning
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # Material's, on what MkDocs 2 will change
    )  # fmt: skip
    assert done.returncode == 0 and "Documentation built" in done.stderr, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    built = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert {page_name(page).replace(".md", ".html") for page in PAGES} <= built
    loads = r'<(?:script|img|iframe|source)[^>]* src="(?!data:)([^"]+)"|<link[^>]* href="([^"]+)"'
    for name in built:
        page = tmp_path / name
        for loaded in ("".join(found) for found in re.findall(loads, page.read_text())):
            assert not re.match(r"(https?:)?//", loaded), f"{name} loads {loaded}"
            assert name == "404.html" or (page.parent / loaded.partition("?")[0]).exists(), loaded
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text()), sheet
    api = (tmp_path / "api.html").read_text()
    for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.M):
        assert f'id="{name}"' in api, name
    # Sections of docstrings are lists, not words in a paragraph.
    assert ">Returns:<" in api and not re.search(r"\b(?:Args|Returns|Raises): \w", api)


def test_the_api_page_has_every_public_name():
    shown = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.M)
    listed = {name.rpartition(".")[2] for name in shown}
    assert listed | {"PAD", "POLICY", "TEACHER"} == set(scope_jax.__all__)
