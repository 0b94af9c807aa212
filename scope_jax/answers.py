r"""Answers as text: finds them in completions, writes them in one way, reads plain numbers.

    completion -> extract_answer -> normalise -> fast_verdict -> True / False / None (undecided)

`scope_jax.answer_forms` compares what stays undecided, and the grading of multiple choice is here.
Nothing but the standard library is imported, and no pattern takes more than linear time on hostile
text of MAX_CHARS.
"""

import re
from fractions import Fraction

MAX_CHARS = 20_000  # never more text than this is checked
MAX_NUMBER_CHARS = 40  # longer digits are no plain number; keeps Fraction cheap

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # "\\." skips escaped braces
# Shown as nothing, whatever stands beside them; not so what turns the direction of the text.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_DECIMAL = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_RATIONAL = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_FRAC = re.compile(r"^([+-]?)\\frac\{([^{}]*)\}\{([^{}]*)\}")
_MIXED = re.compile(r"([+-]?)([0-9]+)(?: ?\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
# What dresses an option's letter: \text{(C)} and **C** are (C) and C.
_DRESS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt)|boldsymbol|mbox|bf|rm|left|right)"
    r"(?![A-Za-z])|\\[,;: ()\[\]]|[${}*~]"
)
_OPTION = re.compile(
    r"(?:(?:option|choice|answer)(?: is|:)? )?"
    r"(?:\(([A-J])\)|\[([A-J])\]|([A-J])(?=$|[):;]|[.,](?: |$)))[):;.]?",
    re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"(?i:[,;/&]|and\b|or\b)+ ?(?:\([A-Ja-j]\)|[A-J](?![A-Za-z]))|\(?[A-Ja-j]\)?\.?$"
)
_SAYS = re.compile(r"\b(?:answer|option|choice)(?: is:?|:) ?", re.IGNORECASE)


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
    return normalise(gold if marked is None else marked)


def normalise(answer: str) -> str:
    r"""Returns the answer less what never changes its meaning: $, \left, \!, spaces, U+200B."""
    if len(answer) > MAX_CHARS:
        return answer  # no real answer; `fast_verdict` lets it equal only itself
    answer = _INVISIBLE.sub("", answer).strip().strip("*")
    answer = answer.replace("\\$", "").replace("$", "").strip()
    if answer[:2] in ("\\(", "\\[") and answer[-2:] in ("\\)", "\\]"):
        answer = answer[2:-2]
    answer = re.sub(r",\\! *(?=[0-9]{3})", ",", answer)  # 11,\! 111 as MATH writes it
    answer = answer.replace("\\!", "").replace("{,}", ",").replace("\\%", "%").replace("−", "-")
    answer = re.sub(r"(?<!\\)\\[,;: ]", " ", answer)
    answer = re.sub(r"\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])", "", answer)
    answer = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(r"\s+", " ", answer)
    answer = re.sub(r" ?([-+*/=^(){}<>]) ?", r"\1", answer).strip().rstrip(". ")
    words = re.fullmatch(r"\\(?:text|textbf|mathrm|mbox)\{([^{}\\]*)\}", answer)
    return words[1].strip(" .") if words else answer


def number(answer: str) -> Fraction | None:
    """Returns the exact value of a decimal, a fraction or a mixed number ("1 3/4"), else None."""
    if len(answer) > MAX_NUMBER_CHARS:
        return None
    mixed = _MIXED.fullmatch(answer)
    if mixed:
        sign, whole, above, below = (part for part in mixed.groups() if part is not None)
        value = int(whole) + Fraction(int(above), int(below)) if int(below) else None
        return value if value is None or sign != "-" else -value
    match = _RATIONAL.fullmatch(_FRAC.sub(r"\1\2/\3", answer))
    if match is None:
        return None
    above, below = (Fraction((part or "1").replace(",", "")) for part in match.group(2, 3))
    return None if below == 0 else above / below * (-1 if match[1] == "-" else 1)


def fast_verdict(gold: str, answer: str) -> bool | None:
    """Returns what is certain of two normalised answers without algebra; None if nothing is."""
    if not answer or gold == answer:
        return bool(answer)
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False
    gold_value, value = number(gold), number(answer)
    if gold_value is None or value is None:
        return None
    # math-verify rounds decimals to 6 places: near misses are left to it, so that we never differ.
    near = abs(gold_value - value) < Fraction(1, 100_000)
    return gold_value == value if gold_value == value or not near else None


def as_formula(answer: str) -> str:
    """Returns a normalised answer as one formula, which math-verify then reads as a whole."""
    return f"${answer}$"


# ---- multiple choice -----------------------------------------------------------------------------


def read_choice(answer: str) -> str | None:
    r"""Returns the one option, "A" to "J", that a bare or boxed text names; None if there is none.

    >>> [read_choice(answer) for answer in ("c", r"\boxed{\textbf{(C)} 12 m}", "C: no", "C or D")]
    ['C', 'C', 'C', None]
    """
    marked = extract_answer(answer)
    return option_in(answer if marked is None else marked)


def find_choice(completion: str) -> str | None:
    """Returns the option in the completion's last box, else the one that its last line names."""
    marked = extract_answer(completion)
    if marked is not None:
        return option_in(marked)
    line = _undressed((completion[-MAX_CHARS:].strip().splitlines() or [""])[-1])
    said = list(_SAYS.finditer(line))
    if not said:
        return option_in(line) if len(line) <= len("(C).") and line.isupper() else None
    line = line[said[-1].end() :]
    return None if re.match("[a-j]", line) else option_in(line)  # "the answer is a: ..."


def _undressed(text: str) -> str:
    return re.sub(r"\s+", " ", _DRESS.sub("", _INVISIBLE.sub("", text[:MAX_CHARS]))).strip()


def option_in(text: str) -> str | None:
    """Returns the option that a text is, dressed and explained as it may be: "(C) 12 m" is C."""
    text = _undressed(text)
    found = _OPTION.match(text)
    if found is None or _ANOTHER.match(text[found.end() :].strip()):
        return None
    return next(letter for letter in found.groups() if letter).upper()
