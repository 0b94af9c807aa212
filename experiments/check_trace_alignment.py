"""How well does similarity alone place a solution that another person began?

    python experiments/check_trace_alignment.py SHARED/data/gsm8k_example_model_solutions.jsonl.gz

Models' right solutions of GSM8K problems are cut behind each line but the last, and the data set's
own solution is aligned with what is kept: by its results (its calculator notes say them), and once
more without the notes, by similarity. Prints, for weights of a formula and thresholds, how many
prefixes have a place, and in how many of those that have both it is the same. alignment.py's two
constants come from here.
"""

import argparse
import random

from scope_jax import alignment
from scope_jax.data import read_jsonl

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def prefixes(rows):
    """Yields (problem, its own solution in GSM8K's layout, text of the first lines of another)."""
    for row in rows:
        own = row["ground_truth"].replace("\nA:", "\n####")
        for name in MODELS:
            lines = alignment.split_text(row[name]["solution"], "\n")
            for kept in range(1, len(lines) if row[name]["is_correct"] else 1):
                yield row["question"], own, "".join(lines[:kept])


def main():
    parser = argparse.ArgumentParser(description="Measures alignment by similarity.")
    parser.add_argument("file", help="gsm8k_example_model_solutions.jsonl.gz")
    parser.add_argument("--problems", type=int, default=400)
    args = parser.parse_args()
    rows = read_jsonl(args.file)
    random.Random(0).shuffle(rows)
    cases = list(prefixes(rows[: args.problems]))
    known = [alignment.align_trace(own, kept, problem=asked) for asked, own, kept in cases]
    print(f"{len(cases)} prefixes; {sum(k is not None for k in known)} have a place by results")
    for weight in (1.0, 5.0):
        alignment.FORMULA_WEIGHT = weight
        for least in (0.5, 0.6, 0.7):
            plain = [alignment._NOTE.sub("", own).replace("####", "A:") for _, own, _ in cases]
            found = [
                alignment.align_trace(own, kept, splitter="\n", min_similarity=least)
                for own, (_, _, kept) in zip(plain, cases, strict=True)
            ]
            pairs = [(k, f) for k, f in zip(known, found, strict=True) if f is not None]
            both = [len(k) == len(f) for k, f in pairs if k is not None]
            print(
                f"formula weight {weight:.0f}, at least {least}: {len(pairs)} have a place; of "
                f"{len(both)} with both {sum(both) / len(both):.1%} have the same"
            )


if __name__ == "__main__":
    main()
