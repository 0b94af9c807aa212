"""Benchmark sets: their problems from local files, the samples that were drawn for them, grades.

    files  ->  read_sets  ->  problems  ->  (evaluate_sets.py samples)  ->  samples.jsonl
                                                  grade_texts  <-  or stored completions

Files are Parquet in LUFFY's layout, several sets in one file told apart by their "data_source",

    {"data_source", "prompt": [{"role", "content"}], "reward_model": {"ground_truth"}}

or JSONL, {"problem" (or "question"), "answer", "id" (optional), "options" (optional)}. Options, the
wrong and the right ones of a multiple-choice question, follow the problem as

    <problem>

    A. <first option>
    B. <second option>

    <CHOICE_REQUEST>

A sample is a line {"set", "id", "index" (of the problem in its set), "sample", "problem" (its
text), "completion", "tokens", "finished", "reward", "answer"}; the lines come in the order of
`jobs_of`. `scope_jax.prepare_data --pass-rates` reads the file.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from scope_jax.answers import extract_answer, find_choice, read_choice, read_gold
from scope_jax.data import read_rows
from scope_jax.records import InputError
from scope_jax.rewards import score_completions, verify_choice
from scope_jax.tasks.math_problems import problem_text

GRADES = ("math", "choice")
GROUPS = ("math", "ood")
CHOICE_REQUEST = "Put the letter of the right option within \\boxed{}."
LETTERS = "ABCDEFGHIJ"  # what `verify_choice` reads
MAX_SAMPLES = 1024  # of a problem: a sample's key is that of row index * MAX_SAMPLES + sample

Sample = dict[str, Any]
Job = tuple[str, int, int]  # set, index of the problem in it, number of the sample


@dataclasses.dataclass(frozen=True)
class BenchmarkSet:
    """What is measured, and how; see configs/eval_math.py."""

    key: str  # its name in the config, in files and in keys of samples
    name: str  # as tables print it
    file: str = ""  # "" = looked for in the data folder
    luffy_file: str = ""  # of LUFFY's data: the file there that holds the set
    source: str = ""  # its "data_source", where rows have one; "" = every row
    samples: int = 1  # drawn for each problem
    grade: str = "math"  # | "choice": by the letter of the option
    group: str = "math"  # | "ood": which table and average it belongs to
    problems: int = 0  # only the first so many; 0 = all

    def __post_init__(self):
        for field, known in (("grade", GRADES), ("group", GROUPS)):
            if (value := getattr(self, field)) not in known:
                raise InputError(f"sets.{self.key}.{field}={value!r} is none of {', '.join(known)}")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise InputError(f"sets.{self.key}.samples={self.samples} is not in 1 .. {MAX_SAMPLES}")
        if self.problems < 0:
            raise InputError(f"sets.{self.key}.problems={self.problems} is below 0 (all)")


# ---- problems ------------------------------------------------------------------------------------


def read_sets(
    sets: Sequence[BenchmarkSet], data_dir: str = ""
) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Returns the problems of the sets that have a file, and why each of the others has none.

    Args:
      data_dir: relative files are of this folder. A set without a file is looked for there, as
        KEY.parquet, KEY.jsonl and KEY.jsonl.gz, then in its `luffy_file`.
    Returns:
      ({key: [{"id", "problem", "gold", perhaps "system"}]}, {key: reason}).
    Raises:
      InputError: a file that was named is missing, holds a bad row or none of the set's; `data_dir`
      is no folder; no set has a file.
    """
    found, skipped = {}, {}
    folder = pathlib.Path(data_dir)
    if data_dir and not folder.is_dir():
        raise InputError(f"data_dir {data_dir} is not a folder")
    for chosen in sets:
        if chosen.file:
            found[chosen.key] = read_set(folder / chosen.file, chosen)
            continue
        names = [f"{chosen.key}{suffix}" for suffix in (".parquet", ".jsonl", ".jsonl.gz")]
        names += [chosen.luffy_file] if chosen.luffy_file else []
        file = next((folder / n for n in names if data_dir and (folder / n).is_file()), None)
        skipped[chosen.key] = f"{', '.join(names)}: none is in data_dir" if data_dir else "no file"
        if file is not None and file.name != chosen.luffy_file:
            found[chosen.key] = read_set(file, chosen)
        elif file is not None:  # it may hold other sets than this
            rows, others = _rows_of(file, chosen)
            if rows:
                found[chosen.key] = rows
            else:
                skipped[chosen.key] = _not_among(file, chosen, others)
    if not found:
        raise InputError(
            "no set has a file: set --config.data_dir=FOLDER or --config.sets.NAME.file=FILE for "
            "one of " + ", ".join(chosen.key for chosen in sets)
        )
    return found, {key: reason for key, reason in skipped.items() if key not in found}


def read_set(path: pathlib.Path, chosen: BenchmarkSet) -> list[dict[str, str]]:
    """Returns the problems of one set, see `read_sets`."""
    if not path.is_file():
        raise InputError(f"sets.{chosen.key}.file: {path} does not exist")
    rows, others = _rows_of(path, chosen)
    if not rows:
        raise InputError(f"sets.{chosen.key}: {_not_among(path, chosen, others)}")
    return rows


def _rows_of(path: pathlib.Path, chosen: BenchmarkSet) -> tuple[list[dict], Counter[str]]:
    """Returns the problems of a set, and how many rows of other data_sources stood beside them."""
    others: Counter[str] = Counter()
    seen: set[str] = set()

    def parse(row: dict) -> dict | None:
        source = row.get("data_source")
        if chosen.source and source is not None and source != chosen.source:
            others[str(source)[:60]] += 1
            return None
        found = _problem(row, chosen.grade)
        if found["id"] is not None:
            if found["id"] in seen:
                raise InputError(f'"id" {found["id"]!r:.60} is there twice')
            seen.add(found["id"])
        return found

    rows = [row for row in read_rows(path, parse) if row is not None]
    rows = rows[: chosen.problems or None]
    for number, row in enumerate(rows):
        row["id"] = f"{chosen.key}/{number}" if row["id"] is None else row["id"]
    return rows, others


def _not_among(path, chosen: BenchmarkSet, others: Counter[str]) -> str:
    held = ", ".join(f"{name!r} ({count})" for name, count in others.most_common(12))
    return f"{path} holds no row of data_source {chosen.source!r}, but {held}"


def _problem(row: dict, grade: str) -> dict[str, Any]:
    """Returns {"id" (None where it has none), "problem", "gold"} of a row in either layout, with
    "system" where it has that.
    """
    problem, system = problem_text(row)
    reward_model = row.get("reward_model")
    gold = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    gold = row.get("answer") if gold is None else gold
    if type(gold) in (int, float):
        gold = json.dumps(gold)
    gold = _text(gold, '"answer" (or "reward_model.ground_truth")')
    options = row.get("options")
    if options is not None and grade != "choice":
        raise InputError('it has "options": set its grade to "choice"')
    if options is not None:
        problem = with_options(problem, options)
    check_gold(gold, grade, len(options or LETTERS))
    identity = row.get("id")
    if identity is not None and type(identity) not in (str, int):
        raise InputError(f'"id" must be a text or a number, got {type(identity).__name__}')
    found = {"id": None if identity is None else str(identity), "problem": problem, "gold": gold}
    return {**found, "system": system} if system else found


def check_gold(gold: str, grade: str, options: int = len(LETTERS)) -> None:
    """Raises InputError for a gold that no completion could be compared with."""
    if grade == "choice":
        last = LETTERS[options - 1]
        if (read_choice(gold) or "Z") > last:
            raise InputError(f'"answer" must name an option in A .. {last}, got {gold!r:.60}')
    elif not read_gold(gold):
        raise InputError(f'"answer" holds nothing to compare with: {gold!r:.60}')


def with_options(problem: str, options: Any) -> str:
    """Returns a multiple-choice question in the layout of the module's docstring."""
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise InputError(f'"options" must be a list of 2 .. {len(LETTERS)} texts')
    texts = [
        _text(json.dumps(option) if type(option) in (int, float) else option, f"option {letter}")
        for letter, option in zip(LETTERS, options, strict=False)
    ]
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False)]
    return "\n".join([problem, "", *lines, "", CHOICE_REQUEST])


def _text(value: Any, what: str) -> str:
    """Returns `value` if it is a text that a tokenizer can take."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"no {what} text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold "\ud800", on which tokenizers crash
        raise InputError(f"{what} holds half a surrogate pair, which is not Unicode") from None
    if "\x00" in value:
        raise InputError(f"{what} holds a NUL character")
    return value


def digest(problems: Sequence[dict[str, Any]]) -> str:
    """Returns what tells two versions of a set apart: SHA-256 of its problems and golds."""
    fields = ("id", "problem", "system", "gold")
    text = json.dumps([[row.get(name, "") for name in fields] for row in problems])
    return hashlib.sha256(text.encode()).hexdigest()


# ---- samples -------------------------------------------------------------------------------------


def jobs_of(counts: dict[str, tuple[int, int]]) -> list[Job]:
    """Returns every sample of an evaluation, in its order.

    >>> jobs_of({"a": (2, 1), "b": (1, 2)})
    [('a', 0, 0), ('a', 1, 0), ('b', 0, 0), ('b', 0, 1)]

    Args:
      counts: {set: (problems, samples)}.
    """
    return [
        (key, index, sample)
        for key, (problems, samples) in counts.items()
        for index in range(problems)
        for sample in range(samples)
    ]


def read_samples(path: pathlib.Path, jobs: Sequence[Job]) -> tuple[list[Sample], int]:
    """Returns the samples that a file holds, the first ones of `jobs`, and the bytes they take.

    Behind them may be a line that was not written to its end; it does not count.

    Raises:
      InputError: a line is no sample, or another one than the jobs say: the line is named.
    """
    samples, size = [], 0
    if not path.is_file():
        return samples, size
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            try:
                row = json.loads(line)
                job = (row["set"], row["index"], row["sample"])
                good = isinstance(row["completion"], str) and isinstance(row["answer"], str | None)
                row["reward"], row["tokens"] = float(row["reward"]), int(row["tokens"])
                good &= isinstance(row["finished"], bool)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{path}:{number + 1}: not a sample ({error!r}): move it away"
                ) from None
            if not good or number >= len(jobs) or job != jobs[number]:
                expected = jobs[number] if number < len(jobs) else "nothing"
                raise InputError(
                    f"{path}:{number + 1}: expected {expected}, got {job}: the file was changed; "
                    "move it away"
                )
            samples.append(row)
    return samples, size


def cut_file(path: pathlib.Path, size: int) -> None:
    """Cuts a file behind its first `size` bytes: a line that was not written to its end."""
    if path.is_file() and path.stat().st_size > size:
        os.truncate(path, size)


def append_samples(path: pathlib.Path, samples: Sequence[Sample]) -> None:
    """Appends a whole batch in one write, and returns when it is on the disk."""
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    with open(path, "a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---- grades --------------------------------------------------------------------------------------


def grade_texts(
    grade: str,
    golds: Sequence[str],
    texts: Sequence[str],
    *,
    after: str = "",
    reward_fn: Callable[[str, str], bool | float],
) -> list[float]:
    """Returns the reward of each completion: by `reward_fn`, or by the option's letter."""
    fn = verify_choice if grade == "choice" else reward_fn
    return score_completions(fn, golds, texts, after=after)


def final_answer(grade: str, text: str, after: str = "") -> str | None:
    r"""Returns the answer that a completion marks behind the last `after`; None: there is none.

    Of "math" what stands in its last \boxed{} or behind "####", normalised; of "choice" the letter.
    """
    if after and after not in text:
        return None
    text = text.rpartition(after)[2] if after else text
    if grade == "choice":
        return find_choice(text)
    marked = extract_answer(text)
    return None if marked is None else read_gold(marked) or None
