"""Rollouts: prefill the prompts once, decode the rows in `slots`, follow the tokens that exist.

    generate        P prompts -> B = P * G completions; a prompt's keys are shared by its G rows
    continue_from   B prompts with token prefixes -> their continuations

The host runs the programs of models/decoding.py, and between them looks at which rows still live:

    prefill  ->  admit  ->  segment  ->  admit, or move, or the end
                    ^__________|________________|

    slot 0   row 0 . . . . . . E | row 9 . . . .       E = end token; the slot goes to the next row
    slot 1   row 1 . . . . . . . . . . E - - - -       nobody waits: the slot idles until `move`

A row's randomness is fold_in(fold_in(key, row id), column): its tokens depend on neither its
neighbours nor slots, segments or buckets.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.models import decoding
from scope_jax.models.decoding import program
from scope_jax.models.kv_cache import KVCache, SharedPrompts
from scope_jax.models.transformer import Transformer
from scope_jax.records import InputError, Rollouts

FEWEST_SLOTS = 4  # below it a step costs the same
FIRST_COLUMNS = 64  # of the cache; it doubles as rows grow
BUCKETS = 4  # sizes of the slots, and of the cache, that programs are compiled for
PREFILL_TOKENS = 16384  # read in one forward


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
    min_p: float = 0.0,
    pad_id: int = 0,
    row_ids=None,
    buffer_length: int | None = None,
    slots: int = 0,
    stop_table=None,
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
      top_k, top_p, min_p: restrict the draw (`drawing.truncate`); 0, 1.0 and 0.0 are off. `logps`
        stay those of the full vocabulary.
      pad_id: id after the end of a completion.
      row_ids: [B] int32, seeds of the rows' keys (default 0 .. B - 1), so that a subset of rows
        keeps its samples.
      buffer_length: T of the result (default: the largest budget). Set it where budgets vary from
        call to call.
      slots: rows decoded at a time (0 = all): the others wait for a free one. It bounds the memory
        of the completions' keys and values (the prompts' are all held) and changes no row's tokens.
      stop_table: [states, V] int32 of `stopping.stop_table`: a row is also finished by the token
        that completes a stop string, which is kept. Only the completion is read: a string that
        began in the prompt (or prefix) does not count.
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
        rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, min_p, pad_id,
        row_ids, slots, stop_table, _vocab_size(model, params),
    )  # fmt: skip
    sampled = _roll_out(
        model, params, prompt_ids, prompt_mask, key, group_size=group_size, **options
    )
    repeat = functools.partial(_repeat, group_size=group_size)
    return Rollouts(prompt_ids=repeat(prompt_ids), prompt_mask=repeat(prompt_mask), **sampled)


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
    min_p: float = 0.0,
    pad_id: int = 0,
    row_ids=None,
    buffer_length: int | None = None,
    slots: int = 0,
    stop_table=None,
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
        rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, min_p, pad_id,
        row_ids, slots, stop_table, _vocab_size(model, params),
    )  # fmt: skip
    context, context_mask = _left_align(prompt_ids, prompt_mask, prefix_ids, prefix_length)
    sampled = _roll_out(model, params, context, context_mask, key, group_size=1, **options)
    return Rollouts(prompt_ids=prompt_ids, prompt_mask=prompt_mask, **sampled)


def _check_prompts(prompt_ids, prompt_mask) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape:
        raise InputError(
            "prompt_ids and prompt_mask must be two arrays [P, N], "
            f"got {prompt_ids.shape} and {prompt_mask.shape}"
        )


def _options(
    rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, min_p, pad_id, row_ids,
    slots, stop_table, vocab_size,
) -> dict:  # fmt: skip
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
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and 0 <= min_p <= 1):
        raise InputError(
            "temperature >= 0, 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1 expected, got "
            f"{temperature=}, {top_p=}, {top_k=}, {min_p=}"
        )
    if slots < 0:
        raise InputError(f"slots must be 0 (all rows) or more, got {slots}")
    eos_ids = tuple(int(i) for i in np.atleast_1d(np.asarray(eos_ids, np.int64)))
    if eos_ids and not 0 <= min(eos_ids) <= max(eos_ids) < vocab_size:
        raise InputError(f"eos_ids must lie in 0 .. {vocab_size - 1}, got {eos_ids}")
    if stop_table is not None:
        kind, shape = getattr(stop_table, "dtype", type(stop_table).__name__), np.shape(stop_table)
        if kind != np.int32 or len(shape) != 2 or shape[0] < 2 or shape[1] != vocab_size:
            raise InputError(
                f"stop_table must be int32 [states, {vocab_size}], got {kind} {shape}: it is "
                "`stopping.stop_table` of the model's own tokenizer and vocabulary"
            )
    # device_put: explicit, so that a caller's transfer guard lets it pass
    drawing = {"temperature": jax.device_put(np.float32(temperature or 1.0))}
    if top_p < 1:
        drawing["top_p"] = jax.device_put(np.float32(top_p))
    if min_p > 0:
        drawing["min_p"] = jax.device_put(np.float32(min_p))
    if stop_table is not None:
        drawing["stop_table"] = stop_table
    return {
        "budgets": budgets,
        "row_ids": jax.device_put(row_ids),
        "length": length,
        "slots": min(slots or rows, rows),
        "eos_ids": eos_ids,
        "pad_id": int(pad_id),
        "greedy": temperature == 0,
        "top_k": int(top_k),
        "drawing": drawing,
    }


def _vocab_size(model, params) -> int:
    return jax.eval_shape(model.unembed, params).shape[-1]


# ------------------------------------------------------------------------------ the host's part


def _roll_out(
    model, params, ids, mask, key, *, group_size, budgets, row_ids, length, slots, pad_id, drawing,
    **static,
) -> dict[str, jax.Array]:  # fmt: skip
    """Completes every context `group_size` times; returns the fields of Rollouts but its prompts.

    Args:
      ids, mask: [P, M], every context's last token in the last column.
      budgets: [B] numpy; rows with a budget of 0 are never decoded.
      drawing, static: `draw`'s arrays and the stop table; its static options and eos_ids.
    """
    if isinstance(model, Transformer) and jax.default_backend() == "cpu":
        model, params = model.one_block_per_layer(params)
    place = _batch_sharding(ids)
    put = functools.partial(_replicate, place=place)
    if slots % _batch_shards(ids):
        raise InputError(
            f"slots={slots} does not divide over the {_batch_shards(ids)} batch shards of the mesh"
        )
    contexts = _prefill_all(model, params, ids, mask, length)
    rolling = isinstance(contexts.cache, KVCache)  # other caches can neither grow nor be refilled
    waiting, occupant = np.flatnonzero(budgets > 0), np.full(slots, -1)  # numbers of rows
    sizes = slot_buckets(slots, _batch_shards(ids)) if rolling else [slots]
    widths = column_buckets(length, refilled=slots < len(budgets)) if rolling else [0]
    of_rows = (decoding.row_keys(key, row_ids), put(budgets))
    state = decoding.start(
        model, contexts, of_rows[0], slots=slots, columns=widths[0], rows=len(budgets),
        length=length, pad_id=pad_id, place=place, stops="stop_table" in drawing,
    )  # fmt: skip
    if "stop_table" in drawing:
        drawing["stop_table"] = put(drawing["stop_table"])
    settings, prompts = (
        {"impl": jax.random.key_impl(key), "place": place, **static, **drawing},
        None,
    )
    move = functools.partial(decoding.move, place=place)
    finish = functools.partial(decoding.finish, pad_id=pad_id)
    if rolling:
        state = _warm_up(
            model, params, state, contexts, of_rows, group_size, sizes, widths,
            slots < len(budgets), move, finish, put, settings,
        )  # fmt: skip
    while True:
        free = np.flatnonzero(occupant < 0)
        if len(waiting) and len(free) and (rolling or len(free) == slots):
            new = np.full(slots, -1)
            new[free[: len(waiting)]], waiting = waiting[: len(free)], waiting[len(free) :]
            occupant = np.where(new < 0, occupant, new)
            prompt_at = np.maximum(occupant, 0) // group_size
            where, prompts = put((new, prompt_at)), None
            state = decoding.admit(model, params, state, contexts, *of_rows, *where, **settings)
        live, count, filled = jax.device_get((state.live, state.count, state.filled))
        occupant = np.where(live, occupant, -1)
        if not live.any() and not len(waiting):
            return finish(state)
        floor = 0
        if rolling and live.any():
            used = int(count[live].max()) - 1  # columns that the oldest live row fills
            while True:
                now = (len(occupant), state.cache.positions.shape[1])
                smaller, wider = _moves(now, used, sizes, widths)
                if smaller and not len(waiting) and live.sum() <= smaller:
                    shape = (smaller, now[1])
                elif filled == now[1]:
                    shape = (now[0], wider)
                else:
                    break
                keep = np.argsort(~live, kind="stable")[: shape[0]]  # live ones first
                where = put((keep, np.int32(filled - used)))
                state, prompts = move(state, *where, columns=shape[1]), None
                occupant, live, filled = occupant[keep], live[keep], used
            if prompts is None:
                prompts = _share(contexts.cache, occupant, group_size, put)
            floor = now[0] - max(1, now[0] // 8) if len(waiting) else smaller
        floor = put(np.int32(floor))
        state = decoding.segment(model, params, state, prompts, floor, **settings)


def _moves(now, used: int, sizes, widths) -> tuple[int, int]:
    """Returns (the next smaller number of slots, 0 = none; the columns to move to when all are
    filled) from `now` = (slots, columns), of which the oldest live row needs `used`.
    """
    smaller = max((size for size in sizes if size < now[0]), default=0)
    # A quarter of room at least: rows that end and begin must not move the cache at every step.
    return smaller, next((w for w in widths if w > used + used // 4), widths[-1])


_COMPILED: set = set()  # what `_warm_up` has seen, beside jit's own caches


def _warm_up(
    model, params, state, contexts, of_rows, group_size, sizes, widths, refilled, move, finish, put,
    settings,
) -> decoding.Decoding:  # fmt: skip
    """Compiles every program that this call and later ones of its shapes can need.

    Which of them a call runs depends on where its rows end: without this a training step long after
    the first could stop to compile. Nothing is decoded, for no row is live; `state` is returned.
    """
    options = tuple((k, v) for k, v in settings.items() if not isinstance(v, jax.Array))
    shapes = tuple((x.shape, str(x.dtype)) for x in (contexts.hidden, state.ids, *of_rows))
    arrays = sorted((k, v.shape) for k, v in settings.items() if isinstance(v, jax.Array))
    shapes += (contexts.cache.positions.shape, tuple(arrays), state.ids.sharding)
    key = (model, options, shapes, group_size, *sizes, *widths)
    if key in _COMPILED:
        return state
    _COMPILED.add(key)
    nobody = put((np.full(sizes[0], -1), np.zeros(sizes[0], int)))
    state = decoding.admit(model, params, state, contexts, *of_rows, *nobody, **settings)
    zero, seen, waiting = put(np.int32(0)), set(), [state]
    while waiting:
        at = waiting.pop()
        shape = size, width = len(at.row), at.cache.positions.shape[1]
        if shape in seen:
            continue
        seen.add(shape)
        place = widths.index(width)
        wider = widths[0 if refilled else place + 1 : place + 2]
        targets = [(size, columns) for columns in wider]
        targets += [(smaller, width) for smaller in sizes if smaller < size][:1]
        for slots, columns in targets:
            keep = put(np.arange(slots))
            waiting.append(move(at, keep, zero, columns=columns))
        prompts = _share(contexts.cache, np.full(size, -1), group_size, put)
        at = decoding.segment(model, params, at, prompts, zero, **settings)
        finish(at)  # once for each: states of several histories may differ in their layout
        state = at if shape == (sizes[0], widths[0]) else state
    return state


def slot_buckets(slots: int, shards: int = 1) -> list[int]:
    """Returns the numbers of slots that programs are compiled for, largest first.

    >>> slot_buckets(64), slot_buckets(6), slot_buckets(16, shards=8)
    ([64, 32, 16, 8], [6], [16, 8])
    """
    sizes = [slots]
    while len(sizes) < BUCKETS and sizes[-1] % (2 * shards) == 0 and sizes[-1] >= 2 * FEWEST_SLOTS:
        sizes.append(sizes[-1] // 2)
    return sizes


def column_buckets(length: int, *, refilled: bool) -> list[int]:
    """Returns the sizes of the completions' cache that programs are compiled for, smallest first.

    Args:
      length: tokens of the longest completion.
      refilled: rows begin while others run, so the columns of a row may lie anywhere; a quarter
        more of them keeps the moves rare.

    >>> column_buckets(256, refilled=False), column_buckets(100, refilled=True)
    ([64, 128, 256], [64, 125])
    """
    last = length + length // 4 if refilled else length
    first = max(FIRST_COLUMNS, -(-last // 2 ** (BUCKETS - 1)))
    return [first << i for i in range(BUCKETS) if first << i < last] + [last]


def _share(cache: KVCache, occupant, group_size: int, put) -> SharedPrompts:
    """Returns the prompts of the rows in flight, with a lane for each of them.

    With no more slots than prompts, a copy per slot takes no more memory than all prompts do, and
    prompts that nobody reads any more cost nothing.
    """
    prompts, slots = cache.positions.shape[0], len(occupant)
    prompt_at = np.maximum(occupant, 0) // group_size
    if slots <= prompts:
        lane = np.arange(slots)
        where, lanes, lane = put((prompt_at, lane[:, None], lane))
        cache = decoding.take(cache, where)
    else:
        lanes = np.full((prompts, min(group_size, slots)), slots)
        lane, taken = np.zeros(slots, int), np.zeros(prompts, int)
        for slot in np.flatnonzero(occupant >= 0):
            prompt = prompt_at[slot]
            lanes[prompt, taken[prompt]] = slot
            lane[slot] = prompt * lanes.shape[1] + taken[prompt]
            taken[prompt] += 1
        lanes, lane = put((lanes, lane))
    return SharedPrompts(cache.keys, cache.values, cache.positions, lanes, lane)


def _prefill_all(model, params, ids, mask, length: int) -> decoding.Contexts:
    """Reads the contexts, so many in one forward that it has at most PREFILL_TOKENS tokens."""
    rows, width = ids.shape
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (
        rows // n * width <= PREFILL_TOKENS or rows // n <= _batch_shards(ids)
    ))  # fmt: skip
    if parts == 1:
        return decoding.prefill(model, params, ids, mask, length=length)
    size = rows // parts
    chunks = [
        decoding.prefill(
            model, params, *decoding.rows_from(ids, mask, i * size, size=size), length=length
        )
        for i in range(parts)
    ]
    return decoding.join(chunks)


def _batch_shards(ids) -> int:
    """Returns over how many devices the rows of an array are split."""
    sharding = getattr(ids, "sharding", None)
    return ids.shape[0] // sharding.shard_shape(ids.shape)[0] if sharding is not None else 1


def _replicate(tree, place: NamedSharding | None):
    """Copies host arrays to the device, or to all of the mesh: left on one device they would be
    sliced and sent on by programs of their own.
    """
    everywhere = None if place is None else NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(tree, everywhere)


def _batch_sharding(ids) -> NamedSharding | None:
    """Returns how the rows of an array are split over a mesh; None where they are not."""
    sharding = getattr(ids, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and _batch_shards(ids) > 1 else None


@program(static=("group_size",))
def _repeat(prompt_ids, *, group_size):
    return jnp.repeat(prompt_ids, group_size, axis=0)


@program()
def _left_align(prompt_ids, prompt_mask, prefix_ids, prefix_length):
    """Joins prompts and prefixes into one LEFT-padded context: every row ends in the last column.

    prompt  - - p p p      prefix  a b c x x  (length 3)      context  - - - - p p p a b c
    """
    prefix_mask = jnp.arange(prefix_ids.shape[1])[None, :] < prefix_length[:, None]
    ids = jnp.concatenate([prompt_ids, prefix_ids], axis=1)  # [B, N + T]
    mask = jnp.concatenate([prompt_mask, prefix_mask], axis=1)
    order = jnp.argsort(mask, axis=1, stable=True)  # padding first, the order of real tokens kept
    return jnp.take_along_axis(ids, order, axis=1), jnp.take_along_axis(mask, order, axis=1)
