r"""Rewards: is the final answer of a completion right?

`verify` takes the answer out of the text, decides on the spot what needs no algebra (equal strings,
plain numbers, words, units that differ) and asks math-verify
(https://github.com/huggingface/Math-Verify) about the rest in worker processes:

    completion -> extract_answer -> compare -> True / False
                                      | both answers, rewritten (undecided)
                                      +-> pipe -> worker: math-verify -> True / False

Why processes: math-verify limits itself by `signal.alarm`, which raises outside of the main thread
and cannot interrupt one long C call (9^{9^9} freezes the interpreter). Why not `multiprocessing`:
fork is unsafe beside jax, and spawn imports the caller's `__main__`, which breaks notebooks and
scripts without a guard. A worker is answer_worker.py run by its path: it imports neither the
caller, nor the package, nor jax. POSIX only.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

from scope_jax import answer_worker
from scope_jax.answers import (
    MAX_CHARS,
    as_formula,
    compare,
    extract_answer,
    find_choice,
    normalise,
    read_choice,
    read_gold,
    rewrite,
)

MAX_BARE_CHARS = 200  # an unmarked one-line completion up to this may itself be the answer
START_SECONDS = 60.0  # `import math_verify` takes 0.7 s, on a busy machine many times that
WORKER_CHECKS = 2000  # after so many a worker makes way for a new one: slow leaks end

_Request = tuple[str, tuple[str, ...]]  # the gold and the ways to read the answer, for math-verify


@dataclasses.dataclass
class VerifierStats:
    """Counts since the process started, for logging."""

    checked: int = 0  # pairs that were given to a worker
    timeouts: int = 0  # of these: ran into a time limit and were scored False
    failed: int = 0  # of these: their worker died twice over them; scored False
    crashes: int = 0  # workers that died
    recycled: int = 0  # workers that made way for a new one after WORKER_CHECKS checks


_STATS = VerifierStats()
_POOL: list["_Worker"] = []
_LOCK = threading.Lock()  # one batch at a time owns the pool


def verifier_stats() -> VerifierStats:
    """Returns a copy of the counters."""
    return dataclasses.replace(_STATS)


def verifier_counts(since: VerifierStats) -> dict[str, int]:
    """Returns {"verify/timeouts", "verify/failed", "verify/crashes"} since an earlier copy."""
    names = ("timeouts", "failed", "crashes")
    return {f"verify/{name}": getattr(_STATS, name) - getattr(since, name) for name in names}


def verify(gold: str, completion: str) -> bool:
    r"""Returns whether the completion's final answer equals the gold answer.

    The answer is what stands in the last closed `\boxed{...}`, else what follows the last "####" on
    its line, else what math-verify finds in the text (its last 20,000 characters). The gold is read
    by the same rules, so a GSM8K solution ("... #### 72") or a boxed one will do; without a mark
    the whole gold is the answer. An empty answer is wrong; so is a check that timed out or crashed.

    Equal are equal values in any notation: (1,2) and 1 < x < 2, 5 m and 500 cm, a column and (a,b),
    3, 5 and {5,3}. A unit, a percent sign or a base may be left out, but not changed: 5 cm is 5,
    not 5 m; 52_8 is 52, not 52_9; 10 % is 0.1, and 10 as well. {1,2}, (1,2) and [1,2] differ. Words
    are compared as words, in any case; i is the imaginary unit. Rules of math-verify 0.9 that stay:
    a decimal of 6 places or more equals what it rounds (0.333333 = 1/3), capital letters are small
    ones, [1,2,3] is (1,2,3). In a text without a box or "####" its own reading counts, by which
    units are nothing and words are products. tests/answer_pairs.py shows each of these.

    Raises:
      ValueError: the gold answer is empty: an error of the data, not of the completion.
      ImportError: math-verify is needed and missing.
    """
    return verify_batch([gold], [completion])[0]


def verify_batch(
    golds: Sequence[str],
    completions: Sequence[str],
    *,
    num_workers: int = 2,
    timeout: float = 5.0,
) -> list[bool]:
    """Returns `verify(gold, completion)` of each pair. Equal pairs are checked once.

    Args:
      golds: one gold per completion.
      completions: as many texts.
      num_workers: processes to use at most; they start when first needed and stay for later calls.
      timeout: seconds that a worker may take over one pair before it is killed and replaced.
    Raises:
      ValueError: different lengths, an empty gold, or no worker or no time to check with.
      ImportError, RuntimeError: the workers cannot start.
    """
    if len(golds) != len(completions):
        raise ValueError(f"{len(golds)} golds for {len(completions)} completions")
    if num_workers < 1 or timeout <= 0:
        raise ValueError(f"{num_workers=} and {timeout=} must be positive")
    verdicts = [False] * len(golds)
    undecided: dict[_Request, list[int]] = {}
    for i, (gold, completion) in enumerate(zip(golds, completions, strict=True)):
        marked, tail = extract_answer(completion), completion[-MAX_CHARS:]
        if not read_gold(gold):
            raise ValueError(f"gold {i} has no answer: {gold[:80]!r}")
        of_gold = extract_answer(gold)
        of_gold = gold if of_gold is None else of_gold
        # An unmarked short line may itself be the answer, but need not: only a few words must.
        bare = len(tail) <= MAX_BARE_CHARS and "\n" not in completion.strip()
        verdict = compare(of_gold, tail if marked is None else marked)
        if verdict is True or (verdict is False and (marked is not None or len(tail.split()) < 4)):
            verdicts[i] = verdict
            continue
        truth, answer = (
            (normalise(of_gold), normalise(tail)) if isinstance(verdict, bool) else verdict
        )
        readings = (as_formula(answer),)
        if marked is None:
            truth, readings = rewrite(normalise(of_gold)), (tail, *readings[:bare])
        undecided.setdefault((as_formula(truth), readings), []).append(i)
    if undecided:
        with _LOCK:
            checked = _check_in_workers(list(undecided), num_workers, timeout)
        for rows, verdict in zip(undecided.values(), checked, strict=True):
            for i in rows:
                verdicts[i] = verdict
    return verdicts


def verify_choice(gold: str, completion: str) -> bool:
    r"""Returns whether a multiple-choice completion names the gold's option, one letter of A to J.

    The completion's choice is the letter in its last closed box, however it is spelled there
    (`\boxed{C}`, `\boxed{\text{(C)}}`, `\boxed{C. 12 m}`, ...). Without a box it is what the last
    line says in so many words ("The answer is (C)."). More than one letter is no choice.

    Raises:
      ValueError: the gold, a bare or boxed letter, is none.
    """
    truth = read_choice(gold)
    if truth is None:
        raise ValueError(
            f"the gold of a multiple-choice problem is no letter A to J: {gold[:80]!r}"
        )
    return find_choice(completion) == truth


def score_completions(
    fn: Callable[[str, str], bool | float],
    golds: Sequence[str],
    completions: Sequence[str],
    *,
    after: str = "",
) -> list[float]:
    """Returns fn(gold, completion) of each pair as a float; `verify` runs as one batch.

    Args:
      fn: e.g. `verify` or `verify_choice`.
      golds: one gold per completion.
      completions: as many texts.
      after: e.g. "</think>": only the text behind its last occurrence is checked, and a completion
        without it is worth 0, unchecked. "": the whole text is.
    """
    if len(golds) != len(completions):
        raise ValueError(f"{len(golds)} golds for {len(completions)} completions")
    kept = [i for i, text in enumerate(completions) if after in text]
    golds = [golds[i] for i in kept]
    texts = [completions[i].rpartition(after)[2] if after else completions[i] for i in kept]
    if fn is verify:
        found = verify_batch(golds, texts)
    else:
        found = [fn(gold, text) for gold, text in zip(golds, texts, strict=True)]
    scores = [0.0] * len(completions)
    for i, score in zip(kept, found, strict=True):
        scores[i] = float(score)
    return scores


# ---- the pool, in the caller's process -----------------------------------------------------------


class _Worker:
    """A worker process and what it is doing. Requests and replies are JSON lines on its pipes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # -P: else scope_jax/ itself heads sys.path, and our data.py could hide another one.
            [sys.executable, "-P", os.path.abspath(answer_worker.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the caller only, who then ends the workers
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout.fileno()
        self.ready, self.job, self.checks = False, None, 0
        self.deadline = time.monotonic() + START_SECONDS

    def send(self, job: int, request: _Request, timeout: float) -> None:
        self.job, self.deadline = job, time.monotonic() + timeout
        self.checks += 1
        with contextlib.suppress(BrokenPipeError):  # it died: seen when its reply is read
            self.requests.write(json.dumps([*request, timeout]).encode() + b"\n")
            self.requests.flush()

    def receive(self) -> str | bool | None:
        """Returns the reply that `wait` announced; None: the process has ended."""
        line = os.read(self.replies, 4096)  # a reply is one short line, written at once
        return json.loads(line) if line else None

    def kill(self) -> None:
        with contextlib.suppress(BrokenPipeError), self.process:  # closes the pipes, then waits
            self.process.kill()
        _POOL.remove(self)


def _check_in_workers(requests: list[_Request], num_workers: int, timeout: float) -> list[bool]:
    """Returns math-verify's verdicts. A worker that hangs or dies costs its own pair only."""
    verdicts = [False] * len(requests)
    todo = collections.deque(range(len(requests)))
    retried: set[int] = set()
    failed_starts = 0
    _STATS.checked += len(requests)
    # Died since the last call, or not our children: we were forked, and they answer to the parent.
    for worker in [w for w in _POOL if w.process.poll() is not None]:
        _STATS.crashes += 1
        worker.kill()
    try:
        while todo or any(w.job is not None for w in _POOL):
            needed = len(todo) + sum(w.job is not None for w in _POOL)
            while len(_POOL) < min(num_workers, needed):
                _POOL.append(_Worker())
            _recycle(num_workers)
            for worker in _POOL[:num_workers]:
                if todo and worker.ready and worker.job is None:
                    job = todo.popleft()
                    worker.send(job, requests[job], timeout)
            pending = [w for w in _POOL if w.job is not None or not w.ready]
            seconds = min(w.deadline for w in pending) - time.monotonic()
            answered = wait([w.replies for w in pending], max(0.0, seconds))
            for worker in pending:
                if worker.replies in answered:
                    reply = worker.receive()
                elif time.monotonic() >= worker.deadline:
                    reply = "timeout"
                else:
                    continue
                job, worker.job = worker.job, None
                if reply in (None, "timeout"):
                    worker.kill()
                if job is None:
                    failed_starts = _started(worker, reply, failed_starts)
                elif reply is None:
                    _STATS.crashes += 1
                    if job not in retried:  # once more in another worker: it may be innocent
                        retried.add(job)
                        todo.appendleft(job)
                    else:
                        _STATS.failed += 1
                else:
                    verdicts[job] = reply is True
                    _STATS.timeouts += reply in ("timeout", "slow")
        return verdicts
    finally:  # after an exception or Ctrl-C no later call may read the reply to one of our pairs
        for worker in [w for w in _POOL if w.job is not None]:
            worker.kill()


def _recycle(num_workers: int) -> None:
    """Lets one worn worker go. It works on until the spare one that replaces it is ready."""
    worn = next((w for w in _POOL[:num_workers] if w.checks >= WORKER_CHECKS), None)
    if worn is None:
        return
    if len(_POOL) <= num_workers:
        _POOL.append(_Worker())  # gets no pair before it moves up into the first `num_workers`
    elif worn.job is None and _POOL[num_workers].ready:
        worn.kill()
        _STATS.recycled += 1


def _started(worker: _Worker, reply: str | bool | None, failed_starts: int) -> int:
    """Takes a worker's first reply; returns the number of starts that failed in a row."""
    if reply == "ready":
        worker.ready = True
        return 0
    if reply not in (None, "timeout"):
        worker.kill()
        raise ImportError(f"checking answers needs math-verify (pip install math-verify): {reply}")
    if failed_starts == 2:
        raise RuntimeError(f"3 answer-checking workers ({sys.executable}) died or hung at start")
    return failed_starts + 1


@atexit.register
def _stop_workers() -> None:
    for worker in list(_POOL):
        worker.kill()
