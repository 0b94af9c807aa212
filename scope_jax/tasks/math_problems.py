"""Word problems with a worked solution, from JSONL files in GSM8K's layout.

    {"question": "...", "answer": "48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}

or {"problem", "answer", "solution" (optional)} with the bare answer. The reward is
`scope_jax.rewards.verify`.
"""

from scope_jax.data import read_jsonl
from scope_jax.records import InputError


def problems(
    split: str, *, train_file: str = "", test_file: str = "", ood_file: str = ""
) -> list[dict]:
    """Returns the problems of a split ("train", "test" or "ood") as {"id", "problem", "gold",
    "solution"}.

    Raises:
      InputError: the split has no file, or a row has no problem or no answer (file and line are
      named).
    """
    files = {"train": train_file, "test": test_file, "ood": ood_file}
    if not files.get(split):
        raise InputError(
            f"no data file for the {split} split: set --config.task.{split}_file=FILE.jsonl[.gz]"
        )
    return read_problems(files[split])


def read_problems(path) -> list[dict]:
    """Returns the problems of one file, as `problems` does."""
    return [_problem(row) for row in read_jsonl(path)]


def _problem(row: dict) -> dict:
    text, answer = row.get("problem", row.get("question")), row.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{row["_source"]}: no "problem" (or "question") text')
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f'{row["_source"]}: no "answer"')
    solution = row.get("solution") or ""
    if not isinstance(solution, str):
        raise InputError(f'{row["_source"]}: "solution" is not text')
    if "####" in answer:
        solution, answer = answer, answer.rsplit("####", 1)[1].strip()
        if not answer:
            raise InputError(f'{row["_source"]}: no answer after "####"')
    elif "question" in row:
        raise InputError(
            f'{row["_source"]}: GSM8K\'s answer ends in "#### gold", this one does not'
        )
    return {"id": row["_source"], "problem": text, "gold": answer, "solution": solution}
