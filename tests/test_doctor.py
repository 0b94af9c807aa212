"""The first minute: what an import loads, what commands say of themselves, what the doctor sees."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import pytest

import scope_jax
from scope_jax import checkpoint, doctor
from scope_jax.configlib import read_command, shipped_configs
from scope_jax.records import TrainState

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = (
    "train",
    "evaluate",
    "plan",
    "pretrain",
    "train_prm",
    "prepare_data",
    "export",
    "report",
)
COMMANDS += ("report", "doctor")
HEAVY = ("transformers", "pyarrow", "math_verify", "tensorboardX", "grain", "orbax")


def fresh(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------ imports


def test_the_contract_loads_nothing_heavy():
    """Neither the package nor all of its names; and the package alone not even JAX."""
    told = fresh(
        "import sys, scope_jax\n"
        "print('jax' in sys.modules)\n"
        "from scope_jax import *\n"
        f"print([name for name in {HEAVY} if name in sys.modules], callable(verify))"
    )
    assert told.stdout.split("\n")[:2] == ["False", "[] True"], told.stderr


def test_the_names_of_checkers_and_of_the_program_are_the_same():
    tree = ast.parse(pathlib.Path(scope_jax.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    homes = {
        alias.name: node.module.removeprefix("scope_jax.")
        for node in imports
        if node.module and node.module.startswith("scope_jax.")
        for alias in node.names
    }
    assert homes == scope_jax._HOMES
    assert sorted(homes) == sorted(scope_jax.__all__)
    assert set(scope_jax.__all__) <= set(dir(scope_jax))
    for name, home in homes.items():
        module = importlib.import_module(f"scope_jax.{home}")
        assert getattr(scope_jax, name) is getattr(module, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        _ = scope_jax.genrate  # pyright: ignore
    assert scope_jax.sampling.generate is scope_jax.generate


# ------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_of_its_own_flags(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"scope_jax.{command}").main(["--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    options, _, example = told.rpartition(f"example: python -m scope_jax.{command} ")
    flags = [word for word in example.split() if word.startswith("--")]
    assert flags
    for flag in flags:
        assert flag.startswith("--config.") or flag.partition("=")[0] in options


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_a_command_without_arguments_shows_what_to_type(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"scope_jax.{command}").main([])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"example: python -m scope_jax.{command} --" in told
    assert f"python -m scope_jax.{command} --help" in told
    lines = told.split("\n")
    shown = [line.split()[1] for line in lines if line.startswith("  --config ")]
    assert shown == (list(shipped_configs()) if command in ("train", "plan", "evaluate") else [])
    assert all(len(line.split()) > 4 for line in lines if line.startswith("  --config "))


def test_the_process_arguments_are_read_where_none_are_given(monkeypatch):
    parser = doctor.argparse.ArgumentParser(description="d", epilog="e")
    parser.add_argument("--config")
    monkeypatch.setattr(sys, "argv", ["command", "--config", "worksheet", "--config.seed=1"])
    args, overrides = read_command(parser, None)
    assert (args.config, overrides) == ("worksheet", ["--config.seed=1"])


# ------------------------------------------------------------------------------ the wheel, the walk


@pytest.fixture(scope="module")
def check_dist():
    spec = importlib.util.spec_from_file_location(
        "check_dist", ROOT / "experiments" / "check_dist.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder, names):
    wheel = folder / "scope_jax-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*names, "scope_jax-0.1.0.dist-info/METADATA"):
            file.writestr(name, "x")
    return wheel


def test_a_wheel_without_a_config_or_with_junk_is_refused(check_dist, tmp_path, monkeypatch):
    listed = {"scope_jax": ["scope_jax/a.py"], "configs": ["configs/worksheet.py"]}
    monkeypatch.setattr(check_dist, "tracked", lambda folder: listed[folder])
    whole = ["scope_jax/a.py", "scope_jax/configs/worksheet.py"]
    assert check_dist.check_wheel(make_wheel(tmp_path, whole)) == 3
    for names, said in [
        (whole[:1], "lacks scope_jax/configs/worksheet.py"),
        ([*whole, "scope_jax/__pycache__/a.pyc"], "holds scope_jax/__pycache__/a.pyc"),
        ([*whole, "scope_jax/notes.txt"], "holds scope_jax/notes.txt (1 such), which git"),
    ]:
        with pytest.raises(SystemExit, match=re.escape(said)):
            check_dist.check_wheel(make_wheel(tmp_path, names))
    check_dist.check_tag(make_wheel(tmp_path, whole), "v0.1.0")
    with pytest.raises(SystemExit, match="tag v0.2.0, but the wheel is of version 0.1.0"):
        check_dist.check_tag(make_wheel(tmp_path, whole), "v0.2.0")


def test_the_release_publishes_what_was_checked_and_holds_no_secret():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "python experiments/check_dist.py --out dist" in text and "needs: build" in text
    assert text.count("id-token: write") == 1 and "secrets." not in text
    assert "NEVER RUN" in text


def test_the_newcomers_walk_finds_its_commands_in_the_readme():
    script = ROOT / "experiments" / "newcomer.sh"
    subprocess.run(["bash", "-n", script], check=True)
    patterns = re.findall(r"from_readme '(.*)'", script.read_text())
    assert len(patterns) == 2
    for pattern in patterns:
        assert len(re.findall(f"^{pattern}", (ROOT / "README.md").read_text(), re.MULTILINE)) == 1


# ------------------------------------------------------------------------------ the doctor


@pytest.fixture
def workdir(tmp_path):
    """A run of 6 steps with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"model": {"path": "m", "dtype": "float32"}, "total_steps": 6, "method": "scope"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": step, "reward": 0.5} for step in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "step_000001.jsonl").write_text('{"step": 1}\n')
    manager = checkpoint.open_checkpoints(folder, keep=3)
    for step in (2, 4, 6):
        params = {"w": jnp.arange(4096.0) + step, "b": jnp.ones(3, jnp.bfloat16)}
        checkpoint.save(manager, step, TrainState(params, {"m": params}, jnp.int32(step)), {})
    checkpoint.settle(manager)
    manager.close()
    return folder


def seen(folder):
    facts, findings = doctor.check_workdir(folder)
    return facts, [finding for finding in findings if finding.level != "ok"]


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def spoil(folder, step):
    """Changes bytes in the middle of a checkpoint's largest file of arrays."""
    files = (path for path in (folder / "checkpoints" / str(step)).rglob("d/*") if path.is_file())
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64 * [0x5A])
    file.write_bytes(content)


def test_a_finished_run_is_well_and_left_as_it_is(workdir):
    before = files_of(workdir)
    facts, findings = seen(workdir)
    assert (facts["checkpoint_step"], facts["last_step"], facts["total_steps"]) == (6, 6, 6)
    assert findings == []
    assert files_of(workdir) == before


def test_a_damaged_checkpoint_is_named_with_the_step_to_go_on_from(workdir):
    spoil(workdir, 6)
    before = files_of(workdir)
    facts, (damaged, behind) = seen(workdir)
    assert facts["checkpoint_step"] == 4
    assert damaged.level == "note" and damaged.text.startswith("checkpoints/6 is damaged: ")
    assert "goes on from step 4" in damaged.todo
    assert behind.todo.startswith("steps 5 to 6 are in no checkpoint")
    assert files_of(workdir) == before


def test_no_whole_checkpoint_left_is_broken(workdir):
    for step in (2, 4, 6):
        spoil(workdir, step)
    facts, findings = seen(workdir)
    assert facts["checkpoint_step"] is None
    assert [f.text[:13] for f in findings if f.level == "broken"] == [
        "checkpoints/6",
        "checkpoints/4",
        "checkpoints/2",
    ]


def test_arrays_of_large_checkpoints_are_read_only_if_asked_for(workdir, monkeypatch):
    monkeypatch.setattr(doctor, "READ_BELOW", 100)
    spoil(workdir, 6)
    assert doctor.check_workdir(workdir)[0]["checkpoint_step"] == 6
    assert doctor.check_workdir(workdir, read_arrays=True)[0]["checkpoint_step"] == 4


def test_what_a_kill_leaves_behind(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    (workdir / "checkpoints" / "8.orbax-checkpoint-tmp-1").mkdir()
    (workdir / "rollouts" / "step_000007.jsonl").write_text('{"step": 7}\n{"step')
    _, findings = seen(workdir)
    assert {f.level for f in findings} == {"note"}
    texts = sorted(f.text.partition(":")[0] for f in findings)
    assert texts == [
        "8.orbax-checkpoint-tmp-1",
        "metrics.jsonl, line 7 is no JSON object",
        "rollouts/step_000007.jsonl, line 2 is no JSON object",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not the config of a training run"),
        ('{"model": {}, "total_steps": 3}', "KeyError"),
        ("[" * 100_000, "not the config of a training run"),
        (None, "No such file"),
    ],
)
def test_a_config_that_is_none_is_broken(workdir, text, said):
    file = workdir / "config.json"
    file.unlink() if text is None else file.write_text(text)
    (finding,) = [f for f in seen(workdir)[1] if f.level == "broken"]
    assert finding.text.startswith("config.json") and said in finding.text
    assert finding.todo


def test_hostile_metrics_break_nothing(workdir):
    lines = ["[" * 100_000, '{"step": "six"}', "null", '{"step": 1e999}', "\x00\x1b[2J", "7"]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    facts, findings = seen(workdir)
    assert facts["last_step"] is None
    assert all(f.level == "note" for f in findings)
    evil = doctor.Finding("note", "workdir", "a\x1b[2Jb", "c\rd")
    bare = {"versions": {}, "devices": [], "host": {"system": "s"}}
    assert "a?[2Jb" in doctor.show(bare, [evil]) and "c?d" in doctor.show(bare, [evil])


def test_a_file_without_rights_is_named(workdir, monkeypatch):
    file = workdir / "rollouts" / "step_000001.jsonl"
    monkeypatch.setattr(doctor.os, "access", lambda path, _: path != file)  # root may read all
    (finding,) = [f for f in seen(workdir)[1] if f.level == "broken"]
    assert str(file) in finding.text and "chmod" in finding.todo


def test_a_missing_and_an_old_package_are_broken_and_say_what_to_install(monkeypatch):
    found = dict.fromkeys((*doctor.PACKAGES, *doctor.OPTIONAL), "999") | {"scope_jax": "0.1.0"}
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["jax>=0.10", "torch>=2; extra == 'x'"]
    )
    good = list(doctor.check_packages(found))
    assert [f.level for f in good] == ["ok"]
    bad = list(doctor.check_packages(found | {"jax": "0.9.1", "flax": None, "torch": "1.0"}))
    assert [f.level for f in bad] == ["broken", "broken"]
    assert bad[0].text == "missing: flax" and bad[0].todo.endswith("pip install flax")
    assert bad[1].text == "jax 0.9.1 is not >=0.10"
    assert bad[1].todo.endswith("pip install --upgrade 'jax>=0.10'")


def test_it_imports_only_the_standard_library_so_that_it_runs_where_jax_is_broken():
    imports = [node for node in ast.parse(inspect.getsource(doctor)).body]
    names = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in imports if isinstance(node, ast.Import) for a in node.names}
    assert {str(name).partition(".")[0] for name in names} <= sys.stdlib_module_names
    told = fresh(
        "import sys; sys.modules['jax'] = None\n"
        "from scope_jax import doctor; sys.exit(doctor.main([]))"
    )
    assert told.returncode == 1, told.stderr
    assert "BROKEN    devices: JAX finds no devices: import of jax halted" in told.stdout


def test_the_command_ends_with_1_only_if_something_is_broken(workdir, capsys):
    assert doctor.main(["--workdir", str(workdir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["workdir"]["checkpoint_step"] == 6
    assert report["versions"]["jax"] == jax.__version__
    assert len(report["devices"]) == jax.local_device_count()
    levels = {"level", "about", "text", "todo"}
    assert all(set(finding) == levels for finding in report["findings"])
    assert levels == {field.name for field in dataclasses.fields(doctor.Finding)}
    assert doctor.main(["--workdir", str(workdir / "nowhere")]) == 1
    assert "BROKEN    workdir: " in capsys.readouterr().out
