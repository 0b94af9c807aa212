r"""Units of measure in answers: "5 cm" is 5 and a unit, which others may drop, but not change.

An answer without a unit is compared by its number alone, for golds and models drop units all the
time. Of two answers with units both must measure the same (5 cm is neither 5 m nor 5 cm^2), and the
numbers are compared in one unit (5 m is 500 cm). A word that is no known unit counts things and is
dropped ("72 clips"); percent is no unit but a number, 1/100, and left to math-verify.
"""

import dataclasses
import re
from fractions import Fraction

MAX_QUANTITY_CHARS = 200  # keeps the search for the unit cheap

# name: what it measures and how many of its kind's first. Plural s is added below.
_TABLE = {
    "length": "1 m meter metre, 1/100 cm centimeter centimetre, 1/1000 mm millimeter millimetre, "
    "1000 km kilometer kilometre, 127/5000 in inch inches, 381/1250 ft foot feet, "
    "1143/1250 yd yard, 201168/125 mi mile",
    "time": "1 s sec second, 60 min minute, 3600 h hr hour, 86400 day, 604800 week",
    "month": "1 month, 12 yr year",
    "mass": "1 g gram, 1000 kg kilogram, 1/1000 mg milligram",
    "weight": "1 lb pound, 1/16 oz ounce, 2000 ton",
    "volume": "1 L l liter litre, 1/1000 mL ml milliliter millilitre",
    "fluid": "1 gallon, 1/4 quart, 1/8 pint, 1/16 cup",
    "money": "1 dollar USD, 1/100 cent",
    "euro": "1 euro EUR",
    "angle": "1 degree deg °",
    "radian": "1 radian rad",
    "celsius": "1 Celsius °C",
    "fahrenheit": "1 Fahrenheit °F",
}
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _kind, _row in _TABLE.items():
    for _entry in _row.split(", "):
        _size, *_names = _entry.split()
        for _name in _names:
            for _spelling in {_name, _name + "s"} if len(_name) > 1 else {_name}:
                _UNITS[_spelling] = _UNITS[_spelling.capitalize()] = (_kind, Fraction(_size))
_SPEEDS = {"mph": "mile/hour", "kph": "km/hour"}
_MAYBE_VARIABLES = {"m", "s", "h", "g", "L", "l", "in", "M", "S", "H", "G", "In", "Mi", "mi"}
_FACTORS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
            "trillion": 10**12}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
# Words that make of a number before them something else than so many things.
_NO_THINGS = {"percent", "sin", "cos", "tan", "log", "and", "or", "to", "is", "base", "mod"}

_TEXT = re.compile(r"\\(?:text|textrm|textbf|mbox|mathrm|rm|operatorname) ?\{([^{}\\]*)\}")
_DEGREE = re.compile(r"\^?\{?\\circ\}?|\^?°|\\degree(?![A-Za-z])")
_WORD = r"(?:°[CF]?|[A-Za-z]+\.?)(?:\^(?:[1-9]|\{-?[1-9]\}))?"
_TAIL = re.compile(rf"(?<![A-Za-z\\]){_WORD}(?:(?: ?/ ?| ?\\cdot ?| ){_WORD})*$")
_PLAIN = re.compile(r"[+-]?[0-9.,]*[0-9](?:/[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Quantity:
    """An answer taken apart. `kinds` is {} of a bare number and of a number of things."""

    value: str  # LaTeX, without the unit
    kinds: dict[str, int]  # {"length": 2} of an area
    size: Fraction = Fraction(1)  # of the unit
    factor: int = 1  # 10**6 of "5 million"


def split_unit(answer: str, *, in_dollars: bool = False, one_letter: bool = False) -> Quantity:
    r"""Returns a normalised answer as number and unit; all of it is the number if there is none.

    Args:
      in_dollars: the answer had a dollar sign, which normalising removes.
      one_letter: takes the m of "5 m" for metres, though it may be a variable.
    """
    whole = Quantity(answer, {"money": 1} if in_dollars else {})
    if len(answer) > MAX_QUANTITY_CHARS:
        return whole
    plain = _TEXT.sub(r" \1", _DEGREE.sub("°", answer))
    plain = re.sub(r"\s+", " ", re.sub(r"° ?(?=[CF]\b)", "°", plain)).strip(" .")
    tail = _TAIL.search(plain)
    if tail is None:
        return whole
    value, words = plain[: tail.start()].strip(" ~"), tail[0]
    dressed = bool(_TEXT.search(answer)) or "°" in words
    if not value or re.search(r"[-+*/=^_(<>,|]$|\\(?!pi$)[A-Za-z]+$|\\$|[°=<>]", value):
        return whole
    if re.search(r"(?<!\\)\b[A-Za-z]{2,}|\\(?:text|mbox|sin|cos|tan|cot|sec|csc)", value):
        return whole  # words, or 30° inside of a function
    return _read_unit(value, words, dressed or one_letter, in_dollars) or whole


def _read_unit(value: str, words: str, letters: bool, in_dollars: bool) -> Quantity | None:
    """Returns the quantity; None if the words are no unit. `letters` lets "m" be metres."""
    for name, spelled in _SPEEDS.items():
        words = re.sub(rf"\b{name}\b", spelled, words)
    words = words.replace(r"\cdot", " ").replace("/", " per ")
    kinds: dict[str, int] = {}
    size, factor, sign, power, known = Fraction(1), 1, 1, 1, True
    for word in words.split():
        name, _, exponent = word.rstrip(".").partition("^")
        if name.lower() == "per":
            sign = -1
        elif name.lower() in _POWERS:
            power = _POWERS[name.lower()]
        elif name.lower() in _FACTORS and not kinds:
            factor *= _FACTORS[name.lower()]
        elif name in _UNITS and (letters or name not in _MAYBE_VARIABLES):
            kind, one = _UNITS[name]
            times = sign * power * int(exponent.strip("{}") or 1)
            kinds[kind] = kinds.get(kind, 0) + times
            size, power = size * one**times, 1
        else:
            known = False
            if len(name) < 3 and name != "of" or name.lower() in _NO_THINGS:
                return None
    if in_dollars and "money" not in kinds:
        kinds["money"] = 1
    if not known:
        # "72 clips" or "72 clips per day" count things; of formulas their letters may be variables.
        return (
            Quantity(value, {"money": 1} if in_dollars else {}, Fraction(1), factor)
            if _PLAIN.fullmatch(value)
            else None
        )
    return Quantity(value, {k: n for k, n in kinds.items() if n}, size, factor)


def comparable(gold: Quantity, answer: Quantity) -> tuple[str, str] | None:
    r"""Returns both numbers in one unit, as LaTeX; None if the two measure different things."""
    if gold.kinds and answer.kinds and gold.kinds != answer.kinds:
        angles = [{"angle": 1}, {"radian": 1}]
        if gold.kinds in angles and answer.kinds in angles:
            return _radians(gold), _radians(answer)
        pairs = (gold.kinds, answer.kinds), (answer.kinds, gold.kinds)
        if not any(_short_for(*pair) for pair in pairs):
            return None
    for one, other in ((gold, answer), (answer, gold)):
        if one.kinds == {"angle": 1} and not other.kinds and r"\pi" in other.value:
            return _radians(gold), _radians(answer)  # 90 degrees is pi/2
    both = gold.kinds and answer.kinds
    sizes = (gold.size, answer.size) if both and gold.size != answer.size else (Fraction(1),) * 2
    written = [
        _times(one.value, size * one.factor)
        for one, size in zip((gold, answer), sizes, strict=True)
    ]
    return written[0], written[1]


def _short_for(kinds: dict[str, int], other: dict[str, int]) -> bool:
    """Says whether a unit stands for a longer one: $15 for $15 an hour, 20 degrees for 20 °C."""
    if kinds == {"angle": 1}:
        return other in ({"celsius": 1}, {"fahrenheit": 1})
    rest = {kind: n for kind, n in other.items() if kind != "money"}
    return kinds == {"money": 1} == {"money": other.get("money")} and max(rest.values()) < 0


def _times(value: str, factor: Fraction) -> str:
    if factor == 1:
        return value
    if re.fullmatch(r"[+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?", value):  # exactly, without a worker
        product = Fraction(value) * factor
        return f"{product.numerator}/{product.denominator}"
    return rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}\cdot({value})"


def _radians(quantity: Quantity) -> str:
    return rf"({quantity.value})\cdot\frac{{\pi}}{{180}}" if "angle" in quantity.kinds else (
        quantity.value
    )  # fmt: skip
