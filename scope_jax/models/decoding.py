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
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.drawing import draw
from scope_jax.models.int8 import over_slots
from scope_jax.models.kv_cache import (
    KVCache,
    move_rows,
    positions_from_mask,
    put_in_shards,
    take_in_shards,
    take_rows,
)
from scope_jax.models.transformer import Transformer
from scope_jax.records import PAD, POLICY
from scope_jax.sharding import DECODING, axis_for


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

    LLVM has little left to do on a CPU, and its higher levels take an eighth longer to compile the
    same speed. Without AVX-512 XLA's YNNPACK halves the speed of products with few rows (50 instead
    of 100 GFLOP/s for 16 rows, jax 0.10.2): it is left to the sums there, and Eigen does the
    products. {} where XLA does not know the options.
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {"xla_backend_optimization_level": 1}
    cpu = pathlib.Path("/proc/cpuinfo")
    if not (cpu.exists() and "avx512f" in cpu.read_text()):
        options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
    except Exception:  # whatever a later XLA raises for an option that it has dropped
        return {}
    return options


class Program:
    """`jax.jit` with the options above, found at the first call: importing starts no backend."""

    def __init__(self, fn, static, donate):
        functools.update_wrapper(self, fn)
        self.fn = fn  # untraced, for shapes
        self._jit = functools.partial(jax.jit, fn, static_argnames=static, donate_argnames=donate)

    @functools.cached_property
    def _here(self):
        return self._jit(compiler_options=_compiler_options())

    def __call__(self, *args, **kwargs):
        return self._here(*args, **kwargs)

    def lower(self, *args, **kwargs):
        """Lowers for the devices of the arguments' shardings, which may be others than this
        process's (a TPU topology).
        """
        return self._jit().lower(*args, **kwargs)


def program(static=(), donate=()):
    return functools.partial(Program, static=static, donate=donate)


@program(static=("model", "places", "length", "place"))
def no_contexts(model, params, ids, mask, *, places, length, place) -> Contexts:
    """Returns room for `places` contexts."""
    read = functools.partial(_read, model, length=length)
    like = jax.eval_shape(lambda: read(params, ids[:places], mask[:places]))
    return _placed(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), place)


@program(static=("model", "width", "length", "place"), donate=("contexts",))
def prefill(model, params, contexts, ids, mask, rows, places, *, width, length, place) -> Contexts:
    """Reads some contexts, each in the last `width` columns of its row, and puts them into places.

    Args:
      contexts: C places. ids, mask: [P, M].
      rows: [D, r] int32, see `take_in_shards`.
      places: [D, r] int32, numbers within the shard; C / D = read for nothing (to fill the batch).
      length: room for new tokens, in caches other than ours.
    """
    chosen = (take_in_shards(x[:, -width:], rows) for x in (ids, mask))
    chunk = _read(model, params, *chosen, length=length)
    if isinstance(chunk.cache, KVCache):  # empty columns in front, as the rows are LEFT-padded
        left = ids.shape[1] - width
        pad = lambda x, axis: jnp.pad(  # noqa: E731
            x, [(left, 0) if i == axis else (0, 0) for i in range(x.ndim)]
        )
        front = functools.partial(over_slots, pad)
        cache = dataclasses.replace(
            chunk.cache,
            keys=tuple(front(x) for x in chunk.cache.keys),
            values=tuple(front(x) for x in chunk.cache.values),
            positions=jnp.pad(chunk.cache.positions, ((0, 0), (left, 0)), constant_values=-1),
        )
        chunk = chunk._replace(cache=cache)

    def put(held, new):
        return new if held.ndim == 0 else put_in_shards(held, new, places, 1 * (held.ndim == 5))

    return _placed(jax.tree.map(put, contexts, chunk), place)


def _read(model, params, ids, mask, *, length) -> Contexts:
    rows, width = ids.shape
    columns = width if isinstance(model, Transformer) else width + length
    positions = positions_from_mask(mask)
    cache = model.init_cache(rows, columns)
    hidden, cache = model(params, ids, positions=positions, cache=cache)
    return Contexts(hidden[:, -1], positions[:, -1] + 1, cache)


@program(static=("place",))
def take(cache, rows, *, place=None):
    """Returns rows of a KVCache, see `take_in_shards`."""

    def take(x):
        return x if x.ndim == 0 else take_in_shards(x, rows, axis=1 if x.ndim == 5 else 0)

    return _placed(jax.tree.map(take, cache), place)


def placement(tree, place: NamedSharding | None) -> Any:
    """Returns where Contexts, a Decoding or a cache lies on the mesh of `place`, which is how the
    prompts' ids are split; None without a mesh.

    Left to itself XLA replicates what begins as zeros, and every device would decode every row;
    and programs that left a state in different places would have the next ones compiled again.
    So caches are split over kv heads and rows, results over rows, while the few numbers a slot lie
    on every device: a step's draws are sent around once, and every host sees who lives.
    """
    if place is None:
        return None
    put, rows = functools.partial(_on_mesh, place), _row_axes(place)

    def of_cache(cache):
        heads = PartitionSpec.UNCONSTRAINED  # another model's axis may be anything
        if isinstance(cache, KVCache):
            heads = axis_for(cache.keys[0].shape[2], DECODING.kv_heads, place.mesh)
        specs = {0: (), 5: (None, rows, heads, None, None)}
        return jax.tree.map(lambda x: put(*specs.get(x.ndim, (rows,))), cache)

    if isinstance(tree, Contexts):
        return tree._replace(hidden=put(rows), start=put(), cache=of_cache(tree.cache))
    if isinstance(tree, Decoding):
        results = ("ids", "logps", "sampling_logps", "length", "finished")
        where = dict.fromkeys(results, put(rows)) | {"cache": of_cache(tree.cache)}
        return dataclasses.replace(jax.tree.map(lambda _: put(), tree), **where)
    return of_cache(tree)


def _placed(tree, place: NamedSharding | None):
    where = placement(tree, place)
    return tree if where is None else jax.lax.with_sharding_constraint(tree, where)


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
    hidden, unembed = contexts.hidden[prompt_at], model.unembed(params)
    state = _draw_next(state, hidden, enters, unembed, place=place, **settings)
    return _placed(state, place)


@program(static=_SETTINGS, donate=("state",))
def segment(model, params, state, prompts, floor, enough, *, place, **settings) -> Decoding:
    """Decodes until `enough` shards have few live rows, or the cache is full.

    Args:
      floor: [D] int32, how many rows are few, for each of the D batch shards of the mesh.
      enough: [] int32, 1 .. D.
    """
    unembed = model.unembed(params)
    if prompts is not None:
        turns = model.turns(prompts.positions.shape[1] + state.ids.shape[1])

    def step(state):
        cache = state.cache
        if prompts is not None:
            cache = dataclasses.replace(cache, prompts=prompts, turns=turns)
        position = jnp.where(state.live, state.start + state.count - 1, -1)
        tokens, positions = state.token[:, None], position[:, None]
        if place is not None:
            split = _on_mesh(place, _row_axes(place))
            tokens, positions = jax.lax.with_sharding_constraint((tokens, positions), split)
        hidden, cache = model(params, tokens, positions=positions, cache=cache)
        if prompts is not None:
            cache = dataclasses.replace(cache, prompts=None, turns=None)
        state = dataclasses.replace(state, cache=cache, filled=state.filled + 1)
        state = _draw_next(state, hidden[:, 0], state.live, unembed, place=place, **settings)
        return _placed(state, place)

    def goes_on(state):
        room = True if prompts is None else state.filled < state.cache.positions.shape[1]
        few = state.live.reshape(len(floor), -1).sum(-1) <= floor
        return (few.sum() < enough) & room

    return _placed(jax.lax.while_loop(goes_on, step, state), place)


def _row_axes(place: NamedSharding):
    return place.spec[0] if len(place.spec) else None


def _on_mesh(place: NamedSharding, *axes) -> NamedSharding:
    return NamedSharding(place.mesh, PartitionSpec(*axes))


def _whole_rows(logits, place: NamedSharding | None):
    """Gives each device the whole logits of some rows, [S / devices, V], by one all-to-all.

    A draw sums, sorts and looks up along the vocabulary: split over it, each of these would talk
    to the other devices, and those of one batch shard would all draw the same rows.
    """
    if place is None:
        return logits
    put, vocab = jax.lax.with_sharding_constraint, DECODING.vocab
    split = _on_mesh(place, _row_axes(place), axis_for(logits.shape[1], vocab, place.mesh))
    logits = put(logits, split)  # without it XLA would gather the unembedding
    whole = _on_mesh(place, place.mesh.axis_names)
    return logits if logits.shape[0] % place.mesh.size else put(logits, whole)


def _draw_next(
    state, hidden, draws, unembed, *, place, impl, eos_ids, temperature, stop_table=None, **drawing
):  # fmt: skip
    """Draws a token for the rows in `draws` [S] bool, given the hidden state before it [S, D]."""
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key, impl=impl), state.count)
    logits = _whole_rows(hidden @ unembed.astype(hidden.dtype), place).astype(jnp.float32)
    drawn = draw(logits, keys, temperature=temperature, **drawing)
    if place is not None:
        drawn = jax.lax.with_sharding_constraint(drawn, _on_mesh(place))
    token, logp, sampling_logp = drawn
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
    """Keeps some slots, in a cache of `columns` columns whose column 0 was `first`.

    Args:
      keep: [D, S / D] int32, see `take_in_shards`.
    """
    of_slots = ("row", "key", "start", "budget", "count", "token", "live", "stop_state")
    kept = {name: getattr(state, name) for name in of_slots}
    kept = jax.tree.map(lambda x: take_in_shards(x, keep), kept)
    moved = dataclasses.replace(
        state,
        cache=move_rows(state.cache, keep, first, columns),
        filled=state.filled - first,
        **kept,
    )
    return _placed(moved, place)


def finish(state: Decoding, *, pad_id: int) -> dict[str, jax.Array]:
    """Returns the fields of Rollouts that were sampled."""
    rows = (state.ids, state.length, state.logps, state.sampling_logps, state.finished)
    return _finish(*rows, pad_id=pad_id)  # without the cache: one program for all of its sizes


@program(static=("pad_id",))
def _finish(ids, length, logps, sampling_logps, finished, *, pad_id):
    mask = jnp.arange(ids.shape[1])[None, :] < length[:, None]
    return {
        "completion_ids": jnp.where(mask, ids, pad_id),
        "completion_mask": mask,
        "token_source": jnp.where(mask, POLICY, PAD).astype(jnp.int8),
        "logps": logps,
        "sampling_logps": sampling_logps,
        "finished": finished,
    }
