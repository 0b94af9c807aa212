"""Tests of drawing: plain-Python twins of truncation and draw, frequencies, borders by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from scope_jax.drawing import BLOCK, _first_beyond, draw, truncate


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def kept_tokens(logps, top_k=0, top_p=None, min_p=None):
    """The specification of `truncate`, one row, with sets."""
    kept = set(range(len(logps)))
    if min_p is not None:
        border = max(logps) + np.log(np.float32(min_p))
        kept = {i for i in kept if logps[i] >= border}
    if 0 < top_k < len(logps):
        border = sorted((logps[i] for i in kept), reverse=True)[:top_k][-1]
        kept = {i for i in kept if logps[i] >= border}
    if top_p is not None:
        total, mass, border = sum(math.exp(logps[i]) for i in kept), 0.0, math.inf
        for i in sorted(kept, key=lambda i: -logps[i]):
            if mass < top_p:
                border = logps[i]
            mass += math.exp(logps[i]) / total
        kept = {i for i in kept if logps[i] >= border}
    return kept


def truncated_probs(logps, **options):
    """Returns the kept tokens' probabilities, renormalised, and 0 for the others; any [..., V]."""
    probs = np.zeros(logps.shape)
    for index in np.ndindex(logps.shape[:-1]):
        kept = sorted(kept_tokens(logps[index].tolist(), **options))
        probs[index][kept] = np.exp(logps[index][kept]) / np.exp(logps[index][kept]).sum()
    return probs


# --- Truncation -----------------------------------------------------------------------------------


def kept_by_truncate(logps, **options):
    out = np.asarray(truncate(jnp.asarray(logps, jnp.float32), **options))
    kept = np.isfinite(out)
    np.testing.assert_array_equal(out[kept], np.asarray(logps, np.float32)[kept])
    assert (out[~kept] == -np.inf).all()
    return [set(np.flatnonzero(row).tolist()) for row in kept]


@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 9])
def test_truncation_equals_the_twin(top_k):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(6, 7))
        logits[3:] = np.round(logits[3:] * 2) / 2  # ties
        logps = log_softmax(logits).astype(np.float32)
        for top_p in (None, 1e-6, 0.3, 0.55, 0.9, 0.9999):
            want = [kept_tokens(row.tolist(), top_k, top_p) for row in logps]
            assert kept_by_truncate(logps, top_k=top_k, top_p=top_p) == want


def test_truncation_by_hand():
    logps = np.log([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    everything = {0, 1, 2, 3}
    assert kept_by_truncate(logps) == [everything] * 2
    assert kept_by_truncate(logps, top_k=2) == [{1, 3}, everything]  # ties at the border stay
    assert kept_by_truncate(logps, top_p=0.39) == [{1}, everything]
    assert kept_by_truncate(logps, top_p=0.41) == [{1, 3}, everything]  # 0.4 has not reached it
    assert kept_by_truncate(logps, top_p=1e-9)[0] == {1}
    # top-k first: of 0.4 and 0.3 the share 0.4 / 0.7 reaches 0.55, though 0.4 does not
    assert kept_by_truncate(logps, top_k=2, top_p=0.55)[0] == {1}
    assert kept_by_truncate(logps, top_p=0.55)[0] == {1, 3}


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.3, 1.0])
def test_min_p_equals_the_twin_and_goes_first(min_p):
    for seed in range(5):
        logps = log_softmax(np.random.default_rng(seed).normal(size=(6, 7))).astype(np.float32)
        for others in ({}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.5}):
            want = [kept_tokens(row.tolist(), min_p=min_p, **others) for row in logps]
            assert kept_by_truncate(logps, min_p=min_p, **others) == want
    by_hand = np.log([[0.1, 0.4, 0.2, 0.3]])
    assert kept_by_truncate(by_hand, min_p=0.74) == [{1, 3}]  # 0.3 / 0.4 = 0.75, 0.2 / 0.4 = 0.5


# --- The draw -------------------------------------------------------------------------------------


def drawn_by_twin(probs, uniform):
    """The specification of the draw, one row: a block of the vocabulary, then a token of it."""
    blocks = [probs[i : i + BLOCK] for i in range(0, len(probs), BLOCK)]

    def first_beyond(weights, u):
        passed = np.flatnonzero(np.cumsum(weights) > u * np.sum(weights))
        return int(passed[0])

    block = first_beyond([sum(weights) for weights in blocks], uniform[0])
    return block * BLOCK + first_beyond(blocks[block], uniform[1])


@pytest.mark.parametrize("vocab", [5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_draw_equals_the_twin(vocab, options):
    logits = 2 * np.random.default_rng(vocab).normal(size=(40, vocab)).astype(np.float32)
    keys, temperature = lambda: jax.random.split(jax.random.key(vocab), 40), 0.8
    token, logp, sampling_logp = draw(logits, keys(), temperature=temperature, **options)
    full = log_softmax(logits / temperature)
    probs = truncated_probs(full, **options)
    uniform = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys()))
    assert token.tolist() == [drawn_by_twin(*row) for row in zip(probs, uniform, strict=True)]
    rows = np.arange(40)
    np.testing.assert_allclose(logp, full[rows, token], rtol=0, atol=1e-5)
    np.testing.assert_allclose(sampling_logp, np.log(probs[rows, token]), rtol=0, atol=1e-5)


def test_greedy_takes_the_first_of_the_most_likely():
    logits = np.array([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0]], np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    token, logp, sampling_logp = draw(logits, keys, temperature=1.0, greedy=True)
    assert token.tolist() == [1, 0] and sampling_logp.tolist() == [0, 0]
    np.testing.assert_allclose(logp, log_softmax(logits)[[0, 1], [1, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_frequencies_over_several_blocks(options):
    # Blocks of very different weight, so that a draw confined to one block, or a block chosen by
    # its number of tokens, would fail.
    count, vocab = 60_000, 2 * BLOCK + 10
    logits = np.random.default_rng(3).normal(size=vocab) - np.linspace(0, 4, vocab)
    logits[[0, BLOCK - 1, BLOCK, 2 * BLOCK, vocab - 1]] = 3.0  # the blocks' borders
    probs = truncated_probs(log_softmax(logits[None]), **options)[0]
    keys = jax.random.split(jax.random.key(1), (count // 1000, 1000))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (1000, vocab))
    one = jax.jit(lambda rows, keys: draw(rows, keys, temperature=1.0, **options)[0])
    token = np.concatenate([one(rows, part) for part in keys])
    got = np.bincount(token, minlength=vocab)
    assert (got[probs == 0] == 0).all()
    often = count * probs > 8
    assert often.sum() > 10
    want = count * np.append(probs[often], probs[~often].sum())
    got = np.append(got[often], got[~often].sum())
    kept = want > 0
    assert stats.chisquare(got[kept], want[kept]).pvalue > 1e-3


def test_token_without_weight_is_never_drawn_whatever_rounds():
    almost_one = np.float32(1 - 2**-24)
    weights = np.array([[0, 1e-30, 0, 0], [0, 0, 3e7, 0], [1, 1e-9, 0, 0], [0, 0, 0, 1]])
    weights = np.concatenate([weights, np.random.default_rng(0).exponential(size=(4, 4))])
    weights[4:, -1] = 0
    for uniform in (np.float32(0), np.float32(0.3), almost_one):
        index, total = _first_beyond(jnp.asarray(weights, jnp.float32), np.full(8, uniform))
        assert (weights[np.arange(8), index] > 0).all()
        np.testing.assert_allclose(total, weights.sum(-1), rtol=1e-6)
