"""Rollouts: one jitted program that prefills and decodes with a KV cache.

    generate        P prompts -> B = P * G completions; each prompt is prefilled once and its cache
    repeated G times continue_from   B prompts with token prefixes -> their continuations

Index arithmetic, the same for both. A context is LEFT-padded to M slots, so every row's first new
token is sampled from the hidden state of slot M - 1, and completion column t goes to cache slot M +
t:

    slot        0 ..        M-1 | M       M+1     ..
    row         - - c0 c1 .. cm | t0      t1      ..        hidden[slot s] predicts the token of
    slot s + 1 column                      | 0       1       ..

A row's randomness is fold_in(fold_in(key, row id), column): it depends on neither its neighbours
nor the batch size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scope_jax.models.kv_cache import positions_from_mask, repeat_rows
from scope_jax.records import PAD, POLICY, InputError, Rollouts


def generate(
    model,
    params,
    prompt_ids,
    prompt_mask,
    key,
    *,
    group_size: int,
    max_new_tokens,
    eos_ids,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    pad_id: int = 0,
    row_ids=None,
    buffer_length: int | None = None,
) -> Rollouts:
    """Samples `group_size` completions of every prompt.

    Args:
      model, params: see models/transformer.py for the protocol.
      prompt_ids: [P, N] int32, LEFT-padded.
      prompt_mask: [P, N] bool.
      key: typed `jax.random.key`.
      group_size: G, completions per prompt.
      max_new_tokens: int, or [B] a budget per row (B = P * G, row-major by prompt).
      eos_ids: end token ids; the sampled one is kept in the completion.
      temperature: 0 takes the argmax (log-probs are then those of temperature 1).
      top_k, top_p: restrict the draw; 0 and 1.0 are off. `logps` stay those of the full vocabulary.
      pad_id: id after the end of a completion.
      row_ids: [B] int32, seeds of the rows' keys (default 0 .. B - 1), so that a subset of rows
        keeps its samples.
      buffer_length: T of the result (default: the largest budget). Set it where budgets vary from
        call to call.
    Returns:
      Rollouts of B rows.
    Raises:
      InputError: shapes, budgets or options that make no sense; nothing has been compiled then.
    """
    _check_prompts(prompt_ids, prompt_mask)
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, got {group_size}")
    if not (prompt_mask.shape[1] and jax.device_get(prompt_mask)[:, -1].all()):
        raise InputError(
            "every prompt needs a token in its last column: prompts are LEFT-padded and not empty"
        )
    rows = prompt_ids.shape[0] * group_size
    options = _options(
        rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, pad_id, row_ids
    )
    return _generate(model, params, prompt_ids, prompt_mask, key, repeats=group_size, **options)


def continue_from(
    model,
    params,
    prompt_ids,
    prompt_mask,
    prefix_ids,
    prefix_length,
    key,
    *,
    max_new_tokens,
    eos_ids,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    pad_id: int = 0,
    row_ids=None,
    buffer_length: int | None = None,
) -> Rollouts:
    """Samples a continuation of every row's prompt + prefix, none of whose tokens is changed.

    Args:
      prompt_ids, prompt_mask: [B, N], LEFT-padded.
      prefix_ids: [B, T] int32; the first prefix_length[i] tokens of row i are read, the rest
        ignored.
      prefix_length: [B] int32, 0 .. T.
      The others are `generate`'s. A budget of 0 gives an empty continuation (all 0: set
        buffer_length).
    Returns:
      Rollouts of B rows whose completion is the continuation alone (prompt_ids and prompt_mask as
      given).
    """
    _check_prompts(prompt_ids, prompt_mask)
    rows = prompt_ids.shape[0]
    if prefix_ids.ndim != 2 or prefix_ids.shape[0] != rows or prefix_length.shape != (rows,):
        raise InputError(
            f"{rows} prompts, but prefix_ids {prefix_ids.shape} and "
            f"prefix_length {prefix_length.shape}"
        )
    lengths = np.asarray(jax.device_get(prefix_length))
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > prefix_ids.shape[1]:
        raise InputError(
            f"prefix_length must lie in 0 .. {prefix_ids.shape[1]}, "
            f"got {lengths.min()} .. {lengths.max()}"
        )
    if not (jax.device_get(prompt_mask).any(-1) | (lengths > 0)).all():
        raise InputError(
            "every row needs a token to continue from: its prompt and prefix are empty"
        )
    options = _options(
        rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, pad_id, row_ids
    )
    return _continue(
        model, params, prompt_ids, prompt_mask, prefix_ids, prefix_length, key, **options
    )


def _check_prompts(prompt_ids, prompt_mask) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape:
        raise InputError(
            "prompt_ids and prompt_mask must be two arrays [P, N], "
            f"got {prompt_ids.shape} and {prompt_mask.shape}"
        )


def _options(
    rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, pad_id, row_ids
) -> dict:
    """Checks the sampling options and splits them into static ones and arrays."""
    budgets = np.asarray(jax.device_get(max_new_tokens), np.int32)
    row_ids = np.arange(rows, dtype=np.int32) if row_ids is None else row_ids
    if budgets.shape not in ((), (rows,)) or np.shape(row_ids) != (rows,):
        raise InputError(
            f"{rows} rows, but max_new_tokens {budgets.shape} and row_ids {np.shape(row_ids)}"
        )
    budgets = np.broadcast_to(budgets, (rows,))
    length = int(budgets.max(initial=0)) if buffer_length is None else buffer_length
    if length < 1 or budgets.max() > length or budgets.min() < 0:
        raise InputError(
            f"max_new_tokens must lie in 0 .. {length} with room for a token, got {max_new_tokens}"
        )
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
        raise InputError(
            "temperature >= 0, 0 < top_p <= 1 and top_k >= 0 expected, got "
            f"{temperature=}, {top_p=}, {top_k=}"
        )
    return {
        # device_put: explicit, so that a caller's transfer guard lets it pass
        "budgets": jax.device_put(budgets),
        "row_ids": jax.device_put(row_ids),
        "temperature": jax.device_put(np.float32(temperature or 1.0)),
        "top_p": jax.device_put(np.float32(top_p)),
        "length": length,
        "eos_ids": tuple(int(i) for i in np.atleast_1d(np.asarray(eos_ids, np.int32))),
        "greedy": temperature == 0,
        "top_k": int(top_k),
        "use_top_p": top_p < 1,
        "pad_id": int(pad_id),
    }


_STATIC = ("model", "length", "eos_ids", "greedy", "top_k", "use_top_p", "pad_id")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "repeats"))
def _generate(model, params, prompt_ids, prompt_mask, key, *, repeats, length, **options):
    rows, slots = prompt_ids.shape
    cache = model.init_cache(rows, slots + length)
    positions = positions_from_mask(prompt_mask)
    hidden, cache = model(params, prompt_ids, positions=positions, cache=cache)
    repeat = functools.partial(jnp.repeat, repeats=repeats, axis=0)  # [P, ...] -> [B, ...]
    hidden, next_position = repeat(hidden[:, -1]), repeat(positions[:, -1] + 1)
    cache = repeat_rows(cache, repeats)
    sampled = _decode(model, params, cache, hidden, next_position, key, length=length, **options)
    return Rollouts(prompt_ids=repeat(prompt_ids), prompt_mask=repeat(prompt_mask), **sampled)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _continue(
    model, params, prompt_ids, prompt_mask, prefix_ids, prefix_length, key, *, length, **options
):
    context, context_mask = _left_align(prompt_ids, prompt_mask, prefix_ids, prefix_length)
    rows, slots = context.shape
    positions = positions_from_mask(context_mask)
    cache = model.init_cache(rows, slots + length)
    hidden, cache = model(params, context, positions=positions, cache=cache)
    next_position = positions[:, -1] + 1
    sampled = _decode(
        model, params, cache, hidden[:, -1], next_position, key, length=length, **options
    )
    return Rollouts(prompt_ids=prompt_ids, prompt_mask=prompt_mask, **sampled)


def _left_align(prompt_ids, prompt_mask, prefix_ids, prefix_length):
    """Joins prompts and prefixes into one LEFT-padded context: every row ends in the last column.

    prompt  - - p p p      prefix  a b c x x  (length 3)      context  - - - - p p p a b c
    """
    prefix_mask = jnp.arange(prefix_ids.shape[1])[None, :] < prefix_length[:, None]
    ids = jnp.concatenate([prompt_ids, prefix_ids], axis=1)  # [B, N + T]
    mask = jnp.concatenate([prompt_mask, prefix_mask], axis=1)
    order = jnp.argsort(mask, axis=1, stable=True)  # padding first, the order of real tokens kept
    return jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(mask, order, axis=1)


def _decode(
    model,
    params,
    cache,
    hidden,
    next_position,
    key,
    *,
    budgets,
    row_ids,
    length,
    eos_ids,
    pad_id,
    **draw,
):
    """Samples until every row has ended or spent its budget.

    State of the loop, after column `t - 1` was sampled: `ids[:, t - 1]` has not been read by the
    model yet.
    Stop reasons: every row is done (end token or budget), or the buffer is full (t == length).
    """
    unembed = model.unembed(params)
    rows = hidden.shape[0]
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
    is_end = lambda ids: (ids[:, None] == jnp.asarray(eos_ids, jnp.int32)[None, :]).any(-1)  # noqa: E731

    def sample(state, hidden, t):
        keys = jax.vmap(lambda k: jax.random.fold_in(k, t))(row_keys)
        logits = (hidden @ unembed.astype(hidden.dtype)).astype(jnp.float32)
        token, logp, sampling_logp = _draw(logits, keys, **draw)
        live = ~state["done"] & (t < budgets)
        token = jnp.where(live, token, pad_id)
        column = {
            "completion_ids": token,
            "completion_mask": live,
            "logps": jnp.where(live, logp, 0.0),
            "sampling_logps": jnp.where(live, sampling_logp, 0.0),
        }
        out = {
            k: jax.lax.dynamic_update_index_in_dim(state["out"][k], v, t, 1)
            for k, v in column.items()
        }
        finished = state["finished"] | (live & is_end(token))
        done = finished | (t + 1 >= budgets)
        return {
            "out": out,
            "finished": finished,
            "done": done,
            "token": token,
            "live": live,
            "t": t + 1,
        }

    def body(carry):
        state, cache = carry
        position = jnp.where(state["live"] & ~state["done"], next_position + state["t"] - 1, -1)
        hidden, cache = model(
            params, state["token"][:, None], positions=position[:, None], cache=cache
        )
        return sample(state, hidden[:, 0], state["t"]), cache

    def unfinished(carry):
        return (carry[0]["t"] < length) & ~carry[0]["done"].all()

    out = {
        "completion_ids": jnp.full((rows, length), pad_id, jnp.int32),
        "completion_mask": jnp.zeros((rows, length), bool),
        "logps": jnp.zeros((rows, length), jnp.float32),
        "sampling_logps": jnp.zeros((rows, length), jnp.float32),
    }
    start: dict[str, Any] = {"out": out, "finished": jnp.zeros(rows, bool), "done": budgets <= 0}
    state, _ = jax.lax.while_loop(unfinished, body, (sample(start, hidden, jnp.int32(0)), cache))
    token_source = jnp.where(state["out"]["completion_mask"], POLICY, PAD).astype(jnp.int8)
    return {**state["out"], "token_source": token_source, "finished": state["finished"]}


def _draw(logits, keys, *, temperature, top_p, greedy, top_k, use_top_p):
    """Draws one token a row.

    Args:
      logits: [B, V] float32.
      keys: [B] typed keys.
    Returns:
      (token [B] int32, its log-prob under the full vocabulary, its log-prob under the distribution
      drawn from).
    """
    scaled = logits / temperature
    full = jax.nn.log_softmax(scaled, axis=-1)
    if greedy:
        token = jnp.argmax(full, axis=-1).astype(jnp.int32)
        logp = _pick(full, token)
        return token, logp, jnp.zeros_like(logp)
    kept = truncate(full, top_k=top_k, top_p=top_p if use_top_p else None)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(keys)
    token = jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)
    return token, _pick(full, token), _pick(jax.nn.log_softmax(kept, axis=-1), token)


def truncate(logps: jax.Array, *, top_k: int = 0, top_p=None) -> jax.Array:
    """Sets the tokens outside top-k and top-p to -inf.

    Top-p keeps the smallest set of most likely tokens whose probability reaches `top_p`, after
    top-k, and always the most likely one (https://arxiv.org/abs/1904.09751). Ties at the border are
    all kept.

    Args:
      logps: [B, V] float32 log-probs.
      top_k: 0 is off.
      top_p: None is off.
    Returns:
      [B, V] float32, not renormalised.
    """
    if top_k and top_k < logps.shape[-1]:
        border = jax.lax.top_k(logps, top_k)[0][:, -1:]
        logps = jnp.where(logps < border, -jnp.inf, logps)
    if top_p is not None:
        ordered = jnp.sort(logps, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        needed = (
            jnp.cumsum(probs, axis=-1) - probs < top_p
        )  # the mass before a token has not reached top_p
        border = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
        logps = jnp.where(logps < border, -jnp.inf, logps)
    return logps


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]
