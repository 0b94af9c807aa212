"""Tests of the export command: from a workdir's checkpoint to a model directory."""

import ast
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import scope_jax.export
from scope_jax import checkpoint, load_hf
from scope_jax.export import main
from scope_jax.models.hf import load_tokenizer
from scope_jax.sharding import make_mesh
from scope_jax.update import init_state

SOURCE = pathlib.Path(__file__).parents[1] / "scope_jax" / "tasks" / "worksheet_models" / "policy"
MESH = {"data": 2, "fsdp": 4, "model": 1}  # 223 vocabulary entries do not split


def trained(params, step):
    return jax.tree.map(lambda x: x + step, params)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that saved its steps 2 and 5, of a model with a generation_config.json."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(SOURCE, folder / "source")
    (folder / "source" / "generation_config.json").write_text('{"temperature": 0.25}')
    config = {
        "model": {"path": str(folder / "source"), "dtype": "float32", "remat": "none"},
        "mesh": MESH,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _, params = load_hf(SOURCE, mesh=make_mesh(**MESH), dtype="float32")
    manager = checkpoint.open_checkpoints(folder)
    for step in (2, 5):
        state = init_state(optax.adamw(1e-3), trained(params, step), step=step)
        checkpoint.save(manager, step, state, {"next_index": 0})
    manager.close()
    return folder


def export(workdir, out, *more):
    return main(["--workdir", str(workdir), "--out", str(out), *more])


def refusal(capsys, *arguments):
    assert export(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def assert_holds(out, step, dtype):
    """Checks a model directory against the source's weights plus `step`."""
    model, params = load_hf(out)
    source, start = load_hf(SOURCE, dtype="float32")
    want = jax.tree.map(lambda x: np.asarray((x + step).astype(dtype)), start)
    assert model.config.dtype == dtype
    assert {**vars(model.config), "dtype": ""} == {**vars(source.config), "dtype": ""}
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_newest_checkpoint_becomes_a_model_directory(workdir, tmp_path, capsys):
    assert export(workdir, tmp_path / "out") == 0
    assert f"wrote {tmp_path / 'out'}: " in capsys.readouterr().out
    assert_holds(tmp_path / "out", 5, "float32")
    tokenizer, ends = load_tokenizer(tmp_path / "out")
    want, want_ends = load_tokenizer(SOURCE)
    assert tokenizer.get_vocab() == want.get_vocab() and ends == want_ends
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.25}


def test_older_checkpoint_is_written_rounded(workdir, tmp_path):
    assert export(workdir, tmp_path, "--step", "2", "--dtype", "bfloat16") == 0
    assert_holds(tmp_path, 2, "bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {np.dtype(jnp.bfloat16)}


def test_second_export_replaces_the_first(workdir, tmp_path):
    assert export(workdir, tmp_path, "--step", "2") == 0
    assert export(workdir, tmp_path) == 0
    assert_holds(tmp_path, 5, "float32")


def test_run_of_a_larger_machine_is_exported_too(workdir, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(workdir, other)
    config = json.loads((other / "config.json").read_text())
    config["mesh"] = {"data": 1, "fsdp": 16, "model": 4}
    (other / "config.json").write_text(json.dumps(config))
    assert export(other, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", 5, "float32")


def test_more_end_tokens_than_the_tokenizer_s_stay(workdir, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(workdir, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["path"] = str(other / "source")
    (other / "config.json").write_text(json.dumps(config))
    source = json.loads((other / "source" / "config.json").read_text())
    (other / "source" / "config.json").write_text(json.dumps({**source, "eos_token_id": [1, 3]}))
    assert export(other, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 3]


def test_step_that_was_not_kept_is_named_with_those_that_were(workdir, tmp_path, capsys):
    error = refusal(capsys, workdir, tmp_path / "out", "--step", "3")
    assert "holds no step 3; it holds 2, 5" in error
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_workdir_is_named(workdir, tmp_path, capsys):
    error = refusal(capsys, tmp_path, tmp_path / "out")
    assert f"{tmp_path / 'config.json'} is missing: --workdir must name" in error
    for content in ("{", "[]", "{}", '{"model": {"path": "x"}}', '{"model": 3, "mesh": {}}'):
        (tmp_path / "config.json").write_text(content)
        assert "is not the config of a training run" in refusal(capsys, tmp_path, tmp_path / "out")
    shutil.copy(workdir / "config.json", tmp_path)
    assert "holds no checkpoints/" in refusal(capsys, tmp_path, tmp_path / "out")


def test_only_model_directories_are_written_over(workdir, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and no model directory" in refusal(capsys, workdir, tmp_path)
    assert "is a file" in refusal(capsys, workdir, tmp_path / "notes.txt")
    assert "is not empty and no model directory" in refusal(capsys, workdir, workdir)
    assert "the model that the run started from" in refusal(capsys, workdir, workdir / "source")
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt"}
    assert_holds(workdir / "source", 0, str(load_hf(SOURCE)[1]["embed"].dtype))


def test_command_helps_with_an_example():
    command = [sys.executable, "-m", "scope_jax.export", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "example: python -m scope_jax.export --workdir" in " ".join(text.split())


def test_export_imports_no_config_library_itself():
    tree = ast.parse(pathlib.Path(scope_jax.export.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "scope_jax.checkpoint" in names and not any("ml_collections" in name for name in names)


def test_stretched_positions_are_in_the_exported_config(workdir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"] |= {"rope_theta": 40000.0, "max_position": 1024}
    (copy / "config.json").write_text(json.dumps(config))
    assert export(copy, tmp_path / "out") == 0
    model, _ = load_hf(tmp_path / "out")
    assert (model.config.rope_theta, model.config.max_position) == (40000.0, 1024)
