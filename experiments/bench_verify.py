"""Times the verifier on ordinary pairs: GSM8K model solutions and rewritten MATH-500 answers.

    python experiments/bench_verify.py --data ../shared/data --workers 2

Two thirds are word problems' whole solutions, mostly decided by the fast path; one third are golds
of MATH-500 as models write them, right and wrong, of which many need math-verify. Every pair is
different text, so nothing is saved by checking equal pairs once. The last line of the output is one
JSON object: `checks_per_s` of all pairs, `checks_per_s_workers_only` of the pairs that reached a
worker, `worker_share` their share, `fast_share` the others'; medians of --reps warm runs.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import time

from scope_jax.data import read_jsonl
from scope_jax.rewards import verifier_stats, verify_batch


def gsm8k_pairs(path, rng: random.Random) -> list[tuple[str, str]]:
    """Real model solutions; half as they end, half with the answer in a box."""
    pairs = []
    for row in read_jsonl(path):
        gold = row["ground_truth"].replace("A: ", "#### ")
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            head, _, answer = row[name]["solution"].rpartition("A: ")
            end = rng.choice([f"#### {answer}", f"The answer is $\\boxed{{{answer}}}$."])
            pairs.append((gold, head + end))
    return pairs


def rewritten(gold: str, rng: random.Random) -> str:
    """One of the ways in which models write an answer."""
    ways = [gold, gold.replace("\\frac", "\\dfrac"), f"x = {gold}", gold.replace(",", ", ")]
    ways += [
        f"{gold} \\text{{ units}}",
        f"\\left({gold}\\right)",
        gold.replace("\\frac", "\\tfrac"),
    ]
    if gold.isdigit():
        ways += [f"{gold}.0", f"\\frac{{{2 * int(gold)}}}{{2}}", f"{gold} \\text{{ cm}}"]
    return rng.choice(ways)


def math500_pairs(path, copies: int, rng: random.Random) -> list[tuple[str, str]]:
    """Each gold with `copies` answers: rewritings of it, and of another gold in two of five."""
    golds = [row["answer"] for row in read_jsonl(path)]
    pairs = []
    for gold in golds * copies:
        answer = rewritten(gold if rng.random() < 0.6 else rng.choice(golds), rng)
        ends = [f"Hence $\\boxed{{{answer}}}$.", f"The final answer is ${answer}$."]
        pairs.append((gold, f"We compute step by step.\n\n{rng.choice(ends)}"))
    return pairs


def rate(pairs: list[tuple[str, str]], workers: int, reps: int) -> float:
    """Returns checks per second, the median of `reps` runs."""
    seconds = []
    for _ in range(reps):
        start = time.perf_counter()
        verify_batch([g for g, _ in pairs], [c for _, c in pairs], num_workers=workers)
        seconds.append(time.perf_counter() - start)
    return len(pairs) / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of shared data")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--reps", type=int, default=3)
    args = parser.parse_args()
    rng = random.Random(0)
    math = list(dict.fromkeys(math500_pairs(args.data / "math500.jsonl.gz", 4, rng)))
    words = gsm8k_pairs(args.data / "gsm8k_example_model_solutions.jsonl.gz", rng)
    ordinary = [*math, *rng.sample(words, 2 * len(math))]
    rng.shuffle(ordinary)
    hard = []
    for pair in ordinary:  # which of them need a worker?  also starts the workers
        before = verifier_stats().checked
        verify_batch([pair[0]], [pair[1]], num_workers=args.workers)
        hard += [pair] * (verifier_stats().checked - before)
    before = verifier_stats()
    checks_per_s = rate(ordinary, args.workers, args.reps)
    workers_only = rate(hard, args.workers, args.reps)
    after = verifier_stats()
    found = {
        "bench": "verify", "pairs": len(ordinary), "checks_per_s": round(checks_per_s, 1),
        "checks_per_s_workers_only": round(workers_only, 1),
        "worker_share": round(len(hard) / len(ordinary), 3),
        "fast_share": round(1 - len(hard) / len(ordinary), 3), "workers": args.workers,
        "timeouts": after.timeouts - before.timeouts, "crashes": after.crashes - before.crashes,
        "load1": round(os.getloadavg()[0], 2), "reps": args.reps,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
