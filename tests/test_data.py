"""Tests of the way from a file to tokens: lines, epochs, prompts, and the texts of steps."""

import gzip
import json
import sys

import numpy as np
import pytest

from scope_jax import data
from scope_jax.data import (
    decode_completions,
    decode_steps,
    prompt_iterator,
    read_jsonl,
    read_rows,
    render_prompt,
    stream_rows,
    tokenize_prompts,
)
from scope_jax.models.hf import load_tokenizer
from scope_jax.records import InputError
from scope_jax.tasks import math_problems


class Words:
    """A tokenizer of words that numbers them as they come; <end> is special."""

    def __init__(self):
        self.words = ["<end>"]

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        self.words += [word for word in dict.fromkeys(text.split()) if word not in self.words]
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens and all(type(i) is int for i in ids)
        return " ".join(self.words[i] for i in ids if i)


def write_lines(file, lines):
    data = b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def refusal(function, *arguments, **options):
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- JSON lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_remember_their_lines(name, tmp_path):
    file = write_lines(tmp_path / name, ['{"a": 1}', "", '{"b": "\u00e9"}', "  "])
    assert read_jsonl(str(file)) == [
        {"a": 1, "_source": f"{file}:1"},
        {"b": "\u00e9", "_source": f"{file}:3"},
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    "bad",
    ['{"a": 1', "{'a': 1}", "nothing", b"\xff\xfe\n", pytest.param("[" * 100_000, id="deep")],
)
def test_broken_line_is_named(bad, name, tmp_path):
    file = write_lines(tmp_path / name, ['{"a": 1}', "", bad, '{"a": 2}'])
    assert refusal(read_jsonl, file).startswith(f"{file}:3: not valid JSON: ")


@pytest.mark.parametrize(
    ("line", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType"), ('"a"', "str")]
)
def test_line_that_is_no_object_is_named(line, kind, tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", ['{"a": 1}', line])
    assert refusal(read_jsonl, file) == f"{file}:2: a JSON object per line expected, got {kind}"


def test_missing_and_empty_files_are_named(tmp_path):
    assert (
        refusal(read_jsonl, tmp_path / "no.jsonl")
        == f"data file {tmp_path / 'no.jsonl'} does not exist"
    )
    assert refusal(read_jsonl, tmp_path) == f"data file {tmp_path} does not exist"
    for name, lines in {"empty.jsonl": [], "blank.jsonl.gz": ["", " "]}.items():
        file = write_lines(tmp_path / name, lines)
        assert refusal(read_jsonl, file) == f"{file} holds no rows"


def test_damaged_gzip_file_is_named(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl.gz", [json.dumps({"a": i * "x"}) for i in range(50)])
    whole = file.read_bytes()
    for damaged in (
        b'{"a": 1}\n',
        whole[: len(whole) // 2],
        whole[:30] + b"\x00\xff" * 9 + whole[48:],
    ):
        file.write_bytes(damaged)
        assert refusal(read_jsonl, file).startswith(f"{file} is damaged: ")


# --- Parquet --------------------------------------------------------------------------------------

ROWS = [
    {"a": 1, "b": "é", "prompt": [{"role": "user", "content": "1+1?"}], "more": {"x": None}},
    {"a": 2, "b": None, "prompt": [], "more": {"x": 0.5}},
    {"a": 3, "b": "", "prompt": None, "more": None},
]


def write_parquet(file, table, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_pylist(table)
    parquet.write_table(table, file, **options)
    return file


@pytest.mark.parametrize("options", [{}, {"row_group_size": 1}, {"compression": "zstd"}])
def test_parquet_gives_the_rows_that_jsonl_gives(options, tmp_path):
    file = write_parquet(tmp_path / "rows.parquet", ROWS, **options)
    lines = write_lines(tmp_path / "rows.jsonl", map(json.dumps, ROWS))
    for row, line in zip(read_rows(str(file)), read_rows(lines), strict=True):
        number = row["a"]
        assert row.pop("_source") == f"{file}:row {number}"
        assert line.pop("_source") == f"{lines}:{number}"
        assert row == line == ROWS[number - 1]


def test_rows_are_numbered_through_all_pieces_that_are_read(tmp_path):
    count = 2 * data.PARQUET_ROWS + 3
    table = [{"a": i} for i in range(count)]
    file = write_parquet(tmp_path / "rows.parquet", table, row_group_size=100)
    rows = read_rows(file, lambda row: (row["a"], row["_source"]))
    assert rows == [(i, f"{file}:row {i + 1}") for i in range(count)]


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "rows.parquet", [{"a": i} for i in range(1000)])
    parquet = pytest.importorskip("pyarrow.parquet")
    read, whole = [], parquet.ParquetFile.iter_batches

    def watched(self, **options):
        for batch in whole(self, **options):
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watched)
    rows = stream_rows(file)
    assert [next(rows)[0] for _ in range(5)] == [1, 2, 3, 4, 5]
    rows.close()
    assert len(read) == 1 and read[0] <= data.PARQUET_ROWS


def test_bad_parquet_rows_are_named_or_left_out(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    text = pyarrow.array([b"fine", b"\xff\xfe", b"refused", b"x" * 5000, b"good"])
    text = pyarrow.StringArray.from_buffers(5, *text.buffers()[1:])  # bytes as they are
    table = pyarrow.table({"text": text})
    file = write_parquet(tmp_path / "rows.parquet", table)
    monkeypatch.setattr(data, "MAX_LINE", 4000)

    def parse(row):
        if row["text"] == "refused":
            raise InputError("no good")
        return row["text"]

    skipped = []
    assert read_rows(file, parse, skipped=skipped) == ["fine", "good"]
    assert [(bad["file"], bad["line"]) for bad in skipped] == [(str(file), i) for i in (2, 3, 4)]
    assert skipped[0]["reason"].startswith("not readable: 'utf-8' codec can't decode")
    assert [bad["reason"] for bad in skipped[1:]] == ["no good", "longer than 4,000 bytes"]
    message = refusal(read_rows, file, parse)
    assert message.startswith(f"{file}:row 2: not readable: ")
    assert message.endswith("(and 2 more bad rows)")


def test_damaged_parquet_file_is_named(tmp_path):
    table = [{"a": f"{i} " * 50} for i in range(300)]
    file = write_parquet(tmp_path / "rows.parquet", table, compression="zstd")
    whole = file.read_bytes()
    for broken in (
        b"",
        b'{"a": 1}\n',
        whole[: len(whole) // 2],
        whole[:-30] + b"\xff" * 22 + whole[-8:],
        whole[:40] + b"\xff" * 200 + whole[240:],
    ):
        file.write_bytes(broken)
        assert refusal(read_rows, file).startswith(f"{file} is damaged: ")
    empty = write_parquet(tmp_path / "empty.parquet", [{"a": 1}])
    table = pytest.importorskip("pyarrow.parquet").read_table(empty).slice(0, 0)
    assert refusal(read_rows, write_parquet(empty, table)) == f"{empty} holds no rows"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(read_rows, file) == (
        f"reading {file} needs pyarrow: pip install pyarrow (or scope_jax[eval])"
    )
    lines = write_lines(tmp_path / "rows.jsonl", ['{"a": 1}'])
    assert len(read_rows(lines)) == 1


# --- Epochs ---------------------------------------------------------------------------------------

RECORDS = [{"id": i} for i in range(7)]


def ids_of(iterator, batches):
    return [[record["id"] for record in next(iterator)] for _ in range(batches)]


def test_every_epoch_covers_all_records_once_in_another_order():
    batches = ids_of(prompt_iterator(RECORDS, batch_size=2, seed=0), 14)
    assert [len(batch) for batch in batches] == [2] * 14  # also across the end of an epoch of 7
    epochs = np.array(batches).reshape(4, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert epochs[0].tolist() != list(range(7))


def test_order_is_a_function_of_the_seed():
    first = ids_of(prompt_iterator(RECORDS, batch_size=3, seed=5), 8)
    assert ids_of(prompt_iterator(RECORDS, batch_size=3, seed=5), 8) == first
    assert ids_of(prompt_iterator(RECORDS, batch_size=3, seed=6), 8) != first


def test_order_of_the_file_is_kept_without_shuffling():
    batches = ids_of(prompt_iterator(RECORDS, batch_size=3, seed=0, shuffle=False), 4)
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


def test_state_resumes_with_the_next_batch():
    iterator = prompt_iterator(RECORDS, batch_size=3, seed=1)
    ids_of(iterator, 4)  # into the second epoch
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    want = ids_of(iterator, 5)
    resumed = prompt_iterator(RECORDS, batch_size=3, seed=1)
    resumed.set_state(state)
    assert ids_of(resumed, 5) == want
    iterator.set_state(state)
    assert ids_of(iterator, 5) == want


def test_parts_make_up_the_whole_and_a_state_goes_on_in_another_number_of_parts():
    def iterator(part=(0, 1)):
        return prompt_iterator(RECORDS, batch_size=6, seed=1, part=part)

    whole = ids_of(iterator(), 9)
    for count in (2, 3):
        parts = [iterator((i, count)) for i in range(count)]
        batches = zip(*[ids_of(part, 4) for part in parts], strict=True)
        assert [sum(batch, []) for batch in batches] == whole[:4]  # neighbouring records each
        states = [part.get_state() for part in parts]
        assert states == [states[0]] * count
        resumed = iterator()
        resumed.set_state(states[0])
        assert ids_of(resumed, 5) == whole[4:]


def test_too_few_records_are_refused():
    message = refusal(prompt_iterator, RECORDS, batch_size=8, seed=0)
    assert message == "7 problems do not fill one batch of 8 prompts"
    assert len(ids_of(prompt_iterator(RECORDS, batch_size=7, seed=0), 1)[0]) == 7


# --- Prompts --------------------------------------------------------------------------------------


def test_braces_of_a_problem_survive_the_template():
    problem = r"Let $x \in \{1, 2\}$ and {problem}: \frac{1}{2} {}?"
    text = render_prompt(None, problem, template="Q: {problem}\nA {b}:", chat=False)
    assert text == f"Q: {problem}\nA {{b}}:"
    assert (
        render_prompt(None, "x", template="{problem}", chat=False, system="Be brief. ")
        == "Be brief. x"
    )


class Chat:
    """Writes down how it was asked."""

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is True
        return json.dumps(messages)


def test_chat_has_a_system_message_only_if_there_is_one():
    user = {"role": "user", "content": "Solve {x}."}
    render = {"template": "Solve {problem}.", "chat": True}
    assert json.loads(render_prompt(Chat(), "{x}", **render)) == [user]
    with_system = json.loads(render_prompt(Chat(), "{x}", system="Think.", **render))
    assert with_system == [{"role": "system", "content": "Think."}, user]


def test_the_assistants_turn_may_be_opened_and_is_opened_once():
    class Thinks(Chat):
        def apply_chat_template(self, messages, **options):
            return super().apply_chat_template(messages, **options) + "<think>\n"

    render = {"template": "{problem}", "assistant": "<think>\n"}
    plain = render_prompt(Chat(), "x", template="{problem}", chat=True)
    assert render_prompt(Chat(), "x", chat=True, **render) == plain + "<think>\n"
    assert render_prompt(Thinks(), "x", chat=True, **render) == plain + "<think>\n"
    assert render_prompt(None, "x", chat=False, **render) == "x<think>\n"


def test_chat_template_of_a_real_tokenizer_ends_at_the_assistant_s_turn(smollm2):
    tokenizer, _ = load_tokenizer(smollm2)
    options = {"template": "Q: {problem}", "chat": True, "system": "Be brief."}
    text = render_prompt(tokenizer, "{1+1}", **options)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nQ: {1+1}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    prompts = tokenize_prompts(
        [{"id": "a", "problem": "{1+1}"}],
        tokenizer=tokenizer,
        render=lambda problem: render_prompt(tokenizer, problem, **options),
        max_prompt_length=40,
        pad_id=2,
    )
    ids = prompts.ids[0][prompts.mask[0]].tolist()
    assert tokenizer.decode(ids) == text
    assert ids.count(1) == 3 and ids.count(2) == 2  # special tokens, and no second bos


def tokenize(problems, width=4):
    records = [{"id": f"p{i}", "problem": problem} for i, problem in enumerate(problems)]
    return records, tokenize_prompts(
        records,
        tokenizer=Words(),
        render=lambda problem: problem.upper(),
        max_prompt_length=width,
        pad_id=99,
    )


def test_prompts_are_padded_on_the_left():
    records, prompts = tokenize(["a b", "c", "a b c a"])
    assert prompts.ids.tolist() == [[99, 99, 1, 2], [99, 99, 99, 3], [1, 2, 3, 1]]
    assert prompts.mask.tolist() == [[False] * 2 + [True] * 2, [False] * 3 + [True], [True] * 4]
    assert prompts.ids.dtype == np.int32 and prompts.mask.dtype == bool
    assert prompts.records == tuple(records)


@pytest.mark.parametrize(("problem", "count"), [("a b c d e", 5), ("", 0)])
def test_prompt_that_does_not_fit_is_named_by_its_id(problem, count):
    message = refusal(tokenize, ["a", problem])
    assert message == f"problem p1 has {count} prompt tokens; data.max_prompt_length is 4"


# --- Texts ----------------------------------------------------------------------------------------


def test_texts_hold_neither_padding_nor_special_tokens():
    tokenizer = Words()
    tokenizer.encode("a b c", add_special_tokens=False)
    ids = np.array([[1, 2, 0, 3], [3, 3, 3, 3], [1, 2, 3, 0]])
    mask = np.arange(4) < np.array([3, 0, 4])[:, None]
    assert decode_completions(tokenizer, ids, mask) == ["a b", "", "a b c"]


def test_steps_are_the_pieces_between_their_ends():
    tokenizer = Words()
    tokenizer.encode("a b c", add_special_tokens=False)
    ids = np.array([[1, 2, 3, 1, 0], [2, 0, 3, 3, 3], [3, 3, 3, 3, 3]])
    ends = np.array([[1, 3, 5], [2, 0, 0], [0, 0, 0]])
    real = np.array([[True] * 3, [True, False, False], [False] * 3])
    assert decode_steps(tokenizer, ids, ends, real) == [["a", "b c", "a"], ["b"], []]


# --- Math problems --------------------------------------------------------------------------------


def math_rows(file, *rows):
    return write_lines(file, map(json.dumps, rows))


def test_gsm8k_row_gives_gold_and_solution(tmp_path):
    answer = "48/2 = <<48/2=24>>24\n#### 1,024 "
    file = math_rows(tmp_path / "rows.jsonl", {"question": "How many?", "answer": answer})
    want = {"id": f"{file}:1", "problem": "How many?", "gold": "1,024", "solution": answer}
    assert math_problems.problems("train", train_file=str(file)) == [want]


def test_bare_answer_may_be_a_number_and_may_have_a_solution(tmp_path):
    file = math_rows(
        tmp_path / "rows.jsonl.gz",
        {"problem": "1+1?", "answer": 2},
        {"problem": "1/2?", "answer": r"\frac{1}{2}", "solution": "Half."},
    )
    rows = math_problems.problems("test", test_file=str(file))
    assert [(row["gold"], row["solution"]) for row in rows] == [
        ("2", ""),
        (r"\frac{1}{2}", "Half."),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "How many?"}, 'no "answer"'),
        ({"question": "How many?", "answer": ""}, 'no "answer"'),
        ({"problem": "How many?", "answer": None}, 'no "answer"'),
        ({"problem": "How many?", "answer": True}, 'no "answer"'),
        ({"problem": "How many?", "answer": ["2"]}, 'no "answer"'),
        ({"question": "How many?", "answer": "2+2=4\n#### "}, 'no answer after "####"'),
        ({"question": "How many?", "answer": "Four."}, "GSM8K's answer ends in"),
        ({"answer": "4"}, 'no "problem" (or "question") text'),
        ({"problem": "  ", "answer": "4"}, 'no "problem" (or "question") text'),
        ({"problem": 3, "answer": "4"}, 'no "problem" (or "question") text'),
    ],
)
def test_row_without_problem_or_answer_is_named(row, reason, tmp_path):
    file = math_rows(tmp_path / "rows.jsonl", {"problem": "fine", "answer": "1"}, row)
    message = refusal(math_problems.problems, "train", train_file=str(file))
    assert message.startswith(f"{file}:2: {reason}")


def test_split_without_a_file_names_the_option(tmp_path):
    file = str(math_rows(tmp_path / "rows.jsonl", {"problem": "fine", "answer": "1"}))
    message = refusal(math_problems.problems, "ood", train_file=file, test_file=file)
    assert message == "no data file for the ood split: set --config.task.ood_file=FILE.jsonl[.gz]"
    assert "no data file for the dev split" in refusal(
        math_problems.problems, "dev", train_file=file
    )


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k_reads_whole(split, count, shared):
    file = str(shared / f"data/gsm8k_{split}.jsonl.gz")
    rows = math_problems.problems(split, **{f"{split}_file": file})
    assert len(rows) == count
    assert len({row["id"] for row in rows}) == count
    assert all(row["gold"].lstrip("-").replace(",", "").replace(".", "").isdigit() for row in rows)
    if split == "train":
        assert rows[0]["gold"] == "72" and rows[0]["problem"].startswith("Natalia sold clips to 48")
