"""From files to prepared problems, mixtures of them, and batches that are made ahead."""

import collections
import hashlib
import itertools
import json
import threading

import numpy as np
import pytest
from test_data import refusal

from scope_jax.data import Ahead, Mixture, Prepared, prompt_iterator, render_record
from scope_jax.prepare_data import main, write_shards
from scope_jax.records import InputError
from scope_jax.tasks.math_problems import normal_text, pass_rate_of, problems, read_pass_rates

OPENR1 = {
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+3?"}],
    "target": [{"role": "assistant", "content": "It is \\boxed{5}."}],
    "reward_model": {"ground_truth": "5", "style": "rule"},
    "extra_info": {"split": "train"},
}
GSM8K = {"question": "6*7?", "answer": "6*7 = <<6*7=42>>42\n#### 42"}
MATH = {"problem": "Half of one?", "solution": "So it is $\\boxed{\\frac12}$.", "level": "1"}
GENERIC = {"problem": "8-1?", "answer": 7, "id": "g1"}
LAYOUTS = (OPENR1, GSM8K, MATH, GENERIC)


def write(file, rows):
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def numbered(tmp_path, name, count, **more):
    rows = [
        {"problem": f"{name} {i}?", "answer": i, "id": f"{name}{i}", **more} for i in range(count)
    ]
    return write(tmp_path / f"{name}.jsonl", rows)


def prepare(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def removed(folder) -> dict[str, int]:
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {one["name"]: one["removed"] for one in manifest["filters"]}
    assert manifest["records"] + sum(found.values()) == manifest["read"]
    assert manifest["records"] == sum(shard["records"] for shard in manifest["shards"])
    return {name: count for name, count in found.items() if count}


# ---- the command ---------------------------------------------------------------------------------


def test_every_layout_becomes_the_same_records_from_jsonl_and_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = write(tmp_path / "rows.jsonl", LAYOUTS)
    assert prepare("--data", texts, "--out", tmp_path / "a") == 0
    records = list(Prepared(tmp_path / "a"))
    assert [record["gold"] for record in records] == ["5", "42", "\\frac12", "7"]
    assert [record["problem"] for record in records] == ["2+3?", "6*7?", "Half of one?", "8-1?"]
    assert records[0]["system"] == "Think." and records[0]["solution"] == "It is \\boxed{5}."
    assert records[3]["row_id"] == "g1" and all("system" not in one for one in records[1:])
    parquet.write_table(pyarrow.Table.from_pylist([OPENR1] * 1), tmp_path / "one.parquet")
    assert prepare("--data", tmp_path / "one.parquet", "--out", tmp_path / "b") == 0
    (record,) = Prepared(tmp_path / "b")
    assert {**record, "id": ""} == {**records[0], "id": ""}
    assert record["id"].endswith("one.parquet:row 1")


def test_every_filter_counts_what_it_removes(tmp_path):
    rows = [
        {"problem": "1+1?", "answer": "2"},
        {"problem": " 1+1 ? ", "answer": "2"},  # duplicate
        {"problem": "x" * 101, "answer": "2"},  # long_problem
        {"problem": "3+1?", "answer": "4", "solution": "y" * 201},  # long_solution
        {"problem": "4+1?", "answer": ""},  # unverifiable
        {"problem": "in the test set?", "answer": "9"},  # excluded
        {"problem": "never solved?", "answer": "9"},  # too hard
        {"problem": "always solved?", "answer": "9"},  # too easy
        {"problem": "sometimes solved?", "answer": "9"},
        {"question": "no answer mark", "answer": "9"},  # bad_line
    ]
    rates = [("never solved?", 0), ("always solved?", 1), ("sometimes solved?", 1)]
    rates += [("sometimes solved?", 0), ("not here", 0.5)]
    exclude = write(tmp_path / "test.jsonl", [{"problem": "In the  TEST set?"}])
    file = write(tmp_path / "rates.jsonl", [{"problem": p, "reward": r} for p, r in rates])
    options = ("--exclude", exclude, "--pass-rates", file, "--min-pass-rate", 0.1,
               "--max-pass-rate", 0.9, "--max-problem-characters", 100,
               "--max-solution-characters", 200, "--bad-lines", "skip")  # fmt: skip
    out = tmp_path / "out"
    assert prepare("--data", write(tmp_path / "rows.jsonl", rows), "--out", out, *options) == 0
    assert removed(out) == {
        "bad_line": 1, "long_problem": 1, "long_solution": 1, "excluded": 1, "too_hard": 1,
        "too_easy": 1, "unverifiable_gold": 1, "duplicate": 1,
    }  # fmt: skip
    assert [one["problem"] for one in Prepared(out)] == ["1+1?", "sometimes solved?"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (
        manifest["sources"][0]["sha256"]
        == hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()
    )


def test_the_same_options_give_the_same_bytes_and_a_seed_another_order(tmp_path):
    file = numbered(tmp_path, "p", 50)
    for name, *seed in [("a",), ("b",), ("c", "--seed", 1), ("d", "--seed", 1)]:
        options = ("--records-per-shard", 20, *seed)
        assert prepare("--data", file, "--out", tmp_path / name, *options) == 0
    read = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}  # noqa: E731
    assert read("a") == read("b") and read("c") == read("d")
    assert len(read("a")) == 3 + 1
    plain, shuffled = ([r["gold"] for r in Prepared(tmp_path / n)] for n in "ac")
    assert plain == [str(i) for i in range(50)] and plain != shuffled
    assert sorted(plain) == sorted(shuffled)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_goes_wrong_is_one_line_and_leaves_nothing(tmp_path, capsys, dry):
    file = write(tmp_path / "rows.jsonl", [GENERIC, {"problem": "?"}, {"answer": "no problem"}])
    assert prepare("--data", file, "--out", tmp_path / "out", *dry) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}:3: no ") and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_an_existing_directory_is_never_touched_and_a_killed_runs_is_replaced(tmp_path, capsys):
    file = numbered(tmp_path, "p", 3)
    (tmp_path / "out").mkdir()
    assert prepare("--data", file, "--out", tmp_path / "out") == 2
    assert "exists: delete it" in capsys.readouterr().err
    left = tmp_path / "new.partial"
    left.mkdir()
    (left / "00000.arrayrecord").write_bytes(b"half")
    assert prepare("--data", file, "--out", tmp_path / "new") == 0 and not left.exists()
    left = tmp_path / "other.partial"
    left.mkdir()
    (left / "thesis.tex").write_text("mine")
    assert prepare("--data", file, "--out", tmp_path / "other") == 2
    assert (left / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda _, shard: shard.unlink(), "is missing"),
        (lambda _, shard: shard.write_bytes(b"nothing of the kind"), "is damaged"),
        (lambda folder, _: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder, _: (folder / "manifest.json").unlink(), "prepare_data"),
        (
            lambda d, shard: (d / "manifest.json").write_text(
                json.dumps({"shards": [{"file": shard.name, "records": 9}]})
            ),
            "holds 3 records, manifest.json says 9",
        ),
    ],
)
def test_a_damaged_directory_is_named_in_one_line(tmp_path, break_it, words):
    assert prepare("--data", numbered(tmp_path, "p", 3), "--out", tmp_path / "out") == 0
    break_it(tmp_path / "out", next((tmp_path / "out").glob("*.arrayrecord")))
    assert words in refusal(lambda: list(Prepared(tmp_path / "out")))


def test_a_damaged_record_is_named_and_the_others_are_read(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"problem": f"{i} " * 400, "answer": i} for i in range(9)])
    assert prepare("--data", file, "--out", tmp_path / "out") == 0
    whole = list(Prepared(tmp_path / "out"))
    shard = next((tmp_path / "out").glob("*.arrayrecord"))
    text = shard.read_bytes()
    shard.write_bytes(text[:200] + bytes([text[200] ^ 255]) + text[201:])  # one byte in a chunk
    found, bad = Prepared(tmp_path / "out"), []
    for i, record in enumerate(whole):
        try:
            assert found[i] == record
        except InputError as error:
            bad.append((i, str(error)))
    ((i, message),) = bad
    assert message.startswith(f"{shard} is damaged at record {i + 1}: ") and "\n" not in message


@pytest.mark.parametrize(
    "record",
    [[], "text", {"id": "a", "problem": "b", "gold": "c"}]
    + [{"id": "a", "problem": "b", "gold": "c", "solution": "", "system": 3}],
)
def test_a_shard_of_other_records_is_named(tmp_path, record):
    shards = write_shards([record], tmp_path, 5)
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    assert f"{shards[0]['file']} is damaged at record 1: " in refusal(lambda: Prepared(tmp_path)[0])


# ---- what a run trains on ------------------------------------------------------------------------


def test_a_prepared_directory_is_a_training_file(tmp_path):
    file = numbered(tmp_path, "p", 5)
    assert prepare("--data", file, "--out", tmp_path / "out") == 0
    found, plain = (
        problems("train", train_file=str(tmp_path / "out")),
        problems("train", train_file=file),
    )
    assert list(found) == list(plain)
    assert found[1:3] == plain[1:3]


def test_pass_rates_choose_training_problems_as_arithmetic(tmp_path):
    file = numbered(tmp_path, "p", 6)
    lines = [("p0", 0), ("p1", 1), ("p2", 0), ("p2", 1), ("p3", 0.25), ("p9", 1)]
    rates = write(tmp_path / "rates.jsonl", [{"id": i, "pass_rate": r} for i, r in lines])
    options = {"pass_rates": rates, "min_pass_rate": 0.2, "max_pass_rate": 0.5}
    found = problems("train", train_file=file, **options)
    assert [one["gold"] for one in found] == ["2", "3", "4", "5"]  # 1/2, 1/4 and two unknown
    assert found.rated == {"kept": 4, "without_rate": 2, "too_hard": 1, "too_easy": 1}
    assert len(problems("test", train_file=file, test_file=file, **options)) == 6
    none = write(tmp_path / "none.jsonl", [{"id": "q", "pass_rate": 0.3}])
    assert "no rate of any" in refusal(problems, "train", train_file=file, pass_rates=none)


def test_a_file_whose_rated_problems_all_go_keeps_those_without_a_rate(tmp_path):
    file = numbered(tmp_path, "p", 3)
    rates = write(tmp_path / "rates.jsonl", [{"id": "p0", "pass_rate": 0}])
    options = {"train_file": file, "pass_rates": rates, "min_pass_rate": 0.5}
    found = problems("train", **options)
    assert [one["gold"] for one in found] == ["1", "2"]
    assert found.rated == {"kept": 2, "without_rate": 2, "too_hard": 1, "too_easy": 0}
    lines = [{"id": f"p{i}", "pass_rate": 0} for i in range(3)]
    write(tmp_path / "rates.jsonl", lines)
    assert "leaves no training problem" in refusal(problems, "train", **options)


@pytest.mark.parametrize("rate", [-0.1, 1.5, "1", None, float("inf")])
def test_what_is_no_rate_is_named(tmp_path, rate):
    file = write(tmp_path / "rates.jsonl", [{"id": "a", "pass_rate": rate}])
    assert refusal(read_pass_rates, file).startswith(f"{file}:1: ")


MESSAGES = [{"role": "user", "content": "2+3?"}]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": [{"role": "assistant", "content": "2+3?"}]}, "has the roles ['assistant']"),
        ({"prompt": MESSAGES * 2}, "has the roles ['user', 'user']"),
        ({"prompt": MESSAGES * 3}, "has the roles"),
        ({"prompt": ["2+3?"]}, "is no list of messages"),
        ({"prompt": []}, "has the roles []"),
        ({"prompt": [{"role": "user", "content": None}]}, "has a message without text"),
        ({"prompt": [{"role": "system", "content": 7}, *MESSAGES]}, "has a message without text"),
        ({"prompt": [{"role": [], "content": "2+3?"}]}, "has the roles [[]]"),
        ({"target": "It is 5."}, "is no list of messages"),
        ({"target": MESSAGES}, "has the roles ['user']"),
        ({"reward_model": {"ground_truth": ["5"]}}, 'no "answer"'),
        ({"reward_model": {}, "target": MESSAGES[:0]}, "has the roles []"),
    ],
)
def test_messages_that_are_no_prompt_or_solution_are_named(tmp_path, change, words):
    file = write(tmp_path / "rows.jsonl", [OPENR1, {**OPENR1, **change}])
    message = refusal(problems, "train", train_file=file)
    assert message.startswith(f"{file}:2: ") and words in message


def test_rates_are_found_by_text_before_id(tmp_path):
    rows = [{"id": "a", "pass_rate": 0.1}, {"problem": "One  half?", "reward": True}]
    rates = read_pass_rates(write(tmp_path / "r.jsonl", rows))
    record = {"id": "f:1", "row_id": "a", "problem": "one half ?"}
    assert pass_rate_of(record, rates) == 1.0
    assert pass_rate_of({**record, "problem": "other"}, rates) == 0.1
    assert pass_rate_of({"id": "f:1", "problem": "other"}, rates) is None
    assert normal_text("Find $ \\dfrac{1}{2} $.") == normal_text("find \\frac{1}{2}")


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1)])
def test_every_stretch_of_a_mixture_has_its_shares(weights):
    sources = [[{"id": (s, i)} for i in range(40)] for s in range(len(weights))]
    batches = prompt_iterator(Mixture(sources, weights), batch_size=8, seed=3)
    drawn = [record["id"][0] for batch in itertools.islice(batches, 60) for record in batch]
    for n in (8, 100, 480):
        counts = collections.Counter(drawn[:n])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - n * weight / sum(weights)) <= len(weights)


def test_a_mixture_shuffles_each_source_anew_in_every_epoch():
    sources = [[{"id": (s, i)} for i in range(16)] for s in range(2)]
    batches = prompt_iterator(Mixture(sources, (1, 1)), batch_size=8, seed=0)
    drawn = [record["id"] for batch in itertools.islice(batches, 8) for record in batch]
    epochs = [
        [i for s, i in drawn if s == source][16 * e : 16 * e + 16]
        for source in (0, 1)
        for e in (0, 1)
    ]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("kind", ["prepared", "mixture"])
def test_parts_of_several_hosts_make_up_the_whole_and_go_on_anywhere(tmp_path, kind):
    assert prepare("--data", numbered(tmp_path, "p", 21), "--out", tmp_path / "out",
                   "--records-per-shard", 4) == 0  # fmt: skip
    source = Prepared(tmp_path / "out")
    if kind == "mixture":
        source = Mixture([source, [{"id": i} for i in range(9)]], (2.0, 1.0))
    make = lambda part: prompt_iterator(source, batch_size=6, seed=5, part=part)  # noqa: E731
    whole, halves = make((0, 1)), [make((k, 2)) for k in (0, 1)]
    for _ in range(5):
        batch = next(whole)
        assert [one for half in halves for one in next(half)] == batch
    late = make((0, 1))
    late.set_state(halves[1].get_state())  # another number of hosts goes on from it
    assert [next(late) for _ in range(4)] == [next(whole) for _ in range(4)]


def test_what_is_no_mixture_is_refused(tmp_path):
    file, small = numbered(tmp_path, "p", 8), [{"id": 0}]
    mix = lambda *pairs: refusal(problems, "train", train_file=file, mix=pairs)  # noqa: E731
    assert "weight of x.jsonl must be > 0" in mix(("x.jsonl", 0))
    assert 'task.mix is (("FILE", weight), ..)' in mix("x.jsonl")
    big = [{"id": i} for i in range(8)]
    few = refusal(prompt_iterator, Mixture([big, small], (1, 1)), batch_size=8, seed=0)
    assert "source 2 of the mixture has 1 problems" in few


def test_a_records_own_system_message_wins():
    render = lambda problem, system="house": f"{system}: {problem}"  # noqa: E731
    assert render_record(render, {"problem": "p"}) == "house: p"
    assert render_record(render, {"problem": "p", "system": "own"}) == "own: p"


# ---- batches made ahead --------------------------------------------------------------------------


def numbers(count=40):
    return prompt_iterator([{"id": i} for i in range(count)], batch_size=4, seed=1)


def test_batches_made_ahead_are_the_same_batches_with_their_prompts():
    plain, ahead = numbers(), Ahead(numbers(), lambda records: [one["id"] for one in records])
    for _ in range(25):
        records, prompts = next(ahead)
        assert records == next(plain) and prompts == [one["id"] for one in records]
        assert ahead.get_state() == plain.get_state()  # of what was handed out, not of what waits


def test_a_run_goes_on_with_the_batch_behind_the_last_one():
    first, plain = Ahead(numbers(), len), numbers()
    for _ in range(7):
        next(first), next(plain)
    later = Ahead(numbers(), len)
    next(later)  # whatever was prepared is dropped
    later.set_state(first.get_state())
    assert [next(later)[0] for _ in range(5)] == [next(plain) for _ in range(5)]


def test_the_next_batch_is_tokenised_beside_its_caller():
    threads, second = [], threading.Event()

    def tokenize(records):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            second.set()
        return records

    next(Ahead(numbers(), tokenize))
    assert second.wait(30)  # nobody asked for it yet
    assert threading.main_thread() not in threads


def test_what_goes_wrong_ahead_is_raised_where_the_batch_is_asked_for():
    def tokenize(records):
        if calls.append(1) or len(calls) > 1:
            raise ValueError("problem 7 is too long")
        return records

    calls: list[int] = []
    ahead = Ahead(numbers(), tokenize)
    next(ahead)
    state = ahead.get_state()
    for _ in range(2):
        with pytest.raises(ValueError, match="problem 7"):
            next(ahead)
        assert ahead.get_state() == state  # such a batch counts as not handed out


def test_a_random_mixture_is_a_function_of_the_seed():
    sources = [[{"id": (s, i)} for i in range(20)] for s in range(2)]
    draw = lambda seed: [next(prompt_iterator(Mixture(sources, (1, 2)), batch_size=9, seed=seed))]  # noqa: E731
    assert draw(4) == draw(4) and draw(4) != draw(5)
    assert np.unique([one["id"][0] for one in draw(4)[0]]).tolist() == [0, 1]
