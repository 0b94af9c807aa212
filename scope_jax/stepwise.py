"""Step-wise correction: a teacher writes ONE step, the policy goes on from it, round by round.

    sampled     p p p|w w w w E          first wrong step at |
    round 1     p p p t t q q|x x E      t: the teacher's step; the policy goes on, x is wrong
    round 2     p p p t t q q t t q q E  until the verifier has it right, or rounds run out

A teacher made of a teacher: what it returns is spliced like any other continuation, and each token
says who wrote it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from scope_jax.hosts import all_hosts
from scope_jax.records import POLICY, TEACHER, Continuations, CorrectionRequests

Continue = Callable[[CorrectionRequests, jax.Array], Continuations]


def correct_stepwise(
    requests: CorrectionRequests,
    key: jax.Array,
    *,
    teach: Continue,
    go_on: Continue,
    first_end: Callable,
    judge: Callable,
    max_rounds: int,
    policy_eos_id: int,
) -> Continuations:
    """Returns continuations in which the teacher wrote single steps and the policy the rest.

    A row has another round if it ended, is not right, and its first wrong step begins behind the
    step that the teacher wrote last: what was corrected is not corrected again.

    Args:
      requests: C rows of at most T tokens, on the host.
      teach: the teacher; of what it writes the first step counts.
      go_on: the policy, with the weights that sampled; its log-probs are those of the ratio.
      first_end: (ids, mask [C, U]) -> [C] int, where the first step of each row ends.
      judge: (requests with the rows as they are, mask [C, T], finished [C]) -> (right [C] bool,
        cut [C] int32, tokens before the first wrong step, -1 where none is known).
      policy_eos_id: last token of a row that ended.
    Returns:
      `Continuations` [C, T] with `source`; `stopped` where the row ended, whoever ended it. Counts:
      the teacher's own, "teacher/rounds" and "teacher/policy_tokens", all that the policy wrote.
    """
    rows, width = requests.prefix_ids.shape
    start = np.array(requests.prefix_length)
    ids, cut, length = np.array(requests.prefix_ids), start.copy(), start.copy()
    source, logps = np.full(ids.shape, POLICY, np.int8), np.zeros(ids.shape, np.float32)
    ended, opened = np.zeros(rows, bool), np.asarray(requests.budgets) > 0
    counts = collections.Counter({"teacher/rounds": 0, "teacher/policy_tokens": 0})

    def ask(writer: Continue, at, wanted, key) -> Continuations:
        at = np.where(wanted, at, 0).astype(np.int32)
        budgets = np.where(wanted, width - at, 0).astype(np.int32)
        cut = {"prefix_ids": ids, "prefix_length": at, "budgets": budgets}
        return writer(dataclasses.replace(requests, **cut), key)

    def place(row: int, written: Continuations, count: int, who: int) -> None:
        """Puts a row's first `count` new tokens behind its `length`."""
        at = slice(length[row], length[row] + count)
        ids[row, at], source[row, at] = written.ids[row, :count], who
        logps[row, at] = written.logps[row, :count]
        length[row] = at.stop

    for step_key, own_key in _round_keys(key, max_rounds):
        if not any(all_hosts(bool(opened.any()))):
            break
        counts["teacher/rounds"] += int(opened.sum())
        step = ask(teach, cut, opened, step_key)
        counts.update(step.counts or {})
        ends = np.minimum(first_end(step.ids, step.mask), np.asarray(step.mask).sum(1))
        for row in np.flatnonzero(opened).tolist():
            length[row], ended[row] = cut[row], False
            place(row, step, int(ends[row]), TEACHER)
            ended[row] = ends[row] > 0 and ids[row, length[row] - 1] == policy_eos_id
        opened &= ends > 0
        behind, goes_on = length.copy(), opened & ~ended & (length < width)
        own = ask(go_on, length, goes_on, own_key)
        for row in np.flatnonzero(goes_on).tolist():
            count = int(np.asarray(own.mask)[row].sum())
            place(row, own, count, POLICY)
            ended[row] = own.stopped[row]
            counts["teacher/policy_tokens"] += count
        mask = np.arange(width)[None, :] < length[:, None]
        whole = dataclasses.replace(requests, prefix_ids=ids, prefix_length=length)
        right, cut = judge(whole, mask, ended)
        opened &= ended & ~right & (cut >= behind)
    return _behind(start, length, ids, source, logps, ended & (length > start), dict(counts))


@functools.partial(jax.jit, static_argnums=1)
def _round_keys(key, rounds: int):
    """Returns (teacher's, policy's) keys of each round, in one program."""
    return [tuple(jax.random.split(jax.random.fold_in(key, i))) for i in range(rounds)]


def _behind(start, length, ids, source, logps, stopped, counts) -> Continuations:
    """Returns rows [C, T] less their first `start` tokens."""
    index = np.minimum(start[:, None] + np.arange(ids.shape[1])[None, :], ids.shape[1] - 1)
    mask = np.arange(ids.shape[1])[None, :] < (length - start)[:, None]
    shifted = lambda x: np.where(mask, np.take_along_axis(x, index, axis=1), 0)  # noqa: E731
    of_token = {"logps": shifted(logps), "source": shifted(source).astype(np.int8)}
    return Continuations(shifted(ids), mask, stopped=stopped, counts=counts, **of_token)
