"""Samples a policy on benchmark sets (benchmark.py) and writes every sample down, or grades
completions that somebody stored.

A sample's key is a function of (seed, set, index of the problem, sample) alone: the file is the
same whatever the batch size, and after an interruption.
"""

import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from scope_jax.benchmark import (
    MAX_SAMPLES,
    BenchmarkSet,
    Sample,
    append_samples,
    check_gold,
    cut_file,
    final_answer,
    grade_texts,
    jobs_of,
    read_samples,
)
from scope_jax.data import decode_completions, read_rows
from scope_jax.hosts import all_hosts, on_first_host, shared_errors
from scope_jax.records import InputError, Prompts
from scope_jax.roles import Policy
from scope_jax.sampling import decoding_layout, generate
from scope_jax.sharding import fetch, host_part, put_batch


def complete_samples(
    policy: Policy,
    params,
    sets: Sequence[BenchmarkSet],
    problems: dict[str, list[dict[str, Any]]],
    file: pathlib.Path,
    *,
    seed: int,
    batch_size: int,
    reward_fn: Callable[[str, str], bool | float],
    after: str,
    **sampling,
) -> list[Sample]:
    """Draws the samples that `file` does not hold yet and appends them, batch by batch; returns all
    of them (in process 0 of several; in the others none).

    Args:
      sets: those of `problems`, {key: rows of `read_sets`}, are sampled, in their order.
      seed: of all samples.
      batch_size: samples at a time, of all processes together.
      reward_fn, after: of the grade "math"; of both, see `grade_texts`.
      sampling: max_new_tokens, temperature, slots (`generate`'s).
    Raises:
      InputError: a prompt that is too long, or a file of other samples; nothing is drawn then.
    """
    sets = [chosen for chosen in sets if chosen.key in problems]
    jobs = jobs_of({chosen.key: (len(problems[chosen.key]), chosen.samples) for chosen in sets})
    samples, size, first = [], 0, jax.process_index() == 0
    with shared_errors():
        prompts = {chosen.key: policy.tokenize(problems[chosen.key]) for chosen in sets}
        if first:
            samples, size = read_samples(file, jobs)
    on_first_host(cut_file, file, size)
    done = all_hosts(len(samples))[0]
    if done == len(jobs):
        return samples
    model, params = decoding_layout(policy.model, params, policy.decode_mesh)
    policy, console = policy._replace(model=model), Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sampling", total=len(jobs), completed=done)
        for chosen in sets:
            rows = problems[chosen.key]
            total = len(rows) * chosen.samples
            start, done = min(done, total), max(0, done - total)
            for drawn in sample_set(
                policy, params, chosen, prompts[chosen.key], start,
                seed=seed, batch_size=batch_size, **sampling,
            ):  # fmt: skip
                graded = _grade(policy, chosen, rows, drawn, reward_fn=reward_fn, after=after)
                if first:
                    append_samples(file, graded)
                    samples += graded
                bar.advance(task, len(graded))
    return samples


def sample_set(
    policy: Policy,
    params,
    chosen: BenchmarkSet,
    prompts: Prompts,
    start: int,
    *,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
    **sampling,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of one set from number `start` on, a batch at a time.

    Each is {"rows": [(index, sample)] of n samples, "texts": [n], "tokens": [n], "finished": [n],
    "fill": rows behind these that only fill the batch up}, whole in every process.
    """
    jobs = [(p, s) for p in range(len(prompts.records)) for s in range(chosen.samples)]
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(chosen.key.encode())))
    part, parts = host_part(policy.decode_mesh)
    share = batch_size // parts
    for begin in range(start, len(jobs), batch_size):
        rows = jobs[begin : begin + batch_size]
        fill = batch_size - len(rows)
        rows = rows + rows[-1:] * fill
        index = np.array([problem for problem, _ in rows])[part * share : (part + 1) * share]
        ids, mask = put_batch((prompts.ids[index], prompts.mask[index]), policy.decode_mesh)
        budgets = np.full(batch_size, max_new_tokens, np.int32)
        budgets[batch_size - fill :] = 1  # nothing waits for rows that only fill up
        rollouts = generate(
            policy.model, params, ids, mask, key, group_size=1, max_new_tokens=budgets,
            row_ids=np.array([MAX_SAMPLES * p + s for p, s in rows], np.int32),
            buffer_length=max_new_tokens, **policy.ends, **sampling,
        )  # fmt: skip
        written = (rollouts.completion_ids, rollouts.completion_mask, rollouts.finished)
        ids, mask, finished = (x[: batch_size - fill] for x in fetch(written))
        yield {
            "rows": rows[: batch_size - fill],
            "texts": decode_completions(policy.tokenizer, ids, mask),
            "tokens": mask.sum(1).tolist(),
            "finished": finished.tolist(),
            "fill": fill,
        }


def _grade(
    policy: Policy, chosen: BenchmarkSet, problems, drawn: dict[str, Any], *, reward_fn, after: str
) -> list[Sample]:
    """Returns the samples of a batch with their rewards; each process grades a part of them."""
    rows, texts = drawn["rows"], drawn["texts"]
    golds = [problems[index]["gold"] for index, _ in rows]
    part, parts = host_part(policy.decode_mesh)
    share = (len(rows) + drawn["fill"]) // parts
    mine = slice(part * share, (part + 1) * share)
    rewards = grade_texts(chosen.grade, golds[mine], texts[mine], after=after, reward_fn=reward_fn)
    if parts > 1:
        own = np.zeros(share, np.float32)
        own[: len(rewards)] = rewards
        rewards = fetch(put_batch(own, policy.decode_mesh)).tolist()[: len(rows)]
    return [
        {
            "set": chosen.key,
            "id": problems[index]["id"],
            "index": index,
            "sample": sample,
            "problem": problems[index]["problem"],
            "completion": text,
            "tokens": tokens,
            "finished": finished,
            "reward": reward,
            "answer": final_answer(chosen.grade, text, after),
        }
        for (index, sample), text, tokens, finished, reward in zip(
            rows, texts, drawn["tokens"], drawn["finished"], rewards, strict=True
        )
    ]


# ---- stored completions --------------------------------------------------------------------------


def grade_stored(
    path, sets: Sequence[BenchmarkSet], problems: dict[str, list[dict[str, Any]]], *,
    reward_fn: Callable[[str, str], bool | float], after: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns the rows of a file of completions with "reward", "answer", "gold" and "correct".

    Args:
      path: JSONL of {"id", "completion", "set" (may be left out where an id is of one set only),
        "gold" (in place of the problem's), "correct" (a label, true or false)}. A row with a "gold"
        needs no set; it is graded as "math" unless its set says otherwise.
    Raises:
      InputError: a row that names no known problem, or is none; it is named by file and line.
    """
    grades = {chosen.key: chosen.grade for chosen in sets}
    golds: dict[str, dict[str, str]] = {}  # id -> {set: gold}
    for key, rows in problems.items():
        for row in rows:
            golds.setdefault(row["id"], {})[key] = row["gold"]
    rows = read_rows(path, lambda row: _stored(row, grades, golds))
    for grade in dict.fromkeys(row["grade"] for row in rows):
        of_grade = [row for row in rows if row["grade"] == grade]
        rewards = grade_texts(
            grade, [row["gold"] for row in of_grade], [row["completion"] for row in of_grade],
            after=after, reward_fn=reward_fn,
        )  # fmt: skip
        for row, reward in zip(of_grade, rewards, strict=True):
            row["reward"] = reward
            row["answer"] = final_answer(grade, row["completion"], after)
    return rows


def _stored(row: dict, grades: dict[str, str], golds: dict[str, dict[str, str]]) -> dict[str, Any]:
    identity, key = row.get("id"), row.get("set")
    if type(identity) not in (str, int):
        raise InputError('no "id" (a text or a number)')
    identity = str(identity)
    if not isinstance(row.get("completion"), str):
        raise InputError('no "completion" text')
    if not isinstance(row.get("correct"), bool | None):
        raise InputError(f'"correct" must be true or false, got {row["correct"]!r:.40}')
    if not isinstance(key, str | None) or (key is not None and key not in grades):
        raise InputError(f'"set" {key!r:.60} is none of {", ".join(grades)}')
    gold = row.get("gold")
    if gold is None:
        known = golds.get(identity, {})
        if key is None and len(known) > 1:
            raise InputError(f'"id" {identity!r:.60} is in {" and ".join(known)}: say which "set"')
        key = next(iter(known), None) if key is None else key
        if key not in known:
            raise InputError(f'no problem has the "id" {identity!r:.60} in {key or "any set"}')
        gold = known[key]
    if not isinstance(gold, str):
        raise InputError('"gold" is not a text')
    grade = grades.get(key or "", "math")
    check_gold(gold, grade)
    return {
        "set": key,
        "id": identity,
        "completion": row["completion"],
        "gold": gold,
        "correct": row.get("correct"),
        "grade": grade,
    }
