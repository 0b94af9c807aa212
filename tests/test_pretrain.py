"""The worksheet's shipped models do what the main job needs of them."""

import functools

import jax
import numpy as np
import pytest

from scope_jax import load_hf, load_prm
from scope_jax.models.hf import load_tokenizer
from scope_jax.pretrain import first_error_accuracy, label_rollouts, main, solve_rate
from scope_jax.pretrain_texts import RIGHT_SHARE, VOCAB, make_tokenizer, solved_sheets
from scope_jax.tasks import worksheet

MODELS = "scope_jax/tasks/worksheet_models"
load = functools.cache(lambda name: load_hf(f"{MODELS}/{name}", dtype="float32"))


def test_the_shipped_tokenizer_is_the_one_pretrain_makes():
    tokenizer, ends = load_tokenizer(f"{MODELS}/policy")
    assert tokenizer.get_vocab() == VOCAB == make_tokenizer().get_vocab()
    assert ends == (VOCAB["<eos>"],)
    text = "c5*2,a3+9?c5*2=0\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("c5*2=0\n")) == 5  # c, 5*2, =, 0, newline


def test_training_text_is_right_except_for_hard_facts():
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    ids, prompt_length = solved_sheets(64, 4, rng, hard={})
    for row in ids:
        sheet, answer = (
            tokenizer.decode(row[:prompt_length]),
            tokenizer.decode(row[prompt_length:-1]),
        )
        assert worksheet.verify(sheet, answer) and row[-1] == VOCAB["<eos>"]

    hard = worksheet.hard_facts(0)
    ids, _ = solved_sheets(4000, 4, rng, hard=hard)
    lines = ids[:, 3 * 4 : -1].reshape(-1, 5)  # label, sum, "=", value, newline
    names = {i: token for token, i in VOCAB.items()}
    verdicts = {True: [], False: []}
    for _, fact, _, value, _ in lines:
        right = int(names[value]) == worksheet.fact_value(names[fact])
        verdicts[names[fact] in hard].append(right)
    assert all(verdicts[False])
    # 8,000 draws: a standard error of 0.005
    assert abs(np.mean(verdicts[True]) - RIGHT_SHARE) < 0.02


def test_the_policy_has_room_to_learn_and_the_teacher_can_teach():
    tokenizer, _ = load_tokenizer(f"{MODELS}/policy")
    assert 0.02 < solve_rate(*load("policy"), tokenizer, 5) < 0.15
    assert solve_rate(*load("teacher"), tokenizer, 5) > 0.95


def test_the_prm_finds_first_errors_of_the_policys_own_rollouts():
    tokenizer, _ = load_tokenizer(f"{MODELS}/policy")
    data = label_rollouts(*load("policy"), tokenizer, count=512, seed=123)  # not the training seed
    prm, params = load_prm(f"{MODELS}/prm", dtype="float32")
    accuracy = first_error_accuracy(prm, params, data)
    assert accuracy["first_error_exact"] > 0.9
    # It is a trained model, not the checker: the two disagree somewhere.
    assert accuracy["first_error_exact"] < 1.0 or accuracy["no_error_exact"] < 1.0


def test_too_few_steps_are_refused(capsys, tmp_path):
    assert main(["--out", str(tmp_path / "models"), "--steps", "1"]) == 2
    assert capsys.readouterr().err == "error: --steps and --rows must be at least 8\n"
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_pretrain_makes_models_that_load(tmp_path):
    assert main(["--out", str(tmp_path), "--steps", "8", "--rows", "8"]) == 0
    model, params = load_hf(tmp_path / "policy")
    assert model.config.num_layers == 2
    assert sum(x.size for x in jax.tree.leaves(params)) == 153_856
    load_prm(tmp_path / "prm")
