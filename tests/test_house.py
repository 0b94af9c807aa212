"""The rules of the house that a reader would otherwise have to check by eye."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "scope_jax"

FLOORS = [
    ["records", "methods", "configlib", "watchman", "units"],
    [
        "hosts",
        "sharding",
        "steps",
        "prm_formats",
        "locate",
        "splicing",
        "credit",
        "losses",
        "diversity",
        "answers",
        "answer_forms",
        "answer_worker",
    ]
    + ["calibration", "drawing", "packing", "stopping", "hardware", "hlo", "models.int8"],
    ["models", "models.attention", "models.kv_cache", "models.transformer", "models.decoding"]
    + ["models.lora", "models.safetensors_files", "models.hf", "models.flops", "models.published"],
    ["data", "step_labels", "tasks", "tasks.worksheet", "tasks.ledger", "alignment"]
    + ["tasks.math_problems", "sampling", "rewards", "prm", "scorers", "endpoint", "teachers"]
    + ["stepwise", "refill", "update", "checkpoint", "metrics", "report", "preemption", "checks"],
    ["roles", "run", "evaluate", "evaluate_prm", "evaluate_sets", "benchmark", "benchmark_report"]
    + ["export", "monte_carlo", "train_prm"]
    + ["pretrain", "pretrain_texts", "prepare_data", "programs", "plan", "doctor"],
    ["train"],
]
# Within a floor: the config loader reads methods, tasks read files, evaluation shares roles.
SAME_FLOOR = {
    ("configlib", "methods"), ("configlib", "records"), ("losses", "sharding"),
    ("answer_forms", "answers"),
    ("run", "roles"), ("run", "monte_carlo"), ("teachers", "alignment"),
    ("models.transformer", "models.kv_cache"), ("models.transformer", "models.attention"),
    ("models.transformer", "models.lora"), ("models.hf", "models.lora"),
    ("models.hf", "models.transformer"), ("models.decoding", "models.transformer"),
    ("models.decoding", "models.kv_cache"),
    ("models.hf", "models.safetensors_files"), ("prm_formats", "steps"), ("stopping", "steps"),
    ("tasks.math_problems", "data"), ("tasks.math_problems", "rewards"), ("step_labels", "data"),
    ("teachers", "endpoint"), ("metrics", "report"),
    ("hlo", "hardware"), ("models.flops", "models.transformer"),
    ("plan", "programs"), ("plan", "roles"), ("evaluate", "roles"),
    ("evaluate", "evaluate_prm"), ("evaluate", "evaluate_sets"), ("evaluate", "benchmark"),
    ("evaluate", "benchmark_report"), ("evaluate_sets", "benchmark"), ("evaluate_sets", "roles"),
    ("benchmark_report", "benchmark"), ("train_prm", "monte_carlo"), ("pretrain", "pretrain_texts"),
}  # fmt: skip


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: pathlib.Path) -> set[str]:
    """Names of the package's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scope_jax"):
            base = node.module.removeprefix("scope_jax").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if (PACKAGE / f"{name.replace('.', '/')}.py").exists() else base)
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("scope_jax.") for a in node.names if "scope_jax" in a.name
            }
    return found


def test_imports_point_down_the_floors():
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        if name == "__init__":
            continue
        assert name in level, f"{path} stands on no floor: add it to DESIGN's table and to FLOORS"
        for other in imported(path):
            down = level[other] < level[name] or (name, other) in SAME_FLOOR
            assert down, f"{name} (floor {level[name]}) imports {other} (floor {level[other]})"


def test_only_the_top_knows_ml_collections():
    allowed = {"configlib", "run", "methods", "roles", "evaluate", "plan", "train"}
    users = {module_name(p) for p in PACKAGE.rglob("*.py") if "ml_collections" in p.read_text()}
    assert users <= allowed


def test_the_loop_fits_a_sitting_and_functions_a_screen():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 300
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "default_config":
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 85, f"{path}: {node.name} has {length} lines"


def test_ci_runs_exactly_the_readmes_test_command():
    commands = re.findall(r"^\.venv/bin/pytest.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("name", [n for floor in FLOORS for n in floor if "." not in n])
def test_the_readmes_table_names_every_module(name):
    assert f"`{name}" in (ROOT / "README.md").read_text(), (
        f"{name} is missing in the README's table"
    )


def test_no_pickle_eval_or_shell():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "os.system"}, f"{path}:{node.lineno}"
                assert not called.startswith("pickle."), f"{path}:{node.lineno}"
                shell = [k for k in node.keywords if k.arg == "shell"]
                assert not shell, f"{path}:{node.lineno}"
