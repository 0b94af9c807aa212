#!/usr/bin/env bash
# A newcomer's walk through the README, in a fresh virtual environment and a copy of what git has:
# install, demo, report, tests, a notebook, an import-only snippet. Each line says what passed.
#
#     experiments/newcomer.sh [--full] [--strict]
#
# --full runs all tests, as CI does (default: those of the first minute); --strict fails where the report, chromium
# or a notebook's kernel is missing (default: says so and goes on). PYTHON names another interpreter.
set -euo pipefail

full=false strict=false
for argument in "$@"; do
  case "$argument" in
    --full) full=true ;;
    --strict) strict=true ;;
    *) echo "usage: experiments/newcomer.sh [--full] [--strict]" >&2; exit 2 ;;
  esac
done

root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
unset PYTHONPATH VIRTUAL_ENV XLA_FLAGS JAX_PLATFORMS

passed() { echo "PASSED  $1"; }
missing() {
  echo "MISSING $1" >&2
  if $strict; then exit 1; fi
}
# The command in the README's code blocks that matches a pattern; fails if there is not exactly one.
from_readme() {
  local found
  found=$(grep -E "^$1" README.md) || { echo "README has no line ^$1" >&2; return 1; }
  [ "$(wc -l <<<"$found")" = 1 ] || { echo "README has several lines ^$1" >&2; return 1; }
  echo "$found"
}

mkdir "$home/project"
git -C "$root" ls-files -z | (cd "$root" && xargs -0 -r tar -cf - --ignore-failed-read) | tar -xf - -C "$home/project"
cd "$home/project"

# 1. Install and demo: the README's one command.
command=$(from_readme 'python3\.11 -m venv .*scope_jax\.train')
command=${command//\/tmp\/worksheet/$home/worksheet}
command=${command//python3.11/${PYTHON:-python3.11}}
echo "+ $command"
bash -euo pipefail -c "$command" | tee "$home/demo.log"
.venv/bin/python - "$home/worksheet" <<'PYTHON'
import json, pathlib, sys

lines = pathlib.Path(sys.argv[1], "metrics.jsonl").read_text().splitlines()
found = [row["eval/pass@1"] for row in map(json.loads, lines) if "eval/pass@1" in row]
assert found[-1] > found[0] + 0.2, found  # the README's table: 0.068 -> 0.559
print(f"pass@1 {found[0]:.3f} -> {found[-1]:.3f}")
PYTHON
passed "install and demo"

# 2. What the doctor says of that run.
.venv/bin/python -m scope_jax.doctor --workdir "$home/worksheet"
passed "doctor"

# 3. The report, in a real browser: it loads, and asks nothing of any network.
if ! .venv/bin/python -c 'import scope_jax.report' 2>/dev/null; then
  missing "report: this version has no scope_jax.report"
elif ! browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome); then
  missing "report: no chromium on this machine"
else
  .venv/bin/python -m scope_jax.report --workdir "$home/worksheet"
  "$browser" --headless --no-sandbox --disable-gpu --enable-logging=stderr --user-data-dir="$home/browser" --host-resolver-rules="MAP * ~NOTFOUND" \
    --virtual-time-budget=10000 --screenshot="$home/report.png" --dump-dom "file://$home/worksheet/report.html" \
    >"$home/report.dom" 2>"$home/browser.log"
  grep -qi "<svg\|<canvas" "$home/report.dom" || { echo "the report shows no curve" >&2; exit 1; }
  if grep -E "CONSOLE.*(Uncaught|ERR_)" "$home/browser.log"; then exit 1; fi
  passed "report in $(basename "$browser")"
fi

# 4. Tests: the README's command, or a part of it.
.venv/bin/pip install --quiet -e '.[dev]'
tests=$(from_readme '\.venv/bin/pytest')
if $full; then
  bash -euo pipefail -c "$tests"
else
  bash -euo pipefail -c "$tests -n 0 tests/test_doctor.py tests/test_configlib.py tests/test_locate.py tests/test_notebooks.py"
fi
passed "tests$($full || echo ' (a part; --full for all)')"

# 5. A notebook, executed as a reader would.
if .venv/bin/python -c 'import nbclient, ipykernel' 2>/dev/null; then
  .venv/bin/python -m pytest -q -m slow -n 0 tests/test_notebooks.py -k 3_pieces
  passed "notebook"
else
  missing "notebook: nbclient or ipykernel is not installed"
fi

# 6. The README's import-only snippet, from an empty folder; its comments say what is printed.
.venv/bin/python - README.md "$home/snippet.py" <<'PYTHON'
import pathlib, re, sys

blocks = re.findall(r"```python\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), re.DOTALL)
(snippet,) = [block for block in blocks if "import first_error_step" in block]
pathlib.Path(sys.argv[2]).write_text(snippet)
PYTHON
mkdir "$home/empty"
(cd "$home/empty" && "$home/project/.venv/bin/python" "$home/snippet.py") >"$home/printed"
sed -n 's/^print.*# *//p' "$home/snippet.py" | diff -b - <(sed 's/  */ /g' "$home/printed")
passed "import-only snippet"
echo "the newcomer's walk passed"
