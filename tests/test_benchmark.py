"""Benchmark sets: problems from files, resumable samples, figures, comparisons, completions."""

import functools
import gzip
import itertools
import json
import math
import pathlib
import random

import hostile
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from scope_jax import benchmark, checkpoint, evaluate_sets
from scope_jax.benchmark import (
    BenchmarkSet,
    digest,
    final_answer,
    jobs_of,
    read_samples,
    read_sets,
    with_options,
)
from scope_jax.benchmark_report import (
    agreement,
    compare,
    majority_is_right,
    paired_bootstrap,
    results,
    summary,
)
from scope_jax.configlib import load_config
from scope_jax.data import render_prompt, render_record
from scope_jax.evaluate import main
from scope_jax.evaluate_sets import grade_stored
from scope_jax.models.hf import load_hf
from scope_jax.records import InputError
from scope_jax.rewards import verify
from scope_jax.tasks.math_problems import pass_rate_of, read_pass_rates
from scope_jax.tasks.worksheet import problems as worksheet
from scope_jax.update import init_state, make_optimizer

POLICY = "scope_jax/tasks/worksheet_models/policy"
MATH = BenchmarkSet(key="math500", name="MATH-500", source="math")
CHOICE = BenchmarkSet(key="gpqa", name="GPQA", source="gpqa", grade="choice", group="ood")


def write(path: pathlib.Path, rows: list) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def luffy_row(source: str, problem: str, gold: str, system: str | None = None) -> dict:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": problem})
    return {
        "data_source": source,
        "prompt": messages,
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": 3, "split": "default"},
    }


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sets that the worksheet's tiny policy can sample: 5 sheets, and 3 as "choices"."""
    folder = tmp_path_factory.mktemp("data")
    sheets = worksheet("test", n=2)
    rows = [{"problem": sheets[i]["problem"], "answer": sheets[i]["gold"]} for i in range(8)]
    write(folder / "aime24.jsonl", rows[:5])
    write(folder / "gpqa.jsonl", [{**row, "answer": "(B)"} for row in rows[5:]])
    return folder


def evaluate(data, out, *more: str, batch: int = 8) -> int:
    return main(
        ["--config", "eval_math:runlocal", "--model", POLICY, "--out", str(out),
         f"--config.data_dir={data}", f"--config.eval.batch_size={batch}",
         "--config.sets.aime24.samples=4", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of an evaluation that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(data, out) == 0
    return out


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_every_sample_is_written_in_order_and_graded(whole):
    rows = lines(whole)
    jobs = [("aime24", p, s) for p in range(5) for s in range(4)]
    jobs += [("gpqa", p, 0) for p in range(3)]
    assert [(row["set"], row["index"], row["sample"]) for row in rows] == jobs
    right = [row["reward"] for row in rows if row["set"] == "aime24"]
    assert 0 < sum(right) < len(right)  # the policy solves some sheets of two sums
    assert [row["id"] for row in rows[:5]] == ["aime24/0"] * 4 + ["aime24/1"]
    assert all(row["reward"] == 0 and row["answer"] is None for row in rows[20:])
    assert len({row["completion"] for row in rows[:20]}) > 5
    assert set(rows[0]) == {
        "set", "id", "index", "sample", "problem", "completion", "tokens", "finished", "reward",
        "answer",
    }  # fmt: skip
    found = json.loads((whole / "results.json").read_text())
    accuracy = sum(right) / 20
    assert found["averages"] == {"math": pytest.approx(accuracy), "ood": 0.0}
    assert found["sets"]["aime24"]["problems"] == 5 and found["sets"]["aime24"]["samples"] == 4
    assert set(found["skipped"]) == {
        "aime25", "amc", "math500", "minerva", "olympiad", "arc_c", "mmlu_pro",
    }  # fmt: skip


def test_the_samples_are_pass_rates_that_prepare_data_reads(whole, data):
    rates, rows = read_pass_rates(whole / "samples.jsonl"), lines(whole)
    for index, line in enumerate((data / "aime24.jsonl").read_text().splitlines()):
        record = {"id": f"train.jsonl:{index + 1}", "problem": json.loads(line)["problem"]}
        right = [row["reward"] for row in rows if row["id"] == f"aime24/{index}"]
        assert pass_rate_of(record, rates) == sum(right) / 4


def test_an_interrupted_evaluation_goes_on_to_the_same_file(data, whole, tmp_path, monkeypatch):
    """Interrupted in the second batch's write, and resumed with other batches, of other slots."""
    out, written = tmp_path / "out", []

    def fails(path, samples):
        if written:
            with open(path, "a") as file:  # three lines and a half of the batch's eight
                text = "".join(json.dumps(sample) + "\n" for sample in samples)
                file.write(text[: text.index("\n", len(text) // 2) - 10])
            raise KeyboardInterrupt
        written.append(samples)
        benchmark.append_samples(path, samples)

    monkeypatch.setattr(evaluate_sets, "append_samples", fails)
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, out)
    monkeypatch.undo()
    partial = (out / "samples.jsonl").read_bytes()
    assert len(written[0]) == 8 and partial.count(b"\n") > 8 and not partial.endswith(b"\n")
    assert not (out / "results.json").exists()
    assert evaluate(data, out, "--config.sample.slots=8", batch=16) == 0
    for name in ("samples.jsonl", "results.json", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_evaluation_is_printed_again_without_sampling(data, whole, monkeypatch, capsys):
    before = (whole / "samples.jsonl").read_bytes(), (whole / "results.json").read_bytes()
    monkeypatch.setattr(evaluate_sets, "generate", None)  # cannot be called
    assert evaluate(data, whole) == 0
    assert before == ((whole / "samples.jsonl").read_bytes(), (whole / "results.json").read_bytes())
    out = capsys.readouterr().out
    accuracy = json.loads((whole / "results.json").read_text())["sets"]["aime24"]["accuracy"]
    assert "AIME24 │ 5 x 4" in " ".join(out.split()).replace("  ", " ")
    assert "average of 1 of 6 sets" in out and "left out: MATH-500: " in out
    assert json.loads(out.splitlines()[-1]) == {
        "math_average": accuracy,
        "ood_average": 0.0,
        "accuracy": {"aime24": accuracy, "gpqa": 0.0},
        "out": str(whole),
    }


def test_more_samples_of_a_set_keep_those_that_fewer_had(data, whole, tmp_path):
    out = tmp_path / "out"
    assert evaluate(data, out, "--config.sets.aime24.samples=2", "--config.data_dir=",
                    f"--config.sets.aime24.file={data}/aime24.jsonl") == 0  # fmt: skip
    assert lines(out) == [row for row in lines(whole) if row["sample"] < 2 and row["set"] != "gpqa"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.eval.temperature=1.0", "sampling.temperature is 0.6 there and 1.0 here"),
        ("--config.seed=3", "seed is 0 there and 3 here"),
        ("--config.sets.aime24.samples=8", "sets.aime24.samples is 4 there and 8 here"),
        ("--config.sets.aime24.problems=3", "sets.aime24.problems is 5 there and 3 here"),
        ("--config.model.rope_theta=5.0", "model.rope_theta is 0.0 there and 5.0 here"),
    ],
)
def test_another_config_in_the_same_folder_is_refused(data, whole, capsys, option, message):
    before = (whole / "samples.jsonl").read_bytes()
    assert evaluate(data, whole, option) == 2
    error = capsys.readouterr().err
    assert message in error and error.rstrip().endswith("use another --out")
    assert error.count("\n") == 1
    assert (whole / "samples.jsonl").read_bytes() == before


def test_a_runs_checkpoint_is_evaluated_into_its_workdir(data, tmp_path, capsys):
    """A checkpoint of weights that differ from the base model's, under eval_math's own config."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    config = load_config("worksheet:n=2,runlocal", ["--config.prompt.system=Solve: "])
    (workdir / "config.json").write_text(config.to_json())
    _, params = load_hf(POLICY)
    params = jax.tree.map(lambda x: 1.02 * x, params)
    manager = checkpoint.open_checkpoints(workdir)
    checkpoint.save(manager, 7, init_state(make_optimizer(2, **config.optimizer), params, 7), {})
    manager.close()
    command = ["--config", "eval_math:runlocal", "--workdir", str(workdir)]
    command += [f"--config.data_dir={data}", "--config.sets.aime24.samples=1"]
    assert main(command) == 0
    out = workdir / "evaluation" / "eval_math-step7"
    record = json.loads((out / "config.json").read_text())
    assert (record["workdir"], record["restored_step"]) == (str(workdir), 7)
    assert record["model"]["path"] == POLICY and len(lines(out)) == 5 + 3
    printed = capsys.readouterr().out
    assert "note: prompt.system is '' here and was 'Solve: ' in training" in printed


def test_bad_arguments_are_one_line_and_write_nothing(data, tmp_path, capsys):
    config, out = ["--config", "eval_math:runlocal"], str(tmp_path / "out")
    named = f"--config.sets.amc.file={tmp_path}/absent.jsonl"
    for arguments, message in [
        ([*config, "--model", POLICY], "--model with benchmark sets needs --out DIR"),
        ([*config, "--model", POLICY, "--out", out], "no set has a file: set --config.data_dir="),
        ([*config, "--model", POLICY, "--out", out, named], "sets.amc.file: "),
        ([*config, "--model", POLICY, "--out", out, "--config.data_dir=/nowhere"], "data_dir /no"),
        ([*config, "--model", POLICY, "--out", out, "--config.sets.amc.grade=best"], "sets.amc.gr"),
        ([*config, "--model", POLICY, "--out", out, "--config.sets.amc.samples=0"], "sets.amc.sam"),
        ([*config, "--out", out], "give --config C with --workdir DIR or --model DIR"),
        ([*config, "--model", POLICY, "--completions", "f"], "give --config C with --workdir DIR"),
        (["--config", "worksheet", "--model", POLICY, "--out", out], "--out is for a config with"),
        (["--config", "worksheet", "--completions", "f"], "--completions is for a config with"),
        (["--compare", "a", "b", "--config", "c"], "--config does not go with --compare"),
        (["--compare", "a", "b"], "a/config.json is missing: a is no evaluation's --out folder"),
        ([*config, "--completions", "absent.jsonl"], "data file absent.jsonl does not exist"),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    too_long = [*config, "--model", POLICY, "--out", out, f"--config.data_dir={data}"]
    assert main([*too_long, "--config.data.max_prompt_length=5"]) == 2
    assert "problem aime24/0 has 6 prompt tokens" in capsys.readouterr().err
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_each_set_has_options_of_its_own_and_all_are_read():
    config = load_config("eval_math", ["--config.sets.aime24.samples=7"])
    fields = set(BenchmarkSet.__dataclass_fields__) - {"key"}
    assert len(config.sets) == 9
    for key, options in config.sets.items():
        assert set(options) == fields
        BenchmarkSet(key=key, **options)
    protocol = {key: (s.samples, s.grade, s.group) for key, s in config.sets.items()}
    assert protocol == {
        **dict.fromkeys(("aime25", "amc"), (32, "math", "math")),
        "aime24": (7, "math", "math"),
        **dict.fromkeys(("math500", "minerva", "olympiad"), (1, "math", "math")),
        **dict.fromkeys(("arc_c", "gpqa", "mmlu_pro"), (1, "choice", "ood")),
    }
    assert (config.eval.temperature, config.eval.max_new_tokens) == (0.6, 8192)


# ------------------------------------------------------------------------------------ files


def test_one_parquet_file_holds_several_sets(tmp_path):
    rows = [
        luffy_row("aime", "What is 1+1?", "2", "Think."),
        luffy_row("math", "What is 2+2?", "4", ""),
        luffy_row("math", "What is 1/2?", "\\frac{1}{2}"),
    ]
    file = tmp_path / "valid.all.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    aime = BenchmarkSet(key="aime24", name="", source="aime", luffy_file="valid.all.parquet")
    math500 = BenchmarkSet(key="math500", name="", source="math", file="valid.all.parquet")
    amc = BenchmarkSet(key="amc", name="", source="amc", luffy_file="valid.all.parquet")
    found, skipped = read_sets([aime, math500, amc], str(tmp_path))
    assert found == {
        "aime24": [{"id": "aime24/0", "problem": "What is 1+1?", "system": "Think.", "gold": "2"}],
        "math500": [
            {"id": "math500/0", "problem": "What is 2+2?", "gold": "4"},
            {"id": "math500/1", "problem": "What is 1/2?", "gold": "\\frac{1}{2}"},
        ],
    }
    assert skipped == {
        "amc": f"{file} holds no row of data_source 'amc', but 'math' (2), 'aime' (1)"
    }
    render = functools.partial(
        render_prompt, None, template="Q: {problem}", chat=False, system="S."
    )
    prompts = [render_record(render, row) for rows in found.values() for row in rows]
    assert prompts == ["Think.Q: What is 1+1?", "S.Q: What is 2+2?", "S.Q: What is 1/2?"]
    with pytest.raises(InputError, match="sets.amc: .* holds no row of data_source 'amc'"):
        read_sets([BenchmarkSet(key="amc", name="", source="amc", file=str(file))])


def test_jsonl_of_either_name_with_ids_and_a_limit(tmp_path):
    rows = [
        {"id": 7, "question": "1+1?", "answer": "so #### 2"},
        {"problem": "half?", "answer": 0.5},
        {"problem": "third?", "answer": "1/3"},
    ]
    with gzip.open(tmp_path / "math500.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    options = {"key": "math500", "name": "", "source": "math", "problems": 2}
    found, _ = read_sets([BenchmarkSet(**options)], str(tmp_path))
    assert [(row["id"], row["gold"]) for row in found["math500"]] == [
        ("7", "so #### 2"), ("math500/1", "0.5"),
    ]  # fmt: skip


def test_options_are_rendered_in_the_documented_layout(tmp_path):
    row = {"question": "Which is even?", "options": ["1", 2, "3"], "answer": "b"}
    file = write(tmp_path / "q.jsonl", [row])
    (found,) = benchmark.read_set(file, CHOICE)
    assert found["problem"] == (
        "Which is even?\n\nA. 1\nB. 2\nC. 3\n\nPut the letter of the right option within \\boxed{}."
    )
    assert found["problem"] == with_options("Which is even?", ["1", "2", "3"])


GOOD = {"problem": "p", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"problem": "p"}, 'no "answer" (or "reward_model.ground_truth") text'),
        ({"answer": "1"}, 'no "problem" (or "question") text'),
        ({"problem": ["p"], "answer": "1"}, 'no "problem" (or "question") text'),
        ({"problem": "p", "answer": "\\boxed{ }"}, '"answer" holds nothing to compare with'),
        ({"problem": "p", "answer": ["1"]}, 'no "answer"'),
        ({"problem": "p", "answer": True}, 'no "answer"'),
        ({"problem": "\ud800", "answer": "1"}, "half a surrogate pair, which is not Unicode"),
        ({"problem": "a\x00b", "answer": "1"}, "a NUL character in"),
        ({**GOOD, "id": ["x"]}, '"id" must be a text or a number, got list'),
        ({**GOOD, "options": ["a", "b"]}, 'it has "options": set its grade to "choice"'),
        ({"prompt": [{"role": "user", "content": 3}], "answer": "1"}, "message without text"),
        ({"prompt": [{"role": "user"}, "x"], "answer": "1"}, '"prompt" is no list of messages'),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}, "['assistant']"),
        ({**GOOD, "reward_model": {"ground_truth": {"a": 1}}}, 'no "answer"'),
    ],
)
def test_a_bad_row_of_a_math_set_is_named(tmp_path, row, reason):
    file = write(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(InputError) as error:
        benchmark.read_set(file, MATH)
    assert str(error.value).startswith(f"{file}:2: ") and reason in str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"problem": "p", "answer": "1"}, '"answer" must name an option in A .. J'),
        ({"problem": "p", "answer": "A or B"}, '"answer" must name an option in A .. J'),
        ({"problem": "p", "answer": "C", "options": ["x", "y"]}, "must name an option in A .. B"),
        ({"problem": "p", "answer": "A", "options": ["x"]}, "must be a list of 2 .. 10 texts"),
        ({"problem": "p", "answer": "A", "options": "xy"}, "must be a list of 2 .. 10 texts"),
        ({"problem": "p", "answer": "A", "options": ["x", None]}, "no option B text"),
    ],
)
def test_a_bad_row_of_a_choice_set_is_named(tmp_path, row, reason):
    file = write(tmp_path / "rows.jsonl", [{"problem": "p", "answer": "J"}, row])
    with pytest.raises(InputError) as error:
        benchmark.read_set(file, CHOICE)
    assert str(error.value).startswith(f"{file}:2: ") and reason in str(error.value)


def test_an_id_that_repeats_is_refused(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{**GOOD, "id": "a"}, {**GOOD, "id": "a"}])
    with pytest.raises(InputError, match=f"{file}:2: \"id\" 'a' is there twice"):
        benchmark.read_set(file, MATH)


def test_a_digest_tells_problems_apart():
    row = {"id": "a", "problem": "p", "gold": "1"}
    assert digest([row]) == digest([dict(row)])
    others = [{**row, "gold": "2"}, {**row, "problem": "q"}, {**row, "system": "s"}]
    assert len({digest([other]) for other in [row, *others]}) == 4


# ------------------------------------------------------------------------------------ samples


def sample(job, **more) -> dict:
    key, problem, number = job
    row = {
        "set": key, "id": f"{key}/{problem}", "index": problem, "sample": number,
        "completion": f"text {number}", "tokens": 3, "finished": True, "reward": 1.0,
        "answer": "1",
    }  # fmt: skip
    return {**row, **more}


def test_samples_are_read_up_to_a_half_written_line(tmp_path):
    jobs = jobs_of({"a": (2, 2), "b": (1, 1)})
    file = tmp_path / "samples.jsonl"
    assert read_samples(file, jobs) == ([], 0)
    rows = [sample(job) for job in jobs]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for size in range(0, len(text) + 1, 7):
        file.write_text(text[:size])
        found, whole = read_samples(file, jobs)
        assert found == rows[: text[:size].count("\n")]
        assert whole == text[:size].rfind("\n") + 1
        benchmark.cut_file(file, whole)
        assert file.read_text() == text[:whole]


@pytest.mark.parametrize(
    "line",
    ["nothing", "[]", "{}", '"set"', json.dumps(sample(("a", 0, 1), reward="x")),
     json.dumps(sample(("a", 0, 1), finished=1)), json.dumps(sample(("a", 0, 1), completion=1)),
     json.dumps(sample(("a", 1, 1))), json.dumps(sample(("b", 0, 1))), "[" * 100_000],
)  # fmt: skip
def test_a_samples_file_that_was_changed_is_named_by_line(tmp_path, line):
    jobs, file = jobs_of({"a": (2, 2)}), tmp_path / "samples.jsonl"
    file.write_text(json.dumps(sample(jobs[0])) + "\n" + line + "\n")
    with pytest.raises(InputError, match=f"{file}:2: .*move it away"):
        read_samples(file, jobs)


def test_final_answers_are_read_behind_the_mark():
    thought = "<think>\\boxed{1}</think> so \\boxed{ 0.50 }"
    assert final_answer("math", thought, "</think>") == "0.50"
    assert final_answer("math", "<think>\\boxed{1}", "</think>") is None
    assert final_answer("math", "no mark") is None and final_answer("math", "\\boxed{}") is None
    assert final_answer("choice", "I say \\boxed{\\text{(C)}}.") == "C"
    assert final_answer("choice", "no idea") is None
    for text in hostile.ENDLESS + hostile.NUMBERS + hostile.BROKEN:
        for grade, after in itertools.product(("math", "choice"), ("", "5")):
            assert isinstance(final_answer(grade, f"\\boxed{{{text}}} {text}", after), str | None)


# ------------------------------------------------------------------------------------ figures


def random_samples(seed: int, problems: int, samples: int, key: str = "s") -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for job in jobs_of({key: (problems, samples)}):
        answer = rng.choice(["1", "2", "0.5", "1/2", None])
        rows.append(
            sample(
                job, reward=float(answer == "1"), answer=answer, tokens=rng.randint(1, 50),
                finished=rng.random() < 0.7, completion=f"it is ${answer}$ {rng.randint(0, 3)}",
            )
        )  # fmt: skip
    return rows


def test_figures_are_those_of_plain_python():
    for seed, (problems, samples) in enumerate([(4, 1), (5, 2), (3, 5), (6, 8)]):
        rows = random_samples(seed, problems, samples)
        entry = {"s": {"name": "S", "group": "math", "samples": samples}}
        found = results(rows, entry)["sets"]["s"]
        right = [row["answer"] == "1" for row in rows]
        groups = [right[i * samples : (i + 1) * samples] for i in range(problems)]
        assert found["accuracy"] == pytest.approx(sum(right) / len(right))
        assert list(found["pass@k"]) == [
            str(k) for k in (1, 2, 4, 5, 8) if k <= samples and (k != 5 or samples == 5)
        ]
        for k, value in found["pass@k"].items():
            draws = [
                [any(drawn) for drawn in itertools.combinations(group, int(k))] for group in groups
            ]
            assert value == pytest.approx(sum(sum(d) / len(d) for d in draws) / problems)
        won = 0
        for i in range(problems):
            given = [
                {"0.5": "1/2"}.get(row["answer"], row["answer"])
                for row in rows[i * samples : (i + 1) * samples]
            ]
            given = [answer for answer in given if answer is not None]
            best = max(map(given.count, given), default=0)
            won += next((a for a in given if given.count(a) == best), None) == "1"
        assert found["maj@k"] == pytest.approx(won / problems)
        assert found["tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / len(rows))
        cut = sum(not row["finished"] for row in rows)
        assert found["truncated"] == pytest.approx(cut / len(rows))
        none = sum(row["answer"] is None for row in rows)
        assert found["unanswered"] == pytest.approx(none / len(rows))
        assert ("diversity" in found) == (samples > 1)


def test_diversity_of_copies_is_least_and_of_different_answers_one():
    jobs = jobs_of({"s": (2, 3)})
    entry = {"s": {"name": "S", "group": "ood", "samples": 3}}
    text = "a b c d e f $x$"
    copies = results([sample(job, completion=text, answer="1") for job in jobs], entry)
    spread = copies["sets"]["s"]["diversity"]
    assert spread["textual_diversity"] == pytest.approx(0, abs=1e-6)
    assert spread["equation_diversity"] == 0 and spread["distinct_answers"] == pytest.approx(1 / 3)
    assert spread["distinct_1"] == pytest.approx(7 / 21) and spread["correct_groups"] == 2
    other = [sample(job, completion=f"{i} ${i}$", answer=str(i)) for i, job in enumerate(jobs)]
    spread = results(other, entry)["sets"]["s"]["diversity"]
    assert spread["equation_diversity"] == 1 and spread["distinct_answers"] == 1


def test_averages_count_every_set_the_same():
    sets = {
        "a": {"name": "A", "group": "math", "samples": 1},
        "b": {"name": "B", "group": "math", "samples": 2},
    }
    rows = [sample(("a", i, 0), reward=float(i == 0)) for i in range(4)]
    rows += [sample(("b", 0, i)) for i in range(2)]
    assert results(rows, sets)["averages"] == {"math": (1 / 4 + 2 / 2) / 2, "ood": None}


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["1", "2", "2"], [True, False, False], False),
        (["2", "1", "1", "2"], [False, True, True, False], False),  # a tie: the first one
        (["1", "2", "2", "1"], [True, False, False, True], True),
        (["0.5", "2", "2", "\\frac{1}{2}", "1/2"], [True, False, False, True, True], True),
        ([None, None, "1"], [False, False, True], True),  # who says nothing has no vote
        ([None, None], [True, True], False),
    ],
)
def test_the_majoritys_answer_counts(answers, right, expected):
    assert majority_is_right(answers, right) is expected


# ------------------------------------------------------------------------------------ comparison


def test_the_bootstrap_is_that_of_plain_python():
    rng = np.random.default_rng(1)
    a, b = rng.random(30), rng.random(30)
    difference, drawn = paired_bootstrap(a, b, resamples=50, seed=5)
    gains, again = [y - x for x, y in zip(a, b, strict=True)], np.random.default_rng(5)
    for value in drawn:
        picked = again.integers(0, 30, 30).tolist()
        assert value == pytest.approx(sum(gains[i] for i in picked) / 30)
    assert difference == pytest.approx(sum(gains) / 30)
    again_difference, again_drawn = paired_bootstrap(a, b, resamples=50, seed=5)
    assert difference == again_difference and (drawn == again_drawn).all()


def test_bootstrap_of_equal_runs_and_of_a_constant_gain():
    a = [0.0, 1.0, 0.5, 0.25]
    same = summary(*paired_bootstrap(a, a))
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "p": 1.0}
    better = summary(*paired_bootstrap(a, [x + 0.25 for x in a]))
    assert better == {"difference": 0.25, "interval": [0.25, 0.25], "p": 2 / 1001}


def test_the_bootstraps_spread_is_the_standard_error_of_paired_differences():
    rng = np.random.default_rng(0)
    hard = rng.random(500) < 0.5  # makes the two runs alike, so that pairing matters
    a = (rng.random(500) < np.where(hard, 0.05, 0.95)).astype(float)
    b = (rng.random(500) < np.where(hard, 0.10, 0.97)).astype(float)
    difference, drawn = paired_bootstrap(a, b, resamples=4000)
    error = (b - a).std() / math.sqrt(500)
    assert drawn.std() == pytest.approx(error, rel=0.05)
    found = summary(difference, drawn)
    assert found["interval"] == pytest.approx(
        [difference - 1.96 * error, difference + 1.96 * error], abs=0.3 * error
    )


def test_p_of_no_difference_is_uniform_enough():
    """Of two runs of the same policy few have p < 0.05: the level is what it says."""
    rng, low = np.random.default_rng(2), 0
    for seed in range(300):
        a, b = rng.random((2, 60)) < 0.5
        low += summary(*paired_bootstrap(a, b, resamples=200, seed=seed))["p"] < 0.05
    assert 3 <= low <= 35  # 15 expected; binomial, and a percentile bootstrap of 60 is a bit bold


def finished_evaluation(folder, rows, *, sha256="x", temperature=0.6, names=("a", "b")):
    """Writes what an evaluation of sets a (4 problems x 2, math) and b (3 x 1, ood) leaves."""
    folder.mkdir()
    sizes = {"a": (4, 2, "math"), "b": (3, 1, "ood"), "c": (3, 1, "ood")}
    sets = {
        key: {"name": key.upper(), "group": sizes[key][2], "problems": sizes[key][0],
              "samples": sizes[key][1], "sha256": sha256}
        for key in names
    }  # fmt: skip
    config = {"sets": sets, "reward": {"solved_at": 1.0}, "sampling": {"temperature": temperature}}
    (folder / "config.json").write_text(json.dumps(config))
    jobs = jobs_of({key: sizes[key][:2] for key in names})
    write(folder / "samples.jsonl", [sample(j, reward=r) for j, r in zip(jobs, rows, strict=False)])
    return folder


def test_compare_pairs_problems_of_each_set_and_average(tmp_path, capsys):
    one = finished_evaluation(tmp_path / "1", [0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1])
    two = finished_evaluation(tmp_path / "2", [1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1], temperature=1.0)
    found = compare(one, two)
    assert found["sets"]["a"]["a"] == (0 + 0.5 + 1 + 0) / 4
    assert found["sets"]["a"]["b"] == (0.5 + 1 + 1 + 0.5) / 4
    assert found["sets"]["a"]["difference"] == pytest.approx(0.375)
    assert found["averages"]["ood"] == {
        key: found["sets"]["b"][key] for key in ("a", "b", "difference", "interval", "p")
    }
    assert found["changed"] == ["sampling.temperature"]
    back = compare(two, one)
    assert back["sets"]["a"]["difference"] == -found["sets"]["a"]["difference"]
    assert back["sets"]["a"]["interval"] == [-x for x in found["sets"]["a"]["interval"][::-1]]
    assert main(["--compare", str(one), str(two)]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == found
    assert "+37.5" in printed and "differs: sampling.temperature" in printed


def test_compare_refuses_what_is_not_the_same_and_says_what(tmp_path):
    rows = [1] * 11
    one = finished_evaluation(tmp_path / "1", rows)
    for name, options, message in [
        ("fewer", {"names": ("a",)}, "1 has the set b, .*fewer has not"),
        ("more", {"names": ("a", "b", "c")}, "more has the set c, .*1 has not"),
        ("other", {"sha256": "y"}, "set a: .*1 and .*other have other problems"),
    ]:
        two = finished_evaluation(tmp_path / name, [1] * 14, **options)
        with pytest.raises(InputError, match=message):
            compare(one, two)
    half = finished_evaluation(tmp_path / "half", rows[:6])
    with pytest.raises(InputError, match="half is not finished: 6 of 11 samples are there"):
        compare(one, half)
    config = json.loads((half / "config.json").read_text())
    config["sets"]["a"].update(samples=1, problems=4)
    (half / "config.json").write_text(json.dumps(config))
    write(half / "samples.jsonl", [sample(j) for j in jobs_of({"a": (4, 1), "b": (3, 1)})])
    with pytest.raises(InputError, match="set a: .*1 has 2 samples a problem, .*half has 1"):
        compare(one, half)
    (half / "config.json").write_text('{"sets": []}')
    with pytest.raises(InputError, match="is not the config of an evaluation"):
        compare(one, half)


# ------------------------------------------------------------------------------------ completions


def test_stored_completions_are_graded_and_every_disagreement_is_listed(tmp_path, capsys):
    write(tmp_path / "math500.jsonl", [{"id": "m", "problem": "p", "answer": "\\frac{1}{2}"}])
    write(tmp_path / "gpqa.jsonl", [{"problem": "p", "answer": "C"}])
    rows = [
        {"id": "m", "completion": "so \\boxed{0.5}", "correct": True},
        {"id": "m", "set": "math500", "completion": "\\boxed{2}", "correct": True},  # a wrong label
        {"id": "gpqa/0", "completion": "\\boxed{c}", "correct": True},
        {"id": "gpqa/0", "completion": "\\boxed{A}", "correct": False},
        {"id": 1, "gold": "#### 72", "completion": "#### 72", "correct": False},  # another
        {"id": "m", "completion": "no label"},
    ]
    file = write(tmp_path / "completions.jsonl", rows)
    command = ["--config", "eval_math", "--completions", str(file), "--out", str(tmp_path / "out")]
    assert main([*command, f"--config.data_dir={tmp_path}"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "completions": 6, "accuracy": pytest.approx(3 / 6), "labelled": 5,
        "label_accuracy": pytest.approx(3 / 5), "agreement": pytest.approx(3 / 5),
        "disagreements": 2,
    }  # fmt: skip
    assert [json.loads(line.removeprefix("disagreement: "))["id"] for line in listed] == ["m", "1"]
    written = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert [row["answer"] for row in written["disagreements"]] == ["2", "72"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"completion": "x"}, 'no "id"'),
        ({"id": "a"}, 'no "completion" text'),
        ({"id": "a", "completion": "x", "correct": 1}, '"correct" must be true or false, got 1'),
        ({"id": "z", "completion": "x"}, "no problem has the \"id\" 'z' in any set"),
        ({"id": "a", "completion": "x"}, "\"id\" 'a' is in math500 and gpqa: say which"),
        ({"id": "a", "set": "amc", "completion": "x"}, "\"set\" 'amc' is none of math500, gpqa"),
        ({"id": "a", "set": [], "completion": "x"}, '"set" [] is none of'),
        ({"id": "a", "gold": 3, "completion": "x"}, '"gold" is not a text'),
        ({"id": "a", "gold": "$ $", "completion": "x"}, "holds nothing to compare with"),
        ({"id": "a", "gold": "7", "set": "gpqa", "completion": "x"}, "must name an option"),
    ],
)
def test_a_bad_stored_completion_is_named(tmp_path, row, reason):
    good = {"id": "a", "set": "gpqa", "completion": "x"}
    file = write(tmp_path / "c.jsonl", [good, row])
    problems = {key: [{"id": "a", "gold": "A"}] for key in ("math500", "gpqa")}
    with pytest.raises(InputError) as error:
        grade_stored(file, [MATH, CHOICE], problems, reward_fn=verify, after="")
    assert str(error.value).startswith(f"{file}:2: ") and reason in str(error.value)


def test_gsm8k_solutions_get_the_labels_that_came_with_them(shared, tmp_path, monkeypatch):
    """All 5,276 real solutions; the file's own "A:" is an adapter's business, not verify's."""
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "experiments"))
    adapter = __import__("gsm8k_completions")
    rows = adapter.completions(shared / "data" / "gsm8k_example_model_solutions.jsonl.gz")
    file = write(tmp_path / "solutions.jsonl", rows)
    found = agreement(grade_stored(file, [MATH], {}, reward_fn=verify, after=""))
    assert (found["completions"], found["labelled"]) == (5276, 5276)
    assert [row["id"] for row in found["disagreements"]] == []
    assert found["label_accuracy"] == 2001 / 5276
