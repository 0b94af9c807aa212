"""Tests of splicing: the contract's rules one by one, and a slow Python twin over random rows."""

import functools

import chex
import jax
import numpy as np
import pytest

from scope_jax.records import PAD, POLICY, TEACHER, InputError
from scope_jax.splicing import insert_rows, splice, splice_rollouts, splice_values

SEEDS = range(25)
B, T, U, PAD_ID = 6, 7, 5, 9

jit_splice = jax.jit(splice, static_argnames=("pad_id",))
jit_splice_values = jax.jit(splice_values, static_argnames=("fill",))


def random_rows(seed):
    """Rows of 0 .. T tokens, and continuations with holes in their mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T)[None, :] < rng.integers(0, T + 1, B)[:, None]
    source = rng.integers(POLICY, TEACHER + 1, (B, T))
    return {
        "ids": np.where(mask, rng.integers(10, 100, (B, T)), PAD_ID).astype(np.int32),
        "mask": mask,
        "logps": np.where(mask, rng.normal(size=(B, T)), 0).astype(np.float32),
        "source": np.where(mask, source, PAD).astype(np.int8),
        "prefix_length": rng.integers(0, T + 1, B).astype(np.int32),
        "new_ids": rng.integers(100, 200, (B, U)).astype(np.int32),
        "new_mask": rng.random((B, U)) < 0.6,
        "new_logps": rng.normal(size=(B, U)).astype(np.float32),
        "new_source": rng.integers(POLICY, TEACHER + 1, (B, U)).astype(np.int8),
    }


def slow_splice(values, mask, prefix_length, new_values, new_mask, fill):
    """Returns (values, mask, overflowed) of one row, token by token."""
    kept = [v for t, (v, m) in enumerate(zip(values, mask, strict=True)) if m and t < prefix_length]
    written = kept + [v for v, m in zip(new_values, new_mask, strict=True) if m]
    padding = max(T - len(written), 0)
    row = (written + [fill] * padding)[:T]
    return row, [True] * (T - padding) + [False] * padding, len(written) > T


def one_row(ids, prefix_length, new_ids, new_mask=None, **options):
    """Splices a single row, right-padded to T tokens; returns lists."""
    mask = np.arange(T) < len(ids)
    ids = np.array([*ids, *[PAD_ID] * (T - len(ids))], np.int32)
    new_mask = [True] * len(new_ids) if new_mask is None else new_mask
    spliced = jit_splice(
        ids[None], mask[None], np.array([prefix_length], np.int32), np.array([new_ids], np.int32),
        np.array([new_mask], bool), pad_id=PAD_ID, **options,
    )  # fmt: skip
    return [x[0].tolist() for x in spliced]


# --- The rules --------------------------------------------------------------------------------


def test_prefix_then_continuation_then_padding():
    ids, mask, source, overflowed = one_row([1, 2, 3, 4, 5], 3, [11, 12])
    assert ids == [1, 2, 3, 11, 12, PAD_ID, PAD_ID]
    assert mask == [True] * 5 + [False] * 2
    assert source == [POLICY] * 3 + [TEACHER] * 2 + [PAD] * 2
    assert overflowed is False


def test_types_and_shapes_are_the_contracts():
    rows = random_rows(0)
    ids, mask, source, overflowed = jit_splice(
        rows["ids"], rows["mask"], rows["prefix_length"], rows["new_ids"], rows["new_mask"],
        pad_id=PAD_ID,
    )  # fmt: skip
    chex.assert_shape([ids, mask, source], (B, T))
    chex.assert_shape(overflowed, (B,))
    assert [x.dtype for x in (ids, mask, source, overflowed)] == [np.int32, bool, np.int8, bool]


def test_holes_in_the_continuations_mask_are_closed_in_order():
    ids, mask, source, _ = one_row([1, 2, 3], 2, [11, 12, 13, 14], [True, False, False, True])
    assert ids == [1, 2, 11, 14] + [PAD_ID] * 3
    assert mask == [True] * 4 + [False] * 3
    assert source == [POLICY] * 2 + [TEACHER] * 2 + [PAD] * 3


def test_prefix_zero_is_the_continuation_alone():
    ids, _, source, _ = one_row([1, 2, 3], 0, [11, 12])
    assert ids == [11, 12] + [PAD_ID] * 5
    assert source == [TEACHER] * 2 + [PAD] * 5


def test_prefix_longer_than_the_row_keeps_the_row_and_no_padding():
    ids, _, source, overflowed = one_row([1, 2, 3], 6, [11])
    assert ids == [1, 2, 3, 11] + [PAD_ID] * 3
    assert source == [POLICY] * 3 + [TEACHER] + [PAD] * 3
    assert overflowed is False


def test_what_does_not_fit_is_cut_and_flagged():
    ids, mask, _, overflowed = one_row([1, 2, 3, 4, 5, 6, 7], 5, [11, 12, 13])
    assert ids == [1, 2, 3, 4, 5, 11, 12]
    assert mask == [True] * T
    assert overflowed is True


def test_exact_fit_does_not_overflow():
    ids, _, _, overflowed = one_row([1, 2, 3, 4, 5, 6, 7], 4, [11, 12, 13])
    assert ids == [1, 2, 3, 4, 11, 12, 13]
    assert overflowed is False


def test_masked_tokens_of_the_continuation_do_not_overflow():
    _, _, _, overflowed = one_row([1, 2, 3, 4, 5, 6], 6, [11, 12], [True, False])
    assert overflowed is False


def test_empty_continuation_with_the_rows_own_length_leaves_the_row_as_it_was():
    for seed in SEEDS:
        rows = random_rows(seed)
        lengths, nothing = rows["mask"].sum(1).astype(np.int32), np.zeros((B, U), bool)
        ids, mask, source, overflowed = jit_splice(
            rows["ids"], rows["mask"], lengths, rows["new_ids"], nothing,
            pad_id=PAD_ID, token_source=rows["source"],
        )  # fmt: skip
        np.testing.assert_array_equal(ids, rows["ids"])
        np.testing.assert_array_equal(mask, rows["mask"])
        np.testing.assert_array_equal(source, rows["source"])
        assert not overflowed.any()


def test_pad_id_fills_the_end_of_plain_numpy_rows():
    mask, none = np.ones((1, 3), bool), np.zeros((1, 2), bool)
    ids, _, source, _ = splice(
        np.array([[5, 6, 7]]), mask, np.array([1]), np.array([[8, 8]]), none, pad_id=42
    )
    assert ids.tolist() == [[5, 42, 42]]
    assert source.tolist() == [[POLICY, PAD, PAD]]


def test_sources_of_the_prefix_are_kept():
    given = np.array([[POLICY, TEACHER, POLICY, TEACHER, PAD, PAD, PAD]], np.int8)
    _, _, source, _ = one_row([1, 2, 3, 4], 3, [11], token_source=given)
    assert source == [POLICY, TEACHER, POLICY, TEACHER, PAD, PAD, PAD]


def test_continuation_source_is_a_scalar_or_per_token():
    _, _, source, _ = one_row([1, 2], 1, [11, 12], continuation_source=POLICY)
    assert source == [POLICY] * 3 + [PAD] * 4
    per_token = np.array([[TEACHER, POLICY, POLICY]], np.int8)
    _, _, source, _ = one_row(
        [1, 2], 1, [11, 12, 13], [True, False, True], continuation_source=per_token
    )
    assert source == [POLICY, TEACHER, POLICY] + [PAD] * 4


def test_neighbouring_rows_do_not_matter():
    rows = random_rows(3)
    names = ("ids", "mask", "prefix_length", "new_ids", "new_mask")
    whole = jit_splice(*[rows[n] for n in names], pad_id=PAD_ID)
    backwards = jit_splice(*[rows[n][::-1] for n in names], pad_id=PAD_ID)
    chex.assert_trees_all_equal(whole, tuple(x[::-1] for x in backwards))


def test_splice_agrees_with_a_slow_twin_eager_and_jitted():
    overflows = 0
    for seed in SEEDS:
        rows = random_rows(seed)
        columns = [rows[n] for n in ("ids", "mask", "prefix_length", "new_ids", "new_mask")]
        options = {"token_source": rows["source"], "continuation_source": rows["new_source"]}
        want = {"ids": [], "mask": [], "source": [], "overflowed": []}
        for i in range(B):
            joint = [rows[n][i] for n in ("mask", "prefix_length")]
            ids, mask, over = slow_splice(
                rows["ids"][i], *joint, *[c[i] for c in columns[3:]], PAD_ID
            )
            source, _, _ = slow_splice(
                rows["source"][i], *joint, rows["new_source"][i], rows["new_mask"][i], PAD
            )
            for name, value in zip(want, (ids, mask, source, over), strict=True):
                want[name].append(value)
        overflows += sum(want["overflowed"])
        for splice_fn in (splice, jit_splice):
            spliced = splice_fn(*columns, pad_id=PAD_ID, **options)
            for found, expected in zip(spliced, want.values(), strict=True):
                np.testing.assert_array_equal(found, expected)
    assert 5 < overflows < len(SEEDS) * B - 5


# --- Per-token arrays -------------------------------------------------------------------------


def test_prefix_log_probs_are_bit_equal_and_indices_are_splices():
    for seed in SEEDS:
        rows = random_rows(seed)
        joint = (rows["mask"], rows["prefix_length"])
        names = ("new_ids", "new_mask", "new_logps")
        new_ids, new_mask, new_logps = (rows[name] for name in names)
        ids, mask, _, overflowed = jax.device_get(
            jit_splice(rows["ids"], *joint, new_ids, new_mask, pad_id=PAD_ID)
        )
        logps, value_mask, value_overflowed = jax.device_get(
            jit_splice_values(rows["logps"], *joint, new_logps, new_mask, fill=0.0)
        )
        assert logps.dtype == np.float32
        np.testing.assert_array_equal(mask, value_mask)
        np.testing.assert_array_equal(overflowed, value_overflowed)
        for i in range(B):
            kept = min(rows["prefix_length"][i], rows["mask"][i].sum())
            assert logps[i, :kept].tobytes() == rows["logps"][i, :kept].tobytes()
            # A token's id and its log-prob come from the same place.
            tail = slice(kept, mask[i].sum())
            place = dict(zip(new_ids[i], new_logps[i], strict=True))
            if len(place) == U:  # no id twice
                assert [place[token] for token in ids[i, tail]] == logps[i, tail].tolist()
        assert (logps[~mask] == 0.0).all()


def test_values_agree_with_a_slow_twin():
    for seed in SEEDS:
        rows = random_rows(seed)
        names = ("logps", "mask", "prefix_length", "new_logps", "new_mask")
        want = [slow_splice(*row, -7.0) for row in zip(*[rows[n] for n in names], strict=True)]
        for values_fn in (splice_values, jit_splice_values):
            found = values_fn(*[rows[n] for n in names], fill=-7.0)
            for value, expected in zip(found, zip(*want, strict=True), strict=True):
                np.testing.assert_array_equal(value, np.array(expected))


def test_splice_of_rollouts_is_splice_and_splice_of_values():
    for seed in SEEDS:
        rows = random_rows(seed)
        joint = (rows["mask"], rows["prefix_length"])
        new_ids, new_mask, new_logps = (rows[n] for n in ("new_ids", "new_mask", "new_logps"))
        found = splice_rollouts(
            rows["ids"], rows["mask"], rows["logps"], rows["prefix_length"], new_ids, new_mask,
            new_logps, pad_id=PAD_ID,
        )  # fmt: skip
        ids, mask, source, overflowed = jit_splice(
            rows["ids"], *joint, new_ids, new_mask, pad_id=PAD_ID
        )
        logps, _, _ = jit_splice_values(rows["logps"], *joint, new_logps, new_mask, fill=0.0)
        chex.assert_trees_all_equal(found, (ids, mask, source, logps, overflowed))


def test_extreme_values_outside_the_masks_do_not_leak():
    rows = random_rows(1)
    joint = (rows["mask"], rows["prefix_length"])
    poisoned = np.where(rows["mask"], rows["logps"], np.nan)
    new_poisoned = np.where(rows["new_mask"], rows["new_logps"], np.inf)
    clean = jit_splice_values(rows["logps"], *joint, rows["new_logps"], rows["new_mask"], fill=0.0)
    dirty = jit_splice_values(poisoned, *joint, new_poisoned, rows["new_mask"], fill=0.0)
    chex.assert_trees_all_equal(clean, dirty)


def test_one_trace_serves_all_values():
    chex.clear_trace_counter()
    counted = jax.jit(functools.partial(chex.assert_max_traces(splice, n=1), pad_id=PAD_ID))
    for seed in range(3):
        rows = random_rows(seed)
        counted(*[rows[n] for n in ("ids", "mask", "prefix_length", "new_ids", "new_mask")])


def test_shapes_that_do_not_match_are_an_error():
    with pytest.raises(AssertionError):
        splice(
            np.zeros((2, 3), int), np.ones((2, 3), bool), np.zeros(2, int), np.zeros((2, 2), int),
            np.ones((2, 3), bool), pad_id=0,
        )  # fmt: skip


# --- Into the group ---------------------------------------------------------------------------


def group_rows(prompts, size):
    """Rows whose every value names their place: prompt * 10 + slot."""
    place = (10 * np.arange(prompts)[:, None] + np.arange(size)[None, :]).reshape(-1)
    return {
        "rewards": place.astype(np.float32),
        "ids": np.stack([place, place + 0], axis=1).astype(np.int32),
        "mask": np.stack([place >= 0, place % 2 == 0], axis=1),
    }


def corrected_rows(values):
    values = np.asarray(values)
    return {
        "rewards": values.astype(np.float32),
        "ids": np.stack([values, -values], axis=1).astype(np.int32),
        "mask": np.ones((len(values), 2), bool),
        "more": values,  # a column that the rows do not have is left out
    }


def test_replacement_puts_accepted_rows_at_their_targets_and_touches_nothing_else():
    rows, before = group_rows(2, 3), group_rows(2, 3)
    out = insert_rows(
        rows, corrected_rows([101, 102]), targets=np.array([1, 5]),
        accepted=np.array([True, False]), group_size=3, insert="replace_source",
    )  # fmt: skip
    assert out["rewards"].tolist() == [0, 101, 2, 10, 11, 12]
    assert out["ids"].tolist() == [[0, 0], [101, -101], [2, 2], [10, 10], [11, 11], [12, 12]]
    assert out["mask"][1].tolist() == [True, True]
    assert out["row_mask"].tolist() == [True] * 6
    assert set(out) == {"rewards", "ids", "mask", "row_mask"}
    assert {k: v.dtype for k, v in out.items() if k in rows} == {
        k: v.dtype for k, v in rows.items()
    }
    chex.assert_trees_all_equal(rows, before)  # the input is not written to


def test_replacement_of_a_random_row_goes_to_the_target_not_the_source():
    out = insert_rows(
        group_rows(1, 4), corrected_rows([7]), targets=np.array([2]), accepted=np.array([True]),
        group_size=4, insert="replace_random_wrong",
    )  # fmt: skip
    assert out["rewards"].tolist() == [0, 1, 7, 3]


@pytest.mark.parametrize("insert", ["replace_source", "replace_random_wrong"])
def test_nothing_accepted_changes_no_row(insert):
    out = insert_rows(
        group_rows(2, 3), corrected_rows([101, 102]), targets=np.array([1, 5]),
        accepted=np.zeros(2, bool), group_size=3, insert=insert,
    )  # fmt: skip
    want = group_rows(2, 3) | {"row_mask": np.ones(6, bool)}
    chex.assert_trees_all_equal(out, want)


def test_append_gives_each_group_slots_behind_its_own_rows():
    out = insert_rows(
        group_rows(2, 3), corrected_rows([100, 101, 102, 103]), targets=np.array([0, 1, 3, 4]),
        accepted=np.array([True, False, False, True]), group_size=3, insert="append",
    )  # fmt: skip
    assert out["row_mask"].reshape(2, 5).tolist() == [
        [True, True, True, True, False],
        [True, True, True, False, True],
    ]
    rewards = out["rewards"].reshape(2, 5)
    assert rewards[:, :3].tolist() == [[0, 1, 2], [10, 11, 12]]  # order and content as they were
    assert rewards[0, 3] == 100 and rewards[1, 4] == 103
    assert out["ids"].shape == (10, 2) and out["ids"][9].tolist() == [103, -103]
    assert set(out) == {"rewards", "ids", "mask", "row_mask"}


def test_append_with_nothing_accepted_only_adds_empty_slots():
    rows = group_rows(2, 3)
    out = insert_rows(
        rows, corrected_rows([100, 101]), targets=np.array([0, 3]), accepted=np.zeros(2, bool),
        group_size=3, insert="append",
    )  # fmt: skip
    real = {k: v[out["row_mask"]] for k, v in out.items() if k != "row_mask"}
    chex.assert_trees_all_equal(real, rows)
    assert out["row_mask"].tolist() == [True] * 3 + [False] + [True] * 3 + [False]


def test_insertion_agrees_with_a_slow_twin():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        prompts, size, slots = 3, 4, int(rng.integers(1, 4))
        rows = group_rows(prompts, size)
        values = 100 + np.arange(prompts * slots)
        accepted = rng.random(prompts * slots) < 0.5
        targets = np.concatenate([rng.permutation(size)[:slots] + p * size for p in range(prompts)])
        groups = [[10 * p + g for g in range(size)] for p in range(prompts)]
        for p in range(prompts):
            for c in range(p * slots, (p + 1) * slots):
                if accepted[c]:
                    groups[p][targets[c] - p * size] = 100 + c
        options = {"targets": targets, "accepted": accepted, "group_size": size}
        out = insert_rows(rows, corrected_rows(values), insert="replace_source", **options)
        assert out["rewards"].reshape(prompts, size).tolist() == groups

        longer = [
            [10 * p + g for g in range(size)]
            + [100 + c for c in range(p * slots, (p + 1) * slots) if accepted[c]]
            for p in range(prompts)
        ]
        out = insert_rows(rows, corrected_rows(values), insert="append", **options)
        shape = (prompts, size + slots)
        found = zip(out["rewards"].reshape(shape), out["row_mask"].reshape(shape), strict=True)
        assert [row[real].tolist() for row, real in found] == longer


def test_an_unknown_way_to_insert_is_an_error_not_a_replacement():
    rows = {"rewards": np.zeros(2, np.float32)}
    with pytest.raises(InputError, match="insert must be one of replace_source, append"):
        insert_rows(rows, rows, targets=[0, 1], accepted=[True, True], group_size=1, insert="apend")
