"""The jitted programs of decoding: what `sampling.py` runs on the device.

    prefill   the contexts, LEFT-padded: a row's first token is drawn from the last column
    admit     waiting rows take free slots and draw their first token
    segment   reads the last token, draws the next, until rows have ended or the cache is full
    move      fewer slots, or more columns of cache

S slots in flight, B rows of the result, P contexts, T tokens of a completion. A row's randomness is
fold_in(fold_in(key, row id), column). After a segment `token` holds the token drawn last, which the
model has not read: column `filled` of the cache is the next to be written, by every slot.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.drawing import draw
from scope_jax.models.kv_cache import KVCache, move_rows, positions_from_mask, take_rows
from scope_jax.models.transformer import Transformer
from scope_jax.records import PAD, POLICY


class Contexts(NamedTuple):
    """What the rows go on from."""

    hidden: jax.Array  # [P, D] after the last token
    start: jax.Array  # [P] int32, position of the first new token
    cache: Any  # of the model, P rows


@struct.dataclass
class Decoding:
    """S slots and what their rows have written so far."""

    cache: Any  # of the slots; a KVCache holds completions only, the prompts are kept apart
    filled: jax.Array  # [] int32, columns of the cache in use
    row: jax.Array  # [S] int32, the row of the result that the slot writes
    key: jax.Array  # [S, ..] uint32, data of these rows' keys
    start: jax.Array  # [S] int32, position of the row's first new token
    budget: jax.Array  # [S] int32
    count: jax.Array  # [S] int32, tokens drawn
    token: jax.Array  # [S] int32, the last of them: not read by the model yet
    live: jax.Array  # [S] bool, will draw another token
    stop_state: jax.Array | None  # [S] int32, of the stop table; None without one
    ids: jax.Array  # [B, T] int32
    logps: jax.Array  # [B, T] float32
    sampling_logps: jax.Array  # [B, T] float32
    length: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool


@functools.cache
def _compiler_options() -> dict[str, Any]:
    """Returns what the decode programs are compiled with.

    On a CPU XLA's YNNPACK halves the speed of products with few rows (50 instead of 100 GFLOP/s
    for 16 rows, jax 0.10.2): it is left to the sums, and Eigen does the products. {} where XLA does
    not know the option.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
    except Exception:  # whatever a later XLA raises for an option that it has dropped
        return {}
    return options


def program(static=(), donate=()):
    """`jax.jit` with the options above, found at the first call: importing starts no backend."""

    def decorate(fn):
        @functools.cache
        def compiled():
            return jax.jit(
                fn,
                static_argnames=static,
                donate_argnames=donate,
                compiler_options=_compiler_options(),
            )

        return functools.wraps(fn)(lambda *args, **options: compiled()(*args, **options))

    return decorate


@program(static=("model", "length"))
def prefill(model, params, ids, mask, *, length) -> Contexts:
    rows, width = ids.shape
    columns = width if isinstance(model, Transformer) else width + length
    positions = positions_from_mask(mask)
    cache = model.init_cache(rows, columns)
    hidden, cache = model(params, ids, positions=positions, cache=cache)
    return Contexts(hidden[:, -1], positions[:, -1] + 1, cache)


@program(static=("size",))
def rows_from(ids, mask, first, *, size):
    return tuple(jax.lax.dynamic_slice_in_dim(x, first, size) for x in (ids, mask))


@program()
def join(chunks: list[Contexts]) -> Contexts:
    def join(*parts):
        return parts[0] if parts[0].ndim == 0 else jnp.concatenate(parts, parts[0].ndim == 5)

    return jax.tree.map(join, *chunks)


@program()
def take(cache, rows):
    return take_rows(cache, rows)


def _placed(state: Decoding, place: NamedSharding | None) -> Decoding:
    """Keeps slots and rows split over the mesh as the prompts are.

    Left to itself XLA replicates what begins as zeros, and every device would decode every row;
    and programs that left a state in different places would have the next ones compiled again.
    """
    if place is None:
        return state
    rows, free = place.spec[0], PartitionSpec.UNCONSTRAINED

    def constrain(x):
        axes = (None, rows, free, None, None) if x.ndim == 5 else (rows,)
        sharding = NamedSharding(place.mesh, PartitionSpec(*axes if x.ndim else ()))
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(constrain, state)


@program(static=("model", "slots", "columns", "rows", "length", "pad_id", "place", "stops"))
def start(
    model, contexts, row_keys, *, slots, columns, rows, length, pad_id, place, stops
) -> Decoding:  # fmt: skip
    """Returns free slots."""
    rolling = isinstance(contexts.cache, KVCache)
    of_slots = jnp.zeros(slots, jnp.int32)
    state = Decoding(
        cache=model.init_cache(slots, columns) if rolling else None,
        filled=jnp.int32(0),
        row=of_slots + rows,
        key=jnp.zeros((slots, *row_keys.shape[1:]), row_keys.dtype),
        start=of_slots,
        budget=of_slots,
        count=of_slots,
        token=of_slots,
        live=jnp.zeros(slots, bool),
        stop_state=of_slots if stops else None,
        ids=jnp.full((rows, length), pad_id, jnp.int32),
        logps=jnp.zeros((rows, length), jnp.float32),
        sampling_logps=jnp.zeros((rows, length), jnp.float32),
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )
    return _placed(state, place)


@program()
def row_keys(key, row_ids):
    """Returns the rows' keys as data: a typed key that rows share out over many calls would be
    reported as used twice.
    """
    return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(row_ids)


_SETTINGS = ("model", "place", "impl", "eos_ids", "greedy", "top_k")


@program(static=_SETTINGS, donate=("state",))
def admit(model, params, state, contexts, row_keys, budgets, new, prompt_at, *, place, **settings):
    """Puts rows into free slots and draws their first token.

    Args:
      new: [S] int32, the row that enters a slot; -1 = the slot stays as it is.
      prompt_at: [S] int32, which context each slot's row goes on from.
    """
    enters = new >= 0
    row = jnp.where(enters, new, state.row)
    of_row = lambda x, old: jnp.where(enters, jnp.take(x, row, mode="clip"), old)  # noqa: E731
    if isinstance(state.cache, KVCache):  # what the slot's last row left there is hidden
        positions = jnp.where(enters[:, None], -1, state.cache.positions)
        cache = dataclasses.replace(state.cache, positions=positions)
    else:
        cache = take_rows(contexts.cache, prompt_at)
    state = dataclasses.replace(
        state,
        cache=cache,
        row=row,
        key=jnp.where(enters[:, None], jnp.take(row_keys, row, axis=0, mode="clip"), state.key),
        budget=of_row(budgets, state.budget),
        start=jnp.where(enters, contexts.start[prompt_at], state.start),
        count=jnp.where(enters, 0, state.count),
        stop_state=jax.tree.map(lambda x: jnp.where(enters, 0, x), state.stop_state),
    )
    unembed = model.unembed(params)
    state = _draw_next(state, contexts.hidden[prompt_at], enters, unembed, **settings)
    return _placed(state, place)


@program(static=_SETTINGS, donate=("state",))
def segment(model, params, state, prompts, floor, *, place, **settings) -> Decoding:
    """Decodes until at most `floor` rows are live, or the cache is full."""
    unembed = model.unembed(params)

    def step(state):
        cache = state.cache
        if prompts is not None:
            cache = dataclasses.replace(cache, prompts=prompts)
        position = jnp.where(state.live, state.start + state.count - 1, -1)
        tokens, positions = state.token[:, None], position[:, None]
        hidden, cache = model(params, tokens, positions=positions, cache=cache)
        if prompts is not None:
            cache = dataclasses.replace(cache, prompts=None)
        state = dataclasses.replace(state, cache=cache, filled=state.filled + 1)
        return _draw_next(state, hidden[:, 0], state.live, unembed, **settings)

    def goes_on(state):
        room = True if prompts is None else state.filled < state.cache.positions.shape[1]
        return (state.live.sum() > floor) & room

    return _placed(jax.lax.while_loop(goes_on, step, state), place)


def _draw_next(
    state, hidden, draws, unembed, *, impl, eos_ids, temperature, stop_table=None, **drawing
):  # fmt: skip
    """Draws a token for the rows in `draws` [S] bool, given the hidden state before it [S, D]."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key, impl=impl), state.count)
    logits = (hidden @ unembed.astype(hidden.dtype)).astype(jnp.float32)
    token, logp, sampling_logp = draw(logits, keys, temperature=temperature, **drawing)
    at = (jnp.where(draws, state.row, state.length.shape[0]), state.count)  # others fall outside
    count = state.count + draws
    ends = (token[:, None] == jnp.asarray(eos_ids, jnp.int32)[None, :]).any(-1)
    stop_state = state.stop_state
    if stop_table is not None:
        stop_state = jnp.where(draws, stop_table[stop_state, token], stop_state)
        ends |= stop_state == stop_table.shape[0] - 1
    return dataclasses.replace(
        state,
        count=count,
        token=jnp.where(draws, token, state.token),
        live=jnp.where(draws, ~ends & (count < state.budget), state.live),
        stop_state=stop_state,
        ids=state.ids.at[at].set(token, mode="drop"),
        logps=state.logps.at[at].set(logp, mode="drop"),
        sampling_logps=state.sampling_logps.at[at].set(sampling_logp, mode="drop"),
        length=state.length.at[at[0]].set(count, mode="drop"),
        finished=state.finished.at[at[0]].set(ends, mode="drop"),
    )


@program(static=("columns", "place"))
def move(state, keep, first, *, columns, place) -> Decoding:
    """Keeps some slots, in a cache of `columns` columns whose column 0 was `first`."""
    of_slots = ("row", "key", "start", "budget", "count", "token", "live", "stop_state")
    kept = jax.tree.map(
        lambda x: jnp.take(x, keep, axis=0), {name: getattr(state, name) for name in of_slots}
    )
    moved = dataclasses.replace(
        state,
        cache=move_rows(state.cache, keep, first, columns),
        filled=state.filled - first,
        **kept,
    )
    return _placed(moved, place)


@program(static=("pad_id",))
def finish(state, *, pad_id) -> dict[str, jax.Array]:
    mask = jnp.arange(state.ids.shape[1])[None, :] < state.length[:, None]
    return {
        "completion_ids": jnp.where(mask, state.ids, pad_id),
        "completion_mask": mask,
        "token_source": jnp.where(mask, POLICY, PAD).astype(jnp.int8),
        "logps": state.logps,
        "sampling_logps": state.sampling_logps,
        "finished": state.finished,
    }
