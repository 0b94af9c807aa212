"""Drawing tokens from logits: truncation of the distribution, and the draw itself; a step's keys.

Pure functions of arrays. B rows, V vocabulary entries. Log-probs are float32 and in nats.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 256  # vocabulary entries whose probabilities are summed before the draw looks into them


def draw(logits, keys, *, temperature, greedy=False, top_k=0, top_p=None, min_p=None):
    """Draws one token a row.

    The draw inverts the cumulative distribution at two uniform numbers: the first chooses a block
    of the vocabulary, the second a token of the block. So a row costs two random numbers and one
    pass over its logits (the Gumbel trick takes V), and a token's probability is met to a relative
    2**-24 of its block's, not of the whole.

    Args:
      logits: [B, V] float32.
      keys: [B] typed keys.
      temperature: [] float32 > 0.
      greedy: take the argmax instead.
      top_k, top_p, min_p: see `truncate`.
    Returns:
      (token [B] int32, its log-prob under the full vocabulary [B], its log-prob under the
      distribution drawn from [B]; 0 for the argmax).
    """
    scaled = logits / temperature
    if greedy:
        token = jnp.argmax(scaled, axis=-1).astype(jnp.int32)
        logp = _pick(scaled, token) - jax.nn.logsumexp(scaled, axis=-1)
        return token, logp, jnp.zeros_like(logp)
    largest = jax.lax.stop_gradient(scaled.max(axis=-1, keepdims=True))
    if not top_k and top_p is None and min_p is None:
        token, total = _invert(scaled, largest, keys)
        logp = _pick(scaled, token) - largest[:, 0] - jnp.log(total)
        return token, logp, logp
    logps = scaled - largest - jnp.log(jnp.exp(scaled - largest).sum(-1, keepdims=True))
    kept = truncate(logps, top_k=top_k, top_p=top_p, min_p=min_p)
    token, total = _invert(kept, jnp.zeros_like(largest), keys)
    logp = _pick(logps, token)
    return token, logp, logp - jnp.log(total)


def _invert(values, largest, keys):
    """Draws from the distribution proportional to exp(values - largest).

    Args:
      values: [B, V] float32, -inf where a token may not be drawn.
      largest: [B, 1] float32.
    Returns:
      (token [B] int32, sum over V of exp(values - largest) [B]).
    """
    rows, vocab = values.shape
    values = jnp.pad(values, ((0, 0), (0, -vocab % BLOCK)), constant_values=-jnp.inf)
    values = values.reshape(rows, -1, BLOCK)
    sums = jnp.exp(values - largest[:, :, None]).sum(-1)  # [B, blocks]
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)  # [B, 2]
    block, total = _first_beyond(sums, uniform[:, 0])
    inside = jnp.take_along_axis(values, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
    offset, _ = _first_beyond(jnp.exp(inside - largest), uniform[:, 1])
    return (block * BLOCK + offset).astype(jnp.int32), total


def _first_beyond(weights, uniform):
    """Returns (first index [B] whose cumulative weight exceeds uniform * total, total [B]).

    An index of weight 0 is never returned: the bound is kept below the total, whatever rounds.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    total = cumulative[:, -1]
    bound = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(cumulative > bound[:, None], axis=-1), total


def truncate(logps: jax.Array, *, top_k: int = 0, top_p=None, min_p=None) -> jax.Array:
    """Sets the tokens outside min-p, top-k and top-p to -inf; the most likely one always stays.

    Min-p keeps the tokens at least `min_p` times as likely as the most likely one
    (https://arxiv.org/abs/2407.01082). Top-p keeps the smallest set of most likely tokens whose
    probability reaches `top_p`, after the other two (https://arxiv.org/abs/1904.09751). Ties at a
    border are all kept.

    Args:
      logps: [B, V] float32 log-probs.
      top_k: 0 is off.
      top_p, min_p: None is off.
    Returns:
      [B, V] float32, not renormalised.
    """
    if min_p is not None:
        border = logps.max(axis=-1, keepdims=True) + jnp.log(min_p)
        logps = jnp.where(logps < border, -jnp.inf, logps)
    if top_k and top_k < logps.shape[-1]:
        border = jax.lax.top_k(logps, top_k)[0][:, -1:]
        logps = jnp.where(logps < border, -jnp.inf, logps)
    if top_p is not None:
        ordered = jnp.sort(logps, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        needed = before < top_p  # the mass before a token has not reached top_p
        border = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
        logps = jnp.where(logps < border, -jnp.inf, logps)
    return logps


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("attempts", "refills"))
def step_keys(seed_key, step, attempts, refills=0):
    """Returns a step's keys (sample, [refill ..], locate, insert, [teach ..]), functions of (seed,
    step).
    """
    step_key = jax.random.fold_in(seed_key, step)
    keys = [jax.random.fold_in(step_key, purpose) for purpose in range(3 + attempts + refills)]
    return keys[0], keys[3 + attempts :], *keys[1:3], keys[3 : 3 + attempts]
