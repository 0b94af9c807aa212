"""GSM8K's 5,276 model solutions with their is_correct, as rows for evaluate --completions.

    python experiments/gsm8k_completions.py ../shared/data/gsm8k_example_model_solutions.jsonl.gz \
        > /tmp/solutions.jsonl
    python -m scope_jax.evaluate --config eval_math --completions /tmp/solutions.jsonl

That file's own rule: the answer stands behind the last "A:", of the gold and of the solution, and a
solution without one is wrong. "A:" is therefore rewritten as "####"; a missing one as a "####" with
nothing behind it.
"""

import json
import sys

from scope_jax.data import read_rows

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def marked(text: str) -> str:
    head, mark, answer = text.rpartition("A:")
    return f"{head}#### {answer.strip()}" if mark else f"{text}\n####"


def completions(path) -> list[dict]:
    """Returns the rows {"id", "gold", "completion", "correct"} of the file."""
    return [
        {
            "id": f"{number}/{model}",
            "gold": marked(row["ground_truth"]),
            "completion": marked(row[model]["solution"]),
            "correct": row[model]["is_correct"],
        }
        for number, row in enumerate(read_rows(path))
        for model in MODELS
    ]


if __name__ == "__main__":
    for row in completions(sys.argv[1]):
        print(json.dumps(row))
