"""Builds sdist and wheel, checks what is in them, installs the wheel far from the source tree and
trains two steps with it.

    python experiments/check_dist.py --out dist [--tag v0.1.0]

Needs `build` (in the dev extra) and an index to install the wheel's dependencies from. The last
line of stdout is one JSON object.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
JUNK = ("__pycache__", ".pyc", ".venv", ".cache", ".ci/", ".git/", ".hypothesis")
MAX_BYTES = 10 << 20  # of either; the task models are 2 MiB


def build(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns (sdist, wheel); the wheel is built from the sdist, so the sdist must be complete."""
    before = set(out.glob("*")) if out.is_dir() else set()
    if before:
        sys.exit(f"error: {out} holds files: give --out a new folder")
    run(sys.executable, "-m", "build", "--outdir", str(out.absolute()), str(ROOT))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def tracked(*folders: str) -> list[str]:
    """Returns the paths that git tracks below folders of the source tree."""
    listed = run("git", "-C", str(ROOT), "ls-files", "--", *folders, capture=True)
    return listed.splitlines()


def check_wheel(wheel: pathlib.Path) -> int:
    """Checks that all code, task models and configs are in a wheel, and nothing else."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    wanted = set(tracked("scope_jax"))
    wanted |= {f"scope_jax/{name}" for name in tracked("configs")}
    check_names(wheel, wanted, names)
    rest = sorted(name for name in names - wanted if ".dist-info/" not in name)
    if rest:
        sys.exit(
            f"error: {wheel.name} holds {rest[0]} ({len(rest)} such), which git does not track"
        )
    return len(names)


def check_sdist(sdist: pathlib.Path) -> int:
    """Checks that what git tracks is in an sdist (.ci apart)."""
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {name for name in tracked(".") if not name.startswith((".ci/", ".git"))}
    check_names(sdist, wanted, names)
    return len(names)


def check_names(file: pathlib.Path, wanted: set[str], names: set[str]) -> None:
    if lost := sorted(wanted - names):
        sys.exit(f"error: {file.name} lacks {lost[0]} ({len(lost)} such)")
    if junk := sorted(name for name in names if any(part in name for part in JUNK)):
        sys.exit(f"error: {file.name} holds {junk[0]} ({len(junk)} such)")
    if file.stat().st_size > MAX_BYTES:
        sys.exit(f"error: {file.name} has {file.stat().st_size} bytes, more than {MAX_BYTES}")


def check_tag(wheel: pathlib.Path, tag: str) -> None:
    version = wheel.name.split("-")[1]
    if tag != f"v{version}":
        sys.exit(f"error: tag {tag}, but the wheel is of version {version}")


def try_wheel(wheel: pathlib.Path) -> dict:
    """Installs a wheel into a fresh virtual environment and uses it from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        venv.create(home / "venv", with_pip=True)
        python = str(home / "venv" / "bin" / "python")
        run(python, "-m", "pip", "install", "--quiet", str(wheel.absolute()))
        (home / "elsewhere").mkdir()
        where = "import scope_jax; print(scope_jax.__file__, scope_jax.__version__)"
        found, version = run(python, "-c", where, cwd=home / "elsewhere", capture=True).split()
        if not found.startswith(str(home)):
            sys.exit(f"error: scope_jax was imported from {found}")
        train = "-m scope_jax.train --config worksheet --workdir run --config.total_steps=2 "
        train += "--config.eval.problems=16"
        run(python, *train.split(), cwd=home / "elsewhere")
        run(python, *"-m scope_jax.doctor --workdir run".split(), cwd=home / "elsewhere")
        lines = (home / "elsewhere" / "run" / "metrics.jsonl").read_text().splitlines()
        return {"version": version, "steps": json.loads(lines[-1])["step"]}


def run(*command: str, cwd: pathlib.Path | None = None, capture: bool = False) -> str:
    """Runs a command without the caller's PYTHONPATH; ends with its code if that is not 0."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    out = subprocess.PIPE if capture else sys.stderr
    done = subprocess.run(command, cwd=cwd, env=clean, stdout=out, text=True)
    if done.returncode:
        print(f"error: {' '.join(command)} ended with {done.returncode}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="new folder for both files")
    parser.add_argument("--tag", help="of git, which must be the version with a v before it")
    args = parser.parse_args()
    sdist, wheel = build(args.out)
    if args.tag:
        check_tag(wheel, args.tag)
    counts = {"sdist_files": check_sdist(sdist), "wheel_files": check_wheel(wheel)}
    sizes = {"sdist_bytes": sdist.stat().st_size, "wheel_bytes": wheel.stat().st_size}
    print(json.dumps({"wheel": wheel.name, **counts, **sizes, **try_wheel(wheel)}))


if __name__ == "__main__":
    main()
