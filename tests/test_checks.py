"""Tests of the promises that a step is checked for, and of what is kept where they are broken."""

import json

import numpy as np
import pytest

from scope_jax.checks import (
    BrokenPromise,
    check_groups,
    check_splices,
    dump_batch,
    find_non_finite,
    is_spike,
)
from scope_jax.records import PAD, POLICY, TEACHER
from scope_jax.splicing import splice_rollouts

# --- Spikes -----------------------------------------------------------------------------------


def test_a_spike_is_beyond_factor_times_the_median_before_it():
    earlier = [1.0, 2.0, 3.0, 100.0]  # median 2.5
    assert not is_spike(3 * 2.5, earlier, factor=3, window=4)
    assert is_spike(3 * 2.5 + 0.01, earlier, factor=3, window=4)


def test_spikes_are_measured_by_the_last_values_alone():
    earlier = [50.0] * 10 + [1.0] * 4
    assert is_spike(4.0, earlier, factor=3, window=4)
    assert not is_spike(4.0, earlier, factor=3, window=12)  # eight of them are 50


def test_no_spike_before_half_a_window_of_finite_values():
    assert not is_spike(9.0, [], factor=2, window=4)
    assert not is_spike(9.0, [1.0, np.nan, np.inf], factor=2, window=4)
    assert is_spike(9.0, [1.0, np.nan, np.inf, 1.0], factor=2, window=4)
    assert not is_spike(9.0, [], factor=2, window=1)
    assert is_spike(9.0, [1.0], factor=2, window=1)


def test_values_that_are_not_finite_are_no_spikes():
    assert not any(is_spike(x, [1.0] * 8, factor=2, window=4) for x in (np.nan, np.inf))


def slow_is_spike(value, earlier, factor, window):
    last = []
    for x in reversed(earlier):
        if x == x and abs(x) != float("inf") and len(last) < window:
            last.append(x)
    if len(last) < window // 2:
        return False
    last.sort()
    middle = (last[(len(last) - 1) // 2] + last[len(last) // 2]) / 2
    return value > factor * middle


@pytest.mark.parametrize("seed", range(5))
def test_spikes_are_those_of_plain_python(seed):
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(size=200))
    values[rng.random(200) < 0.2] = rng.choice([np.nan, np.inf])
    found = []
    for i in np.flatnonzero(np.isfinite(values)):
        found.append(is_spike(values[i], values[:i].tolist(), factor=2, window=10))
        assert found[-1] == slow_is_spike(values[i], values[:i].tolist(), 2, 10)
    assert 5 < sum(found) < 100


# --- Rows -------------------------------------------------------------------------------------


def sampled(rows=6, length=7, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(4, length + 1, (rows, 1))
    return {
        "ids": np.where(mask, rng.integers(1, 30, mask.shape), 0).astype(np.int32),
        "mask": mask,
        "source": np.where(mask, POLICY, PAD).astype(np.int8),
        "logps": np.where(mask, -rng.exponential(size=mask.shape), 0).astype(np.float32),
        "rewards": rng.integers(0, 2, rows).astype(np.float32),
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found_where_they_count(value):
    rows = sampled()
    assert find_non_finite(rows) == []
    row, at = np.argwhere(~rows["mask"])[0]
    rows["logps"][row, at] = value  # padding
    assert find_non_finite(rows) == []
    rows["logps"][0, 0] = value
    assert find_non_finite(rows) == ["logps"]
    rows["rewards"][-1] = value
    assert find_non_finite(rows) == ["logps", "rewards"]


# --- Splices ----------------------------------------------------------------------------------


CHOSEN, KEPT = np.array([1, 4, 5]), np.array([2, 0, 3])
ACCEPTED = np.array([True, True, False])


def spliced(rows):
    new = np.random.default_rng(9).integers(40, 50, (3, 2)).astype(np.int32)
    columns = (rows[name][CHOSEN] for name in ("ids", "mask", "logps"))
    made = splice_rollouts(
        *columns, KEPT, new, np.ones((3, 2), bool), np.full((3, 2), -2, np.float32), pad_id=0
    )
    return {
        name: np.array(x)
        for name, x in zip(("ids", "mask", "source", "logps"), made[:4], strict=True)
    }


def test_what_splicing_makes_holds():
    rows = sampled()
    fixed = spliced(rows)
    assert (fixed["source"][0, :4] == [POLICY, POLICY, TEACHER, TEACHER]).all()
    check_splices(rows, fixed, CHOSEN, KEPT, ACCEPTED)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ids", "rollout 0 does not begin with the 2 kept tokens of its source, rollout 1: ids"),
        ("logps", "source, rollout 1: logps differ"),
        ("mask", "source, rollout 1: mask differ"),
        ("source", "keeps 2 tokens of rollout 1, not all of which are the policy's"),
    ],
)
def test_a_prefix_that_is_not_the_sources_is_an_error(name, message):
    rows = sampled()
    fixed = spliced(rows)
    value = fixed[name]
    value[0, 1] = {"mask": False, "source": TEACHER}.get(name, value[0, 1] + 1)
    with pytest.raises(BrokenPromise, match=message):
        check_splices(rows, fixed, CHOSEN, KEPT, ACCEPTED)
    check_splices(rows, fixed, CHOSEN, KEPT, ~ACCEPTED)  # it is not in use


def test_behind_the_kept_tokens_all_may_differ():
    rows = sampled()
    fixed = spliced(rows)
    fixed["ids"][0, 2] += 1
    fixed["logps"][0, 2] += 1
    fixed["ids"][1] += 1  # nothing of it was kept
    check_splices(rows, fixed, CHOSEN, KEPT, ACCEPTED)


def test_more_kept_than_the_source_has_is_an_error():
    rows = sampled()
    fixed = {name: value[CHOSEN].copy() for name, value in rows.items()}
    long = np.full(3, rows["mask"].shape[1])
    short = ~rows["mask"][CHOSEN].all(1)
    assert short.any()
    with pytest.raises(BrokenPromise, match="not all of which are the policy's"):
        check_splices(rows, fixed, CHOSEN, long, short)


# --- Groups -----------------------------------------------------------------------------------


def test_repair_alone_makes_no_group_all_right():
    before = np.array([1, 1, 0, 0, 1, 0], np.float32)  # groups of two
    check_groups(before, before, 1.0, 2)
    check_groups(before, np.array([1, 1, 1, 0, 1, 0], np.float32), 1.0, 2)
    with pytest.raises(BrokenPromise, match="no wrong rollout in group 2"):
        check_groups(before, np.array([1, 1, 0, 0, 1, 1], np.float32), 1.0, 2)
    check_groups(before, np.array([1, 1, 0, 0, 1, 0.6], np.float32), 1.0, 2)
    with pytest.raises(BrokenPromise, match="group 2"):
        check_groups(before, np.array([1, 1, 0, 0, 1, 0.6], np.float32), 0.5, 2)


# --- Dumps ------------------------------------------------------------------------------------


def test_a_dump_holds_the_arrays_and_the_reason(tmp_path):
    rows, reason = sampled(), {"step": 3, "names": ["logps"]}
    rows["logps"][0, 0] = np.nan
    for _ in range(2):  # the second one replaces the first
        dump_batch(tmp_path / "bad" / "step_000003.npz", rows, reason)
    assert sorted(file.name for file in (tmp_path / "bad").iterdir()) == [
        "step_000003.json",
        "step_000003.npz",
    ]
    assert json.loads((tmp_path / "bad" / "step_000003.json").read_text()) == reason
    with np.load(tmp_path / "bad" / "step_000003.npz", allow_pickle=False) as found:
        assert set(found.files) == set(rows)
        for name, value in rows.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def test_objects_are_not_dumped(tmp_path):
    rows = {**sampled(), "texts": np.array(["a", None], object)}
    with pytest.raises(TypeError, match="cannot dump arrays of objects: texts"):
        dump_batch(tmp_path / "x.npz", rows, "why")
    assert not list(tmp_path.iterdir())


def test_a_dump_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    dump_batch(tmp_path / "x.npz", {"a": np.arange(3)}, "first")

    def half(output, **_):
        output.write(b"PK")
        raise OSError("No space left on device")

    monkeypatch.setattr("scope_jax.checks.np.savez", half)
    with pytest.raises(OSError, match="No space left"):
        dump_batch(tmp_path / "x.npz", {"a": np.arange(4)}, "second")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.npz"]
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["a"], [0, 1, 2])
