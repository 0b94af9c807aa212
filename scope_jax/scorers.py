"""Scorers: who says how right each reasoning step is.

A scorer is any function  score(requests: ScoreRequests) -> (StepScores, counts).  Scores are numpy
[B, S]; a row that could not be scored has mask False throughout, and `counts` says why:

    prm/alignment_failed    no exact text, or the PRM's tokenizer does not give it back
    prm/too_long            longer than the PRM's context or `max_length`; with windows, one of its
                            steps is longer than a window

Such a rollout is left alone: no score is not "no error".

With `window` a PRM reads a text that is too long in windows of whole steps, and `counts` has how
many these were (prm/windows). Every step is scored once, in the first window that holds it:

    problem | s0 s1 s2 s3 s4 s5                 scores s0 .. s5
    problem |          s3 s4 s5 s6 s7           s3 .. s5 fill half of the room; scores s6, s7
    problem |                s5 s6 s7 s8 s9     scores s8, s9

A later window shows the PRM a solution that begins in its middle, which it was not trained on.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from scope_jax.prm_formats import PRMInput, PRMTexts, pad_inputs
from scope_jax.records import ScoreRequests, StepScores
from scope_jax.steps import step_texts

Scorer = Callable[[ScoreRequests], tuple[StepScores, dict[str, int]]]


def oracle_scorer(check_steps, decode_steps, *, false_alarms=0.0, misses=0.0, seed=0) -> Scorer:
    """The task's exact checker: 1 for right steps, 0 for wrong ones; or one that errs as told.

    Args:
      check_steps: (gold, step texts, finished) -> list of bool, of the task.
      decode_steps: (ids, step_ends, step_mask) -> list of lists of step texts.
      false_alarms, misses: share of the right steps that are called wrong, and of the wrong ones
        that are called right. Which, is a function of the seed and of the text up to there: the
        same step is judged the same each time.
    """

    def judge(gold: str, steps: list[str], finished: bool) -> list[float]:
        verdicts, digest = [], hashlib.sha256(f"{seed}\n{gold}".encode(errors="replace"))
        for text, right in zip(steps, check_steps(gold, steps, finished), strict=True):
            digest.update(text.encode(errors="replace"))
            drawn = int.from_bytes(digest.digest()[:8], "big") / 2**64
            verdicts.append(float(right != (drawn < (false_alarms if right else misses))))
        return verdicts

    def score(requests: ScoreRequests):
        scores = np.ones(requests.step_mask.shape, np.float32)
        texts = decode_steps(requests.completion_ids, requests.step_ends, requests.step_mask)
        for row, steps in enumerate(texts):
            gold, finished = requests.records[row]["gold"], bool(requests.finished[row])
            scores[row, : len(steps)] = judge(gold, steps, finished)
        return StepScores(scores, np.asarray(requests.step_mask)), {}

    return score


class Window(NamedTuple):
    """Steps start .. end - 1 of a rollout, read together; first .. end - 1 of them are scored."""

    start: int
    first: int
    end: int


def windows_of(fixed: int, lengths: Sequence[int], window: int) -> list[Window]:
    """Returns the windows in which a solution of K steps is read, each step scored in one of them.

    A window holds the problem, of the steps before its first one as many as fit in half of the room
    that is left (fewer where that step needs more than the other half), and then as many steps as
    fit.

    Args:
      fixed: tokens that every window holds: the problem, and what stands around it.
      lengths: K, tokens of each step.
      window: tokens of a window at most.
    Returns:
      [] where a step does not fit even alone.
    """
    room, found, first = window - fixed, [], 0
    if not lengths or max(lengths) > room:
        return []
    while first < len(lengths):
        start, used = first, 0
        before = min(room // 2, room - lengths[first])
        while start and used + lengths[start - 1] <= before:
            start -= 1
            used += lengths[start]
        end = first
        while end < len(lengths) and used + lengths[end] <= room:
            used += lengths[end]
            end += 1
        found.append(Window(start, first, end))
        first = end
    return found


def join_windows(scored: StepScores, rows: int, further: Sequence[tuple[int, Window]]):
    """Returns the StepScores [rows, S] of rollouts whose further windows were scored below them.

    Args:
      scored: [rows + len(further) or more, S]; the first `rows` are of the rollouts, or of their
        first windows.
      further: the rollout and the window of each row from there on, a rollout's in their order. A
        rollout with a window that could not be scored is not scored.
    """
    scores, mask = np.array(scored.scores[:rows]), np.array(scored.mask[:rows])
    ends = {row: window.end for row, window in further}
    for at, (row, (start, first, end)) in enumerate(further, rows):
        scores[row, first:end] = scored.scores[at, first - start : end - start]
        mask[row, first:end] = scored.mask[at, first - start : end - start]
    for row, end in ends.items():
        mask[row] &= mask[row, :end].all()
    return StepScores(np.where(mask, scores, 0).astype(np.float32), mask)


def filling(further: int, rows: int, block: int, most: Callable[[int], int]) -> int:
    """Returns how many empty rows make `further` rows whole blocks, as many in every process: a
    forward of another shape would be compiled anew, and processes compute together.
    """
    block = min(block or rows, rows)
    return -(-most(further) // block) * block - further


def token_scorer(
    score_fn, *, max_length: int, window: int = 0, block: int = 0, most: Callable[[int], int] = int
) -> Scorer:
    """A PRM that reads the policy's own tokens: each step at its last one, nothing tokenised again.

    Args:
      score_fn: (ids, mask [R, L], score_positions, step_mask [R, S]) -> StepScores on the host;
        `prm.score_steps` with the PRM bound.
      max_length: of prompt and completion together, in tokens.
      window: tokens of a window in which what is longer is read; 0 = it is not read.
      block: rows of a forward; 0 = all that are scored.
      most: the most of a number in any process.
    """

    def score(requests: ScoreRequests):
        prompt_width = requests.prompt_ids.shape[1]
        ids = np.concatenate([requests.prompt_ids, requests.completion_ids], axis=1)
        mask = np.concatenate([requests.prompt_mask, requests.completion_mask], axis=1)
        last_token = prompt_width + requests.step_ends - 1
        read_at = np.where(requests.step_mask, last_token, 0).astype(np.int32)
        too_long = requests.step_mask.any(1) & (mask.sum(1) > max_length)
        counts = {"prm/alignment_failed": 0}
        if not window:
            scored = score_fn(ids, mask, read_at, requests.step_mask & ~too_long[:, None])
            return scored, counts | {"prm/too_long": int(too_long.sum())}
        columns = (ids, mask, read_at, np.array(requests.step_mask))
        further: list[tuple[int, Window]] = []
        read: list[tuple[np.ndarray, ...]] = []
        counts |= {"prm/too_long": 0, "prm/windows": 0}
        for row in np.flatnonzero(too_long):
            ends = np.asarray(requests.step_ends[row])[requests.step_mask[row]]
            fixed = int(requests.prompt_mask[row].sum())
            windows = windows_of(fixed, np.diff(ends, prepend=0).tolist(), window)
            counts["prm/too_long"] += not windows
            counts["prm/windows"] += len(windows)
            rows = [_cut_tokens([c[row] for c in columns], prompt_width, ends, w) for w in windows]
            further += [(int(row), w) for w in windows[1:]]
            read += rows[1:]
            for column, first in zip(columns, rows[0] if rows else (0, 0, 0, 0), strict=True):
                column[row] = first
        empty = filling(len(further), len(ids), block, most)
        read += [tuple(np.zeros_like(c[0]) for c in columns)] * empty
        below = [np.stack([r[i] for r in read]) for i in range(4)] if read else []
        if below:
            columns = [np.concatenate(pair) for pair in zip(columns, below, strict=True)]
        return join_windows(score_fn(*columns), len(ids), further), counts

    return score


def _cut_tokens(columns, prompt_width: int, ends: np.ndarray, window: Window):
    """Returns ids, mask [L], score_positions, step_mask [S] of one window of a row's tokens."""
    ids, mask, read_at, step_mask = (np.zeros_like(column) for column in columns)
    start, end = (int(ends[window.start - 1]) if window.start else 0), int(ends[window.end - 1])
    ids[:prompt_width], mask[:prompt_width] = columns[0][:prompt_width], columns[1][:prompt_width]
    ids[prompt_width : prompt_width + end - start] = columns[0][prompt_width:][start:end]
    mask[prompt_width : prompt_width + end - start] = True
    steps = window.end - window.start
    read_at[:steps] = prompt_width + ends[window.start : window.end] - start - 1
    step_mask[:steps] = True
    return ids, mask, read_at, step_mask


def text_scorer(
    score_fn, layout: PRMTexts, policy_tokenizer, *, max_length: int, window: int = 0,
    block: int = 0, most: Callable[[int], int] = int,
) -> Scorer:  # fmt: skip
    """A PRM with its own tokenizer and layout: reads the exact texts of the policy's steps.

    Args:
      score_fn, window, block, most: as `token_scorer`'s.
      layout: of the PRM.
      policy_tokenizer: a transformers tokenizer.
      max_length: L, the static width of what the PRM reads.
    """

    def score(requests: ScoreRequests):
        texts = step_texts(
            policy_tokenizer, requests.completion_ids, requests.completion_mask,
            requests.step_ends, requests.step_mask,
        )  # fmt: skip
        counts = {"prm/alignment_failed": 0, "prm/too_long": 0}
        counts |= {"prm/windows": 0} if window else {}
        inputs: list[PRMInput | None] = []
        further: list[tuple[int, Window]] = []
        below: list[PRMInput | None] = []
        with_steps = [bool(row.any()) for row in requests.step_mask]
        for record, steps, has_steps in zip(requests.records, texts, with_steps, strict=True):
            item = layout(record["problem"], steps) if has_steps and steps else None
            counts["prm/alignment_failed"] += bool(has_steps and item is None)
            if item is not None and steps and len(item.ids) > max_length:
                read = _cut_texts(layout, record["problem"], steps, item, window) if window else []
                item = read[0][1] if read else None
                counts["prm/too_long"] += item is None
                if window:
                    counts["prm/windows"] += len(read)
                further += [(len(inputs), w) for w, _ in read[1:]]
                below += [cut for _, cut in read[1:]]
            inputs.append(item)
        below += [None] * filling(len(below), len(inputs), block, most) if window else []
        batch = pad_inputs(
            [*inputs, *below], width=max_length, num_steps=requests.step_mask.shape[1]
        )
        scored = score_fn(**batch)
        return join_windows(scored, len(inputs), further) if window else scored, counts

    return score


def _cut_texts(
    layout: PRMTexts, problem: str, steps: list[str], item: PRMInput, window: int
) -> list[tuple[Window, PRMInput]]:
    """Returns the windows of a text, each laid out like a text of its own; [] if one is too long.

    Args:
      item: all of the text, laid out.
    """
    rest = layout(problem, steps[1:])
    if rest is None:  # its only step is too long
        return []
    first = len(item.ids) - len(rest.ids)
    lengths = [first, *np.diff(item.reads).tolist()]
    found = []
    for cut in windows_of(len(item.ids) - sum(lengths), lengths, window):
        read = layout(problem, steps[cut.start : cut.end])
        # A tokenizer may join what a window cuts apart: what is longer than planned is not read.
        if read is None or len(read.ids) > window:
            return []
        found.append((cut, read))
    return found
