r"""Cuts and carries over texts between two real tokenizers, and counts what cannot be exact.

    python experiments/check_alignment.py --policy QWEN_DIR --prm SMOLLM2_DIR \
        --texts gsm8k_test.jsonl.gz math500.jsonl.gz --num-random 10000 --num-texts 2000

Every row must satisfy, for random ids and for real texts:
  * the steps partition the ids, and their texts add up to the text of the completion;
  * a row that `PRMTexts` lays out shows every step's exact text in front of its read position;
  * a row that it refuses is one that cannot be exact, by a check written here independently.
"""

import argparse
import collections
import itertools
import json
import time

import numpy as np

from scope_jax.data import read_jsonl
from scope_jax.models.hf import load_tokenizer
from scope_jax.prm_formats import PRMFormat, PRMTexts
from scope_jax.steps import segment_steps, step_texts

# What Qwen's chat template makes of a conversation that has a system turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_rows(tokenizer, count: int, rng) -> list[list[int]]:
    """Returns id sequences with many newlines, some end tokens and any other token at all."""
    newlines = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    rows = []
    for _ in range(count):
        length = int(rng.integers(1, 49))
        ids = rng.integers(0, len(tokenizer), length)
        if rng.random() < 0.5:  # ordinary tokens only: half of the rows should be exact
            ids = rng.integers(1000, 30000, length)
        ids = np.where(rng.random(length) < 0.2, rng.choice(newlines, length), ids).tolist()
        rows.append(ids + [tokenizer.eos_token_id] * int(rng.integers(0, 2)))
    return rows


def text_rows(tokenizer, files, count: int) -> list[list[int]]:
    rows = [row for file in files for row in read_jsonl(file)]
    rows = [row for row in rows if "answer" in row or "problem" in row]
    texts = [row["answer"] if "question" in row else row["problem"] for row in rows]
    texts = [text.replace("\n", "\n\n") if i % 2 else text for i, text in enumerate(texts)]
    assert len(texts) >= count, f"{len(texts)} texts in {files}"
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    return [[*encode(text), tokenizer.eos_token_id] for text in texts[:count]]


def special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def why_inexact(policy, prm, ids: list[int], pieces: list[str], problem: str) -> str | None:
    """Returns why a row has no exact form in the PRM's tokenizer, found by other means."""
    special = special_ids(policy)
    while ids and ids[-1] in special:
        ids = ids[:-1]
    if set(ids) & special:
        return "special token inside"
    text = policy.decode(ids)
    if "\ufffd" in text:
        return "not UTF-8"
    if "\ufffd" in "".join(pieces):
        return "cut inside a character"
    if any(not piece.strip() for piece in pieces):
        return "blank"
    if any(str(token) in text for token in prm.added_tokens_decoder.values()):
        return "spells a special token"
    joined = "\n".join([problem, *(piece.strip() for piece in pieces)])
    if prm.decode(prm.encode(joined, add_special_tokens=False)) != joined:
        return "does not survive encode and decode"
    return None


def check(policy, prm, rows: list[list[int]], layout: PRMTexts) -> collections.Counter:
    """Returns how many rows were laid out and why others were not; raises on any violation."""
    counts, problem = collections.Counter(), "What is 2 + 2?"
    for ids in rows:
        mask = np.ones((1, len(ids)), bool)
        ends, step_mask = segment_steps(policy, [ids], mask, "\n\n" if len(ids) % 2 else "\n")
        cuts = [0, *ends[0][step_mask[0]].tolist()]
        assert cuts[-1] == len(ids) and all(a < b for a, b in itertools.pairwise(cuts)), ids
        texts = step_texts(policy, [ids], mask, ends, step_mask)[0]
        specials = special_ids(policy)
        body = [i for i in ids if i not in specials]
        if texts is not None:
            assert "".join(texts) == (policy.decode(body) if body else ""), ids
        item = layout(problem, texts) if texts else None
        pieces = [
            policy.decode([i for i in ids[a:b] if i not in specials])
            for a, b in itertools.pairwise(cuts)
        ]
        reason = why_inexact(policy, prm, list(ids), pieces, problem)
        assert (item is None) == (reason is not None), (reason, ids, texts)
        if item is None:
            counts[reason] += 1
            continue
        counts["exact"] += 1
        assert texts is not None
        separator = len(prm.encode(layout.format.step_token, add_special_tokens=False))
        ends_before = [read + 1 - separator for read in item.reads]
        head = prm.decode(item.ids[: ends_before[0]])
        assert head.endswith(texts[0].strip()), (texts[0], head)
        for k in range(1, len(texts)):
            shown = prm.decode(item.ids[item.reads[k - 1] + 1 : ends_before[k]])
            assert shown == texts[k].strip(), (texts[k], shown)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", required=True, help="tokenizer directory")
    parser.add_argument("--prm", required=True, help="tokenizer directory")
    parser.add_argument(
        "--format", default="trl", choices=("trl", "skywork", "qwen_math", "math_shepherd")
    )
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--num-random", type=int, default=10000)
    parser.add_argument("--num-texts", type=int, default=2000)
    args = parser.parse_args()
    policy, prm = load_tokenizer(args.policy)[0], load_tokenizer(args.prm)[0]
    prm.chat_template = prm.chat_template or CHATML
    layout, start = PRMTexts(prm, PRMFormat(args.format), args.prm), time.perf_counter()
    rng = np.random.default_rng(0)
    random = check(policy, prm, random_rows(policy, args.num_random, rng), layout)
    real = check(policy, prm, text_rows(policy, args.texts, args.num_texts), layout)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"random": random, "texts": real, "seconds": seconds}))


if __name__ == "__main__":
    main()
