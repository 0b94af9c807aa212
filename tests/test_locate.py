"""Tests of the first wrong step and of what is repaired: by hand, and against slow Python twins."""

import functools
import itertools

import chex
import jax
import numpy as np
import pytest

from scope_jax.locate import (
    first_error_step,
    locate,
    plan_corrections,
    prefix_length,
    random_wrong_rows,
    rank_candidates,
    select_candidates,
    teacher_share,
    unrepaired,
    within_share,
)
from scope_jax.records import InputError

SEEDS = range(20)
P, G, S = 3, 4, 5
B = P * G

# Hand-made cases run jitted, one compilation each; the twins compare eager calls too.
jit_first_error = jax.jit(first_error_step)
jit_prefix_length = jax.jit(prefix_length)
jit_locate = jax.jit(locate, static_argnames=("locator", "on_no_error"))
jit_select = jax.jit(
    select_candidates,
    static_argnames=("group_size", "select", "require_finished", "trigger", "trigger_accuracy"),
)
jit_rank = jax.jit(rank_candidates, static_argnames=("group_size", "n_correct"))
jit_random_rows = jax.jit(random_wrong_rows, static_argnames=("group_size", "count"))


def random_rows(seed):
    """Rows with 0 .. S steps. Scores in quarters, so that ties and score == tau happen."""
    rng = np.random.default_rng(seed)
    num_steps = rng.integers(0, S + 1, B)
    mask = np.arange(S)[None, :] < num_steps[:, None]
    ends = np.cumsum(rng.integers(1, 7, (B, S)), axis=1) * mask
    return {
        "rewards": rng.choice([0.0, 0.5, 1.0], B).astype(np.float32),
        "finished": rng.random(B) < 0.8,
        "scores": (rng.choice(5, (B, S), p=[0.1, 0.1, 0.3, 0.3, 0.2]) / 4).astype(np.float32),
        "mask": mask,
        "ends": ends.astype(np.int32),
    }


# --- Slow twins: one row, one step, one comparison at a time --------------------------------------


def slow_first_error(scores, mask, tau):
    for step, (score, real) in enumerate(zip(scores, mask, strict=True)):
        if real and score < tau:
            return step
    return -1


def slow_prefix_length(first_error, ends, mask):
    if first_error == 0:
        return 0
    real = [int(end) for end, is_real in zip(ends, mask, strict=True) if is_real]
    if first_error < 0:
        return real[-1] if real else 0
    return real[first_error - 1]


def slow_candidates(
    rows, first_error, *, select="wrong", require_finished=True, trigger="always",
    trigger_accuracy=0.5, min_prefix_steps=1, min_prefix_ratio=0.0, tau=0.5, solved_at=1.0,
):  # fmt: skip
    chosen = []
    for i in range(B):
        start = i // G * G
        group = [bool(r >= solved_at) for r in rows["rewards"][start : start + G]]
        wrong, steps = rows["rewards"][i] < solved_at, int(rows["mask"][i].sum())
        low = slow_first_error(rows["scores"][i], rows["mask"][i], tau) >= 0
        opened = {
            "always": True,
            "acc_below": sum(group) / G < trigger_accuracy,
            "all_wrong": not any(group),
            "mixed_only": any(group) and not all(group),
        }[trigger]
        kept = first_error[i]
        long_enough = steps > 0 and kept >= min_prefix_steps and kept / steps >= min_prefix_ratio
        wanted = {"wrong": wrong, "wrong_or_low_prm": wrong or low, "any": True}[select]
        ended = bool(rows["finished"][i]) or not require_finished
        chosen.append(bool(wanted and opened and long_enough and ended))
    return chosen


def slow_ranking(candidates, first_error, rows, group):
    """Returns the group's candidates, best first."""

    def sort_key(i):
        kept = [float(s) for s in rows["scores"][i][: first_error[i]]]
        share = first_error[i] / int(rows["mask"][i].sum())
        return (-share, -(sum(kept) / len(kept) if kept else 0.0), i)

    return sorted((i for i in range(group * G, (group + 1) * G) if candidates[i]), key=sort_key)


# --- First error ----------------------------------------------------------------------------------


def test_first_error_is_the_first_real_step_below_the_threshold():
    scores = np.array([[0.9, 0.2, 0.1], [0.9, 0.8, 0.7], [0.1, 0.9, 0.9], [0.9, 0.9, 0.1]])
    mask = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
    found = jit_first_error(scores, mask, 0.5)
    assert found.tolist() == [1, -1, 0, -1]  # the last row's low score is padding
    assert found.dtype == np.int32


def test_score_at_the_threshold_is_right():
    found = jit_first_error(np.array([[0.5, 0.25]]), np.ones((1, 2), bool), 0.5)
    assert found.tolist() == [1]


def test_row_without_steps_has_no_error():
    found = jit_first_error(np.zeros((2, 3)), np.zeros((2, 3), bool), 0.5)
    assert found.tolist() == [-1, -1]


def test_threshold_zero_marks_nothing_and_above_one_marks_the_first_step():
    scores = np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    mask = np.ones((2, 3), bool)
    assert jit_first_error(scores, mask, 0.0).tolist() == [-1, -1]
    assert jit_first_error(scores, mask, 1.5).tolist() == [0, 0]


def test_first_error_agrees_with_a_slow_twin_eager_and_jitted():
    for seed, tau in itertools.product(SEEDS, (0.0, 0.25, 0.5, 0.8)):
        rows = random_rows(seed)
        want = [
            slow_first_error(*row, tau) for row in zip(rows["scores"], rows["mask"], strict=True)
        ]
        device = jax.device_put(rows)
        assert first_error_step(device["scores"], device["mask"], tau).tolist() == want
        assert jit_first_error(device["scores"], device["mask"], tau).tolist() == want


def test_one_trace_serves_every_threshold():
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(first_error_step, n=1))
    for tau in (0.1, 0.5, 0.9):
        jitted(np.full((1, 2), 0.3), np.ones((1, 2), bool), tau)


def test_shapes_that_differ_are_an_error():
    with pytest.raises(AssertionError):
        first_error_step(np.zeros((2, 3)), np.ones((2, 4), bool), 0.5)


# --- Prefix length --------------------------------------------------------------------------------


def test_prefix_ends_where_the_step_before_the_error_ends():
    ends = np.tile(np.array([[3, 7, 12, 0]], np.int32), (5, 1))
    mask = np.tile(np.array([[True, True, True, False]]), (5, 1))
    length = jit_prefix_length(np.array([0, 1, 2, -1, 3], np.int32), ends, mask)
    assert length.tolist() == [0, 3, 7, 12, 12]
    assert length.dtype == np.int32


def test_padded_step_ends_are_not_read():
    ends = np.array([[3, 7, 99]], np.int32)
    mask = np.array([[True, True, False]])
    assert jit_prefix_length(np.array([-1], np.int32), ends, mask).tolist() == [7]


def test_row_without_steps_keeps_nothing():
    ends = np.array([[5, 9]], np.int32)
    mask = np.zeros((1, 2), bool)
    assert jit_prefix_length(np.array([-1], np.int32), ends, mask).tolist() == [0]


def test_prefix_length_agrees_with_a_slow_twin_eager_and_jitted():
    for seed in SEEDS:
        rows = random_rows(seed)
        steps = rows["mask"].sum(1)
        first = np.random.default_rng(seed).integers(-1, np.maximum(steps, 0)).astype(np.int32)
        want = [slow_prefix_length(*r) for r in zip(first, rows["ends"], rows["mask"], strict=True)]
        assert prefix_length(first, rows["ends"], rows["mask"]).tolist() == want
        assert jit_prefix_length(first, rows["ends"], rows["mask"]).tolist() == want


# --- Locators -------------------------------------------------------------------------------------

# Four verdicts that a locator can meet: an error at step 2, none, an error at once, not scored.
SCORES = np.array([[0.9, 0.8, 0.1, 0.2], [0.9, 0.6, 0.7, 0.8], [0.2, 0.9, 0.9, 0.9], [0.0] * 4])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)


@pytest.mark.parametrize("locator", ["prm", "oracle"])
def test_prm_and_oracle_find_the_first_low_step(locator):
    assert jit_locate(SCORES, MASK, jax.random.key(0), locator=locator).tolist() == [2, -1, 0, -1]


def test_tau_moves_the_mark():
    found = jit_locate(SCORES, MASK, jax.random.key(0), tau=0.85)
    assert found.tolist() == [1, 1, 0, -1]


@pytest.mark.parametrize("locator", ["prm", "oracle"])
def test_tau_zero_never_marks(locator):
    for scores in (SCORES, np.zeros((4, 4))):
        found = jit_locate(scores, MASK, jax.random.key(0), locator=locator, tau=0.0)
        assert found.tolist() == [-1] * 4


def test_no_error_falls_back_to_the_lowest_step_only_if_asked():
    found = jit_locate(SCORES, MASK, jax.random.key(0), on_no_error="argmin")
    assert found.tolist() == [2, 1, 0, -1]  # step 1 scores 0.6, the lowest of row 1's real steps
    assert jit_locate(SCORES, MASK, jax.random.key(0), on_no_error="skip")[1] == -1


def test_argmin_ignores_padded_steps_and_takes_the_first_of_equals():
    scores = np.array([[0.9, 0.9, 0.7, 0.7], [0.9, 0.7, 0.7, 0.0], [0.9] * 4, [0.9] * 4])
    found = jit_locate(scores, MASK, jax.random.key(0), on_no_error="argmin")
    assert found.tolist() == [2, 1, 0, -1]


def test_zero_cuts_every_scored_row_at_its_start():
    found = jit_locate(SCORES, MASK, jax.random.key(0), locator="zero", tau=0.0)
    assert found.tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize("locator", ["prm", "oracle", "zero"])
def test_unscored_rows_are_never_marked(locator):
    key, empty = jax.random.key(0), np.zeros((4, 4), bool)
    found = jit_locate(np.zeros((4, 4)), empty, key, locator=locator, on_no_error="argmin")
    assert found.tolist() == [-1] * 4
    assert found.dtype == np.int32


DRAWS = 2000


def draw_steps(scores, steps, seed, **options):
    """Locates in `DRAWS` copies of a row of six steps, the first `steps` of them real."""
    scores = np.tile(np.array(scores, np.float32), (DRAWS, 1))
    mask = np.tile(np.arange(6) < steps, (DRAWS, 1))
    return np.asarray(jit_locate(scores, mask, jax.random.key(seed), **options))


def assert_uniform(found, values):
    counts = [(found == value).sum() for value in values]
    share = DRAWS / len(values)
    assert sum(counts) == DRAWS
    assert np.abs(np.array(counts) - share).max() < 5 * share**0.5  # five standard deviations


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_random_is_uniform_over_the_steps_after_the_first(steps):
    scores = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]  # it does not read them
    assert_uniform(draw_steps(scores, steps, 1, locator="random"), range(1, steps))


def test_random_has_nothing_to_draw_in_a_row_of_one_step_or_an_unscored_one():
    assert set(draw_steps([0.0] * 6, 1, 1, locator="random")) == {-1}
    assert set(draw_steps([0.0] * 6, 0, 1, locator="random")) == {-1}


@pytest.mark.parametrize("first", [1, 3, 5])
def test_random_correct_is_uniform_from_step_one_to_the_first_error(first):
    scores = [1.0] * first + [0.0] * (6 - first)
    assert_uniform(draw_steps(scores, 6, 2, locator="random_correct"), range(1, first + 1))


def test_random_correct_has_nothing_to_draw_where_the_first_step_is_wrong_or_none_is():
    assert set(draw_steps([0.0] * 6, 6, 2, locator="random_correct")) == {-1}
    assert set(draw_steps([1.0] * 6, 6, 2, locator="random_correct")) == {-1}


def test_random_correct_counts_to_the_lowest_step_with_argmin():
    scores = [0.9, 0.8, 0.6, 0.7, 0.7, 0.0]
    found = draw_steps(scores, 5, 3, locator="random_correct", on_no_error="argmin")
    assert_uniform(found, range(1, 2 + 1))
    unscored = draw_steps(scores, 0, 3, locator="random_correct", on_no_error="argmin")
    assert set(unscored) == {-1}


def test_random_locators_follow_their_key():
    draws = [draw_steps([1.0] * 6, 6, seed, locator="random").tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_locate_agrees_with_a_slow_twin():
    for seed in SEEDS:
        rows = random_rows(seed)
        device = jax.device_put(rows)
        for tau, on_no_error in itertools.product((0.0, 0.5, 0.75), ("skip", "argmin")):
            want = []
            for scores, mask in zip(rows["scores"], rows["mask"], strict=True):
                first, steps = slow_first_error(scores, mask, tau), int(mask.sum())
                if first < 0 and on_no_error == "argmin" and steps:
                    first = min(range(steps), key=lambda k, s=scores: s[k])
                want.append(first)
            found = locate(
                device["scores"], device["mask"], jax.random.key(seed),
                tau=tau, on_no_error=on_no_error,
            )  # fmt: skip
            assert found.tolist() == want


@pytest.mark.parametrize("locator", ["prm", "random_correct", "zero"])
def test_locate_is_the_same_eager_and_jitted(locator):
    device = jax.device_put(random_rows(0))
    eager = locate(device["scores"], device["mask"], jax.random.key(5), locator=locator, tau=0.75)
    again = jit_locate(
        device["scores"], device["mask"], jax.random.key(5), locator=locator, tau=0.75
    )
    assert eager.tolist() == again.tolist()


def test_unknown_locator_or_fallback_is_an_error_that_names_the_choices():
    with pytest.raises(InputError, match="random_correct, zero, got 'best'"):
        locate(SCORES, MASK, jax.random.key(0), locator="best")
    with pytest.raises(InputError, match='"skip" or "argmin", got \'last\''):
        locate(SCORES, MASK, jax.random.key(0), on_no_error="last")


# --- Candidates -----------------------------------------------------------------------------------


def candidates_of(rewards, first_error, *, steps=4, scores=None, finished=None, **options):
    """`select_candidates` of rows whose `steps` steps are right, unless told otherwise.

    Padded to [B, S], so that all these tests share the compiled operations.
    """
    rows, padded = len(rewards), np.ones((B, S), np.float32)
    if scores is not None:
        padded[:rows, :steps] = scores
    selected = select_candidates(
        np.resize(np.array(rewards, np.float32), B),
        np.resize(np.ones(rows, bool) if finished is None else finished, B),
        np.resize(np.array(first_error, np.int32), B),
        padded,
        np.arange(S)[None, :] < np.full((B, 1), steps),
        group_size=options.pop("group_size", rows),
        **options,
    )
    return selected[:rows].tolist()


def test_wrong_rows_with_a_marked_step_are_candidates():
    assert candidates_of([0, 1, 0, 0], [2, 2, -1, 1]) == [True, False, False, True]


def test_lucky_answers_are_candidates_if_asked():
    scores = [[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.9, 0.9, 0.9]]
    rewards, first_error = [0, 1, 1], [2, 2, 2]  # the third row is right, and no step is low
    options = {"steps": 3, "scores": scores}
    selected = candidates_of(rewards, first_error, **options, select="wrong_or_low_prm")
    assert selected == [True, True, False]
    assert candidates_of(rewards, first_error, **options, select="any") == [True, True, True]
    low_tau = candidates_of(rewards, first_error, **options, select="wrong_or_low_prm", tau=0.05)
    assert low_tau == [True, False, False]


def test_rollouts_without_end_token_are_candidates_only_if_asked():
    finished = [True, False]
    assert candidates_of([0, 0], [1, 1], finished=finished) == [True, False]
    assert candidates_of([0, 0], [1, 1], finished=finished, require_finished=False) == [True, True]


def test_trigger_opens_whole_groups():
    rewards = [0, 0, 1, 0, 1, 1]  # groups of two that solve 0 %, 50 %, 100 %
    first_error = [1] * 6
    selected = functools.partial(candidates_of, rewards, first_error, group_size=2, select="any")
    assert selected() == [True] * 6
    assert selected(trigger="all_wrong") == [True, True, False, False, False, False]
    assert selected(trigger="mixed_only") == [False, False, True, True, False, False]
    assert selected(trigger="acc_below") == [True, True, False, False, False, False]
    wider = selected(trigger="acc_below", trigger_accuracy=0.6)
    assert wider == [True, True, True, True, False, False]


def test_trigger_counts_exactly_in_groups_of_any_size():
    # As float32 means inside jit, 41 / 41 is 0.99999994 and 5 / 25 is above 0.2.
    for size, right, trigger in ((41, 41, "mixed_only"), (25, 5, "acc_below")):
        rewards = np.asarray(np.arange(size) < right, np.float32)
        selected = jit_select(
            rewards, np.ones(size, bool), np.ones(size, np.int32), np.ones((size, 2)),
            np.ones((size, 2), bool), group_size=size, select="any", trigger=trigger,
            trigger_accuracy=0.2,
        )  # fmt: skip
        assert not selected.any()


def test_short_prefixes_are_no_candidates():
    first_error = [0, 1, 2, 3]
    assert candidates_of([0] * 4, first_error) == [False, True, True, True]
    assert candidates_of([0] * 4, first_error, min_prefix_steps=0) == [True] * 4
    assert candidates_of([0] * 4, first_error, min_prefix_steps=2) == [False, False, True, True]
    # of 4 steps: shares 0/4, 1/4, 2/4, 3/4
    assert candidates_of([0] * 4, first_error, min_prefix_ratio=0.5) == [False, False, True, True]
    assert candidates_of([0] * 4, first_error, min_prefix_ratio=0.6) == [False, False, False, True]


def test_solved_at_says_what_is_wrong():
    assert candidates_of([0.4, 0.5, 1.0], [1, 1, 1]) == [True, True, False]
    assert candidates_of([0.4, 0.5, 1.0], [1, 1, 1], solved_at=0.5) == [True, False, False]


def test_unscored_row_is_no_candidate_even_if_its_first_error_says_so():
    options = {"min_prefix_steps": 0, "select": "any", "group_size": G}
    assert candidates_of([0] * 4, [0, 0, 1, 2], steps=0, **options) == [False] * 4
    assert candidates_of([0] * 4, [0, 0, 1, 2], steps=3, **options) == [True] * 4


OPTIONS = [
    {"select": select, "trigger": trigger, **rest}
    for (select, trigger), rest in zip(
        itertools.product(
            ("wrong", "wrong_or_low_prm", "any"), ("always", "acc_below", "all_wrong", "mixed_only")
        ),
        itertools.cycle(
            [
                {},
                {"require_finished": False, "solved_at": 0.5},
                {"min_prefix_steps": 0, "tau": 0.75},
                {"min_prefix_ratio": 0.5},
                {"trigger_accuracy": 0.3, "min_prefix_steps": 2},
            ]
        ),
        strict=False,
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_candidates_agree_with_a_slow_twin(options):
    for seed in SEEDS:
        rows = random_rows(seed)
        first = [slow_first_error(*r, 0.5) for r in zip(rows["scores"], rows["mask"], strict=True)]
        device = jax.device_put(rows)
        found = select_candidates(
            device["rewards"], device["finished"], np.asarray(first, np.int32), device["scores"],
            device["mask"], group_size=G, **options,
        )  # fmt: skip
        assert found.tolist() == slow_candidates(rows, first, **options)


def test_unknown_selection_or_trigger_is_an_error():
    with pytest.raises(InputError, match="got 'worst', 'always'"):
        candidates_of([0], [1], select="worst")
    with pytest.raises(InputError, match="got 'wrong', 'never'"):
        candidates_of([0], [1], trigger="never")


# --- Ranking --------------------------------------------------------------------------------------


def rank(given, n_correct=-1, limit=None):
    """Ranks the given candidates, {row: (first error, scores)}; all other rows are none."""
    candidates, first_error = np.zeros(B, bool), np.zeros(B, np.int32)
    scores, mask = np.zeros((B, S), np.float32), np.zeros((B, S), bool)
    for row, (first, row_scores) in given.items():
        candidates[row], first_error[row] = True, first
        scores[row, : len(row_scores)], mask[row, : len(row_scores)] = row_scores, True
    rows, is_real = rank_candidates(
        candidates, first_error, scores, mask, group_size=G, n_correct=n_correct, limit=limit
    )
    assert rows.dtype == np.int32 and is_real.dtype == bool
    return np.asarray(rows)[np.asarray(is_real)].tolist()


def test_largest_correct_share_comes_first():
    shares = {0: 1 / 4, 1: 3 / 4, 2: 2 / 4, 3: 2 / 3}
    given = {0: (1, [0.9] * 4), 1: (3, [0.6] * 4), 2: (2, [0.7] * 4), 3: (2, [0.5] * 3)}
    assert rank(given) == sorted(shares, key=shares.get, reverse=True)


def test_equal_shares_go_to_the_better_prefix_then_to_the_earlier_row():
    scores = {0: [0.5, 0.75], 1: [1.0, 0.5], 2: [0.75, 0.75], 3: [0.625, 0.625]}
    means = {0: (0.5 + 0.75) / 2, 1: (1 + 0.5) / 2, 2: 0.75, 3: 0.625}
    given = {row: (2, [*prefix, 0.0, 0.0]) for row, prefix in scores.items()}
    assert rank(given) == sorted(means, key=means.get, reverse=True) == [1, 2, 0, 3]


def test_scores_behind_the_prefix_do_not_count():
    assert rank({0: (1, [0.5, 1.0]), 1: (1, [0.75, 0.0])}) == [1, 0]


def test_rows_that_are_no_candidates_are_never_ranked():
    assert rank({2: (0, [0.1, 0.1]), 9: (1, [0.9, 0.9])}) == [2, 9]


def test_each_group_gives_its_own_best_rows():
    given = {0: (1, [0.9] * 3), 1: (2, [0.9] * 3), 7: (1, [0.9] * 3), 8: (1, [0.9]), 11: (0, [0.9])}
    assert rank(given, n_correct=1) == [1, 7, 8]
    assert rank(given, n_correct=99) == rank(given) == [1, 0, 7, 8, 11]


def test_limit_takes_the_best_rows_of_each_group():
    given = {row: (row % G + 1, [0.9] * 5) for row in range(B)}
    assert rank(given, limit=np.array([1, -1, 2], np.int32)) == [3, 11, 10]


def test_ranking_agrees_with_a_slow_twin_eager_and_jitted():
    for seed, (n_correct, capped) in itertools.product(range(8), ((-1, False), (3, True))):
        rows = random_rows(seed)
        rng = np.random.default_rng(seed)
        steps = rows["mask"].sum(1)
        first = np.array([rng.integers(0, max(n, 1)) for n in steps], np.int32)
        candidates = (rng.random(B) < 0.7) & (steps > 0)
        limit = rng.integers(-1, G + 1, P).astype(np.int32)
        device, take = jax.device_put(rows), G if n_correct < 0 else n_correct
        for rank_fn in (rank_candidates, jit_rank)[: 2 if seed < 2 else 1]:
            found, is_real = jax.device_get(
                rank_fn(
                    np.asarray(candidates), np.asarray(first), device["scores"], device["mask"],
                    group_size=G, n_correct=n_correct, limit=np.asarray(limit) if capped else None,
                )
            )  # fmt: skip
            assert found.shape == is_real.shape == (P * take,)
            for group in range(P):
                want = slow_ranking(candidates, first, rows, group)[:take]
                want = want[: max(limit[group], 0)] if capped else want
                mine = slice(group * take, (group + 1) * take)
                assert found[mine][is_real[mine]].tolist() == want
                assert is_real[mine].tolist() == [k < len(want) for k in range(take)]
                assert len(set(found[mine])) == take and (found[mine] // G == group).all()


# --- Random replacement ---------------------------------------------------------------------------


def test_random_replacement_takes_wrong_rows_first_and_each_once():
    rewards = np.array([1, 0, 1, 0, 0, 1, 1, 1], np.float32)  # wrong: 1, 3 | 4
    seen = set()
    for seed in range(20):
        targets = jit_random_rows(rewards, jax.random.key(seed), group_size=4, count=3).tolist()
        assert set(targets[:2]) == {1, 3} and targets[2] in (0, 2)
        assert targets[3] == 4 and set(targets[4:]) < {5, 6, 7} and len(set(targets[4:])) == 2
        seen.add(tuple(targets[:2]))
    assert seen == {(1, 3), (3, 1)}


# --- The plan -------------------------------------------------------------------------------------

PLAN = {
    "group_size": G, "solved_at": 1.0, "n_correct": 1, "spare_last_wrong": False,
    "replace_random": False, "locator": "prm", "tau": 0.5, "on_no_error": "skip", "select": "wrong",
    "require_finished": True, "trigger": "always", "trigger_accuracy": 0.5, "min_prefix_steps": 1,
    "min_prefix_ratio": 0.0,
}  # fmt: skip


def plan(rows, seed=0, **options):
    device = jax.device_put(rows)
    columns = [device[name] for name in ("rewards", "finished", "scores", "ends", "mask")]
    keys = (jax.random.key(seed), jax.random.key(seed + 1))
    return jax.device_get(plan_corrections(*columns, keys, **{**PLAN, **options}))


def rows_with(rewards):
    """Every row: 4 steps of 3 tokens, the third one wrong."""
    rows = random_rows(0)
    rows["rewards"] = np.asarray(rewards, np.float32)
    rows["finished"] = np.ones(B, bool)
    rows["mask"] = np.arange(S)[None, :] < np.full(B, 4)[:, None]
    rows["ends"] = (np.arange(1, S + 1) * 3 * rows["mask"]).astype(np.int32)
    rows["scores"] = np.tile(np.array([0.9, 0.9, 0.1, 0.9, 0.0]), (B, 1))
    return rows


def test_last_wrong_row_of_a_group_is_spared_and_two_give_one_repair():
    rows = rows_with([0, 1, 1, 1] + [0, 0, 1, 1] + [1, 1, 1, 1])
    _, _, is_real, _, _ = plan(rows, n_correct=-1, spare_last_wrong=True)
    assert is_real.reshape(P, G).sum(1).tolist() == [1 - 1, 2 - 1, 0]
    _, _, is_real, _, _ = plan(rows, n_correct=-1)
    assert is_real.reshape(P, G).sum(1).tolist() == [1, 2, 0]


def test_plan_keeps_the_tokens_before_the_first_wrong_step():
    rows = rows_with([1, 0, 1, 1] + [1] * 4 + [0] * 4)
    first_error, chosen, is_real, kept, targets = plan(rows)
    assert first_error.tolist() == [2] * B
    assert chosen[is_real].tolist() == [1, 8]
    assert is_real.tolist() == [True, False, True]
    assert kept.tolist() == [3 * 2, 0, 3 * 2]  # filling rows keep nothing
    assert targets.tolist() == chosen.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_correct": -1, "spare_last_wrong": True},
        {"n_correct": 2, "select": "any", "trigger": "mixed_only", "tau": 0.75},
        {"n_correct": -1, "on_no_error": "argmin", "min_prefix_steps": 0, "solved_at": 0.5},
    ],
    ids=str,
)
def test_plan_agrees_with_a_slow_twin(options):
    settings = {**PLAN, **options}
    names = ("select", "require_finished", "trigger", "trigger_accuracy", "min_prefix_steps",
             "min_prefix_ratio", "tau", "solved_at")  # fmt: skip
    take = G if settings["n_correct"] < 0 else settings["n_correct"]
    planned = 0
    for seed in SEEDS:
        rows = random_rows(seed)
        first = []
        for scores, mask in zip(rows["scores"], rows["mask"], strict=True):
            found, steps = slow_first_error(scores, mask, settings["tau"]), int(mask.sum())
            if found < 0 and settings["on_no_error"] == "argmin" and steps:
                found = int(np.argmin(scores[:steps]))
            first.append(found)
        candidates = slow_candidates(rows, first, **{name: settings[name] for name in names})
        want = []
        for group in range(P):
            members = slice(group * G, (group + 1) * G)
            best = slow_ranking(candidates, first, rows, group)[:take]
            if settings["spare_last_wrong"]:
                wrong = sum(r < settings["solved_at"] for r in rows["rewards"][members])
                best = best[: max(wrong - 1, 0)]
            want.append(best)
        first_error, chosen, is_real, kept, targets = plan(rows, **options)
        assert first_error.tolist() == first
        real = chosen.reshape(P, take), is_real.reshape(P, take)
        assert [row[keep].tolist() for row, keep in zip(*real, strict=True)] == want
        lengths = [
            slow_prefix_length(first[i], rows["ends"][i], rows["mask"][i]) if ok else 0
            for i, ok in zip(chosen, is_real, strict=True)
        ]
        assert kept.tolist() == lengths
        assert targets.tolist() == chosen.tolist()
        planned += int(is_real.sum())
    assert planned > 20  # the comparison is not one of empty plans


def test_random_replacement_targets_are_distinct_wrong_rows_and_not_always_the_source():
    elsewhere, repairs = 0, 0
    for seed in range(30):
        rows = random_rows(seed)
        options = {"n_correct": 3, "replace_random": True, "spare_last_wrong": True}
        _, chosen, is_real, _, targets = plan(rows, seed, **options)
        assert targets.shape == chosen.shape
        for group in range(P):
            mine = np.arange(group * 3, (group + 1) * 3)
            hit = targets[mine][is_real[mine]]
            assert (rows["rewards"][hit] < 1).all()
            assert len(set(targets[mine])) == 3
            assert (targets[mine] // G == group).all()
        elsewhere += int((targets != chosen)[is_real].sum())
        repairs += int(is_real.sum())
    assert 0 < elsewhere < repairs


def test_tau_zero_plans_no_correction():
    for seed in SEEDS:
        _, _, is_real, kept, _ = plan(random_rows(seed), tau=0.0, n_correct=-1, select="any")
        assert not is_real.any() and not kept.any()


def test_the_teachers_share_goes_in_a_line():
    options = {"share": 0.8, "share_end": 0.2, "over_steps": 3}
    shares = [teacher_share(step, **options) for step in range(1, 7)]
    np.testing.assert_allclose(shares, [0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert teacher_share(99, share=0.5, share_end=0.0, over_steps=0) == 0.5


@pytest.mark.parametrize("share, groups", [(1.0, 4), (0.5, 2), (0.3, 1), (0.0, 0)])
def test_a_share_of_the_groups_is_whole_groups_of_corrections(share, groups):
    assert within_share(8, 4, share).tolist() == [True] * 2 * groups + [False] * 2 * (4 - groups)


def test_whole_traces_stand_in_for_groups_without_an_accepted_repair():
    rewards = [0, 0, 0] + [1, 0, 0] + [1, 1, 0] + [1, 1, 1] + [0, 1, 0] + [0, 0, 1]
    accepted = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # two corrections a group; the first has one
    allowed = [1] * 10 + [0] * 2  # the last is over the budget
    options = {"solved_at": 1.0, "group_size": 3}
    masks = (np.array(accepted, bool), np.array(allowed, bool))
    slots, rows = unrepaired(rewards, *masks, spare_last_wrong=True, **options)
    assert np.flatnonzero(slots).tolist() == [2, 8] and rows.tolist() == [4, 12]
    slots, rows = unrepaired(rewards, *masks, spare_last_wrong=False, **options)
    assert np.flatnonzero(slots).tolist() == [2, 4, 8] and rows.tolist() == [4, 8, 12]
