"""experiments/chaos.py in small: three kills, one of them during a save, change no bit."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_three_kills_change_no_bit_and_lose_no_more_than_the_save_interval(tmp_path):
    options = "--kills 3 --steps 9 --every 2 --config worksheet:n=3,runlocal --no-bad-inputs"
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "chaos.py"), *options.split()]
        + ["--workdir", str(tmp_path / "chaos")],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bit_equal"], result["differences"]
    assert result["kills"] == result["restarts"] == 3 and result["killed_while_saving"] >= 1
    assert result["most_lost"] <= result["save_interval"] and result["hangs"] == 0
