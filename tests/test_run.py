"""What a run does with its rows: scored by the policy's own continuations, accepted or not."""

import threading

import jax
import numpy as np
import pytest

from scope_jax.configlib import load_config
from scope_jax.data import decode_steps
from scope_jax.metrics import Timer
from scope_jax.run import Pending, acceptable, current_logps, load_run
from scope_jax.sharding import replicate
from scope_jax.train import sample, score


def test_monte_carlo_never_passes_a_wrong_step(tmp_path):
    """On a worksheet nothing that follows a wrong line makes the sheet right."""
    config = load_config("worksheet:n=3,runlocal", ["--config.method=scope_monte_carlo"])
    run, params, data = load_run(config, tmp_path)
    key, (records, prompts) = replicate(jax.random.key(0), run.policy.mesh), next(data)
    rows, _ = sample(run, config, params, records, prompts, key)
    rows["rewards"] = np.asarray(rows["rewards"])
    ends, scores, step_mask, counts = score(run, config, params, key, rows, records)
    assert counts == {} and set(np.unique(scores)) <= {0.0, 1.0}
    steps, found, wrong_rows = (
        decode_steps(run.policy.tokenizer, rows["ids"], ends, step_mask),
        0,
        0,
    )
    for row, texts in enumerate(steps):
        gold, finished = records[rows["record"][row]]["gold"], bool(rows["finished"][row])
        verdicts = run.policy.check_steps(gold, texts, finished)
        if rows["rewards"][row] == 1 or not finished:
            assert scores[row].all()
            continue
        first, wrong_rows = verdicts.index(False), wrong_rows + 1
        assert not scores[row, first : len(texts)].any()
        found += scores[row, :first].all()
    assert wrong_rows > 10 and found > 0  # and now and then it is the very first wrong step


@pytest.mark.parametrize(
    "accept, want",
    [
        ("verified_correct", [True, False, False]),
        ("prm_ok", [True, False, True]),
        ("any", [True, True, True]),
    ],
)
def test_what_is_accepted(accept, want):
    config = load_config("worksheet", [f"--config.correct.accept={accept}"])
    scores = np.array([[0.9, 0.6], [0.9, 0.4], [0.7, 0.0]])
    steps = np.array([[True, True], [True, True], [True, False]])
    found = acceptable(config, np.array([1.0, 0.0, 0.0]), lambda: (None, scores, steps, {}))
    assert found.tolist() == want


def test_pending_work_runs_beside_its_caller_and_is_waited_for():
    timer, go, doing = Timer(), threading.Event(), threading.Event()

    def work(x):
        doing.set()
        assert go.wait(30)
        return np.array([x, 2.0], np.float32)

    pending = Pending(timer, "verify", work, 1.0)
    assert doing.wait(30)  # started, and we are still here: it cannot have ended
    go.set()
    assert np.asarray(pending).tolist() == [1.0, 2.0]
    assert np.array(pending, np.float64).dtype == np.float64  # may be read again
    found = timer.flush()
    assert found["seconds/verify"] > 0 and found["seconds/verify_wait"] >= 0


def test_what_goes_wrong_beside_is_raised_where_it_is_read():
    def work():
        raise ValueError("gold 3 has no answer")

    pending = Pending(Timer(), "verify", work)
    with pytest.raises(ValueError, match="gold 3"):
        np.asarray(pending)


@pytest.mark.parametrize("parts", [1, 4])
def test_current_logps_of_what_was_just_sampled_are_the_samplers(tmp_path, parts):
    options = [f"--config.learn.mini_batches={parts}", "--config.sample.temperature=0.7"]
    config = load_config("worksheet:n=3,runlocal", options)
    run, params, data = load_run(config, tmp_path)
    records, prompts = next(data)
    key = replicate(jax.random.key(0), run.policy.mesh)
    rows, _ = sample(run, config, params, records, prompts, key)
    found = current_logps(run, config, params, rows)
    np.testing.assert_allclose(found, rows["logps"], atol=1e-4)
    assert (found[~rows["mask"]] == 0).all()
    moved = jax.tree.map(lambda x: x * 1.1, params)
    assert abs(current_logps(run, config, moved, rows) - found).max() > 0.01
