r"""Rewards: is the final answer of a completion right?

`verify` takes the answer out of the text, decides equal strings and plain numbers on the spot and
asks math-verify (https://github.com/huggingface/Math-Verify) about the rest in worker processes:

    completion -> extract_answer -> _fast_verdict -> True / False
                                         | None (undecided)
                                         +-> pipe -> worker: math-verify -> True / False

Why processes: math-verify limits itself by `signal.alarm`, which raises outside of the main thread
and cannot interrupt one long C call (9^{9^9} freezes the interpreter). Why not `multiprocessing`:
fork is unsafe beside jax, and spawn imports the caller's `__main__`, which breaks notebooks and
scripts without a guard. A worker is this file run by its path: it imports neither the caller, nor
the package, nor jax; hence nothing but the standard library is imported up here. POSIX only.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from multiprocessing.connection import wait

MAX_CHARS = 20_000  # never more text than this is checked
MAX_NUMBER_CHARS = 40  # longer digits are no plain number; keeps Fraction cheap
MAX_BARE_CHARS = 200  # an unmarked one-line completion up to this may itself be the answer
START_SECONDS = 60.0  # `import math_verify` takes 0.7 s, on a busy machine many times that
WORKER_BYTES = 2 << 30  # address space of one worker
WORKER_CHECKS = 2000  # after so many a worker makes way for a new one: slow leaks end

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # "\\." skips escaped braces
# Shown as nothing, whatever stands beside them; not so what turns the direction of the text.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_DECIMAL = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_RATIONAL = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_FRAC = re.compile(r"([+-]?)\\frac\{([^{}]*)\}\{([^{}]*)\}")
# "72 clips" is 72: math-verify drops the units that it knows and takes c*l*i*p*s for variables.
# Words of one or two letters may be variables; those listed change the number.
_NUMBER_OF_THINGS = re.compile(
    rf"([+-]?{_DECIMAL}) ((?!(?:percent|dozen|hundred|thousand|[mb]illion|sin|cos|tan|log|and)\b)"
    r"[A-Za-z]{3,}(?: [A-Za-z]+)*)"
)

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

    Oddities of math-verify 0.9 show: units are dropped (5 cm = 5 m); 10 % equals both 10 and 0.1;
    decimals are equal when they agree to 6 places (0.333333 = 1/3); words are products of letters,
    so anagrams are equal; 1 < x < 2 as the gold equals the answer (1,2), not the other way round.

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
        truth, marked = read_gold(gold), extract_answer(completion)
        tail = completion[-MAX_CHARS:]
        answer = _normalise(tail if marked is None else marked)
        if not truth:
            raise ValueError(f"gold {i} has no answer: {gold[:80]!r}")
        verdict = _fast_verdict(truth, answer)
        if verdict is not None:
            verdicts[i] = verdict
            continue
        readings = (_as_formula(answer),)
        if marked is None:
            bare = len(answer) <= MAX_BARE_CHARS and "\n" not in completion.strip()
            readings = (tail, *readings) if bare else (tail,)
        undecided.setdefault((_as_formula(truth), readings), []).append(i)
    if undecided:
        with _LOCK:
            checked = _check_in_workers(list(undecided), num_workers, timeout)
        for rows, verdict in zip(undecided.values(), checked, strict=True):
            for i in rows:
                verdicts[i] = verdict
    return verdicts


def score_completions(
    fn: Callable[[str, str], bool | float],
    golds: Sequence[str],
    completions: Sequence[str],
    after="",
) -> list[float]:
    """Returns fn(gold, completion) of each pair as a float; `verify` runs as one batch."""
    if fn is verify:
        return [float(right) for right in verify_batch(golds, completions)]
    return [float(fn(gold, text)) for gold, text in zip(golds, completions, strict=True)]


def extract_answer(text: str) -> str | None:
    r"""Returns the last closed `\boxed{...}`, else the line after the last "####", else None.

    A box that is never closed (the completion was cut off inside it) is no box.

    >>> extract_answer(r"#### 3, or rather \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    last, answer = -1, None
    if "\\boxed" in text:
        opened: list[tuple[int, bool]] = []  # (where the content starts, is it a box)
        for token in _BOX_OR_BRACE.finditer(text):  # one pass: linear in hostile text, too
            if token[0] == "}" and opened:
                start, is_box = opened.pop()
                if is_box and start > last:
                    last, answer = start, text[start : token.start()]
            elif token[0] == "{" or token[0].startswith("\\boxed"):
                opened.append((token.end(), token[0] != "{"))
    if answer is None and "####" in text:
        answer = text[text.rindex("####") + 4 :].partition("\n")[0]
    return None if answer is None else answer.strip()


def read_gold(gold: str) -> str:
    """Returns what answers are compared with; "" if the gold holds none, which `verify` refuses."""
    marked = extract_answer(gold)
    return _normalise(gold if marked is None else marked)


def _normalise(answer: str) -> str:
    r"""Returns the answer less what never changes its meaning: $, \left, \!, spaces, U+200B."""
    if len(answer) > MAX_CHARS:
        return answer  # no real answer; `_fast_verdict` lets it equal only itself
    answer = _INVISIBLE.sub("", answer).strip().strip("*")
    answer = answer.replace("\\$", "").replace("$", "").strip()
    if answer[:2] in ("\\(", "\\[") and answer[-2:] in ("\\)", "\\]"):
        answer = answer[2:-2]
    answer = answer.replace("\\!", "").replace("{,}", ",").replace("\\%", "%").replace("−", "-")
    answer = re.sub(r"(?<!\\)\\[,;: ]", " ", answer)
    answer = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", answer)
    answer = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(r"\s+", " ", answer)
    answer = re.sub(r" ?([-+*/=^(){}<>]) ?", r"\1", answer).strip().rstrip(". ")
    words = re.fullmatch(r"\\(?:text|textbf|mathrm|mbox)\{([^{}\\]*)\}", answer)
    return words[1].strip(" .") if words else answer


def _number(answer: str) -> Fraction | None:
    """Returns the exact value of a plain decimal or fraction ("-1,234.5", "3/4"), else None."""
    match = None
    if len(answer) <= MAX_NUMBER_CHARS:
        match = _RATIONAL.fullmatch(_FRAC.sub(r"\1\2/\3", answer))
    if match is None:
        return None
    above, below = (Fraction((part or "1").replace(",", "")) for part in match.group(2, 3))
    return None if below == 0 else above / below * (-1 if match[1] == "-" else 1)


def _fast_verdict(gold: str, answer: str) -> bool | None:
    """Returns what is certain of two normalised answers without algebra; None if nothing is."""
    if not answer or gold == answer:
        return bool(answer)
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False
    gold_value, value = _number(gold), _number(answer)
    if gold_value is None or value is None:
        return None
    # math-verify rounds decimals to 6 places: near misses are left to it, so that we never differ.
    near = abs(gold_value - value) < Fraction(1, 100_000)
    return gold_value == value if gold_value == value or not near else None


def _as_formula(answer: str) -> str:
    """Returns a normalised answer as one formula, which math-verify then reads as a whole."""
    things = _NUMBER_OF_THINGS.fullmatch(answer)
    return f"${things[1]} \\text{{ {things[2]}}}$" if things else f"${answer}$"


# ---- the pool, in the caller's process -----------------------------------------------------------


class _Worker:
    """A worker process and what it is doing. Requests and replies are JSON lines on its pipes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # -P: else scope_jax/ itself heads sys.path, and our data.py could hide another one.
            [sys.executable, "-P", os.path.abspath(__file__)],
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


# ---- the worker process --------------------------------------------------------------------------


def _parse_in_two_stages() -> None:
    """Makes latex2sympy parse by ANTLR's fast prediction first; most of a check's time is parsing.

    The fast one (SLL) ends in the tree of the full one (LL) or in a syntax error
    (https://www.antlr.org/papers/allstar-techreport.pdf); after an error the full one has its turn.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    class TwoStages(latex2sympy2._Latex2Sympy):
        mode = PredictionMode.LL

        def create_parser(self, latex_str):
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = self.mode
            return parser

        def parse(self, latex_str):
            self.mode = PredictionMode.SLL
            try:
                return super().parse(latex_str)
            except Exception:  # the time limit's is a BaseException, and passes
                self.mode = PredictionMode.LL
                return super().parse(latex_str)

    latex2sympy2._Latex2Sympy = TwoStages


def _serve() -> None:
    """Answers requests [gold, readings, timeout] on stdin, until it closes: true, false, "slow"."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever sympy or antlr print must not mix with the replies

    def send(reply: str | bool) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    try:
        import math_verify
        from math_verify.errors import TimeoutException

        with contextlib.suppress(ImportError, AttributeError):  # of another version: slower
            _parse_in_two_stages()
        math_verify.parse("$\\frac{1}{2}$")  # builds the parser's tables before the clock runs
    except Exception as error:
        return send(repr(error)[:1000])
    send("ready")
    max_cpu_seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin.buffer:
        gold, readings, timeout = json.loads(line)
        start, limit = time.monotonic(), max(1, int(timeout / 2))  # below the caller's own limit
        # If the caller is killed meanwhile, only this ends a C call that would run for hours.
        cpu_seconds = int(time.process_time() + 2 * timeout) + 2
        with contextlib.suppress(ValueError):  # the user's own limit is lower
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, max_cpu_seconds))
        try:
            truth = math_verify.parse(gold, parsing_timeout=limit)
            answers = [a for r in readings for a in math_verify.parse(r, parsing_timeout=limit)]
            equal = bool(math_verify.verify(truth, answers, timeout_seconds=limit))
        except (Exception, TimeoutException):  # hostile text finds every kind of error
            equal = False
        send("slow" if not equal and time.monotonic() - start >= limit else equal)


if __name__ == "__main__":
    _serve()
