r"""Where an expert's written solution (a trace) goes on behind the policy's own kept steps.

    trace    48/2 = 24 in May.|48+24 = 72 in all.|#### 72
    kept     She sold half of 48, 24, in May.\n
    goes on                   |48+24 = 72 in all.|#### 72

By the results that the trace states, where it is written as GSM8K's are ("<<48/2=24>>" notes, a
last "#### answer"), by similarity of the steps otherwise. What cannot be placed is not continued: a
wrong place would teach a solution that repeats itself, or leaps.
"""

import collections
import re

import numpy as np

from scope_jax.steps import Splitter, segment_steps

# Two steps are taken for the same from this similarity on. Both constants were chosen with
# experiments/check_trace_alignment.py.
MIN_SIMILARITY = 0.6
FORMULA_WEIGHT = 5.0  # of a number, variable or LaTeX command; a word or operator weighs 1

_NOTE = re.compile(r"<<([^<>]*)>>")  # GSM8K's calculator notes: 48/2 = <<48/2=24>>24
_ANSWER = re.compile(r"(?:^|\n)####[^\n]*$")  # its last line: #### 72
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_CLAUSE = re.compile(r"\n|[.,;:!?](?=\s|$)|\band\b")  # what lies between is a clause
_TOKEN = re.compile(r"\\[A-Za-z]+|\d[\d,]*(?:\.\d+)?|[^\W\d_]+|[-+*/=^<>]")


def align_trace(
    trace: str,
    prefix: str,
    *,
    problem: str = "",
    splitter: Splitter = "\n\n",
    min_similarity: float = MIN_SIMILARITY,
) -> list[str] | None:
    r"""Returns the steps of a trace that go on behind a prefix.

    They are the trace's last steps, so they add up to an end of it: [] if the prefix has all of
    them, None if it is not known which it has. Behind an empty prefix they are all steps.

    With stated results a step is a line. Those up to the last whose result the prefix has are left
    out; of the prefix's results, if it has any, at least half must be the trace's. By similarity
    the last kept step must be a step of the trace. Either way those that are the trace's must come
    in its order, and pass over no more of its steps than they reach.

    >>> align_trace("48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72.", "24 in May")
    ['48+24 = 72.']
    >>> align_trace("48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72.", "99 in May")

    Args:
      trace: a worked solution; its calculator notes are taken out.
      prefix: text of the kept steps.
      problem: numbers of its text are no results, unless they follow "=".
      splitter: of the policy's steps; a trace with no such place is cut into lines.
      min_similarity: see `similarity`.
    """
    trace = trace.strip()
    has_results = _NOTE.search(trace) is not None or _ANSWER.search(trace) is not None
    noted = split_text(trace, "\n" if has_results else splitter)
    noted = noted if len(noted) > 1 else split_text(trace, "\n")
    steps = [_NOTE.sub("", step) for step in noted]
    if not prefix.strip():
        return steps
    if not has_results:
        kept = split_text(_NOTE.sub("", prefix), splitter)
        start = _after_similar(steps, kept, min_similarity)
        return None if start is None else steps[start:]
    found = stated_results(prefix, problem)
    start = _after_results([step_result(step) for step in noted], found)
    if start is None:
        return None
    rest = steps[start:]
    concluded = rest and rest[0].startswith("####") and "####" in prefix
    return [] if concluded else rest


def split_text(text: str, splitter: Splitter) -> list[str]:
    r"""Returns the reasoning steps of a text, cut as `segment_steps` cuts a completion.

    >>> split_text("a\n\nb\n\n", "\n\n")
    ['a\n\n', 'b\n\n']
    """
    ids = np.array([list(map(ord, text))], np.int32)
    (ends,), (real,) = segment_steps(_CodePoints, ids, np.ones(ids.shape, bool), splitter)
    bounds = [0, *ends[real].tolist()]
    return [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


class _CodePoints:
    """The tokenizer whose ids are code points."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))


def read_trace(solution: str, *, thinking: bool) -> str:
    r"""Returns what a policy could have written of a solution in R1's form.

    That is "<think>\n..thought..\n</think>\n\n..answer..". A policy that thinks (its prompt or its
    completion opened the tag) goes on in the thought; another one gets the answer alone. A thought
    that never ends gives "". Text without tags stays as it is.

    >>> read_trace("<think>\nTry 3.\n</think>\n\nIt is 3.", thinking=False)
    'It is 3.'
    """
    thought, closed, answer = solution.partition("</think>")
    if not closed:
        return "" if "<think>" in solution else solution
    if thinking:
        return thought.strip().removeprefix("<think>").lstrip() + "\n" + closed + answer
    return answer.strip()


# ------------------------------------------------------------------------------ by results


def step_result(step: str) -> float | None:
    """Returns the result of a line: that of its last calculator note, else its last number. None
    where there is none, and for a "#### answer" line, which concludes.
    """
    notes = _NOTE.findall(step)
    numbers = _numbers(notes[-1].rpartition("=")[2] if notes else step)
    return numbers[-1] if numbers and not step.startswith("####") else None


def stated_results(text: str, problem: str = "") -> list[float]:
    """Returns the results that a text states, in order: numbers that follow "=" and no operator
    follows, and the last number of a clause that is neither an operand nor the problem's own.

    >>> stated_results("He has 48/2 = 24. So 24+48 is 72 clips, of 48/2", "He has 48")
    [24.0, 72.0]
    """
    given, results = set(_numbers(problem)), []
    for clause in _CLAUSE.split(_NOTE.sub("", text)):
        found = list(_NUMBER.finditer(clause))
        for number in found:
            before, after = clause[: number.start()].rstrip(" $€£"), clause[number.end() :].strip()
            value = _numbers(number.group())[0]
            equals = before.endswith("=") and not after.startswith(tuple("+-*/×^"))
            minus = number.group().startswith("-") and before[-1:].isalnum()
            operand = before.endswith(tuple("+-*/×^")) or minus
            last = number is found[-1] and not operand and value not in given
            results += [value] if equals or last else []
    return results


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def _after_results(results: list[float | None], found: list[float]) -> int | None:
    lines = [line for line, result in enumerate(results) if result is not None]
    places = [[i for i, line in enumerate(lines) if results[line] == value] for value in found]
    reached, foreign = _walk(places), sum(not steps for steps in places)
    if not reached or 2 * foreign > len(found):
        return None if found else 0  # a prefix without any result has none of the trace's
    return lines[reached - 1] + 1


# ------------------------------------------------------------------------------ by similarity


def similarity(one: str, other: str) -> float:
    """Returns how much of two steps is the same, 0 to 1: twice the weight of the tokens that they
    share over the weight of all they have. Order does not count; formulas weigh more than words.

    >>> round(similarity("So x = 4", "Then x = 4"), 2), round(similarity("So x = 4", "So x = 5"), 2)
    (0.92, 0.58)
    """
    return _overlap(_weights(one), _weights(other))


def _weights(step: str) -> dict[str, float]:
    """Returns the weight of each distinct token of a step."""
    weights: dict[str, float] = collections.defaultdict(float)
    for token in _TOKEN.findall(step.lower()):
        variable = len(token) == 1 and token.isalpha() and token not in "ai"  # "a" is a word
        formula = variable or token[0] in "\\0123456789"
        weights[token.replace(",", "")] += FORMULA_WEIGHT if formula else 1.0
    return weights


def _overlap(one: dict[str, float], other: dict[str, float]) -> float:
    small, large = sorted((one, other), key=len)
    shared = sum(min(weight, large.get(token, 0.0)) for token, weight in small.items())
    total = sum(one.values()) + sum(other.values())
    return 2 * shared / total if total else 0.0


def _after_similar(steps: list[str], kept: list[str], least: float) -> int | None:
    weights, places = [_weights(step) for step in steps], []
    for step in kept:
        own = _weights(step)
        scores = np.array([_overlap(own, other) for other in weights])
        near = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] >= least]
        places.append(near)
    return _walk(places) if places and places[-1] else None


def _walk(places: list[list[int]]) -> int | None:
    """Walks along a trace and returns the step behind the last one reached. None where a piece can
    only be a step that was passed over (another order than the trace's), or where more steps were
    passed over than reached: one equal number is no evidence for a leap.

    Args:
      places: for each piece of the prefix the steps that it may be, the likeliest first. The next
        step goes before all; a piece that may be a step already reached says that one again.
    """
    position, reached = 0, set()
    for steps in filter(None, places):
        ahead = [step for step in steps if step >= position]
        if position not in ahead and reached.intersection(steps):
            continue
        if not ahead:
            return None
        place = position if position in ahead else ahead[0]
        reached.add(place)
        position = place + 1
    return position if 2 * len(reached) >= position else None
