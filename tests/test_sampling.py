"""Tests of sampling: loops and full forwards as twins, frequencies, rollouts spelled out by hand.

Two models. A small transformer with random weights, for what cache and padding could break. A table
of bigrams (the least that the model protocol asks for), whose distributions are known exactly.
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from scope_jax import sampling
from scope_jax.models import decoding
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import Transformer, TransformerConfig, Weight, declare
from scope_jax.records import PAD, POLICY, InputError, Rollouts
from scope_jax.sampling import continue_from, decoding_layout, generate
from scope_jax.sharding import (
    DECODING,
    TRAINING,
    make_mesh,
    make_meshes,
    put_batch,
    replicate,
    shardings,
)
from scope_jax.update import completion_logps
from tests.test_drawing import kept_tokens, log_softmax, truncated_probs

EOS = 1
CONFIG = TransformerConfig(
    vocab_size=11, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24
)
MODEL = Transformer(CONFIG)
GROUP, LENGTH, TEMPERATURE = 3, 8, 0.7
PROMPT_LENGTHS = (5, 3, 1, 4)
PROMPT_MASK = np.arange(5) >= 5 - np.array(PROMPT_LENGTHS)[:, None]
PROMPT_IDS = np.where(PROMPT_MASK, np.random.default_rng(0).integers(2, 11, (4, 5)), 0).astype(
    np.int32
)
ROWS = GROUP * len(PROMPT_LENGTHS)


@dataclasses.dataclass(frozen=True)
class Bigram:
    """The next token's logits are a row of params["table"] [V, V]; there is nothing to cache."""

    def __call__(self, params, tokens, *, positions, cache):
        del positions
        return params["table"][tokens], cache

    def unembed(self, params):
        return jnp.eye(params["table"].shape[0])

    def init_cache(self, batch, slots):
        del batch, slots
        return ()


SUCCESSOR = {
    "table": 30.0 * np.roll(np.eye(10, dtype=np.float32), 1, axis=1)
}  # i is followed by i + 1, 9 by 0
END, FILL = 9, 4


@pytest.fixture(scope="module")
def params():
    """Weights under which some rows end and others do not, and greedy rows are not monotonous."""
    rng = np.random.default_rng(7)

    def draw(weight):
        noise = 0.45 * rng.standard_normal(weight.shape)
        return jnp.asarray(1 + noise if weight.init == "ones" else noise, jnp.float32)

    return jax.tree.map(draw, declare(CONFIG), is_leaf=lambda x: isinstance(x, Weight))


def sample(params, key=0, prompt_ids=PROMPT_IDS, prompt_mask=PROMPT_MASK, **options):
    fixed = {"group_size": GROUP, "max_new_tokens": LENGTH, "eos_ids": EOS}
    options = {"temperature": TEMPERATURE, **fixed, **options}
    key = jax.random.key(key)
    return jax.device_get(generate(MODEL, params, prompt_ids, prompt_mask, key, **options))


def written(rollouts):
    """Returns each row's real tokens."""
    rows = jax.device_get((rollouts.completion_ids, rollouts.completion_mask))
    return [ids[mask].tolist() for ids, mask in zip(*rows, strict=True)]


@pytest.fixture(scope="module")
def sampled(params):
    return sample(params)


@pytest.fixture(scope="module")
def greedy(params):
    return sample(params, temperature=0.0)


TRUNCATION = {"top_k": 5, "top_p": 0.8}


@pytest.fixture(scope="module")
def truncated(params):
    return sample(params, **TRUNCATION)


@jax.jit
def _logits(params, ids, mask):
    hidden, _ = MODEL(params, ids, positions=positions_from_mask(mask))
    return hidden @ MODEL.unembed(params)


def full_logits(params, prompt_ids, prompt_mask, ids, mask):
    """Returns [B, T, V] logits of the completions by one forward without a cache."""
    logits = _logits(
        params, np.concatenate([prompt_ids, ids], 1), np.concatenate([prompt_mask, mask], 1)
    )
    start = prompt_ids.shape[1] - 1
    return np.asarray(logits)[:, start : start + ids.shape[1]]


def completion_logits(params, rollouts):
    return full_logits(
        params,
        rollouts.prompt_ids,
        rollouts.prompt_mask,
        rollouts.completion_ids,
        rollouts.completion_mask,
    )


def pick(values, ids):
    return np.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


# --- Log-probs ------------------------------------------------------------------------------------


def test_sampled_rows_end_in_every_way(sampled):
    assert 0 < sampled.finished.sum() < ROWS  # what the tests below rest on
    assert (
        len(
            {
                row[mask].tobytes()
                for row, mask in zip(sampled.completion_ids, sampled.completion_mask, strict=True)
            }
        )
        > 8
    )


@pytest.mark.parametrize("name", ["sampled", "truncated"])
def test_logps_equal_a_full_forward_over_the_whole_vocabulary(name, params, request):
    rollouts: Rollouts = request.getfixturevalue(name)
    mask = rollouts.completion_mask
    want = pick(
        log_softmax(completion_logits(params, rollouts) / TEMPERATURE), rollouts.completion_ids
    )
    np.testing.assert_allclose(rollouts.logps[mask], want[mask], rtol=0, atol=1e-4)


def test_logps_equal_those_of_the_update(sampled, params):
    logps, _ = jax.jit(completion_logps, static_argnums=0)(
        MODEL, params, sampled, temperature=TEMPERATURE
    )
    mask = sampled.completion_mask
    np.testing.assert_allclose(sampled.logps[mask], logps[mask], rtol=0, atol=1e-4)


def test_sampling_logps_are_those_of_the_truncated_distribution(truncated, params):
    mask = truncated.completion_mask
    logps = log_softmax(completion_logits(params, truncated) / TEMPERATURE)
    probs = pick(truncated_probs(logps, **TRUNCATION), truncated.completion_ids)
    assert (probs[mask] > 0).all()  # no token from outside was drawn
    np.testing.assert_allclose(
        truncated.sampling_logps[mask], np.log(probs[mask]), rtol=0, atol=1e-4
    )
    assert (truncated.sampling_logps > truncated.logps + 1e-3)[mask].mean() > 0.9


def test_sampling_logps_without_truncation_are_the_logps(sampled):
    np.testing.assert_allclose(sampled.sampling_logps, sampled.logps, rtol=0, atol=1e-6)


def test_temperature_zero_is_greedy(greedy, params):
    mask, logits = greedy.completion_mask, completion_logits(params, greedy)
    np.testing.assert_array_equal(greedy.completion_ids[mask], logits.argmax(-1)[mask])
    want = pick(log_softmax(logits), greedy.completion_ids)  # log-probs of temperature 1
    np.testing.assert_allclose(greedy.logps[mask], want[mask], rtol=0, atol=1e-4)
    assert (greedy.sampling_logps == 0).all()
    groups = greedy.completion_ids.reshape(-1, GROUP, LENGTH)
    assert (groups == groups[:, :1]).all()


# --- Draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("sampled", {}), ("truncated", TRUNCATION)])
def test_cached_decode_equals_a_loop_without_cache(name, options, params, request):
    rollouts = request.getfixturevalue(name)
    prompt_ids, prompt_mask = np.repeat(PROMPT_IDS, GROUP, 0), np.repeat(PROMPT_MASK, GROUP, 0)
    ids, mask = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
    row_keys = [jax.random.fold_in(jax.random.key(0), row) for row in range(ROWS)]
    live = np.ones(ROWS, bool)
    for column in range(LENGTH):
        logits = full_logits(params, prompt_ids, prompt_mask, ids, mask)[:, column]
        logps = log_softmax(logits / TEMPERATURE)
        for row in np.flatnonzero(live):
            # 11 tokens are one block: the first uniform number chooses among one
            _, uniform = jax.random.uniform(jax.random.fold_in(row_keys[row], column), (2,))
            kept = sorted(kept_tokens(logps[row], **options))
            cumulative = np.cumsum(np.exp(logps[row, kept]))
            place = np.flatnonzero(cumulative > uniform * cumulative[-1])[0]
            ids[row, column], mask[row, column] = kept[place], True
        live &= ids[:, column] != EOS
    np.testing.assert_array_equal(rollouts.completion_mask, mask)
    np.testing.assert_array_equal(rollouts.completion_ids, ids)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_frequencies_are_those_of_the_distribution(options):
    # Two columns at once: pairs of tokens, so that noise shared between the columns would show too.
    count, size, temperature = 20_000, 5, 0.8
    table = np.random.default_rng(1).normal(size=(size, size)).astype(np.float32)
    rollouts = generate(
        Bigram(), {"table": table}, np.array([[2]]), np.array([[True]]), jax.random.key(5),
        group_size=count, max_new_tokens=2, eos_ids=(), temperature=temperature, **options,
    )  # fmt: skip
    step = truncated_probs(log_softmax(table / temperature), **options)  # [from, to]
    want = step[2][:, None] * step  # [first, second]
    first, second = np.asarray(rollouts.completion_ids).T
    got = np.zeros((size, size))
    np.add.at(got, (first, second), 1)
    assert (got[want == 0] == 0).all()
    assert count * want[want > 0].min() > 5
    assert stats.chisquare(got[want > 0], count * want[want > 0]).pvalue > 1e-3


def test_frequencies_test_can_fail():
    wrong = np.array([0.21, 0.19, 0.2, 0.2, 0.2]) * 20_000
    assert stats.chisquare(wrong, np.full(5, 4000)).pvalue < 1e-3


def test_same_key_repeats_the_samples_and_another_key_does_not(params, sampled):
    again, other = sample(params), sample(params, key=1)
    assert all(
        (x == y).all()
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(sampled), strict=True)
    )
    same = (other.completion_ids == sampled.completion_ids).all(-1)
    assert same.sum() <= 2  # short completions may coincide


def test_reordered_rows_keep_their_samples(params, sampled):
    order = np.array([3, 1, 0, 2])
    rows = (order[:, None] * GROUP + np.arange(GROUP)).ravel().astype(np.int32)
    moved = sample(
        params, prompt_ids=PROMPT_IDS[order], prompt_mask=PROMPT_MASK[order], row_ids=rows
    )
    np.testing.assert_array_equal(moved.completion_ids, sampled.completion_ids[rows])
    # Not to the bit: Eigen rounds a product's last rows in another order than its first ones.
    np.testing.assert_allclose(moved.logps, sampled.logps[rows], rtol=0, atol=1e-5)


def test_subset_of_rows_keeps_its_samples():
    table = {"table": np.random.default_rng(2).normal(size=(10, 10)).astype(np.float32)}
    ids, mask = np.tile(np.array([[2], [5], [7], [3]], np.int32), (1, 3)), np.ones((4, 3), bool)
    options = {"group_size": 1, "max_new_tokens": 4, "eos_ids": (END,)}
    rows = np.array([3, 1], np.int32)
    whole = generate(Bigram(), table, ids, mask, jax.random.key(0), **options)
    part = generate(
        Bigram(), table, ids[rows], mask[rows], jax.random.key(0), row_ids=rows, **options
    )
    assert written(part) == [written(whole)[3], written(whole)[1]]
    assert len(set(map(tuple, written(whole)))) == 4


def test_row_does_not_depend_on_its_neighbours(params, sampled):
    others = np.where(PROMPT_MASK, (PROMPT_IDS + 3) % 11, 0)
    others[1] = PROMPT_IDS[1]
    changed = sample(params, prompt_ids=others)
    rows = slice(1 * GROUP, 2 * GROUP)
    np.testing.assert_array_equal(changed.completion_ids[rows], sampled.completion_ids[rows])
    np.testing.assert_allclose(changed.logps[rows], sampled.logps[rows], rtol=0, atol=1e-6)
    assert (changed.completion_ids != sampled.completion_ids).any()


def test_rows_of_a_group_differ(sampled):
    groups = sampled.completion_ids.reshape(-1, GROUP, LENGTH)
    assert all(len({row.tobytes() for row in group}) > 1 for group in groups)


# --- The shape of a rollout -----------------------------------------------------------------------


def count_up(starts, **options):
    """Greedy rollouts of the model that counts: one prompt per start, padded on the left."""
    ids = np.array([[FILL, start] for start in starts], np.int32)
    mask = np.array([[False, True]] * len(starts))
    options = {"group_size": 1, "eos_ids": (END,), "temperature": 0.0, "pad_id": FILL, **options}
    return jax.device_get(generate(Bigram(), SUCCESSOR, ids, mask, jax.random.key(0), **options))


def test_end_token_is_kept_and_the_rest_is_padding():
    rollouts = count_up([5, 7, 8, 2], max_new_tokens=4)
    assert rollouts.completion_ids.tolist() == [
        [6, 7, 8, END],
        [8, END, FILL, FILL],
        [END, FILL, FILL, FILL],
        [3, 4, 5, 6],
    ]
    assert rollouts.completion_mask.sum(-1).tolist() == [4, 2, 1, 4]
    assert rollouts.finished.tolist() == [True, True, True, False]
    mask = np.arange(4) < np.array([4, 2, 1, 4])[:, None]
    np.testing.assert_array_equal(rollouts.completion_mask, mask)
    np.testing.assert_array_equal(rollouts.token_source, np.where(mask, POLICY, PAD))
    np.testing.assert_array_equal(rollouts.prompt_ids, [[FILL, 5], [FILL, 7], [FILL, 8], [FILL, 2]])
    assert rollouts.completion_ids.dtype == np.int32 and rollouts.token_source.dtype == np.int8


def test_padding_has_no_log_probs(sampled):
    mask = sampled.completion_mask
    assert (sampled.logps[mask] < 0).all() and (sampled.sampling_logps[mask] < 0).all()
    assert (sampled.logps[~mask] == 0).all() and (sampled.sampling_logps[~mask] == 0).all()
    assert (np.sort(~mask, axis=1) == ~mask).all()  # right-padded
    ends = (sampled.completion_ids == EOS) & mask
    np.testing.assert_array_equal(ends.any(-1), sampled.finished)
    np.testing.assert_array_equal(
        ends.argmax(-1)[sampled.finished], mask.sum(-1)[sampled.finished] - 1
    )


def test_any_of_several_end_tokens_ends_a_row():
    rollouts = count_up([5, 7, 2], max_new_tokens=4, eos_ids=(END, 7))
    assert written(rollouts) == [[6, 7], [8, END], [3, 4, 5, 6]]
    assert rollouts.finished.tolist() == [True, True, False]


def test_each_row_has_its_own_budget():
    rollouts = count_up([5, 5, 5, 5, 8], max_new_tokens=np.array([0, 1, 3, 4, 1]))
    assert written(rollouts) == [[], [6], [6, 7, 8], [6, 7, 8, END], [END]]
    assert rollouts.finished.tolist() == [False, False, False, True, True]
    assert rollouts.completion_ids.shape == (5, 4)  # the largest budget
    assert rollouts.completion_ids[0].tolist() == [FILL] * 4


def test_padding_with_the_end_token_finishes_no_row():
    rollouts = count_up([5, 5, 6], max_new_tokens=np.array([0, 2, 4]), pad_id=END)
    assert written(rollouts) == [[], [6, 7], [7, 8, END]]
    assert rollouts.completion_ids[1].tolist() == [6, 7, END, END]
    assert rollouts.finished.tolist() == [False, False, True]


def test_buffer_may_be_longer_than_every_budget():
    rollouts = count_up([5, 5], max_new_tokens=np.array([0, 2]), buffer_length=6)
    assert rollouts.completion_ids.tolist() == [[FILL] * 6, [6, 7, *[FILL] * 4]]
    assert rollouts.logps.shape == rollouts.token_source.shape == (2, 6)
    assert count_up([5], max_new_tokens=2, buffer_length=6).completion_mask.tolist() == [
        [True] * 2 + [False] * 4
    ]
    assert not count_up(
        [5, 6], max_new_tokens=np.array([0, 0]), buffer_length=6
    ).completion_mask.any()


def test_groups_are_row_major_by_prompt():
    rollouts = count_up([5, 2], max_new_tokens=2, group_size=3)
    assert rollouts.completion_ids.tolist() == [[6, 7]] * 3 + [[3, 4]] * 3
    assert rollouts.prompt_ids.tolist() == [[FILL, 5]] * 3 + [[FILL, 2]] * 3
    assert rollouts.prompt_mask.tolist() == [[False, True]] * 6


class CountingBigram(Bigram):
    calls = 0

    def __call__(self, params, tokens, *, positions, cache):
        jax.debug.callback(self.count, tokens)
        return super().__call__(params, tokens, positions=positions, cache=cache)

    @classmethod
    def count(cls, _):
        cls.calls += 1


def test_loop_stops_when_every_row_has_ended_or_spent_its_budget():
    ids, mask = np.array([[6], [2]]), np.ones((2, 1), bool)
    rollouts = generate(
        CountingBigram(), SUCCESSOR, ids, mask, jax.random.key(0), group_size=1,
        max_new_tokens=np.array([50, 3]), eos_ids=(END,), temperature=0.0,
    )  # fmt: skip
    jax.block_until_ready(rollouts)
    jax.effects_barrier()
    assert written(rollouts) == [[7, 8, END], [3, 4, 5]]
    assert (
        CountingBigram.calls == 1 + 2
    )  # the prompts and two columns: a row's last token is not read


# --- Slots, refills, moves ------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Sizes so small that 12 rows of 8 tokens fill the cache, empty slots and move."""
    sizes = {"FIRST_COLUMNS": 2, "FEWEST_SLOTS": 1, "PREFILL_TOKENS": 10, "BUCKETS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(sampling, name, value)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("name", "slots"), [*[("sampled", slots) for slots in (0, 1, 5)], ("truncated", 8)]
)
def test_slots_and_buckets_change_no_row(name, slots, params, request):
    whole, options = request.getfixturevalue(name), TRUNCATION if name == "truncated" else {}
    parts = sample(params, slots=slots, **options)
    np.testing.assert_array_equal(parts.completion_ids, whole.completion_ids)
    np.testing.assert_array_equal(parts.completion_mask, whole.completion_mask)
    np.testing.assert_array_equal(parts.finished, whole.finished)
    for field in ("logps", "sampling_logps"):
        np.testing.assert_allclose(getattr(parts, field), getattr(whole, field), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_rows_with_budgets_share_slots(params, sampled):
    budgets = np.array([0, 3, 8, 1, 0, 8, 2, 5, 8, 8, 0, 1], np.int32)
    parts = sample(params, slots=3, max_new_tokens=budgets)
    shown = np.minimum(sampled.completion_mask.sum(-1), budgets)
    assert parts.completion_mask.sum(-1).tolist() == shown.tolist()
    for row, count in enumerate(shown):
        assert (parts.completion_ids[row, :count] == sampled.completion_ids[row, :count]).all()
    np.testing.assert_array_equal(parts.finished, sampled.finished & (shown == [
        mask.sum() for mask in sampled.completion_mask
    ]))  # fmt: skip


def test_another_models_rows_wait_for_whole_slots():
    rollouts = count_up([5, 7, 8, 2, 6], max_new_tokens=4, slots=2)
    want = [[6, 7, 8, END], [8, END], [END], [3, 4, 5, 6], [7, 8, END]]
    assert written(rollouts) == want


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("slots", [7])
def test_continuations_change_with_neither_slots_nor_buckets(slots, params, sampled):
    lengths = np.arange(ROWS) % 3
    whole = resume(params, sampled, lengths, key=3)
    parts = resume(params, sampled, lengths, key=3, slots=slots)
    np.testing.assert_array_equal(parts.completion_ids, whole.completion_ids)
    np.testing.assert_allclose(parts.logps, whole.logps, rtol=0, atol=1e-5)


def test_a_forward_with_room_reads_the_contexts_that_come_next(params, sampled, monkeypatch):
    contexts, read, prefill = len(PROMPT_MASK), [], decoding.prefill

    def recorded(*arguments, **options):
        rows, places = jax.device_get(arguments[-2:])
        read.append(sorted(rows[places < contexts].tolist()))
        return prefill(*arguments, **options)

    monkeypatch.setattr(decoding, "prefill", recorded)
    parts = sample(params, slots=contexts)  # the first rows go on from two of them
    assert [rows for rows in read if rows] == [list(range(contexts))]  # [] only compiles
    np.testing.assert_array_equal(parts.completion_ids, sampled.completion_ids)
    np.testing.assert_allclose(parts.logps, sampled.logps, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("slots", [4])
def test_short_contexts_are_read_in_narrow_forwards(slots, params, sampled, monkeypatch):
    lengths = np.array([0, 0, 3, 0, 1, 3, 2, 0, 0, 1, 0, 4])
    ended = sampled.finished & (lengths >= sampled.completion_mask.sum(-1))
    budgets = np.where(ended, 0, 4).astype(np.int32)
    whole = resume(params, sampled, lengths, max_new_tokens=budgets)
    monkeypatch.setattr(sampling, "FEWEST_COLUMNS", 2)
    read, prefill = [], decoding.prefill

    def recorded(*arguments, width, **options):
        rows, places = jax.device_get(arguments[-2:])
        read.append((width, rows[places < (slots or ROWS)]))  # the others fill the batch
        return prefill(*arguments, width=width, **options)

    monkeypatch.setattr(decoding, "prefill", recorded)
    parts = resume(params, sampled, lengths, max_new_tokens=budgets, slots=slots)
    np.testing.assert_array_equal(parts.completion_ids, whole.completion_ids)
    np.testing.assert_allclose(parts.logps, whole.logps, rtol=0, atol=1e-5)
    total = PROMPT_MASK.sum(-1).repeat(GROUP) + lengths
    assert sorted(np.concatenate([rows for _, rows in read])) == np.flatnonzero(budgets).tolist()
    assert all(width >= total[rows].max(initial=0) for width, rows in read)
    widths = {width for width, rows in read if len(rows)}
    assert len(widths) >= 2 and widths <= set(sampling.context_buckets(9))


@pytest.mark.parametrize("slots", [0, 8])
def test_mesh_changes_no_row_and_splits_them(slots, params, sampled):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    prompts = put_batch((PROMPT_IDS, PROMPT_MASK), mesh)
    options = {"group_size": GROUP, "max_new_tokens": LENGTH, "eos_ids": EOS}
    rollouts = generate(
        MODEL, replicate(params, mesh), *prompts, jax.random.key(0), temperature=TEMPERATURE,
        slots=slots, **options,
    )  # fmt: skip
    np.testing.assert_array_equal(rollouts.completion_ids, sampled.completion_ids)
    np.testing.assert_allclose(rollouts.logps, sampled.logps, rtol=0, atol=1e-5)
    assert rollouts.completion_ids.sharding.shard_shape((ROWS, LENGTH)) == (ROWS // 4, LENGTH)
    with pytest.raises(InputError, match="slots=6 does not divide over the 4 batch shards"):
        generate(MODEL, params, *prompts, jax.random.key(0), slots=6, **options)


WHOLE_VOCABULARY = {"vocab": None}  # 11 tokens do not divide


def lay_out(params, decode_model=0, **sizes):
    """Returns (mesh, params as training has them, model and params as decoding wants them)."""
    mesh, decode_mesh = make_meshes(decode_model=decode_model, **sizes)
    training = dataclasses.replace(TRAINING, **WHOLE_VOCABULARY)
    params = jax.device_put(params, shardings(declare(CONFIG), mesh, training))
    rules = dataclasses.replace(DECODING, **WHOLE_VOCABULARY)
    return decode_mesh, params, decoding_layout(MODEL, params, decode_mesh, rules)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("sizes", "slots"),
    # A shard's rows: all, one a prompt, more; and weights that came from another mesh.
    [((1, 4, 2, 0), 0), ((2, 2, 2, 0), 8), ((1, 1, 8, 0), 16), ((2, 4, 1, 2), 0)],
)
def test_decoding_layout_and_mesh_change_no_token(sizes, slots, params, sampled, monkeypatch):
    monkeypatch.setattr(sampling, "BUCKETS", 2)  # rows still move and wait
    *sizes, decode_model = sizes
    sizes = dict(zip(("data", "fsdp", "model"), sizes, strict=True))
    if sizes["model"] == 8:  # more than heads: weights and cache lie whole on every device
        mesh, model, placed = make_mesh(**sizes), MODEL, replicate(params, make_mesh(**sizes))
    else:
        mesh, _, (model, placed) = lay_out(params, decode_model, **sizes)
    twice = lambda x: np.concatenate([x, x])  # noqa: E731
    prompts = put_batch((twice(PROMPT_IDS), twice(PROMPT_MASK)), mesh)
    rollouts = generate(
        model, placed, *prompts, jax.random.key(0), group_size=GROUP, max_new_tokens=LENGTH,
        eos_ids=EOS, temperature=TEMPERATURE, row_ids=twice(np.arange(ROWS)), slots=slots,
    )  # fmt: skip
    np.testing.assert_array_equal(rollouts.completion_ids, twice(sampled.completion_ids))
    np.testing.assert_array_equal(rollouts.finished, twice(sampled.finished))
    np.testing.assert_allclose(rollouts.logps, twice(sampled.logps), rtol=0, atol=1e-5)


def test_on_a_mesh_of_one_device_no_program_is_compiled_twice(params, caplog):
    # Four rows of three tokens: one number of slots, one of columns.
    prompts = put_batch(
        (PROMPT_IDS[:, 1:], PROMPT_MASK[:, 1:]), make_mesh(devices=jax.devices()[:1])
    )
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        generate(
            MODEL, params, *prompts, jax.random.key(0), group_size=1, max_new_tokens=3, eos_ids=EOS
        )
    words = [record.getMessage().split() for record in caplog.records]
    compiled = [line[4] for line in words if line[:3] == ["Finished", "XLA", "compilation"]]
    for name in ("jit(prefill)", "jit(admit)", "jit(segment)"):
        assert compiled.count(name) == 1, compiled


def test_decoding_layout_gathers_once_and_leaves_the_params_to_training(params):
    _, training, (model, decoding) = lay_out(params, data=2, fsdp=2, model=2)
    assert "fsdp" in training["layers"]["gate"].sharding.spec
    for weight in jax.tree.leaves(decoding):
        assert "fsdp" not in weight.sharding.spec
    gate = decoding["layers"][0]["gate"]
    assert gate.sharding.shard_shape(gate.shape) == (1, 16, 24 // 2)
    assert decoding_layout(model, decoding) == (model, decoding)  # nothing left to do
    np.testing.assert_array_equal(training["embed"], params["embed"])  # not donated


def test_decoding_layout_computes_in_the_models_dtype(params):
    half = Transformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
    laid_out = decoding_layout(half, params)
    assert {x.dtype for x in jax.tree.leaves(laid_out[1])} == {jnp.dtype("bfloat16")}
    options = {"group_size": 1, "max_new_tokens": 4, "eos_ids": EOS}
    prompts = (PROMPT_IDS, PROMPT_MASK, jax.random.key(0))
    want = generate(half, params, *prompts, **options)
    got = generate(*laid_out, *prompts, **options)
    np.testing.assert_array_equal(got.completion_ids, want.completion_ids)
    np.testing.assert_array_equal(got.logps, want.logps)
    assert decoding_layout(Bigram(), SUCCESSOR) == (Bigram(), SUCCESSOR)


@pytest.mark.usefixtures("tiny")
def test_programs_are_few_and_compiled_once(params):
    """8 keys, whose rows end at other times each: a triangle of programs decodes them all."""
    options = {"slots": 8, "max_new_tokens": 16}
    traced = set()

    class Counted(Transformer):
        def __call__(self, params, tokens, *, positions, cache=None):
            if tokens.shape[1] == 1:
                shape = (tokens.shape[0], cache.positions.shape[1])
                assert shape not in traced or shape == (8, 2)  # the loop's body is traced twice
                traced.add(shape)
            return super().__call__(params, tokens, positions=positions, cache=cache)

    for key in range(8):
        fixed = {"group_size": GROUP, "eos_ids": EOS, "temperature": TEMPERATURE}
        generate(
            Counted(CONFIG), params, PROMPT_IDS, PROMPT_MASK, jax.random.key(key), **fixed,
            **options,
        )  # fmt: skip
    assert 3 <= len(traced) <= sampling.BUCKETS * (sampling.BUCKETS + 1) // 2


# --- continue_from --------------------------------------------------------------------------------


def resume(params, rollouts, prefix_length, *, key=0, length=4, **options):
    """Continues the rows of `rollouts` from their own first 4 (at most) tokens."""
    options = {"max_new_tokens": length, "eos_ids": EOS, "temperature": TEMPERATURE, **options}
    prefix = rollouts.completion_ids[:, :4], np.asarray(prefix_length, np.int32)
    rows = rollouts.prompt_ids, rollouts.prompt_mask, *prefix
    return jax.device_get(continue_from(MODEL, params, *rows, jax.random.key(key), **options))


@pytest.mark.parametrize("prompt", [1, 2])
def test_greedy_completion_is_continued_token_for_token_from_any_prefix(prompt, params, greedy):
    row = prompt * GROUP
    ids, total = greedy.completion_ids[row], int(greedy.completion_mask[row].sum())
    assert (total, greedy.finished[row]) == {1: (8, False), 2: (5, True)}[prompt]
    assert len(set(ids[:total].tolist())) >= 4
    lengths = np.minimum(np.arange(LENGTH + 1), total)  # one row each: a ragged batch
    prefix_ids = np.where(np.arange(LENGTH) < lengths[:, None], ids, 10)  # what follows is not read
    continued = continue_from(
        MODEL, params, np.tile(greedy.prompt_ids[row], (len(lengths), 1)),
        np.tile(greedy.prompt_mask[row], (len(lengths), 1)), prefix_ids, lengths, jax.random.key(0),
        max_new_tokens=total - lengths, buffer_length=LENGTH, eos_ids=EOS, temperature=0.0,
    )  # fmt: skip
    assert written(continued) == [ids[n:total].tolist() for n in lengths]
    for logps, n in zip(continued.logps, lengths, strict=True):
        np.testing.assert_allclose(
            logps[: total - n], greedy.logps[row, n:total], rtol=0, atol=1e-5
        )
    np.testing.assert_array_equal(continued.finished, greedy.finished[row] & (lengths < total))


def test_empty_prefix_gives_the_samples_of_generate(params, sampled):
    continued = resume(params, sampled, [0] * ROWS)
    np.testing.assert_array_equal(continued.completion_ids, sampled.completion_ids[:, :4])
    np.testing.assert_array_equal(continued.completion_mask, sampled.completion_mask[:, :4])
    np.testing.assert_allclose(continued.logps, sampled.logps[:, :4], rtol=0, atol=1e-5)


def test_continued_logps_equal_a_full_forward_of_prompt_prefix_and_continuation(params, sampled):
    unfinished = sampled.completion_mask[:, :4].sum(-1) - (
        sampled.completion_ids[:, :4] == EOS
    ).any(-1)
    prefix_length = np.minimum(np.arange(ROWS) % 5, unfinished)
    assert len(set(prefix_length.tolist())) >= 4  # ragged
    continued = resume(params, sampled, prefix_length, key=7)
    np.testing.assert_array_equal(continued.prompt_ids, sampled.prompt_ids)
    np.testing.assert_array_equal(continued.prompt_mask, sampled.prompt_mask)
    ids, mask = np.zeros((ROWS, 8), np.int32), np.zeros((ROWS, 8), bool)
    for row, start in enumerate(prefix_length):
        written = continued.completion_ids[row][continued.completion_mask[row]]
        whole = [*sampled.completion_ids[row, :start], *written]
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, True
    logps = log_softmax(
        full_logits(params, sampled.prompt_ids, sampled.prompt_mask, ids, mask) / TEMPERATURE
    )
    want = pick(logps, ids)
    for row, start in enumerate(prefix_length):
        n = continued.completion_mask[row].sum()
        np.testing.assert_allclose(
            continued.logps[row, :n], want[row, start : start + n], rtol=0, atol=1e-4
        )


def test_continuation_of_a_row_depends_on_its_id_alone(params, sampled):
    reversed_rows = jax.tree.map(lambda x: x[::-1], sampled)
    ids = np.arange(ROWS, dtype=np.int32)
    first = resume(params, sampled, [2] * ROWS, row_ids=ids)
    second = resume(params, reversed_rows, [2] * ROWS, row_ids=ids[::-1].copy())
    np.testing.assert_array_equal(second.completion_ids, first.completion_ids[::-1])


# --- Bad input ------------------------------------------------------------------------------------


class Untouchable(Bigram):
    def __call__(self, *_, **__):
        raise AssertionError("the model was traced before the input was checked")


IDS, MASK = np.full((2, 3), 5, np.int32), np.ones((2, 3), bool)
NO_TOKEN, RIGHT_PADDED = MASK.copy(), MASK.copy()
NO_TOKEN[1], RIGHT_PADDED[1, 2] = False, False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"prompt_mask": NO_TOKEN}, "LEFT-padded and not empty"),
        ({"prompt_mask": RIGHT_PADDED}, "LEFT-padded and not empty"),
        ({"prompt_ids": IDS[:, :0], "prompt_mask": MASK[:, :0]}, "LEFT-padded and not empty"),
        ({"prompt_mask": MASK[:, :2]}, "prompt_ids and prompt_mask"),
        ({"prompt_ids": IDS[0], "prompt_mask": MASK[0]}, "prompt_ids and prompt_mask"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"slots": -1}, "slots must be 0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": np.array([3, -1, 3, 3])}, "max_new_tokens"),
        ({"max_new_tokens": np.array([3, 3])}, "4 rows, but max_new_tokens"),
        ({"max_new_tokens": 9, "buffer_length": 8}, "max_new_tokens"),
        ({"row_ids": np.arange(3)}, "row_ids"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(changes, message):
    options = {
        "prompt_ids": IDS,
        "prompt_mask": MASK,
        "group_size": 2,
        "max_new_tokens": 4,
        **changes,
    }
    prompt_ids, prompt_mask = options.pop("prompt_ids"), options.pop("prompt_mask")
    with pytest.raises(InputError, match=message):
        generate(
            Untouchable(),
            SUCCESSOR,
            prompt_ids,
            prompt_mask,
            jax.random.key(0),
            eos_ids=(END,),
            **options,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_length": np.array([0, 5])}, r"0 \.\. 4, got 0 \.\. 5"),
        ({"prefix_length": np.array([-1, 2])}, r"0 \.\. 4, got -1 \.\. 2"),
        ({"prefix_length": np.array([2])}, "2 prompts, but"),
        ({"prefix_ids": np.zeros((3, 4), np.int32)}, "2 prompts, but"),
        ({"prefix_ids": np.zeros(2, np.int32)}, "2 prompts, but"),
        ({"prompt_mask": MASK[:, :2]}, "prompt_ids and prompt_mask"),
        ({"prompt_mask": NO_TOKEN, "prefix_length": np.array([1, 0])}, "every row needs a token"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"max_new_tokens": np.array([1, 2, 3])}, "2 rows, but max_new_tokens"),
    ],
)
def test_bad_continuation_is_refused_before_anything_compiles(changes, message):
    arrays = {
        "prompt_ids": IDS, "prompt_mask": MASK, "prefix_ids": np.zeros((2, 4), np.int32),
        "prefix_length": np.array([1, 2]),
    }  # fmt: skip
    options = {"max_new_tokens": 4, **{k: v for k, v in changes.items() if k not in arrays}}
    arrays = {k: changes.get(k, v) for k, v in arrays.items()}
    with pytest.raises(InputError, match=message):
        continue_from(
            Untouchable(), SUCCESSOR, *arrays.values(), jax.random.key(0), eos_ids=(END,), **options
        )


@dataclasses.dataclass(frozen=True)
class Untraced(Transformer):
    def __call__(self, *_, **__):
        raise AssertionError("the model was traced before the input was checked")


def test_rows_that_may_outgrow_the_model_are_refused_before_anything_compiles():
    short = Untraced(dataclasses.replace(CONFIG, max_position=12))
    params, key = MODEL.init(jax.random.key(0)), jax.random.key(0)
    with pytest.raises(InputError, match="context 0 has 5 tokens and may grow to 13, .* for 12: "):
        generate(
            short, params, PROMPT_IDS, PROMPT_MASK, key, group_size=2, max_new_tokens=8, eos_ids=()
        )
    # What a row really holds counts: padding does not, nor does another row's budget.
    lengths, budgets = np.array([0, 2, 3, 4]), np.array([7, 7, 9, 4])
    prefix = np.full((4, 9), 3, np.int32)
    with pytest.raises(InputError, match="context 2 has 4 tokens and may grow to 13"):
        continue_from(
            short, params, PROMPT_IDS, PROMPT_MASK, prefix, lengths, key, max_new_tokens=budgets,
            eos_ids=(),
        )  # fmt: skip
    budgets[2] = 8
    with pytest.raises(AssertionError, match="traced"):
        continue_from(
            short, params, PROMPT_IDS, PROMPT_MASK, prefix, lengths, key, max_new_tokens=budgets,
            eos_ids=(),
        )  # fmt: skip


# --- Transfers ------------------------------------------------------------------------------------


def test_device_arrays_pass_a_transfer_guard():
    params, ids, mask, prefix, length, key, ones = jax.device_put(
        (SUCCESSOR, IDS, MASK, IDS, np.array([1, 2], np.int32), jax.random.key(0), np.ones(3))
    )
    options = {
        "max_new_tokens": np.array([2, 4]),
        "eos_ids": (END,),
        "temperature": 0.6,
    }
    with jax.transfer_guard_host_to_device("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jnp.add(ones, np.ones(3))  # the guard does guard
        new = generate(Bigram(), params, ids, mask, key, group_size=1, **options)
        more = continue_from(Bigram(), params, ids, mask, prefix, length, key, **options)
    assert new.completion_ids.tolist() == [[6, 7, 0, 0], [6, 7, 8, END]]
    assert more.completion_ids.tolist() == [[6, 7, 0, 0], [6, 7, 8, END]]
