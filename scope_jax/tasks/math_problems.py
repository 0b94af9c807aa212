"""Word problems with an answer, and perhaps a worked solution, from JSONL or Parquet files or from
directories that `scope_jax.prepare_data` wrote.

    {"question": "...", "answer": "48/2 = <<48/2=24>>24 clips in May.\\n...\\n#### 72"}     GSM8K
    {"problem", "answer" and/or "solution" with the answer in \\boxed{}}            MATH and others
    {"prompt": [{"role": "system", "content": ..}, {"role": "user", ..}],   OpenR1-Math-46k-8192
     "target": [{"role": "assistant", ..}], "reward_model": {"ground_truth": "72"}}

The reward is `scope_jax.rewards.verify`.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from scope_jax.data import Mixture, Prepared, describe_bad_lines, is_prepared, read_rows
from scope_jax.records import InputError
from scope_jax.rewards import extract_answer, read_gold

# What two printings of a problem differ by beside spaces: TeX's spaces and delimiters.
_LAYOUT = re.compile(r"\\[,;:! ()\[\]]|\\(?:left|right|displaystyle)(?![a-z])|[$~]")
_FREE_SPACE = re.compile(r" (?!\w)|(?<!\w) ")  # not between two words or numbers


class Problems(list):
    """Problems of a file, the lines of it that were left out, {"file", "line", "reason"}, and what
    a filter by pass rate counted.
    """

    skipped: list[dict[str, Any]]
    rated: dict[str, int]


def problems(
    split: str,
    *,
    train_file: str = "",
    test_file: str = "",
    ood_file: str = "",
    bad_lines: str = "strict",
    mix: Sequence[tuple[str, float]] = (),
    pass_rates: str = "",
    min_pass_rate: float | None = 0.0,
    max_pass_rate: float | None = 1.0,
) -> Sequence[dict[str, Any]]:
    """Returns the problems of a split ("train", "test" or "ood") as {"id", "problem", "gold",
    "solution"}, perhaps with the "system" message that the problem came with: `Problems` of a file,
    `Prepared` of a directory, with `mix` a `Mixture` of them.

    Args:
      train_file, test_file, ood_file: .jsonl, .jsonl.gz, .parquet, or a prepared directory.
      bad_lines: "strict": a bad line is an error; "skip": it is left out, and stands in `skipped`
        of what is returned.
      mix: (file, weight) of more training problems; train_file's weight is 1.
      pass_rates: file of {"id" or "problem", "pass_rate" or "reward"}: training problems whose rate
        is not in [min_pass_rate, max_pass_rate] are left out; see `read_pass_rates`. Those without
        a rate stay. `rated` of each file's problems has the counts: {"kept", "without_rate",
        "too_hard", "too_easy"}.
    Raises:
      InputError: the split has no file, none of its lines is good, or, if strict, one is bad (file
      and line are named): it is no JSON object, has no problem or no answer, repeats an id. Or the
      options do not fit together, no rate is of any problem, no problem is left.
    """
    files = {"train": train_file, "test": test_file, "ood": ood_file}
    if not files.get(split):
        raise InputError(
            f"no data file for the {split} split: set --config.task.{split}_file=FILE.jsonl[.gz]"
        )
    low = 0.0 if min_pass_rate is None else min_pass_rate
    high = 1.0 if max_pass_rate is None else max_pass_rate
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"task.min_pass_rate={low} and max_pass_rate={high} are no range in 0 .. 1"
        )
    if (low, high) != (0, 1) and not pass_rates:
        raise InputError("task.min_pass_rate and max_pass_rate need --config.task.pass_rates=FILE")
    if split != "train":
        return read_problems(files[split], bad_lines)
    weights = [1.0, *_weights(mix)]
    sources = [read_problems(file, bad_lines) for file in (train_file, *(one[0] for one in mix))]
    if pass_rates:
        rates = read_pass_rates(pass_rates)
        counts = [len(source) for source in sources]
        sources = [_in_range(source, rates, low, high) for source in sources]
        if sum(counts) == sum(source.rated["without_rate"] for source in sources):
            raise InputError(f"{pass_rates} has no rate of any training problem, by id or problem")
        if not any(len(source) for source in sources):
            raise InputError(f"{pass_rates} leaves no training problem: widen the range of rates")
    return Mixture(sources, weights) if mix else sources[0]


def read_problems(path, bad_lines: str = "strict") -> Any:
    """Returns the problems of one file or prepared directory, as `problems` does."""
    if bad_lines not in ("strict", "skip"):
        raise InputError(f'task.bad_lines must be "strict" or "skip", got {bad_lines!r}')
    if is_prepared(path):
        return Prepared(path)
    skipped: list[dict[str, Any]] = []
    found = Problems(read_rows(path, functools.partial(_problem, lines={}), skipped=skipped))
    found.skipped = skipped
    if skipped and bad_lines == "strict":
        raise InputError(
            f"{describe_bad_lines(skipped)}; correct or delete them, or leave bad lines out with "
            "--config.task.bad_lines=skip"
        )
    return found


def normal_text(problem: str) -> str:
    """Returns what is equal for two printings of the same problem: lower case, compatible
    characters made one (NFKC), without TeX's spacing and delimiters, without spaces beside what is
    no word, and without a full stop at the end.

    >>> normal_text("Find  $\\\\dfrac{1}{2} + x$.")
    'find\\\\frac{1}{2}+x'
    """
    text = _LAYOUT.sub(" ", unicodedata.normalize("NFKC", problem).lower())
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _FREE_SPACE.sub("", " ".join(text.split()).rstrip(". "))


def read_pass_rates(path) -> dict[str, float]:
    """Returns the pass rates of problems by their normal text, where a row has "problem", else by
    their id, as `pass_rate_of` finds them.

    Args:
      path: rows {"id" or "problem", "pass_rate" or "reward" in 0 .. 1}; several rows of a problem
        (samples of an evaluation) are averaged.
    """

    def parse(row):
        rate = row.get("pass_rate", row.get("reward"))
        if not isinstance(rate, (bool, int, float)) or not 0 <= rate <= 1:
            raise InputError(f'"pass_rate" (or "reward") must be in 0 .. 1, got {rate!r:.60}')
        if isinstance(row.get("problem"), str):
            return normal_text(row["problem"]), float(rate)
        if type(row.get("id")) not in (str, int):
            raise InputError('no "problem" text, and no "id"')
        return f"id {row['id']}", float(rate)

    found: dict[str, list[float]] = {}
    for key, rate in read_rows(path, parse):
        found.setdefault(key, []).append(rate)
    return {key: math.fsum(of_one) / len(of_one) for key, of_one in found.items()}


def pass_rate_of(record: dict[str, Any], rates: dict[str, float]) -> float | None:
    """Returns the pass rate of a problem: by its text, its id ("file:line"), its row's own id."""
    keys = [normal_text(record["problem"]), f"id {record['id']}"]
    keys += [f"id {record['row_id']}"] if "row_id" in record else []
    return next((rates[key] for key in keys if key in rates), None)


def _in_range(source: Any, rates: dict[str, float], low: float, high: float) -> Any:
    """Returns the problems whose pass rate is in [low, high], and those that have none."""
    found = [pass_rate_of(record, rates) for record in source]
    rows = [i for i, rate in enumerate(found) if rate is None or low <= rate <= high]
    if isinstance(source, Prepared):
        kept: Any = source.only(rows)
    else:
        kept = Problems(source[i] for i in rows)
        kept.skipped = source.skipped
    kept.rated = {
        "kept": len(rows),
        "without_rate": found.count(None),
        "too_hard": sum(rate is not None and rate < low for rate in found),
        "too_easy": sum(rate is not None and rate > high for rate in found),
    }
    return kept


def _weights(mix: Any) -> list[float]:
    for pair in mix:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(f'task.mix is (("FILE", weight), ..), got {pair!r:.60} in it')
        if isinstance(pair[1], bool) or not isinstance(pair[1], (int, float)) or not pair[1] > 0:
            raise InputError(f"task.mix: the weight of {pair[0]} must be > 0, got {pair[1]!r:.60}")
    return [float(weight) for _, weight in mix]


def _problem(row: dict, lines: dict[str | int, str]) -> dict:
    """Returns the problem of a row; `lines` holds where each explicit id was seen."""
    problem = read_problem(row)
    if not problem["gold"]:
        marked = "####" in problem["solution"]
        raise InputError('no answer after "####"' if marked else 'no "answer"')
    if not read_gold(problem["gold"]):
        raise InputError(f'"answer" holds nothing to compare with: {problem["gold"]!r:.60}')
    check_id(row, lines)
    return problem


def check_id(row: dict, lines: dict[str | int, str]) -> None:
    """Refuses an explicit id that is none or was seen before in the file; notes it in `lines`."""
    identity = row.get("id")
    if identity is not None:
        if type(identity) not in (str, int):
            raise InputError(f'"id" must be a text or a number, got {type(identity).__name__}')
        if identity in lines:
            raise InputError(f'"id" {identity!r:.60} is that of {lines[identity]}, too')
        lines[identity] = row["_source"]


def read_problem(row: dict) -> dict[str, str]:
    """Returns {"id", "problem", "gold", "solution"} of a row in any of the layouts above, with
    "system" and "row_id" where it has them. The gold is as the row has it, unchecked, "" where
    there is none.

    Raises:
      InputError: why the row is none of them.
    """
    text, system = problem_text(row)
    answer, solution = row.get("answer"), row.get("solution")
    if answer is None and isinstance(row.get("reward_model"), dict):
        answer = row["reward_model"].get("ground_truth")
    if solution is None and row.get("target") is not None:
        solution = _messages(row["target"], "target", ("assistant",))[-1]
    if solution is not None and not isinstance(solution, str):
        raise InputError('"solution" is not text')
    if answer is None and solution and "\\boxed" in solution:
        answer = extract_answer(solution)
    if type(answer) is int or (isinstance(answer, float) and math.isfinite(answer)):
        answer = str(answer)
    blank = answer is None or (isinstance(answer, str) and not answer.strip())
    answer = "" if blank else _text(answer, 'no "answer"')
    solution = _text(solution, "") if solution and solution.strip() else ""
    if "####" in answer:
        solution, answer = answer, answer.rsplit("####", 1)[1].strip()
    elif "question" in row and answer:
        raise InputError('GSM8K\'s answer ends in "#### gold", this one does not')
    own = {} if row.get("id") is None else {"row_id": f"{row['id']}"}
    own |= {"system": system} if system else {}
    return {"id": row["_source"], "problem": text, "gold": answer, "solution": solution, **own}


def problem_text(row: dict) -> tuple[str, str]:
    """Returns (problem, system message or "") of a row in any of the layouts above."""
    text = row.get("problem", row.get("question"))
    if text is None and isinstance(row.get("prompt"), list):
        roles = ("system", "user") if len(row["prompt"]) == 2 else ("user",)
        *system, text = _messages(row["prompt"], "prompt", roles)
        return text, "".join(system)
    return _text(text, 'no "problem" (or "question") text'), ""


def _messages(value: Any, column: str, roles: tuple[str, ...]) -> list[str]:
    """Returns the contents of messages [{"role", "content"}] that must have these roles."""
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(message, dict) for message in found):
        raise InputError(f'"{column}" is no list of messages {{"role", "content"}}')
    given = [message.get("role") for message in found]
    if given != list(roles):
        raise InputError(f'"{column}" has the roles {given!r:.80}, expected {list(roles)}')
    contents = [message.get("content") for message in found]
    return [
        "" if role == "system" and (content is None or content == "")
        else _text(content, f'"{column}" has a message without text')
        for role, content in zip(roles, contents, strict=True)
    ]  # fmt: skip


def _text(value: Any, missing: str) -> str:
    """Returns `value` if it is a text that a tokenizer can take."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(missing)
    if "\x00" in value:
        raise InputError(f"a NUL character in {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold "\ud800", on which tokenizers crash
        raise InputError(f"half a surrogate pair, which is not Unicode, in {value!r:.60}") from None
    return value
