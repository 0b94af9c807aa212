"""Says what a machine has and what state a run's workdir is in, and what to do about it.

    python -m scope_jax.doctor --workdir /tmp/run

Reads only. Nothing but the standard library is imported before it is known to be there, so that a
missing or broken package is a finding, too.
"""

import argparse
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

GIB = 2**30
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain")
PACKAGES += (
    "ml-collections",
    "chex",
    "safetensors",
    "math-verify",
    "tensorboardX",
    "rich",
    "numpy",
)
OPTIONAL = ("libtpu", "pyarrow", "matplotlib", "torch", "wandb", "trackio")
READ_BELOW = 2 * GIB  # arrays of a larger checkpoint are read only if asked for: it takes minutes
NEEDED_DISK = 3  # free room, in checkpoints of the size of the newest one
MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: str  # ok | note (may be meant so) | broken (a run would fail, or loses work)
    about: str  # packages, devices, host, workdir
    text: str
    todo: str = ""  # what to do next


def diagnose(
    workdir: pathlib.Path | None = None, *, read_arrays: bool = False
) -> tuple[dict[str, Any], list[Finding]]:
    """Returns (facts: {"versions", "devices", "host", "workdir"}, findings) of this machine.

    Args:
      workdir: of a training run; None leaves it out.
      read_arrays: of checkpoints above READ_BELOW, too.
    """
    facts: dict[str, Any] = {"versions": versions()}
    findings = list(check_packages(facts["versions"]))
    facts["devices"], found = find_devices()
    findings += found
    facts["host"] = host(workdir)
    findings += check_host(facts["host"])
    if workdir is not None:
        facts["workdir"], found = check_workdir(workdir, read_arrays=read_arrays)
        findings += found
    return facts, findings


# ------------------------------------------------------------------------------ packages, devices


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and the packages; None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("scope_jax", *PACKAGES, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_packages(found: dict[str, str | None]) -> Iterator[Finding]:
    """Compares versions with what scope_jax's own metadata asks for."""
    missing = [name for name in PACKAGES if found[name] is None]
    if missing:
        todo = f"{sys.executable} -m pip install {' '.join(missing)}"
        yield Finding("broken", "packages", f"missing: {', '.join(missing)}", todo)
    old = list(_too_old(found))
    if old:
        todo = (
            f"{sys.executable} -m pip install --upgrade {' '.join(repr(need) for _, need in old)}"
        )
        yield Finding("broken", "packages", "; ".join(text for text, _ in old), todo)
    if found["scope_jax"] is None:
        todo = "fine if PYTHONPATH is meant; else pip install -e . in the project's folder"
        yield Finding("note", "packages", "scope_jax itself is not installed", todo)
    if not missing and not old:
        yield Finding("ok", "packages", "all there, none too old")
    if found["libtpu"] is None:
        todo = "pip install 'scope_jax[aot]' to plan for TPUs, 'scope_jax[tpu]' on one"
        yield Finding("note", "packages", "libtpu is not installed: no scope_jax.plan", todo)


def _too_old(found: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """Returns (what is wrong, the requirement) of packages that scope_jax's metadata refuses."""
    try:
        from packaging.requirements import Requirement

        needs = [Requirement(text) for text in importlib.metadata.requires("scope_jax") or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return
    for need in needs:
        have = found.get(need.name)
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        if have and applies and not need.specifier.contains(have, prereleases=True):
            yield f"{need.name} {have} is not {need.specifier}", f"{need.name}{need.specifier}"


def find_devices() -> tuple[list[dict[str, Any]], list[Finding]]:
    """Returns (JAX's devices as {"id", "kind", "platform", "memory_gib", "used_gib"}, findings)."""
    try:
        import jax

        devices = jax.local_devices()
        shown = [_device(device) for device in devices]
    except Exception as error:  # whatever an import, a driver or a plugin raises
        todo = "check JAX_PLATFORMS, the driver, and that jax, jaxlib and its plugin fit together"
        return [], [Finding("broken", "devices", f"JAX finds no devices: {_line(error)}", todo)]
    kinds = {f"{device['platform']} {device['kind']}" for device in shown}
    text = f"{len(shown)} x {', '.join(sorted(kinds))}"
    findings = [Finding("ok", "devices", text)]
    if devices[0].platform == "cpu":
        idle = None
        if glob.glob("/dev/accel*"):
            idle = "a TPU", "tpu"
        elif shutil.which("nvidia-smi") and glob.glob("/dev/nvidia[0-9]*"):
            idle = "an NVIDIA GPU", "cuda"
        if not glob.glob("/dev/accel*") and importlib.util.find_spec("libtpu"):
            todo = "JAX_PLATFORMS=cpu stops that; scope_jax.plan works either way"
            text = "libtpu is installed and JAX finds no TPU: it may complain at every start"
            findings.append(Finding("note", "devices", text, todo))
        if idle:
            todo = f"pip install 'scope_jax[{idle[1]}]'; is JAX_PLATFORMS set to cpu?"
            text = f"the machine seems to have {idle[0]}, and JAX does not use it"
            findings.append(Finding("note", "devices", text, todo))
    return shown, findings


def _device(device) -> dict[str, Any]:
    stats = device.memory_stats() or {}  # a CPU has none
    gib = {name: stats[key] / GIB for name, key in _MEMORY.items() if key in stats}
    return {"id": device.id, "kind": device.device_kind, "platform": device.platform, **gib}


_MEMORY = {"memory_gib": "bytes_limit", "used_gib": "bytes_in_use"}


def host(workdir: pathlib.Path | None) -> dict[str, Any]:
    """Returns {"system", "cores", "ram_gib", "ram_free_gib", "disk", "disk_free_gib"}."""
    folder = pathlib.Path.cwd() if workdir is None else workdir.absolute()
    while not folder.exists():
        folder = folder.parent
    memory = {}
    if (info := pathlib.Path("/proc/meminfo")).exists():  # Linux only
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.MULTILINE))
        names = {"ram_gib": "MemTotal", "ram_free_gib": "MemAvailable"}
        memory = {name: int(sizes[key]) * 1024 / GIB for name, key in names.items() if key in sizes}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(folder).free / GIB
    return {"system": platform.platform(), "cores": cores, **memory} | {
        "disk": str(folder), "disk_free_gib": free,
    }  # fmt: skip


def check_host(found: dict[str, Any]) -> Iterator[Finding]:
    if found["disk_free_gib"] < 0.1:
        text = f"{found['disk']}: {found['disk_free_gib'] * 1024:.0f} MiB free"
        yield Finding("broken", "host", text, "make room: no checkpoint could be written")
    ram = f", {found['ram_free_gib']:.1f} of {found['ram_gib']:.1f} GiB RAM free"
    text = f"{found['cores']} cores{ram if 'ram_gib' in found else ''}"
    yield Finding("ok", "host", f"{text}, {found['disk_free_gib']:.1f} GiB of disk free")


# ------------------------------------------------------------------------------ a run's workdir


def check_workdir(
    workdir: pathlib.Path, *, read_arrays: bool = False
) -> tuple[dict[str, Any], list[Finding]]:
    """Returns ({"total_steps", "checkpoint_step", "last_step", ..}, findings) of a workdir."""
    facts: dict[str, Any] = {"path": str(workdir)}
    if not workdir.is_dir():
        text = f"{workdir} is no folder" if workdir.exists() else f"{workdir} does not exist"
        todo = "check --workdir: the folder that scope_jax.train was given"
        return facts, [Finding("broken", "workdir", text, todo)]
    findings = list(_unreadable(workdir))
    config, found = _read_config(workdir / "config.json")
    facts["method"], facts["total_steps"] = config.get("method"), config.get("total_steps")
    findings += found
    try:
        found = _check_checkpoints(workdir, facts, read_arrays)
    except Exception as error:  # an import, or a folder that Orbax makes nothing of
        todo = "another version of orbax-checkpoint wrote it, or a file is missing"
        text = f"checkpoints/ cannot be looked at: {_line(error)}"
        found = [Finding("broken", "workdir", text, todo)]
    findings += found
    findings += _check_metrics(workdir / "metrics.jsonl", facts)
    findings += _check_rollouts(workdir / "rollouts", facts)
    for name, what in (
        ("damaged_checkpoints", "checkpoints that a run found damaged and set aside; delete them"),
        ("non_finite", "batches of updates that were not finite and skipped; see their values"),
    ):
        if (workdir / name).is_dir() and (count := len(list((workdir / name).iterdir()))):
            findings.append(Finding("note", "workdir", f"{name}/ holds {count}", what))
    return facts, findings


def _unreadable(workdir: pathlib.Path) -> Iterator[Finding]:
    """Names what this user cannot read, or not write, in a workdir."""
    paths = [workdir, *workdir.rglob("*")]
    closed = [path for path in paths if not os.access(path, os.R_OK)]
    if closed:
        more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
        todo = f"chmod -R u+rwX {workdir}, or run as the user who trained there"
        yield Finding("broken", "workdir", f"{closed[0]}{more} cannot be read", todo)
    folders = [path for path in paths if path.is_dir() and not os.access(path, os.W_OK)]
    if folders:
        text = f"{folders[0]} cannot be written: the run could not go on"
        yield Finding("note", "workdir", text, "fine for reading; else change its owner or mode")


def _read_config(file: pathlib.Path) -> tuple[dict[str, Any], list[Finding]]:
    todo = "use the --workdir of a training run; a lost config.json can be copied from a like run"
    try:
        config = json.loads(file.read_text())
        total, model = config["total_steps"] + 0, config["model"]
        model = str(model if isinstance(model, str) else model["path"])  # train_prm's, train's
    except OSError as error:
        return {}, [Finding("broken", "workdir", f"config.json: {error.strerror}", todo)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text = f"config.json is not the config of a training run ({error!r})"
        return {}, [Finding("broken", "workdir", text, todo)]
    text = f"config.json: {config.get('method', 'train_prm')}, {total} steps of {model}"
    return config, [Finding("ok", "workdir", text)]


def _check_checkpoints(
    workdir: pathlib.Path, facts: dict[str, Any], read_arrays: bool
) -> list[Finding]:
    facts["checkpoint_step"] = None
    folder = workdir / "checkpoints"
    unfinished = sorted(folder.glob("*.orbax-checkpoint-tmp*"))
    findings = []
    if unfinished:
        text = f"{unfinished[0].name}: a save that is in progress, or was killed"
        findings.append(Finding("note", "workdir", text, "the next start clears it away"))
    if not folder.is_dir():
        text = "no checkpoints/: the run starts at step 0"
        return [*findings, Finding("note", "workdir", text)]
    from scope_jax.checkpoint import find_damage, folder_bytes

    found = find_damage(workdir, max_bytes=float("inf") if read_arrays else READ_BELOW)
    whole = next((step for step, damage in found.items() if not damage), None)
    goes_on = f"the same command goes on from step {whole}"
    for step, damage in found.items():
        if damage:
            todo = f"{goes_on} and sets it aside" if whole is not None else "restore it from a copy"
            text = f"checkpoints/{step} is damaged: {damage}"
            level = "note" if whole is not None else "broken"
            findings.append(Finding(level, "workdir", text, todo))
    if whole is None:
        if not found:
            text = "checkpoints/ holds no finished one: the run starts at step 0"
            findings.append(Finding("note", "workdir", text))
        return findings
    facts["checkpoint_step"], size = whole, folder_bytes(folder / str(whole))
    facts["checkpoint_gib"] = size / GIB
    read = "its arrays are those that were saved"
    if size > READ_BELOW and not read_arrays:
        read = f"its {size / GIB:.0f} GiB of arrays were not read; --read reads them"
    findings.append(Finding("ok", "workdir", f"checkpoint of step {whole}: {read}", goes_on))
    free = shutil.disk_usage(workdir).free
    if free < NEEDED_DISK * size:
        text = f"{free / GIB:.1f} GiB free, and a checkpoint takes {size / GIB:.1f}"
        findings.append(Finding("note", "workdir", text, "make room, or lower checkpoint.keep"))
    return findings


def _check_metrics(file: pathlib.Path, facts: dict[str, Any]) -> Iterator[Finding]:
    facts["last_step"] = None
    if not file.is_file():
        yield Finding("note", "workdir", "no metrics.jsonl: no step has ended yet")
        return
    rows, bad = _json_lines(file)
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    trained = [row["step"] for row in rows if "step" in row and "eval/k" not in row]
    for number in bad[:3]:
        text = f"metrics.jsonl, line {number} is no JSON object"
        yield Finding("note", "workdir", text, "torn by a kill; the next start drops it")
    if not steps:
        yield Finding("note", "workdir", "metrics.jsonl holds no step yet")
        return
    facts["last_step"], whole = max(steps), facts["checkpoint_step"] or 0
    total = facts["total_steps"]
    done = "finished" if total and max(steps) >= total else "not finished"
    todo = ""
    if whole < max(steps):
        todo = f"steps {whole + 1} to {max(steps)} are in no checkpoint: they are done again"
    elif done == "finished":
        todo = "raise --config.total_steps to prolong it"
    text = f"metrics.jsonl: step {max(steps)} of {total}, {done}, {len(trained)} lines of training"
    yield Finding("note" if whole < max(steps) else "ok", "workdir", text, todo)
    skipped = sum(bool(row.get("skipped")) for row in rows)
    if skipped:
        todo = "see non_finite/; lower the learning rate, or the dtype is too short"
        yield Finding("note", "workdir", f"{skipped} updates were not finite", todo)


def _check_rollouts(folder: pathlib.Path, facts: dict[str, Any]) -> Iterator[Finding]:
    files = sorted(folder.glob("step_*.jsonl"))
    facts["rollout_files"] = len(files)
    for file in files:
        if bad := _json_lines(file)[1]:
            text = f"rollouts/{file.name}, line {bad[0]} is no JSON object"
            yield Finding("note", "workdir", text, "delete the file; nothing but a report needs it")


def _json_lines(file: pathlib.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns (the objects of a file's lines, the numbers of lines that are none)."""
    rows, bad = [], []
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:  # `_unreadable` names it
        return rows, bad
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        rows.append(row) if isinstance(row, dict) else bad.append(number)
    return rows, bad


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ------------------------------------------------------------------------------ the command


def show(facts: dict[str, Any], findings: list[Finding]) -> str:
    """Returns facts and findings as text for a terminal; nothing in it can move the cursor."""
    there = [f"{name} {version}" for name, version in facts["versions"].items() if version]
    lines = ["versions  " + ", ".join(there)]
    for device in facts["devices"]:
        used = f"{device.get('used_gib', 0):.1f} of {device.get('memory_gib', 0):.1f} GiB in use"
        memory = used if "memory_gib" in device else "the host's memory"
        lines.append(f"device    {device['id']}: {device['platform']} {device['kind']}, {memory}")
    lines.append(f"host      {facts['host']['system']}")
    for finding in findings:
        lines.append(f"{MARKS[finding.level]:8}  {finding.about}: {finding.text}")
        if finding.todo:
            lines.append(f"{'':10}-> {finding.todo}")
    clean = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "\n".join(clean)


def main(argv: list[str] | None = None) -> int:
    """Prints what it finds; returns 1 if something is broken, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.doctor",
        description="Looks at versions, devices, memory, disk and a run's workdir, and says what "
        "to do next. Changes nothing. Ends with 1 if something is broken, else with 0.",
        epilog="example: python -m scope_jax.doctor --workdir /tmp/run",
    )
    parser.add_argument("--workdir", type=pathlib.Path, help="of a training run")
    parser.add_argument("--read", action="store_true", help="the arrays of large checkpoints, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(argv)
    _hush()
    facts, findings = diagnose(args.workdir, read_arrays=args.read)
    broken = any(finding.level == "broken" for finding in findings)
    if args.json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ok": not broken, **facts, "findings": listed}))
    else:
        print(show(facts, findings))
    return int(broken)


def _hush() -> None:
    """Keeps libtpu and Orbax from logging between the lines."""
    import logging

    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
