"""Tests of the command that trains PRMs: a rule that can be learnt, resume, export, bad input."""

import importlib.util
import json
import pathlib
import random
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_prm_formats import CHATML, MARKS, MERGES, byte_tokenizer

from scope_jax import train_prm as module
from scope_jax.checkpoint import open_checkpoints
from scope_jax.data import read_jsonl
from scope_jax.models.hf import load_hf, save_hf
from scope_jax.models.transformer import Transformer, TransformerConfig, Weight, declare
from scope_jax.prm import HEADS, load_prm, score_solutions
from scope_jax.prm_formats import PRMInput
from scope_jax.sharding import make_mesh
from scope_jax.step_labels import read_step_labels
from scope_jax.train_prm import epoch_batches, main, make_batch, make_prm

TOKENIZER = byte_tokenizer(MERGES, MARKS, template=CHATML, bos="<bos>")
SMALL = {"embed_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 32}


def solutions(count: int, seed: int) -> list[dict]:
    """Solutions of equally long steps up to the first wrong one: a step with an "x" is wrong."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        steps = ["".join(rng.choice(list("abc"), 3)) for _ in range(rng.integers(1, 5))]
        if i % 2:
            steps[-1] = "xxx"
        labels = ["x" not in step for step in steps]
        rows.append({"prompt": f"{seed}-{i:03}?", "completions": steps, "labels": labels})
    return rows


def write(path: pathlib.Path, rows) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, a random backbone of two layers, and train.jsonl."""
    folder = tmp_path_factory.mktemp("train_prm")
    model = Transformer(
        TransformerConfig(vocab_size=len(TOKENIZER), num_layers=2, tie_embeddings=False, **SMALL)
    )
    rng = np.random.default_rng(0)

    def draw(weight):  # numpy's numbers: they compile nothing
        noise = 0.25 * rng.standard_normal(weight.shape).astype(np.float32)
        return np.ones_like(noise) if weight.init == "ones" else noise

    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    params = jax.tree.map(draw, declare(model.config), is_leaf=is_weight)
    save_hf(folder / "model", model, params, TOKENIZER)
    write(folder / "train.jsonl", solutions(200, seed=0))
    return folder


def arguments(folder, workdir, *more: str) -> list[str]:
    return [
        "--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--labels", "trl",
        "--workdir", str(workdir), "--total-steps", "60", "--rows", "16", "--learning-rate", "1e-2",
        "--held-out", "0.2", "--checkpoint-every", "10", *more,
    ]  # fmt: skip


def train(folder, head: str) -> pathlib.Path:
    workdir = folder / f"run_{head}"
    if not workdir.exists():
        assert main(arguments(folder, workdir, "--head", head)) == 0
    return workdir


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# --- Learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_which_steps_are_wrong(folder, head):
    rows = metrics(train(folder, head))
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    last = [row for row in rows if "eval/step_accuracy" in row][-1]
    assert last["step"] == 60 and last["eval/solutions"] == 40
    assert last["eval/step_accuracy"] > 0.9 and last["eval/balanced_accuracy"] > 0.9
    assert last["eval/first_error_f1"] > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_exported_prm_scores_unseen_solutions_as_the_trained_state_does(folder, head):
    workdir = train(folder, head)
    prm, params = load_prm(workdir / "prm")
    assert (prm.head, prm.format.name) == (head, HEADS[head])
    manager = open_checkpoints(workdir)
    trained = manager.restore(manager.latest_step())["state"]["params"]
    manager.close()
    leaves = jax.tree.leaves_with_path(params)
    other = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(trained)}
    assert len(other) == len(leaves)
    for path, x in leaves:
        np.testing.assert_array_equal(x, other[jax.tree_util.keystr(path)])

    rows, right = solutions(40, seed=1), []
    problems, steps = [r["prompt"] for r in rows], [r["completions"] for r in rows]
    for scores, row in zip(
        score_solutions(prm, params, TOKENIZER, problems, steps), rows, strict=True
    ):
        assert scores is not None
        right += [(score >= 0.5) == ok for score, ok in zip(scores, row["labels"], strict=True)]
    assert np.mean(right) > 0.9


class Interrupted(BaseException):
    """As a preemption: nothing catches it."""


def test_interrupted_run_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    whole, workdir = train(folder, "linear2_at_sep"), tmp_path / "run"
    say = module.say_progress

    def stop(writer, done, *rest):
        if done == 40:
            raise Interrupted
        say(writer, done, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "say_progress", stop)
        with pytest.raises(Interrupted):
            main(arguments(folder, workdir))
    assert not (workdir / "prm").exists()
    updates = []
    monkeypatch.setattr(
        module, "make_batch", lambda examples: updates.append(1) or make_batch(examples)
    )
    assert main(arguments(folder, workdir)) == 0
    assert len(updates) in (30, 40)  # the save of step 30 was in flight when the run was stopped
    want, got = (load_file(path / "prm" / "model.safetensors") for path in (whole, workdir))
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    assert [row for row in metrics(workdir) if "eval/step_accuracy" in row] == [
        row for row in metrics(whole) if "eval/step_accuracy" in row
    ]


def test_a_finished_run_is_not_silently_done_again(folder, capsys):
    workdir = train(folder, "linear2_at_sep")
    capsys.readouterr()
    status = main(arguments(folder, workdir))
    said = capsys.readouterr()
    assert (status, said.err[:7]) == (2, "error: "), said.out[-200:]


PARTLY = (
    "--train-layers", "1", "--reads", "3", "--probe", "64", "--learning-rate", "3e-3",
    "--total-steps", "40",
)  # fmt: skip


def test_partly_trained_backbone_learns_resumes_and_keeps_the_frozen_bits(
    folder, tmp_path, monkeypatch
):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    assert main(arguments(folder, whole, *PARTLY)) == 0
    last = [row for row in metrics(whole) if "eval/step_accuracy" in row][-1]
    assert last["eval/step_accuracy"] > 0.9 and last["eval/first_error_f1"] > 0.9
    before, after = (load_file(path / "model.safetensors") for path in (
        folder / "model", whole / "prm"
    ))  # fmt: skip
    frozen = [name for name in before if "layers.0." in name or "embed_tokens" in name]
    trained = [name for name in before if "layers.1." in name or name == "model.norm.weight"]
    assert len(frozen) > 5 and len(trained) > 5
    for name in frozen:
        np.testing.assert_array_equal(after[name], before[name])
    assert all((after[name] != before[name]).any() for name in trained)
    assert load_prm(whole / "prm")[0].reads == 3

    with monkeypatch.context() as patch:
        patch.setattr(module, "say_progress", mock.Mock(side_effect=Interrupted))
        with pytest.raises(Interrupted):
            main(arguments(folder, workdir, *PARTLY))
    assert main(arguments(folder, workdir, *PARTLY)) == 0
    resumed = load_file(workdir / "prm" / "model.safetensors")
    for name in after:
        np.testing.assert_array_equal(resumed[name], after[name])


@pytest.mark.parametrize("head", ["linear2_at_sep", "mlp2_at_token", "value_sigmoid_at_sep"])
def test_probe_alone_beats_a_fresh_head(folder, tmp_path, head, capsys):
    """One update at a rate of nothing: what is evaluated is the fitted head."""
    more = ("--head", head, "--learning-rate", "1e-12", "--total-steps", "1", "--reads", "2")
    accuracy = []
    for probe in ("0", "128"):
        assert main(arguments(folder, tmp_path / probe, *more, "--probe", probe)) == 0
        accuracy.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    fresh, fitted = (row["eval/balanced_accuracy"] for row in accuracy)
    assert fitted > max(fresh, 0.5) + 0.2


def test_fitted_logistic_finds_the_token_that_makes_a_step_wrong():
    # One feature of five says that a token is wrong; a step is right if none of its tokens is.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4, 5)).astype(np.float32) + 50  # far from the origin, as real ones
    real = np.arange(4) < rng.integers(1, 5, 600)[:, None]
    labels = (~((x[:, :, 2] > 51) & real).any(1)).astype(np.int32)
    weight, bias = module.fit_logistic(x, real, labels, ridge=1e-4)
    odds = np.where(real, x @ weight + bias, np.inf)
    right = (odds.min(1) > 0) == (labels == 1)
    assert right.mean() > 0.95
    assert np.abs(weight).argmax() == 2 and weight[2] < 0


# --- Batches --------------------------------------------------------------------------------------


def test_an_epoch_has_every_example_at_most_once_and_is_a_function_of_its_number():
    lengths = np.random.default_rng(0).integers(5, 90, 1003)
    for epoch in range(3):
        batches = epoch_batches(lengths, 8, seed=1, epoch=epoch)
        assert batches.shape == (1003 // 8, 8) and len(set(batches.ravel())) == batches.size
        np.testing.assert_array_equal(batches, epoch_batches(lengths, 8, seed=1, epoch=epoch))
    first = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert not np.array_equal(first, epoch_batches(lengths, 8, seed=1, epoch=1))
    assert not np.array_equal(first, epoch_batches(lengths, 8, seed=2, epoch=0))
    # neighbours in length: a batch spans far less than the whole range
    assert np.ptp(lengths[first], axis=1).mean() < np.ptp(lengths) / 8


def test_every_example_is_seen_within_some_epochs():
    seen = {i for epoch in range(20) for i in epoch_batches(np.ones(11), 4, 0, epoch).ravel()}
    assert seen == set(range(11))


def test_make_batch_masks_steps_without_a_label():
    examples = [
        (PRMInput([5, 6, 7, 8], [1, 2, 3]), [1, None, 0]),
        (PRMInput([9] * 33, [32]), [1]),
        (PRMInput([4], [0]), [None]),
    ]
    batch = make_batch(examples)
    assert batch["ids"].shape == (3, 64) and batch["labels"].shape == (3, 16)  # buckets
    assert batch["labels"].dtype == np.int32
    assert batch["labels"][:, :3].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert batch["step_mask"][:, :3].tolist() == [
        [True, False, True], [True, False, False], [False] * 3,
    ]  # fmt: skip
    assert not batch["step_mask"][:, 3:].any() and not batch["labels"][:, 3:].any()
    assert batch["score_positions"][0, :3].tolist() == [1, 2, 3]
    assert batch["mask"].sum(1).tolist() == [4, 33, 1]


def test_loss_is_the_mean_over_labelled_steps_and_accuracy_their_share():
    logits = np.array([[[0.0, 2.0], [1.0, -1.0], [9.0, 9.0]], [[0.5, 0.0], [0, 0], [0, 0]]])

    class Given:
        def logits(self, params, ids, positions, score_positions):
            del params, ids, positions, score_positions
            return jnp.array(logits, jnp.float32)

    batch = {
        "ids": np.zeros((2, 4), np.int32), "mask": np.ones((2, 4), bool),
        "score_positions": np.zeros((2, 3), np.int32),
        "labels": np.array([[1, 1, 0], [0, 0, 0]]),
        "step_mask": np.array([[True, True, False], [True, False, False]]),
    }  # fmt: skip
    loss, accuracy = module.prm_loss({}, {}, Given(), batch)
    # -log softmax: right by 2, wrong by 2, right by 1/2
    want = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2)) + np.log(1 + np.exp(-0.5))) / 3
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(accuracy, 2 / 3, rtol=1e-6)


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear2_at_sep", "lm_pair_at_token"])
def test_layers_keeps_the_first_ones_exactly(folder, head):
    options = {"head": head, "format": "", "step_token": "", "seed": 0, "dtype": jnp.float32}
    options |= {"train_layers": 0, "reads": 1}
    prm, params, _ = make_prm(folder / "model", layers=1, mesh=make_mesh(), **options)
    _, whole = load_hf(folder / "model", mesh=make_mesh(), dtype=jnp.float32)
    assert prm.backbone.config.num_layers == 1
    assert ("unembed" in params["backbone"]) == (head == "lm_pair_at_token")
    for name, x in params["backbone"].items():
        if name == "layers":
            kept = jax.tree.map(lambda x: x[:1], whole["layers"])
            jax.tree.map(np.testing.assert_array_equal, x, kept)
            assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(x))
        else:
            np.testing.assert_array_equal(x, whole[name])
    all_layers, _, _ = make_prm(folder / "model", layers=0, mesh=make_mesh(), **options)
    assert all_layers.backbone.config.num_layers == 2


# --- Bad input ------------------------------------------------------------------------------------


def refused(capsys, options: list[str]) -> str:
    capsys.readouterr()
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--rows", "12"), "--rows 12 does not divide over 8 devices"),
        (("--rows", "0"), "--rows must be at least 1"),
        (("--held-out", "1"), "--held-out is a share"),
        (("--layers", "3"), "--layers 3: "),
        (("--layers", "-1"), "--layers -1: "),
        (("--train-layers", "2"), "--train-layers 2: 0 (everything) to 1 of the 2 layers kept"),
        (("--train-layers", "-1"), "--train-layers -1: "),
        (("--reads", "0"), "--reads must be at least 1"),
        (("--model", "/nowhere"), "/nowhere does not exist"),
        (("--data", "/nowhere.jsonl"), "/nowhere.jsonl"),
        (("--step-token", "<no>", "--format", "qwen_math"), "no step token '<no>'"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_no_workdir(folder, tmp_path, capsys, more, reason):
    assert reason in refused(capsys, arguments(folder, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_missing_step_token_is_one_line_and_leaves_no_workdir(folder, tmp_path, capsys):
    model, params = load_hf(folder / "model")
    save_hf(tmp_path / "model", model, params, byte_tokenizer(template=CHATML))
    head = ("--head", "mlp2_at_token", "--model", str(tmp_path / "model"))
    error = refused(capsys, arguments(folder, tmp_path / "run", *head))
    assert "no step token '<extra_0>'" in error and str(tmp_path / "model") in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "p", "completions": ["a", "b"], "labels": [True]}], "2 steps but 1 labels"),
        ([{"prompt": "p", "completions": ["a"], "labels": ["+"]}], "label 0 must be true or false"),
        ([{"question": "p", "answer": "#### 1"}], '"prompt" must be text'),
    ],
)
def test_bad_labels_are_named_by_file_and_line(folder, tmp_path, capsys, rows, reason):
    data = write(tmp_path / "bad.jsonl", solutions(3, seed=0) + rows)
    error = refused(capsys, arguments(folder, tmp_path / "run", "--data", str(data)))
    assert reason in error and "bad.jsonl:4" in error
    assert not (tmp_path / "run").exists()


def test_unknown_labels_kind_is_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:  # argparse's own, as for every choice
        main(arguments(folder, tmp_path / "run", "--labels", "prm900k"))
    assert stopped.value.code == 2
    assert "invalid choice: 'prm900k'" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("count", "labels", "reason"),
    [(15, "trl", "do not fill --rows 16"), (1, "trl", "leaves none to train"), (3, "mc", "answer")],
)
def test_too_little_data_is_one_line(folder, tmp_path, capsys, count, labels, reason):
    data = write(tmp_path / "few.jsonl", solutions(count, seed=0))
    more = ("--data", str(data), "--labels", labels)
    line = refused(capsys, arguments(folder, tmp_path / "run", *more))
    assert reason in line or "few.jsonl:1" in line


@pytest.mark.parametrize(("count", "labels"), [(15, "trl"), (1, "trl"), (3, "mc")])
def test_too_little_data_leaves_no_workdir(folder, tmp_path, capsys, count, labels):
    data = write(tmp_path / "few.jsonl", solutions(count, seed=0))
    more = ("--data", str(data), "--labels", labels)
    refused(capsys, arguments(folder, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


# --- experiments/gsm8k_step_labels.py -------------------------------------------------------------

NUMBER = re.compile(r"(?:(?<![\w)%])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")  # 48-24 are two


@pytest.fixture(scope="module")
def step_labels():
    path = pathlib.Path(__file__).parents[1] / "experiments" / "gsm8k_step_labels.py"
    spec = importlib.util.spec_from_file_location("gsm8k_step_labels", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def gsm8k(shared) -> pathlib.Path:
    path = shared / "data" / "gsm8k_test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return path


def test_corruption_changes_exactly_one_number_and_never_to_the_right_one(step_labels, shared):
    rng, changed = np.random.default_rng(0), 0
    lines = [line for row in read_jsonl(gsm8k(shared)) for line in row["answer"].split("\n")]
    for line in lines:
        wrong = step_labels.corrupt(line, random.Random(int(rng.integers(1 << 30))))
        if wrong is None:
            continue
        changed += 1
        right = step_labels.NOTE.sub("", line)
        assert NUMBER.sub("#", wrong) == NUMBER.sub("#", right), (right, wrong)
        pairs = list(zip(NUMBER.findall(right), NUMBER.findall(wrong), strict=True))
        values = [tuple(float(x.replace(",", "")) for x in pair) for pair in pairs]
        different = [(a, b) for a, b in values if a != b]
        assert len(different) == 1 and sum(a != b for a, b in pairs) == 1, (right, wrong)
        note = list(step_labels.NOTE.finditer(line))[-1]
        assert different[0][0] == float(note[2]), (right, wrong)
        assert f"{different[0][1]:.4f}" != f"{float(note[2]):.4f}"
    assert changed > len(lines) / 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_label_points_at_the_changed_line(step_labels, shared, share):
    rows = list(read_jsonl(gsm8k(shared)))
    found = step_labels.solutions(gsm8k(shared), share, random.Random(0))
    assert len(found) == len(rows)
    for row, solution in zip(rows, found, strict=True):
        lines = [step_labels.NOTE.sub("", line) for line in row["answer"].split("\n")]
        lines = [line for line in lines if line.strip()]
        lines[-1] = lines[-1].replace("#### ", "The answer is ")
        pairs = zip(lines, solution["steps"], strict=True)
        different = [i for i, (a, b) in enumerate(pairs) if a != b]
        assert different == ([] if solution["label"] == -1 else [solution["label"]])
    # a problem without a result that stands in its text stays as it is
    assert 0.95 * share - 0.04 <= np.mean([row["label"] >= 0 for row in found]) <= share + 0.04


def test_command_writes_labels_that_the_readers_take(step_labels, tmp_path, monkeypatch):
    answers = ["2+3=<<2+3=5>>5\n5*2=<<5*2=10>>10\n#### 10"] * 20
    data = write(
        tmp_path / "gsm8k.jsonl",
        [{"question": f"What, {i}?", "answer": answer} for i, answer in enumerate(answers)],
    )
    out = tmp_path / "out.jsonl"
    command = ["x", "--data", str(data), "--layout", "trl", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    step_labels.main()
    records = read_step_labels(out, "trl")
    assert len(records) == 20
    for record in records:
        labels = record["labels"]
        assert all(labels[:-1]), "a corrupted copy stops at its wrong step"
        if labels[-1]:
            assert record["steps"] == ["2+3=5", "5*2=10", "The answer is 10"]
    assert 0 < sum(record["labels"][-1] == 0 for record in records) < 20
