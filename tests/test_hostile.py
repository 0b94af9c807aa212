"""The verifier and the data readers under tests/hostile.py's corpora, and under random text."""

import gzip
import json
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scope_jax.rewards as rewards
from scope_jax.configlib import load_config
from scope_jax.data import read_jsonl
from scope_jax.records import InputError
from scope_jax.rewards import verifier_stats, verify_batch
from scope_jax.tasks.math_problems import problems, read_problems
from tests import hostile

# --- Completions ----------------------------------------------------------------------------------


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def test_every_hostile_completion_gets_the_right_verdict_and_the_pool_works_on(tmp_path):
    mark = tmp_path / "was_here"
    golds, texts, expected = zip(*hostile.completions(str(mark)), strict=True)
    assert len(set(texts)) >= 300 and 300 < sum(expected) < len(expected) - 300
    before, start = verifier_stats(), time.monotonic()
    verdicts = verify_batch(golds, texts, num_workers=2, timeout=2.0)
    seconds = time.monotonic() - start
    pairs = zip(golds, texts, expected, verdicts, strict=True)
    assert [(g, t[:99], right) for g, t, right, found in pairs if found is not right] == []
    assert not mark.exists()
    assert verifier_stats().timeouts - before.timeouts > 10  # the corpus does reach the limit
    assert seconds < 300  # a hang limit: each pair alone has two seconds
    assert all(worker.process.poll() is None for worker in rewards._POOL)
    ordinary = [(r"\frac{1}{2}", r"\frac12", True), (r"\sqrt{12}", r"2\sqrt{3}", True)]
    ordinary += [(r"\sqrt{12}", r"3\sqrt{2}", False), ("72", "72.0", True), ("72", "73", False)]
    golds, answers, expected = zip(*ordinary, strict=True)
    assert verify_batch(golds, [boxed(answer) for answer in answers]) == list(expected)


ANYTHING = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates, too
PIECES = st.sampled_from([*hostile.BROKEN, *hostile.PROTOCOL, *hostile.UNSEEN, "5", "x", " ", "\n"])
TEXTS = st.lists(st.one_of(ANYTHING, PIECES), max_size=8).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_gets_a_verdict(texts):
    completions = [*texts, *map(boxed, texts)]
    verdicts = verify_batch([r"\frac{\pi}{11}"] * len(completions), completions, timeout=2.0)
    assert verdicts == [False] * len(completions)
    assert all(verify_batch(["7"] * len(texts), [text + "\n\\boxed{7}" for text in texts]))


# --- Data lines -----------------------------------------------------------------------------------

GOOD = json.dumps(hostile.ROW).encode()


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def interleaved():
    """Returns (lines, numbers of the good ones, {number: reason} of the bad ones)."""
    good, bad = hostile.good_lines(), hostile.bad_lines()
    marked = [(line, None) for line in good] + bad
    marked.sort(key=lambda pair: zlib.crc32(pair[0]))  # any order
    numbered = list(enumerate(marked, start=1))
    reasons = {number: reason for number, (_, reason) in numbered if reason}
    kept = [number for number, (_, reason) in numbered if reason is None]
    return [line for line, _ in marked], kept, reasons


def test_strict_names_the_very_line_of_each_bad_one(tmp_path):
    bad = hostile.bad_lines()
    assert len({line for line, _ in bad}) >= 300
    for number, (line, reason) in enumerate(bad):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
        message = refusal(read_problems, file)
        assert message.startswith(f"{file}:3: {reason}"), line[:200]
        assert message.endswith("--config.task.bad_lines=skip") and "more bad" not in message
        file.unlink()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_skip_keeps_exactly_the_good_lines_and_lists_the_others(name, tmp_path):
    lines, kept, reasons = interleaved()
    assert len(kept) > 300 and len(reasons) > 300
    file, text = tmp_path / name, b"\n".join(lines)
    file.write_bytes(gzip.compress(text, 1) if name.endswith("gz") else text)
    found = problems("train", train_file=str(file), bad_lines="skip")
    assert isinstance(found, list)  # as training asks before it tries every prompt
    assert [row["id"] for row in found] == [f"{file}:{number}" for number in kept]
    assert [(row["file"], row["line"]) for row in found.skipped] == [
        (str(file), n) for n in reasons
    ]
    for row in json.loads(json.dumps(found.skipped)):
        assert row["reason"].startswith(reasons[row["line"]])
    message = refusal(problems, "train", train_file=str(file))
    first = min(reasons)
    assert message.startswith(f"{file}:{first}: {reasons[first]}")
    assert f" (and {len(reasons) - 1} more bad lines); " in message


def test_a_repeated_id_is_bad_only_after_a_good_line(tmp_path):
    rows = [
        {"id": "a", "problem": ""},
        {"id": "a"},
        {"id": "b"},
        {"id": 1},
        {"id": "1"},
        {"id": "a"},
    ]
    rows += [{"id": 1}, {"id": "a\ud800"}, {"id": "a\ud800"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**hostile.ROW, **row}) for row in rows))
    found = read_problems(file, "skip")
    assert [row["id"] for row in found] == [f"{file}:{n}" for n in (2, 3, 4, 5, 8)]
    assert [(row["line"], row["reason"]) for row in found.skipped[1:]] == [
        (6, f"\"id\" 'a' is that of {file}:2, too"),
        (7, f'"id" 1 is that of {file}:4, too'),
        (9, f"\"id\" 'a\\ud800' is that of {file}:8, too"),
    ]


@pytest.mark.parametrize("bad_lines", ["strict", "skip"])
def test_a_file_without_a_good_line_is_an_error_under_every_policy(bad_lines, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n\nnothing\n{}\n[]\n")
    message = refusal(problems, "test", test_file=str(file), bad_lines=bad_lines)
    assert message.startswith(f"{file}:3: not valid JSON: ")
    assert message.endswith("(and 2 more bad lines); none is good")


def test_the_policy_is_a_config_key_and_another_word_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"\nnothing\n")
    options = [f"--config.task.train_file={tmp_path}/rows.jsonl", "--config.task.bad_lines=skip"]
    for name in ("gsm8k_smollm2", "qwen2_5_math_7b"):
        assert load_config(name, []).task.bad_lines == "strict"
        task = load_config(name, options).task.to_dict()
        assert task.pop("module") == "scope_jax.tasks.math_problems"
        assert len(problems("train", **task).skipped) == 1
        message = refusal(problems, "train", **{**task, "bad_lines": "ignore"})
        assert message == 'task.bad_lines must be "strict" or "skip", got \'ignore\''


LINES = st.one_of(st.binary(max_size=30), ANYTHING.map(lambda text: json.dumps({"problem": text})))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(LINES.map(lambda x: x if isinstance(x, bytes) else x.encode()))))
def test_any_bytes_are_a_row_or_a_bad_line(tmp_path_factory, lines):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    text = b"\n".join([*lines, GOOD])
    file.write_bytes(text)
    skipped = []
    rows = read_jsonl(file, skipped=skipped)
    assert len(rows) + len(skipped) == sum(bool(line.strip()) for line in text.split(b"\n"))
    assert rows[-1] == {**hostile.ROW, "_source": f"{file}:{text.count(10) + 1}"}
