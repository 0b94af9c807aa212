r"""Makes step labels from GSM8K: worked solutions, and copies with one corrupted calculation.

    python experiments/gsm8k_step_labels.py --data gsm8k_train.jsonl.gz --layout trl \
        --corrupted 0.8 --out train.jsonl
    python experiments/gsm8k_step_labels.py --data gsm8k_test.jsonl.gz --layout processbench \
        --limit 400 --out test.jsonl.gz

A corrupted copy has ONE line whose calculated result is replaced by a wrong number (a small slip, a
slipped digit or decimal point, or the result of another operation); no other line is touched.
`--corrupted` is the share of problems that get one; the others are written as they are.

trl           {prompt, completions, labels}; a corrupted copy stops at its wrong step.
processbench  {id, problem, steps, label}; whole solutions, label = the wrong step or -1.
"""

import argparse
import gzip
import json
import pathlib
import random
import re

from scope_jax.data import read_jsonl

NOTE = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # GSM8K's calculator note: <<48/2=24>>
OPERATION = re.compile(r"(-?\d+(?:\.\d+)?)([-+*/])(\d+(?:\.\d+)?)")


def number(value: float) -> str:
    """Writes a number as GSM8K does: no trailing zeros."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def slips(expression: str, result: float) -> list[float]:
    """Returns wrong results that somebody might write for an expression."""
    wrong = [result + step for step in (-10, -2, -1, 1, 2, 10)] + [result * 10, result / 10]
    digits = number(abs(result))
    wrong += [float(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :])
              for i in range(len(digits) - 1) if "." not in digits[i : i + 2]]  # fmt: skip
    if match := OPERATION.fullmatch(expression.replace(" ", "")):
        a, sign, b = float(match[1]), match[2], float(match[3])
        others = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}
        wrong += [value for other, value in others.items() if other != sign] * 2
    return [value for value in wrong if value >= 0 and number(value) != number(result)]


def corrupt(line: str, rng: random.Random) -> str | None:
    """Returns the line with its last calculated result replaced, notes left out; None if it has no
    result that stands in the text.
    """
    notes = list(NOTE.finditer(line))
    if not notes:
        return None
    note = notes[-1]
    try:
        wrong = slips(note[1], float(note[2]))
    except ValueError:  # a fraction or a percentage in the note
        return None
    behind = line[note.end() :]
    shown = re.match(r"\s*" + re.escape(note[2]) + r"(?![\d.]*\d)", behind)
    if not wrong or not shown:
        return None
    start = NOTE.sub("", line[: note.start()])
    wrong_text = number(rng.choice(wrong))
    rest = NOTE.sub("", behind[shown.end() :])
    return start + behind[: shown.end() - len(note[2])] + wrong_text + rest


def solutions(path, corrupted: float, rng: random.Random) -> list[dict]:
    """Returns {"id", "problem", "steps", "label"} of every problem, a share of them corrupted."""
    found = []
    for row in read_jsonl(path):
        lines = [line for line in row["answer"].split("\n") if line.strip()]
        label, steps = -1, [NOTE.sub("", line) for line in lines]
        if rng.random() < corrupted:
            places = [i for i, line in enumerate(lines) if NOTE.search(line)]
            rng.shuffle(places)
            for place in places:
                if (wrong := corrupt(lines[place], rng)) is not None:
                    label, steps[place] = place, wrong
                    break
        steps[-1] = steps[-1].replace("#### ", "The answer is ")
        found.append(
            {"id": row["_source"], "problem": row["question"], "steps": steps, "label": label}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="GSM8K's {question, answer} lines")
    parser.add_argument("--layout", choices=("trl", "processbench"), required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True, help=".jsonl or .jsonl.gz")
    parser.add_argument("--copies", type=int, default=1, help="passes over the problems")
    parser.add_argument("--corrupted", type=float, default=0.5, help="share of the problems")
    parser.add_argument("--limit", type=int, help="solutions to write at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [row for _ in range(args.copies) for row in solutions(args.data, args.corrupted, rng)]
    rng.shuffle(rows)
    rows = rows[: args.limit]
    if args.layout == "trl":
        rows = [
            {
                "prompt": row["problem"],
                "completions": row["steps"][: row["label"] + 1 or None],
                "labels": [i != row["label"] for i in range(len(row["steps"]))][
                    : row["label"] + 1 or None
                ],
            }
            for row in rows
        ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write = gzip.open if args.out.suffix == ".gz" else open
    with write(args.out, "wt", encoding="utf-8") as file:
        file.write(text)
    print(f"{len(rows)} solutions in {args.out}")


if __name__ == "__main__":
    main()
