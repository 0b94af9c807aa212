r"""Makes word problems of one to three calculations, in GSM8K's layout, from templates.

    python experiments/word_problems.py --out /tmp/word_problems

    {"question": "Rosa has 12 shells and gives 5 of them to Tom. How many shells does Rosa have
                  left?",
     "answer": "Rosa has 12 - 5 = <<12-5=7>>7 shells left.\n#### 7"}

train.jsonl and test.jsonl hold problems of one and of two calculations, half of each, from the same
templates; ood.jsonl holds problems of three, from templates of its own. No question is twice in a
file, and no problem of test.jsonl has template and numbers of one in train.jsonl; inside of a file
two may differ in names and things alone.

Every result is a whole number from 2 to 40, and none equals another number of its problem: so a
line of the solution that is already in a rollout is told by its result (teachers.dataset_teacher).
A file is a function of the seed and its own size.
"""

import argparse
import json
import pathlib
import random
import re

from scope_jax.records import InputError

LARGEST = 40
TRIES = 10_000  # draws for one new question before the templates are taken to be exhausted
HELD_OUT = 0.2  # share of a template's numbers that only test.jsonl has
SPLITS = {"train": (1, 2), "test": (1, 2), "ood": (3,)}

PEOPLE = [(name, "she", "her") for name in ("Rosa", "Emma", "Lena", "Mia", "Nora", "Sofia", "Zoe")]
PEOPLE += [(name, "he", "him") for name in ("Tom", "Ben", "Omar", "Leo", "Jack", "Paul", "Sam")]
THINGS = [  # and what they are kept in: of several, of one
    ("pencils", "boxes", "box"), ("crayons", "boxes", "box"), ("stickers", "packs", "pack"),
    ("balloons", "packs", "pack"), ("marbles", "bags", "bag"), ("shells", "bags", "bag"),
    ("apples", "baskets", "basket"), ("pears", "baskets", "basket"), ("cookies", "tins", "tin"),
    ("buttons", "jars", "jar"), ("beads", "jars", "jar"), ("cards", "packs", "pack"),
]  # fmt: skip
PLACES = ["the library", "the school", "the market", "the museum", "the station", "the park"]

OPERATION = re.compile(r"\[(\d+) ([-+*/]) (\d+)\]")

# The numbers that are drawn, the question, and the solution: a line for each calculation, which
# stands in brackets; r1 and r2 are the first and the second result.
TEMPLATES = [
    # one calculation
    (
        {"a": (2, 5), "b": (2, 5)},
        "{name} buys {a} {boxes} of {things}. Each {box} holds {b} {things}. How many {things} "
        "does {name} buy?",
        ["{name} buys [{a} * {b}] {things}."],
    ),
    (
        {"a": (4, 12), "b": (2, 6)},
        "{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} "
        "have left?",
        ["{name} has [{a} - {b}] {things} left."],
    ),
    (
        {"a": (2, 12), "b": (2, 6)},
        "{name} has {a} {things}. {other} gives {him} {b} more. How many {things} does {name} have "
        "now?",
        ["{name} has [{a} + {b}] {things} now."],
    ),
    (
        {"a": (4, 20), "b": (2, 5)},
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend "
        "get?",
        ["Each friend gets [{a} / {b}] {things}."],
    ),
    (
        {"a": (4, 12), "b": (2, 9)},
        "{name} has {a} {things} and {other} has {b} {things}. How many more {things} does {name} "
        "have than {other}?",
        ["{name} has [{a} - {b}] more {things} than {other}."],
    ),
    (
        {"a": (2, 6), "b": (2, 3)},
        "{name} has {a} {things}. {other} has {b} times as many. How many {things} does {other} "
        "have?",
        ["{other} has [{a} * {b}] {things}."],
    ),
    (
        {"a": (2, 8), "b": (2, 4)},
        "{name} reads {a} pages of a book every day. How many pages does {he} read in {b} days?",
        ["{name} reads [{a} * {b}] pages."],
    ),
    (
        {"a": (4, 20), "b": (2, 5)},
        "{name} puts {a} {things} into {boxes}, {b} in each {box}. How many {boxes} does {he} "
        "fill?",
        ["{name} fills [{a} / {b}] {boxes}."],
    ),
    (
        {"a": (2, 12), "b": (2, 6)},
        "A bus has {a} passengers when it comes to {place}. There {b} more passengers get on. How "
        "many passengers are on the bus now?",
        ["There are [{a} + {b}] passengers on the bus now."],
    ),
    # two calculations
    (
        {"a": (2, 5), "b": (2, 5), "c": (2, 6)},
        "{name} buys {a} {boxes} of {things} with {b} {things} in each {box}. Then {he} gives {c} "
        "{things} to {other}. How many {things} does {name} have left?",
        ["{name} buys [{a} * {b}] {things}.", "{name} has [{r1} - {c}] {things} left."],
    ),
    (
        {"a": (2, 5), "b": (2, 5), "c": (6, 20)},
        "{name} has ${c}. {He} buys {a} books at {place} for ${b} each. How much money does {name} "
        "have left?",
        ["The books cost [{a} * {b}] dollars.", "{name} has [{c} - {r1}] dollars left."],
    ),
    (
        {"a": (2, 12), "b": (2, 12), "c": (2, 4)},
        "{name} collects {a} {things} in the morning and {b} {things} in the afternoon. {He} "
        "shares them equally among {c} friends. How many {things} does each friend get?",
        ["{name} collects [{a} + {b}] {things}.", "Each friend gets [{r1} / {c}] {things}."],
    ),
    (
        {"a": (2, 6), "b": (2, 3)},
        "{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have "
        "together?",
        ["{other} has [{a} * {b}] {things}.", "Together they have [{a} + {r1}] {things}."],
    ),
    (
        {"a": (4, 12), "b": (2, 6)},
        "{name} has {a} {things}. {other} has {b} fewer than {name}. How many {things} do they "
        "have together?",
        ["{other} has [{a} - {b}] {things}.", "Together they have [{a} + {r1}] {things}."],
    ),
    (
        {"a": (6, 15), "b": (2, 5), "c": (2, 6)},
        "A bus has {a} passengers when it comes to {place}. There {b} passengers get off and {c} "
        "get on. How many passengers are on the bus now?",
        [
            "After some got off, [{a} - {b}] passengers are on the bus.",
            "There are [{r1} + {c}] passengers on the bus now.",
        ],
    ),
    (
        {"a": (2, 10), "b": (2, 4), "c": (2, 10)},
        "{name} works at {place} for {b} hours and earns ${a} an hour. Then {he} spends ${c} on a "
        "present for {other}. How much of the money that {he} earned does {name} have left?",
        ["{name} earns [{a} * {b}] dollars.", "{name} has [{r1} - {c}] dollars left."],
    ),
    (
        {"a": (2, 6), "b": (2, 4), "c": (8, 25)},
        "{name} borrows a book of {c} pages from {other}. {He} reads {a} pages a day for {b} days. "
        "How many pages of the book are left?",
        ["{name} reads [{a} * {b}] pages.", "There are [{c} - {r1}] pages left."],
    ),
    (
        {"a": (6, 20), "b": (2, 6), "c": (2, 5)},
        "{name} has {a} {things}. {He} keeps {b} of them and puts the others into {c} {boxes}, the "
        "same number into each {box}. How many {things} are in each {box}?",
        [
            "{name} puts [{a} - {b}] {things} into {boxes}.",
            "There are [{r1} / {c}] {things} in each {box}.",
        ],
    ),
    # three calculations
    (
        {"a": (2, 5), "b": (2, 5), "c": (2, 5), "d": (2, 5)},
        "At {place} {name} buys {a} books for ${b} each and {c} pens for ${d} each. How much does "
        "{he} pay in all?",
        [
            "The books cost [{a} * {b}] dollars.",
            "The pens cost [{c} * {d}] dollars.",
            "{name} pays [{r1} + {r2}] dollars in all.",
        ],
    ),
    (
        {"a": (2, 6), "b": (2, 3), "c": (2, 5)},
        "{name} has {a} {things}. {other} has {b} times as many. They put all of them into {c} "
        "{boxes}, the same number into each {box}. How many {things} are in each {box}?",
        [
            "{other} has [{a} * {b}] {things}.",
            "Together they have [{a} + {r1}] {things}.",
            "There are [{r2} / {c}] {things} in each {box}.",
        ],
    ),
    (
        {"a": (2, 5), "b": (2, 5), "c": (2, 6), "d": (2, 4)},
        "{name} buys {a} {boxes} of {things} with {b} {things} in each {box}. {He} keeps {c} "
        "{things} and shares the others equally among {d} friends. How many {things} does each "
        "friend get?",
        [
            "{name} buys [{a} * {b}] {things}.",
            "{name} shares [{r1} - {c}] {things}.",
            "Each friend gets [{r2} / {d}] {things}.",
        ],
    ),
    (
        {"a": (2, 8), "b": (2, 4), "c": (2, 4), "d": (2, 15)},
        "{name} earns ${a} an hour. {He} works {b} hours on Saturday and {c} hours on Sunday, and "
        "then spends ${d}. How much of the money that {he} earned does {name} have left?",
        [
            "{name} works [{b} + {c}] hours.",
            "{name} earns [{a} * {r1}] dollars.",
            "{name} has [{r2} - {d}] dollars left.",
        ],
    ),
    (
        {"a": (2, 6), "b": (2, 4), "c": (2, 4), "d": (10, 30)},
        "{name} borrows a book of {d} pages from {other}. {He} reads {a} pages a day for {b} days. "
        "{He} wants to read the other pages in {c} days, the same number each day. How many pages "
        "does {he} have to read on each of these days?",
        [
            "{name} reads [{a} * {b}] pages.",
            "There are [{d} - {r1}] pages left.",
            "{name} has to read [{r2} / {c}] pages each day.",
        ],
    ),
    (
        {"a": (4, 12), "b": (2, 6), "c": (2, 6)},
        "{name} has {a} {things}. {other} has {b} fewer than {name}. Together they give {c} "
        "{things} away. How many {things} do they have left together?",
        [
            "{other} has [{a} - {b}] {things}.",
            "Together they have [{a} + {r1}] {things}.",
            "They have [{r2} - {c}] {things} left.",
        ],
    ),
]


def draw_words(rng: random.Random) -> dict[str, str]:
    """Returns what the templates' names, pronouns, things and places stand for."""
    (name, he, him), (other, _, _) = rng.sample(PEOPLE, 2)
    things, boxes, box = rng.choice(THINGS)
    return {
        "name": name, "he": he, "He": he.capitalize(), "him": him, "other": other,
        "things": things, "boxes": boxes, "box": box, "place": rng.choice(PLACES),
    }  # fmt: skip


def calculate(a: int, sign: str, b: int) -> int | None:
    """Returns the result of a calculation; None if it is not whole.

    >>> calculate(12, "/", 4), calculate(12, "/", 5), calculate(12, "-", 5)
    (3, None, 7)
    """
    if sign == "/":
        return None if a % b else a // b
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def solve(lines: list[str], words: dict) -> tuple[list[str], list[int]] | None:
    """Returns a solution's lines with calculator notes and their results; None if a result is not
    whole, too small for a plural or too large.

    >>> solve(["Tom has [{a} - {b}] pears."], {"a": 12, "b": 5})
    (['Tom has 12 - 5 = <<12-5=7>>7 pears.'], [7])
    """
    written, results = [], []
    for line in lines:
        known = {f"r{i}": result for i, result in enumerate(results, 1)}
        line = line.format(**words, **known)
        found = OPERATION.search(line)
        assert found is not None, f"no calculation in {line!r}"
        a, sign, b = found.groups()
        result = calculate(int(a), sign, int(b))
        if result is None or not 2 <= result <= LARGEST:
            return None
        note = f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}"
        written.append(line[: found.start()] + note + line[found.end() :])
        results.append(result)
    return written, results


def make_problem(steps: int, rng: random.Random) -> tuple[dict[str, str], str]:
    """Returns {"question", "answer"} of a problem of `steps` calculations, and what it shares
    with those that differ in names and things alone.
    """
    ranges, question, lines = rng.choice([t for t in TEMPLATES if len(t[2]) == steps])
    while True:
        numbers = {name: rng.randint(*bounds) for name, bounds in ranges.items()}
        words = draw_words(rng) | numbers
        solved = solve(lines, words)
        if solved is None:
            continue
        written, results = solved
        if len({*numbers.values(), *results}) == len(numbers) + len(results):
            answer = "\n".join([*written, f"#### {results[-1]}"])
            return {"question": question.format(**words), "answer": answer}, f"{question} {numbers}"


def is_held_out(kind: str, seed: int) -> bool:
    """Returns whether problems with this template and these numbers are for testing alone."""
    return random.Random(f"{seed} {kind}").random() < HELD_OUT


def make_splits(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Returns the problems of each split.

    Args:
      sizes: of "train", "test" and "ood".
      seed: of the draws.
    Raises:
      InputError: the templates do not give so many different questions.
    """
    splits = {}
    for split, steps in SPLITS.items():
        rng, found = random.Random(f"{seed} {split}"), {}
        for i in range(sizes[split]):
            for _ in range(TRIES):
                problem, kind = make_problem(steps[i % len(steps)], rng)
                fits = split == "ood" or is_held_out(kind, seed) == (split == "test")
                if fits and problem["question"] not in found:
                    break
            else:
                raise InputError(f"the templates have no {sizes[split]} questions for {split}")
            found[problem["question"]] = problem
        splits[split] = list(found.values())
        rng.shuffle(splits[split])
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes word problems in GSM8K's layout.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the files")
    parser.add_argument("--train", type=int, default=4000, help="problems in train.jsonl")
    parser.add_argument("--test", type=int, default=512, help="problems in test.jsonl")
    parser.add_argument("--ood", type=int, default=256, help="problems in ood.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    splits = make_splits({split: getattr(args, split) for split in SPLITS}, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        file = args.out / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{len(rows)} problems in {file}")


if __name__ == "__main__":
    main()
