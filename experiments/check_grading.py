"""Holds `verify` against labels that it did not make: GSM8K's 5,276 model solutions.

    python experiments/check_grading.py --data ../shared/data/gsm8k_example_model_solutions.jsonl.gz

Each of the 1,319 test problems has four solutions by GPT-3 models, graded by the data's authors
(https://github.com/openai/grade-school-math). In that file a last "A:" marks the answer, in golds
and solutions alike, and a solution without one counts as wrong. That is this file's habit and no
rule of `verify`, so `marked` rewrites it here into the "####" that `verify` knows. Disagreements
are listed one by one; the last line of the output is one JSON object.
"""

import argparse
import collections
import json
import pathlib
import sys

from scope_jax.configlib import one_line_errors
from scope_jax.data import read_jsonl
from scope_jax.records import InputError
from scope_jax.rewards import verifier_stats, verify_batch

WRITERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
MARK = "A:"


def marked(text: str) -> str:
    """Returns the text's answer as "#### answer", "" where no "A:" marks one."""
    before, mark, answer = text.rpartition(MARK)
    return f"#### {answer.strip()}" if mark else ""


def read_solutions(path) -> list[dict]:
    """Returns {"line", "writer", "gold", "solution", "is_correct"} of each solution of the file.

    Raises:
      InputError: a line has not the file's fields, or its gold no answer.
    """
    solutions = []
    for row in read_jsonl(path):
        try:
            gold = row["ground_truth"]
            found = [(w, row[w]["solution"], row[w]["is_correct"]) for w in WRITERS]
            if not marked(gold):
                raise KeyError(f"no {MARK!r} in ground_truth")
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{row['_source']}: no row of GSM8K's example_model_solutions ({error!r}); it has "
                f"ground_truth, and solution and is_correct under each of {', '.join(WRITERS)}"
            ) from None
        for writer, solution, label in found:
            solutions.append(
                {"line": row["_source"], "writer": writer, "gold": gold, "solution": solution}
                | {"is_correct": label}
            )
    return solutions


def check(solutions: list[dict]) -> tuple[list[dict], dict]:
    """Returns (the solutions that `verify` grades otherwise, the counts of all)."""
    golds = [marked(row["gold"]) for row in solutions]
    before = verifier_stats()
    verdicts = verify_batch(golds, [marked(row["solution"]) for row in solutions])
    after = verifier_stats()
    cells = collections.Counter(
        (row["is_correct"], verdict) for row, verdict in zip(solutions, verdicts, strict=True)
    )
    agree = cells[True, True] + cells[False, False]
    counts = {
        "check": "grading", "solutions": len(solutions), "agree": agree,
        "agreement": agree / len(solutions),
        "labelled_right": cells[True, True] + cells[True, False],
        "labelled_right_graded_wrong": cells[True, False],
        "labelled_wrong_graded_right": cells[False, True],
        "without_answer": sum(not marked(row["solution"]) for row in solutions),
        "by_math_verify": after.checked - before.checked,
        "timeouts": after.timeouts - before.timeouts,
    }  # fmt: skip
    others = [
        row
        for row, verdict in zip(solutions, verdicts, strict=True)
        if verdict != row["is_correct"]
    ]
    return others, counts


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="the file, .jsonl or .gz")
    others, counts = check(read_solutions(parser.parse_args(argv).data))
    for row in others:
        label = "right" if row["is_correct"] else "wrong"
        gold, answer = (marked(row[key])[5:] for key in ("gold", "solution"))
        print(f"{row['line']} {row['writer']}: labelled {label}; gold {gold!r}, answer {answer!r}")
    print(f"{len(others)} disagreements among {counts['solutions']} solutions")
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.exit(main())
