"""How large a long run's report is, and how soon a browser has it.

    python experiments/report_size.py            # 200 steps, 5,000 rollouts of 200 to 400 tokens

Makes a workdir of random words, scores and log-probs (which pack worse than a model's), writes its
report and opens it in a headless Chromium from an empty profile. The last line is one JSON object.
"""

import argparse
import json
import pathlib
import random
import tempfile
import time

from playwright.sync_api import sync_playwright
from screenshots import FLAGS

from scope_jax.records import POLICY, TEACHER
from scope_jax.report import write_report

WORDS = "so the sum of all terms is x then we have y and z = a + b thus 12 34 576 / 9 * 7".split()


def make_text(rng: random.Random, tokens: int) -> list[str]:
    """Returns tokens, of which every 40th ends a step."""
    numbers = ["", *map(str, range(1000))]
    words = (f" {rng.choice(WORDS)}{rng.choice(numbers)}" for _ in range(tokens))
    return ["\n\n" if i % 40 == 39 else word for i, word in enumerate(words)]


def make_rollout(rng: random.Random, step: int, group: int, slot: int) -> dict:
    tokens = make_text(rng, n := rng.randrange(200, 400))
    ends = [*range(40, n, 40), n]
    record = {
        "step": step, "id": f"train-{step}-{group}", "gold": str(rng.randrange(1000)),
        "problem": " ".join(rng.choices(WORDS, k=60)), "group": group, "slot": slot,
        "completion": "".join(tokens), "reward": float(rng.random() < 0.4), "finished": True,
        "token_chars": [len(token) for token in tokens], "step_ends": ends,
        "logps": [-round(rng.expovariate(3), 3) for _ in tokens],
        "logps_after": [-round(rng.expovariate(3), 3) for _ in tokens],
        "advantages": [[round(rng.uniform(-1, 1), 4), n]],
        "step_scores": [round(rng.random(), 4) for _ in ends], "first_error": 2,
    }  # fmt: skip
    if slot == 7 and n > 80:
        repair = {"kept": 80, "tokens": make_text(rng, 150), "advantages": [[0.75, 230]]}
        repair["source"] = [[POLICY, 80], [TEACHER, 150]]
        record |= {"reward": 0.0, "reward_after": 1.0, "repair": repair}
        record |= {"kept_prefix": "".join(tokens[:80]), "correction": "".join(repair["tokens"])}
    return record


def make_workdir(workdir: pathlib.Path, steps: int, rollouts: int) -> None:
    """Writes metrics.jsonl and rollouts/ of a run that never was."""
    rng, groups = random.Random(0), rollouts // 8
    (workdir / "rollouts").mkdir(parents=True)
    names = "reward solve_rate entropy grad_norm logp_gap approx_kl groups_with_signal".split()
    names += [f"seconds/{name}" for name in ("step", "sample", "verify", "score", "update")]
    rows = [{"step": s, **{name: rng.random() for name in names}} for s in range(1, steps + 1)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, steps + 1):
        own = range(groups * (step - 1) // steps, groups * step // steps)
        lines = [make_rollout(rng, step, g - own[0], slot) for g in own for slot in range(8)]
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (workdir / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)


def seconds_to_open(report: pathlib.Path, chromium: str) -> float:
    """Returns the time from asking for the page until its rollouts can be read and filtered."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page()
        began = time.perf_counter()
        page.goto(report.resolve().as_uri(), wait_until="commit")
        page.wait_for_selector("body[data-ready]", state="attached")
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=5000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        make_workdir(workdir, args.steps, args.rollouts)
        began = time.process_time()
        report = write_report(workdir)
        result = {
            "steps": args.steps, "rollouts": args.rollouts,
            "stored_mb": sum(f.stat().st_size for f in (workdir / "rollouts").iterdir()) / 1e6,
            "report_mb": report.stat().st_size / 1e6,
            "cpu_seconds_to_write": time.process_time() - began,
            "seconds_to_open": seconds_to_open(report, args.chromium),
            "all_there": '"left_out":0' in report.read_text(),
        }  # fmt: skip
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
