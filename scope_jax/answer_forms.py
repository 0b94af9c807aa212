r"""Equality of two answers where the algebra of math-verify would err, or is not needed.

    compare -> words? bases? units? -> inequalities, vectors, percents in one form -> numbers?

`compare` decides what it can and hands back the others in a form that math-verify compares rightly.
What it errs on by itself is in tests/answer_pairs.py: words are products of letters to it, units
and bases nothing, 1<x<2 equals (1,2) in one direction only, a column never equals (1,2).
"""

import re

from scope_jax.answers import fast_verdict, normalise, number, option_in
from scope_jax.units import comparable, split_unit

MAX_REWRITE_CHARS = 500  # longer answers are compared as they stand

_WORDS = re.compile(r"[A-Za-z][A-Za-z'’-]*(?: [A-Za-z][A-Za-z'’-]*)*")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mbox|mathbf) ?\{([^{}\\]*)\}")
_NOTHING = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set",
            "none"}  # fmt: skip
_EVERYTHING = {"all real numbers", "all reals", "real numbers"}
_SHORT_WORDS = {"yes", "no", "odd"}  # and no products of variables
_NUMERALS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}
_BASE = re.compile(
    r"([0-9][0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?)_"
    r"(?:([0-9])|\{ ?(?:\\text ?\{ ?)?(?:base ?)?([0-9]{1,2}|[a-z]+) ?\}?\})"
)
_REPEATING = re.compile(r"([+-]?)([0-9]{0,9})\.([0-9]{0,9})\\(?:overline|bar) ?(?:\{([0-9]{1,9})\}|"
                        r"([0-9]))")  # fmt: skip
_SCIENTIFIC = re.compile(r"([+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?)[eE]([+-]?[0-9]{1,2})")
_SPACED = re.compile(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_ANGLE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\^(?:\\circ|\{\\circ\})|°)")
_RELATIONS = [
    (re.compile(r" ?(?:\\l(?:eqslant|eq|e)(?![A-Za-z])|≤|⩽|<=) ?"), "≤"),
    (re.compile(r" ?(?:\\g(?:eqslant|eq|e)(?![A-Za-z])|≥|⩾|>=) ?"), "≥"),
    (re.compile(r" ?\\lt(?![A-Za-z]) ?"), "<"),
    (re.compile(r" ?\\gt(?![A-Za-z]) ?"), ">"),
    (re.compile(r" ?(?:\\neq?(?![A-Za-z])|≠|\\not=) ?"), "≠"),
    (re.compile(r" ?(?:\\in(?![A-Za-z])|∈) ?"), "∈"),
]
_VARIABLE = r"(?:[A-Za-z]|\\(?:theta|alpha|beta|gamma|lambda|phi|omega|mu))"
_BUILDER = re.compile(
    rf"\\\{{ ?({_VARIABLE})(?:∈ ?\\(?:mathbb|mathbf) ?\{{?R\}}?)? ?(?:\\mid|\||:) ?(.*)\\\}}"
)
_OR = re.compile(r" ?(?:\\(?:text|mbox|mathrm) ?\{ ?or ?\}|\bor\b|\\cup|\\lor|\\vee|∪) ?")
_AND = re.compile(r" ?(?:\\(?:text|mbox|mathrm) ?\{ ?and ?\}|\band\b|\\land|\\wedge|∧) ?")
_VECTOR = re.compile(r"\\begin ?\{([pb]?matrix)\}(.*)\\end ?\{\1\}")
_ARRAY = re.compile(r"[(\[]\\begin ?\{array\} ?\{[clr|]*\}(.*)\\end ?\{array\}[)\]]")
_OPEN, _CLOSE = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
_BRACKET = re.compile(r"\\[{}]|[()\[\]{},]|\\.")
_MAYBE_INTERVAL = r"[(\[<>=≤≥]|\\(?:mathbb|emptyset|varnothing|infty|le|ge|ne)"


def compare(gold: str, answer: str) -> bool | tuple[str, str]:
    """Returns whether two answers are equal where that is certain, else both for math-verify.

    What comes back for math-verify is normalised, without units, and written in the way in which it
    compares both rightly. Answers that are too long for that are left as they stand.
    """
    truth, found = normalise(gold), normalise(answer)
    verdict = fast_verdict(truth, found)
    if verdict is not None or max(len(truth), len(found)) > MAX_REWRITE_CHARS:
        return (truth, found) if verdict is None else verdict
    verdict = _compare_words(gold, truth, answer, found)
    truth, found = _without_name(rewrite(truth), rewrite(found))
    verdict = _compare_bases(truth, found) if verdict is None else verdict
    if verdict is not None:
        return verdict
    pair = _compare_units(truth, found, in_dollars(gold), in_dollars(answer))
    if pair is None:
        return False
    pair = _compare_shapes(*map(rewrite, pair))
    if isinstance(pair, bool):
        return pair
    verdict = _compare_percent(*pair)
    verdict = fast_verdict(*pair) if verdict is None else verdict
    return pair if verdict is None else verdict


def in_dollars(answer: str) -> bool:
    r"""Says whether an answer has a dollar sign that delimits no formula."""
    return "\\$" in answer or (answer.count("$") == 1 and answer.lstrip().startswith("$"))


def rewrite(answer: str) -> str:
    r"""Returns a normalised answer in notations that math-verify reads as they are meant.

    >>> [rewrite(answer) for answer in (r"0.1\overline{6}", "1.5e3", "12 000", "5 percent")]
    ['15/90', '1.5\\cdot10^{3}', '12000', '5%']
    """
    answer = re.sub(r" ?(?:\\text ?\{ ?percent ?\}|\bpercent)$", "%", answer)
    answer = answer.replace("²", "^2").replace("³", "^3")
    words = _plain_words(answer) or ""
    if words in _EVERYTHING or words in _NUMERALS:
        return _NUMERALS.get(words, r"(-\infty,\infty)")
    repeating = _REPEATING.fullmatch(answer)
    if repeating:
        sign, whole, once, again, digit = repeating.groups()
        again = again or digit
        value = int(whole + once + again) - int(whole + once or "0")
        return f"{sign}{value}/{'9' * len(again)}{'0' * len(once)}"
    if _SPACED.fullmatch(answer):
        return answer.replace(" ", "")
    answer = re.sub(r"^\((?:[a-z],)+[a-z]\)=(?=\()", "", answer)  # (x,y)=(1,2)
    answer = re.sub(r"\\log_(?:e|\{e\})(?![A-Za-z])", r"\\ln", answer)
    answer = re.sub(r"\\frac ?(?:([0-9])|(\{[0-9]+\})) ?([0-9])", _braced, answer)
    answer = re.sub(r"\\frac ?([0-9]) ?(?=\{)", r"\\frac{\1}", answer)
    answer = _ARRAY.sub(r"\\begin{pmatrix}\1\\end{pmatrix}", answer)
    answer = re.sub(r"\\langle ?(.*?) ?\\rangle", r"(\1)", answer)
    if _TRIG.search(answer):  # math-verify would take 45 degrees for 45 radians
        answer = _ANGLE.sub(r"(\\frac{\1\\pi}{180})", answer)
    return _SCIENTIFIC.sub(r"\1\\cdot10^{\2}", answer) if _SCIENTIFIC.fullmatch(answer) else answer


def _braced(frac: re.Match) -> str:
    return rf"\frac{{{frac[1]}}}{{{frac[3]}}}" if frac[1] else rf"\frac{frac[2]}{{{frac[3]}}}"


def _plain_words(answer: str) -> str | None:
    """Returns a text answer in small letters, without articles; None if it is no text."""
    text = re.sub(r"\s+", " ", _TEXT.sub(r" \1 ", answer)).strip(" .,")
    if not _WORDS.fullmatch(text):
        return None
    return re.sub(r"^(?:the|an?) (?=.)", "", text.lower().replace("’", "'"))


def _is_text(raw: str) -> bool:
    r"""Says whether an answer's words are marked as such, as in \text{abc} or "a b c"."""
    return bool(re.search(r"\\(?:text|mbox)|[A-Za-z] [A-Za-z]", raw))


def _is_product(letters: str) -> bool:
    """Tells what may be a product of variables ("abcd") from a word ("east")."""
    return len(letters) < 4 or sorted(set(letters)) == list(letters)


def _compare_words(gold: str, truth: str, answer: str, found: str) -> bool | None:
    """Compares text answers letter by letter: to math-verify, anagrams are equal products."""
    option = re.fullmatch(r"\(([A-J])\)", truth)
    if option and "\\text" in gold:
        return option_in(answer) == option[1]
    words, other = _plain_words(truth), _plain_words(found)
    for one, another in ((words, found), (other, truth)):
        if one in _NOTHING and re.fullmatch(r"\\(?:emptyset|varnothing)|\\\{ ?\\\}|∅", another):
            return True
    if words is None or other is None:
        return None
    if words in _NOTHING and other in _NOTHING:
        return True
    text = _is_text(gold) or _is_text(answer) or {words, other} & _SHORT_WORDS
    text = text or not (_is_product(words) or _is_product(other))
    return words == other if text else None


def _compare_bases(truth: str, found: str) -> bool | None:
    """Compares numerals with a base, which math-verify ignores; the answer may drop it."""
    pair = [_BASE.fullmatch(text) for text in (truth, found)]
    if not any(pair):
        return None
    digits = [match[1] if match else text for match, text in zip(pair, (truth, found), strict=True)]
    names = [match[2] or match[3] for match in pair if match]
    bases = {_NUMERALS.get(name, name) for name in names}
    return digits[0].upper() == digits[1].upper() and len(bases) == 1


def _without_name(truth: str, found: str) -> tuple[str, str]:
    """Returns both without the "x=" that only one of them has before its value."""
    named = [re.fullmatch(r"[A-Za-z]=([^=<>]+)", text) for text in (truth, found)]
    if (named[0] is None) == (named[1] is None) or "=" in (found if named[0] else truth):
        return truth, found
    return named[0][1] if named[0] else truth, named[1][1] if named[1] else found


def _compare_units(
    truth: str, found: str, gold_dollars: bool, answer_dollars: bool
) -> tuple[str, str] | None:
    """Returns both answers in one unit, without it; None if they measure different things."""
    one = split_unit(truth, in_dollars=gold_dollars)
    other = split_unit(found, in_dollars=answer_dollars)
    if bool(one.kinds) != bool(other.kinds) or not (one.kinds or other.kinds):
        # "5 m" beside "5 cm" is a length; by itself it may be five times m
        lettered = split_unit(truth, one_letter=True), split_unit(found, one_letter=True)
        if all(quantity.kinds for quantity in lettered):
            one, other = lettered
    if (one.kinds and found.endswith("%")) or (other.kinds and truth.endswith("%")):
        return None
    return comparable(one, other)


def _compare_percent(truth: str, found: str) -> bool | None:
    """Compares a percentage with a number: 10% is 0.1, and 10 with its sign left out."""
    if truth.endswith("%") == found.endswith("%"):
        return None
    percents, plain = (truth, found) if truth.endswith("%") else (found, truth)
    share, value = number(percents.rstrip("% ")), number(plain)
    return None if share is None or value is None else value in (share, share / 100)


def _compare_shapes(truth: str, found: str) -> bool | tuple[str, str]:
    """Compares sets with sets, pairs with pairs, inequalities with intervals, vectors with tuples.

    To math-verify (1,2) is an interval, and equals the set {1,2} and the inequality 1<x<2, the
    latter in one direction only.
    """
    intervals = [_as_interval(text) for text in (truth, found)]
    if intervals[0] and intervals[1]:
        names = {name for name, _ in (intervals[0], intervals[1])}
        return len(names) == 1 and (intervals[0][1], intervals[1][1])
    if intervals[0] or intervals[1]:
        other = found if intervals[0] else truth
        interval = (intervals[0] or intervals[1] or ("", ""))[1]
        if re.match(r"[(\[]", interval) and not re.search(_MAYBE_INTERVAL, other):
            return False  # "1, 2" is not 1<x<2
        truth = intervals[0][1] if intervals[0] else truth
        found = intervals[1][1] if intervals[1] else found
    (kind, items), (other_kind, other_items) = _brackets(truth), _brackets(found)
    if {kind, other_kind} & {"{}"} and {kind, other_kind} - {"{}", ""}:
        if items > 1 or other_items > 1:
            return False  # a set is neither a tuple nor an interval
    vectors = [bool(_VECTOR.fullmatch(text)) for text in (truth, found)]
    if "()" in (kind, other_kind) or (vectors[0] != vectors[1] and not kind + other_kind):
        truth, found = (
            text if own == "()" else _as_tuple(text, count) for text, own, count in
            ((truth, kind, items), (found, other_kind, other_items))
        )  # fmt: skip
    return truth == found or (truth, found)


def _brackets(answer: str) -> tuple[str, int]:
    r"""Returns the brackets that hold all of an answer, e.g. "(]" or "", and the items in it."""
    depth, commas, whole = 0, [0, 0], True
    for token in _BRACKET.finditer(answer):
        text = token[0]
        depth += (text in _OPEN) - (text in _CLOSE)
        if text == "," and depth in (0, 1):
            commas[depth] += 1
        whole = whole and (depth > 0 or token.end() == len(answer))
    first = next((mark for mark in (r"\{", "(", "[") if answer.startswith(mark)), "")
    last = next((mark for mark in (r"\}", ")", "]") if answer.endswith(mark)), "")
    if first and last and whole and depth == 0:
        return (first + last).replace("\\", ""), 1 + commas[1]
    return "", 1 + commas[0]


def _as_tuple(answer: str, items: int) -> str:
    """Returns a vector, "y=2, x=1" or a bare list of items as "(..)", as tuples are written."""
    vector = _VECTOR.fullmatch(answer)
    if vector:
        rows = [row.split("&") for row in re.split(r"\\\\", vector[2]) if row.strip()]
        if len(rows) == 1 or all(len(row) == 1 for row in rows):
            return f"({','.join(cell.strip() for row in rows for cell in row)})"
    parts = re.split(r" ?(?:, ?|\\text ?\{ ?(?:, ?)?and ?\}|\band\b) ?", answer)
    named = [re.fullmatch(rf"({_VARIABLE})=([^=]+)", part.strip()) for part in parts]
    if len(parts) > 1 and all(named):
        values = {match[1]: match[2].strip() for match in named if match}
        if len(values) == len(parts):
            return f"({','.join(values[name] for name in sorted(values))})"
    bare = items > 1 and number(answer) is None and "=" not in answer and "\\pm" not in answer
    return f"({answer})" if bare and not _brackets(answer)[0] else answer


def _as_interval(answer: str) -> tuple[str, str] | None:
    r"""Returns (variable, interval) of an inequality in one variable; None if it is none.

    >>> _as_interval(r"-2 \le x<7"), _as_interval("x<1 or x>2")
    (('x', '[-2,7)'), ('x', '(-\\infty,1) \\cup (2,\\infty)'))
    """
    for pattern, sign in _RELATIONS:
        answer = pattern.sub(sign, answer)
    built = _BUILDER.fullmatch(answer)
    if built:
        answer = built[2].strip()
    member = re.fullmatch(rf"({_VARIABLE})∈(.+)", answer)
    if member:
        return member[1], member[2]
    found = []
    for part in _OR.split(answer):
        ends = [_one_interval(end.strip()) for end in _AND.split(part, maxsplit=1)]
        if len(ends) == 2 and ends[0] and ends[1] and ends[0][0] == ends[1][0]:
            ends = [_both(*ends[0], ends[1][1])]  # x>3 and x<5
        if len(ends) > 1 or ends[0] is None:
            return None
        found.append(ends[0])
    names = {name for name, _ in found}
    return (names.pop(), r" \cup ".join(text for _, text in found)) if len(names) == 1 else None


def _both(name: str, one: str, other: str) -> tuple[str, str] | None:
    """Returns what two half-lines in opposite directions share."""
    for low, high in ((one, other), (other, one)):
        if low.endswith(r",\infty)") and high.startswith(r"(-\infty,"):
            if "cup" not in low + high:
                return name, low.removesuffix(r"\infty)") + high.removeprefix(r"(-\infty,")
    return None


def _one_interval(part: str) -> tuple[str, str] | None:
    sides = [side.strip() for side in re.split("[<>≤≥≠]", part)]
    signs = re.findall("[<>≤≥≠]", part)
    if len(sides) == 2 and re.fullmatch(_VARIABLE, sides[1]):
        sides.reverse()  # 3<x is x>3
        signs = [signs[0].translate(str.maketrans("<>≤≥", "><≥≤"))]
    name = sides[0] if len(sides) == 2 else sides[1] if len(sides) == 3 else ""
    bounds = [side for side in sides if side != name]
    absolute = re.fullmatch(rf"\|({_VARIABLE})\|", name)
    if absolute and len(bounds) == 1 and number(bounds[0]) and not bounds[0].startswith("-"):
        if signs[0] in "<≤":  # |x|<3
            low, high = ("(", ")") if signs[0] == "<" else ("[", "]")
            return absolute[1], f"{low}-{bounds[0]},{bounds[0]}{high}"
    if not re.fullmatch(_VARIABLE, name) or len(bounds) != len(sides) - 1:
        return None
    for bound in bounds:  # numbers only: "x<y" is no interval of x
        letters = re.sub(r"\\[a-z]+", "", bound)
        if not bound or re.search(r"[A-Za-df-z=,]", letters):
            return None
    if len(sides) == 2:
        bound = bounds[0]
        intervals = {
            "<": rf"(-\infty,{bound})", "≤": rf"(-\infty,{bound}]", ">": rf"({bound},\infty)",
            "≥": rf"[{bound},\infty)", "≠": rf"(-\infty,{bound}) \cup ({bound},\infty)",
        }  # fmt: skip
        return name, intervals[signs[0]]
    if {*signs} <= {">", "≥"}:
        signs, bounds = signs[::-1], bounds[::-1]
        signs = [sign.translate(str.maketrans(">≥", "<≤")) for sign in signs]
    if not {*signs} <= {"<", "≤"}:
        return None
    return name, f"{'(['[signs[0] == '≤']}{bounds[0]},{bounds[1]}{')]'[signs[1] == '≤']}"
