"""Groups without signal give way to those of further batches: by hand, and in the loop."""

import numpy as np
from test_train import rows as metrics_of
from test_train import run, training_rows

from scope_jax.refill import has_signal, refill_groups

G = 2
BATCHES = {  # rewards of three groups of two
    "first": [0, 0, 1, 0, 1, 1],
    "a": [1, 1, 0, 1, 0, 0],
    "b": [0, 1, 1, 0, 0, 1],
}


def batch(name):
    rewards = np.array(BATCHES[name], np.float32)
    ids = np.array([[ord(name[0]), i] for i in range(6)])
    rows = {"record": np.repeat(np.arange(3), G), "ids": ids, "mask": ids > 0, "rewards": rewards}
    return [f"{name}{i}" for i in range(3)], rows, {"policy_tokens": int(rows["mask"].sum())}


def refill(*keys):
    return refill_groups(batch, keys, *batch("first"))


def test_signal_is_unequal_rewards():
    assert has_signal([0, 0, 1, 0, 1, 1, 0.5, 0.25], 2).tolist() == [False, True, False, True]


def test_without_further_batches_nothing_changes():
    records, rows, measured = refill()
    want = batch("first")
    assert records == want[0] and measured == want[2]
    assert all(np.array_equal(rows[name], want[1][name]) for name in rows)


def test_groups_without_signal_are_replaced_in_order():
    records, rows, measured = refill("a", "b")
    assert records == ["a1", "first1", "b0"]
    assert rows["rewards"].tolist() == [0, 1, 1, 0, 0, 1]
    assert rows["ids"].tolist() == [
        [ord("a"), 2], [ord("a"), 3], [ord("f"), 2], [ord("f"), 3], [ord("b"), 0], [ord("b"), 1]
    ]  # fmt: skip
    assert rows["record"].tolist() == [0, 0, 1, 1, 2, 2]  # places, not problems
    sampled = sum(batch(name)[2]["policy_tokens"] for name in BATCHES)
    assert measured == {"policy_tokens": sampled, "refill/batches": 2, "refill/groups": 2}


def test_no_batch_is_drawn_once_all_groups_have_signal():
    records, _, measured = refill("b", "a")
    assert records == ["b0", "first1", "b1"] and measured["refill/batches"] == 1


def test_all_wrong_groups_may_stay_to_be_repaired():
    records, rows, measured = refill_groups(batch, ("a", "b"), *batch("first"), 1.0)
    assert records == ["first0", "first1", "a1"]  # the all-wrong first one is not lacking
    assert rows["rewards"].tolist() == [0, 0, 1, 0, 0, 1] and measured["refill/batches"] == 1


def test_what_finds_no_replacement_stays():
    records, rows, measured = refill("a")
    assert records == ["a1", "first1", "first2"] and measured["refill/groups"] == 1
    assert rows["rewards"].tolist() == [0, 1, 1, 0, 1, 1]


def test_dapo_trains_on_more_groups_with_signal(tmp_path):
    options = ("--config.method=dapo", "--config.total_steps=3", "--config.learn.mini_batches=1")
    run(tmp_path / "dapo", *options)
    run(tmp_path / "plain", *options, "--config.refill.rounds=0")
    dapo, plain = (training_rows(tmp_path / name) for name in ("dapo", "plain"))
    assert sum(row["refill/groups"] for row in dapo) > 0
    mean = lambda steps: np.mean([row["groups_with_signal"] for row in steps])  # noqa: E731
    assert mean(dapo) > mean(plain)
    assert all(row["policy_tokens"] > 0 and row["recompiles"] == 0 for row in dapo)
    first = [next(r for r in metrics_of(tmp_path / n) if r["step"] == 1) for n in ("dapo", "plain")]
    assert first[0]["reward"] == first[1]["reward"]  # of the first batch, which is no choice
