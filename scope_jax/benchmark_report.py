"""The figures of a benchmark: accuracy, pass@k, maj@k, diversity, length; and two runs compared.

All are functions of the samples (benchmark.py), so that they can be computed again at any time.
"""

import itertools
import json
import math
import pathlib
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from scope_jax.answers import number
from scope_jax.benchmark import GROUPS, Sample, jobs_of, read_samples
from scope_jax.configlib import flat_keys
from scope_jax.diversity import (
    correct_diversity,
    distinct_n,
    equation_diversity,
    pass_at_k,
    textual_diversity,
)
from scope_jax.records import InputError

TITLES = {"math": "Math", "ood": "Out of distribution"}


# ---- figures of one evaluation -------------------------------------------------------------------


def results(
    samples: Sequence[Sample], sets: dict[str, dict[str, Any]], solved_at: float = 1.0
) -> dict[str, Any]:
    """Returns all figures of an evaluation, as plain numbers that JSON can hold.

    Args:
      samples: in the order of `jobs_of`.
      sets: {key: {"name", "group", "samples", ..}} of those that were evaluated.
      solved_at: a reward below it is wrong.
    Returns:
      {"sets": {key: `set_figures`}, "averages": {"math", "ood": the mean of its sets' accuracy,
      every set counting the same; None without a set}}.
    """
    by_set = {key: list(rows) for key, rows in itertools.groupby(samples, lambda s: s["set"])}
    figures = {
        key: set_figures(by_set[key], entry["samples"], solved_at) for key, entry in sets.items()
    }
    averages = {}
    for group in GROUPS:
        of_group = [figures[key]["accuracy"] for key in sets if sets[key]["group"] == group]
        averages[group] = math.fsum(of_group) / len(of_group) if of_group else None
    return {"sets": figures, "averages": averages}


def set_figures(
    samples: Sequence[Sample], num_samples: int, solved_at: float = 1.0
) -> dict[str, Any]:
    """Returns the figures of one set.

    Args:
      samples: `num_samples` of each problem, neighbours.
    Returns:
      "problems", "samples" (of each); "accuracy" (mean over samples); "pass@k" for k = 1, 2, 4, ..
      and all samples; "maj@k" of all samples, see `majority_is_right`; "tokens" (mean), "truncated"
      (share that the budget cut off), "unanswered" (share without a marked answer); with several
      samples "diversity": means over problems of distinct-1 .. 4, textual and equational diversity
      and "distinct_answers" (different marked answers / samples), and what `correct_diversity`
      says.
    """
    groups = [
        list(samples[i : i + num_samples]) for i in range(0, len(samples), num_samples)
    ]  # [P][S]
    right = [[row["reward"] >= solved_at for row in group] for group in groups]
    powers = {2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples}
    found: dict[str, Any] = {
        "problems": len(groups),
        "samples": num_samples,
        "accuracy": _mean([_mean(row) for row in right]),
        "pass@k": {
            str(k): _mean([pass_at_k(num_samples, sum(row), k) for row in right])
            for k in sorted(powers | {num_samples})
        },
        "maj@k": _mean(
            [
                majority_is_right([row["answer"] for row in group], solved)
                for group, solved in zip(groups, right, strict=True)
            ]
        ),
        "tokens": _mean([row["tokens"] for row in samples]),
        "truncated": _mean([not row["finished"] for row in samples]),
        "unanswered": _mean([row["answer"] is None for row in samples]),
    }
    if num_samples > 1:
        texts = [[row["completion"] for row in group] for group in groups]
        among = correct_diversity(texts, right)
        found["diversity"] = {
            **{f"distinct_{n}": _mean([distinct_n(t, n) for t in texts]) for n in (1, 2, 3, 4)},
            "textual_diversity": _mean([textual_diversity(t) for t in texts]),
            "equation_diversity": _mean([equation_diversity(t) for t in texts]),
            "distinct_answers": _mean(
                [len({_meant(row["answer"]) for row in g} - {None}) / num_samples for g in groups]
            ),
            **{f"correct_{name}": value for name, value in among.items()},
        }
    return found


def majority_is_right(answers: Sequence[str | None], right: Sequence[bool]) -> bool:
    r"""Returns whether the answer that most samples give is right (maj@k, self-consistency).

    Wang et al., https://arxiv.org/abs/2203.11171. Answers are the same if they are the same number
    or their normalised strings are equal (2\sqrt{2} and \sqrt{8} are two: math-verify is not asked
    for every pair). A sample without a marked answer has no vote, and no vote at all is wrong. Of
    answers with equally many votes the one that came first wins. It is right if the first sample
    that gave it is.
    """
    meant = [_meant(answer) for answer in answers]
    votes = Counter(answer for answer in meant if answer is not None)  # in order of appearance
    if not votes:
        return False
    return right[meant.index(max(votes, key=votes.__getitem__))]


def _meant(answer: str | None) -> str | None:
    """Returns the number that an answer is in one spelling, 1/2 for 0.5, else the answer."""
    value = None if answer is None else number(answer)
    return answer if value is None else str(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def accuracy_tables(found: dict[str, Any], sets: dict[str, dict[str, Any]], of: dict[str, int]):
    """Returns the tables of a group's sets with their average, one for each group that has sets.

    Args:
      found: `results`; sets: as there; of: {group: number of sets in the config}, so that an
        average over some of them says so.
    """
    tables = []
    for group in GROUPS:
        keys = [key for key in sets if sets[key]["group"] == group]
        if not keys:
            continue
        table = Table(
            "set", "problems x samples", "accuracy %", title=TITLES[group], title_justify="left"
        )
        for key in keys:
            figures = found["sets"][key]
            size = f"{figures['problems']} x {figures['samples']}"
            table.add_row(sets[key]["name"], size, f"{100 * figures['accuracy']:.1f}")
        some = "" if len(keys) == of[group] else f" of {len(keys)} of {of[group]} sets"
        table.add_section()
        table.add_row(f"average{some}", "", f"{100 * found['averages'][group]:.1f}")
        tables.append(table)
    return tables


def detail_table(found: dict[str, Any], sets: dict[str, dict[str, Any]]) -> Table:
    """Returns the table of all other figures, in 80 columns: pass@k and maj@k of all samples in per
    cent, diversity, mean length in tokens, per cent that were cut off and that mark no answer.
    """
    table = Table(
        "set", "k", "pass@k", "maj@k", "TD", "ED", "answers", "tokens", "cut", "none",
        title="Samples (TD, ED: diversity; answers: different ones / k)", title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for key, entry in sets.items():
        figures = found["sets"][key]
        k, spread = figures["samples"], figures.get("diversity")
        names = ("textual_diversity", "equation_diversity", "distinct_answers")
        table.add_row(
            entry["name"], str(k), f"{100 * figures['pass@k'][str(k)]:.1f}",
            f"{100 * figures['maj@k']:.1f}",
            *(f"{spread[name]:.3f}" if spread else "-" for name in names),
            f"{figures['tokens']:.0f}", f"{100 * figures['truncated']:.1f}",
            f"{100 * figures['unanswered']:.1f}",
        )  # fmt: skip
    return table


# ---- two evaluations -----------------------------------------------------------------------------


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Returns (mean of b - a, the same of each resample of the problems, [resamples] float64).

    Paired: a problem is drawn for both, so what makes it hard or easy cancels.

    Args:
      a, b: [P] accuracy of each problem.
      seed: of numpy's generator.
    """
    gain = np.asarray(b, np.float64) - np.asarray(a, np.float64)  # [P]
    rng = np.random.default_rng(seed)
    drawn = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(resamples)]
    return float(gain.mean()), np.array(drawn)


def summary(difference: float, drawn: np.ndarray) -> dict[str, Any]:
    """Returns {"difference", "interval" (95 %, percentiles), "p"} of a bootstrap.

    p is two-sided: twice the share of resamples on the other side of 0 (a resample at 0 is on both
    sides), each count plus one so that it is never 0, at most 1.
    """
    low, high = np.quantile(drawn, [0.025, 0.975])
    side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (side + 1) / (len(drawn) + 1))
    return {"difference": difference, "interval": [float(low), float(high)], "p": p}


def compare(out_a, out_b, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Returns what changes from evaluation A to B: accuracy of each set and both averages.

    Returns:
      {"sets": {key: {"name", "group", "a", "b", "difference" (b - a), "interval", "p"}},
      "averages": the same of the groups, "changed": [keys of the two configs that differ]}. For an
      average every set is resampled on its own, and counts the same.
    Raises:
      InputError: a folder that is no finished evaluation, or the two differ in their sets, problems
      or samples: which is said.
    """
    (config_a, rows_a), (config_b, rows_b) = read_evaluation(out_a), read_evaluation(out_b)
    sets = config_a["sets"]
    _check_same(out_a, sets, out_b, config_b["sets"])
    accuracy_a, accuracy_b = _by_problem(rows_a, config_a), _by_problem(rows_b, config_b)
    found: dict[str, Any] = {"sets": {}, "averages": {}}
    drawn = {}
    for key, entry in sets.items():
        a, b = accuracy_a[key], accuracy_b[key]
        own = zlib.crc32(f"{seed}/{key}".encode())  # a set's draws do not depend on the others
        difference, drawn[key] = paired_bootstrap(a, b, resamples=resamples, seed=own)
        found["sets"][key] = {
            "name": entry["name"], "group": entry["group"], "a": _mean(a), "b": _mean(b),
            **summary(difference, drawn[key]),
        }  # fmt: skip
    for group in GROUPS:
        keys = [key for key in sets if sets[key]["group"] == group]
        if keys:
            mean = {
                name: _mean([found["sets"][key][name] for key in keys])
                for name in ("a", "b", "difference")
            }
            of_sets = np.mean([drawn[key] for key in keys], axis=0)
            found["averages"][group] = mean | summary(mean["difference"], of_sets)
    flat_a, flat_b = flat_keys(config_a), flat_keys(config_b)
    names = sorted(flat_a.keys() | flat_b.keys())
    found["changed"] = [name for name in names if flat_a.get(name) != flat_b.get(name)]
    return found


def read_evaluation(out) -> tuple[dict[str, Any], list[Sample]]:
    """Returns (config, samples) of a folder that an evaluation wrote, and finished."""
    folder = pathlib.Path(out)
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        counts = {
            key: (int(entry["problems"]), int(entry["samples"]))
            for key, entry in config["sets"].items()
        }
        _ = [(e["name"], e["group"], e["sha256"]) for e in config["sets"].values()]
        _ = float(config["reward"]["solved_at"])
    except FileNotFoundError:
        raise InputError(f"{file} is missing: {out} is no evaluation's --out folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not the config of an evaluation ({error!r})") from None
    jobs = jobs_of(counts)
    samples, _ = read_samples(folder / "samples.jsonl", jobs)
    if len(samples) < len(jobs):
        raise InputError(f"{out} is not finished: {len(samples)} of {len(jobs)} samples are there")
    return config, samples


def _check_same(out_a, sets_a: dict, out_b, sets_b: dict) -> None:
    for one, ours, other, theirs in (
        (out_a, sets_a, out_b, sets_b),
        (out_b, sets_b, out_a, sets_a),
    ):
        if missing := [key for key in ours if key not in theirs]:
            raise InputError(f"{one} has the set {missing[0]}, {other} has not")
    for key, entry in sets_a.items():
        for name, what in (
            ("problems", "problems"), ("samples", "samples a problem"), ("sha256", "problems"),
            ("group", "group"),
        ):  # fmt: skip
            ours, theirs = entry[name], sets_b[key][name]
            if name == "sha256" and ours != theirs:
                raise InputError(f"set {key}: {out_a} and {out_b} have other problems")
            if ours != theirs:
                raise InputError(f"set {key}: {out_a} has {ours} {what}, {out_b} has {theirs}")


def _by_problem(samples: Sequence[Sample], config: dict[str, Any]) -> dict[str, list[float]]:
    """Returns {set: accuracy of each of its problems}."""
    solved_at, found = float(config["reward"]["solved_at"]), {}
    for (key, _), rows in itertools.groupby(samples, lambda s: (s["set"], s["index"])):
        found.setdefault(key, []).append(_mean([row["reward"] >= solved_at for row in rows]))
    return found


def comparison_table(found: dict[str, Any], out_a, out_b) -> Table:
    """Returns the table of `compare`, in per cent."""
    table = Table(
        "set", "A %", "B %", "B - A", "95 % interval", "p",
        title=f"A {out_a}, B {out_b}", title_justify="left",
    )  # fmt: skip
    lines = [(entry["name"], entry) for entry in found["sets"].values()]
    lines += [(f"average, {TITLES[g].lower()}", entry) for g, entry in found["averages"].items()]
    for row, (name, entry) in enumerate(lines):
        if row == len(found["sets"]):
            table.add_section()
        low, high = (100 * x for x in entry["interval"])
        table.add_row(
            name, f"{100 * entry['a']:.1f}", f"{100 * entry['b']:.1f}",
            f"{100 * entry['difference']:+.1f}", f"{low:+.1f} .. {high:+.1f}", f"{entry['p']:.3f}",
        )  # fmt: skip
    return table


# ---- stored completions --------------------------------------------------------------------------


def agreement(rows: Sequence[dict[str, Any]], solved_at: float = 1.0) -> dict[str, Any]:
    """Returns how graded completions agree with the labels that came with them.

    Args:
      rows: {"set", "id", "gold", "reward", "answer", "correct" (None where there is no label)}.
    Returns:
      "completions", "accuracy", "labelled", "label_accuracy" and "agreement" (shares; None without
      a label), "disagreements": the rows, as they are, that were judged otherwise.
    """
    judged = [row["reward"] >= solved_at for row in rows]
    labelled = [(row, right) for row, right in zip(rows, judged, strict=True) if _labelled(row)]
    differ = [row for row, right in labelled if row["correct"] != right]
    known = len(labelled)
    return {
        "completions": len(rows),
        "accuracy": _mean(judged),
        "labelled": known,
        "label_accuracy": _mean([row["correct"] for row, _ in labelled]) if known else None,
        "agreement": 1 - len(differ) / known if known else None,
        "disagreements": differ,
    }


def _labelled(row: dict[str, Any]) -> bool:
    return row["correct"] is not None
