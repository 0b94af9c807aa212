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

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from scope_jax.models import decoding
from scope_jax.models.decoding import program
from scope_jax.models.int8 import Int8, quantise_weights
from scope_jax.models.kv_cache import KVCache, SharedPrompts
from scope_jax.models.lora import base_of, merge
from scope_jax.models.transformer import Transformer, Weight, declare
from scope_jax.records import InputError, Rollouts
from scope_jax.sharding import DECODING, Rules, batch_shards, fetch, replicate, shardings, spec

FEWEST_SLOTS = 4  # below it a step costs the same
FIRST_COLUMNS = 64  # of the cache; it doubles as rows grow
BUCKETS = 4  # sizes of the slots, and of the cache, that programs are compiled for
FEWEST_COLUMNS = 48  # of a context: narrower ones are read no faster
INT8 = ("weights", "cache")  # what `decoding_layout` can hold in eight bits
PREFILL_TOKENS = 4096  # read in one forward, by each batch shard of a mesh


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
        of keys and values, of completions and of the prompts that they go on from, and changes no
        row's tokens.
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
    mask = fetch(prompt_mask)
    if not (mask.shape[1] and mask[:, -1].all()):
        raise InputError(
            "every prompt needs a token in its last column: prompts are LEFT-padded and not empty"
        )
    rows = prompt_ids.shape[0] * group_size
    options = _options(
        rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, min_p, pad_id,
        row_ids, slots, stop_table, _vocab_size(model, params),
    )  # fmt: skip
    _check_positions(model, mask.sum(-1), options["budgets"])
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
    lengths = np.asarray(fetch(prefix_length))
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > prefix_ids.shape[1]:
        raise InputError(
            f"prefix_length must lie in 0 .. {prefix_ids.shape[1]}, "
            f"got {lengths.min()} .. {lengths.max()}"
        )
    lengths = fetch(prompt_mask).sum(-1) + lengths
    if not lengths.all():
        raise InputError(
            "every row needs a token to continue from: its prompt and prefix are empty"
        )
    options = _options(
        rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, min_p, pad_id,
        row_ids, slots, stop_table, _vocab_size(model, params),
    )  # fmt: skip
    _check_positions(model, lengths, options["budgets"])
    context, context_mask = _left_align(prompt_ids, prompt_mask, prefix_ids, prefix_length)
    sampled = _roll_out(model, params, context, context_mask, key, group_size=1, **options)
    return Rollouts(prompt_ids=prompt_ids, prompt_mask=prompt_mask, **sampled)


def decoding_layout(model, params, mesh=None, rules: Rules = DECODING, *, int8=()):
    """Returns (model, params) as decoding wants them, for `generate` and `continue_from`.

    To be called once for weights that are sampled from, a training step's say. The weights are
    resharded (gathered from `fsdp` once, where the decode loop would gather them for every token),
    cast to the dtype of the computation, LoRA is merged into them, and on a CPU they are cut into
    an array per layer. No sampled token depends on it. `params` stay as they are; what is returned
    is a copy unless nothing had to change, and its memory is free again when the caller lets go of
    it: do so before an update.

    Args:
      model, params: another model than `Transformer` is returned as it is.
      mesh: the params'; None or a single device: only the dtype and the cut.
      rules: see sharding.py.
      int8: what is held in eight bits, see models/int8.py: "weights" (of the layers), "cache" (keys
        and values). Tokens and log-probs are then those of a slightly other model: train with
        old_logps="recompute" and is_weights.
    Raises:
      InputError: an unknown name in `int8`, or a model that is not a `Transformer`.
    """
    if unknown := set(int8) - set(INT8):
        raise InputError(f"int8 must be some of {', '.join(INT8)}, got {sorted(unknown)}")
    if int8 and not (isinstance(model, Transformer) and not model.blocks):
        raise InputError("int8 needs a Transformer's own params, not yet laid out for decoding")
    if not isinstance(model, Transformer) or model.blocks:
        return model, params
    if "cache" in int8:
        model = dataclasses.replace(
            model, config=dataclasses.replace(model.config, cache_dtype="int8")
        )
    split = jax.default_backend() == "cpu"
    base, weights = base_of(model, params)
    where = shardings(declare(base.config), mesh, rules) if mesh and mesh.size > 1 else None
    dtype = np.dtype(model.config.dtype)
    as_is = jax.tree.map(lambda x: x.dtype == dtype, weights)
    if where is not None:
        as_is = jax.tree.map(
            lambda x, s, same: same and x.sharding.is_equivalent_to(s, x.ndim),
            weights, where, as_is,
        )  # fmt: skip
    in_eight_bits = "weights" in int8
    merged = weights is params  # there is no LoRA to merge
    if merged and not split and not in_eight_bits and all(jax.tree.leaves(as_is)):
        return base, params
    params = _layout_program(model, mesh if where else None, rules, split, in_eight_bits)(params)
    blocks = (1,) * model.config.num_layers if split else ()
    return dataclasses.replace(base, blocks=blocks), params


@functools.cache
def _layout_program(model, mesh, rules, split: bool, in_eight_bits: bool):
    declared = declare(dataclasses.replace(model.config, lora=None))

    def lay_out(params):
        _, params = merge(model, params)
        layers = params["layers"]
        params = jax.tree.map(lambda x: x.astype(model.config.dtype), params)
        if in_eight_bits:  # rounded once, from the precision that was given
            params["layers"] = quantise_weights(layers, params["layers"], declared["layers"])
        return model.one_block_per_layer(params)[1] if split else params

    if mesh is None:
        return jax.jit(lay_out)
    where = shardings(declared, mesh, rules)
    if in_eight_bits:
        where["layers"] = shardings_of_int8(declared["layers"], mesh, rules)
    if split:  # an array per layer lies as the stack of all does
        unembed = NamedSharding(mesh, spec(("embed", "vocab"), rules))
        layers = (where["layers"],) * model.config.num_layers
        where = {**where, "layers": layers, "unembed": unembed}
    return jax.jit(lay_out, out_shardings=where)


def shardings_of_int8(declared, mesh, rules: Rules = DECODING):
    """Returns where layers lie whose linear maps are `Int8`: scales as the outputs they scale."""

    def one(weight: Weight, where) -> Any:
        if not weight.in_dims:
            return where
        behind = weight.axes[1 + weight.in_dims :]
        axes = (weight.axes[0], *(None,) * weight.in_dims, *behind)
        scale: Any = NamedSharding(mesh, spec(axes, rules))
        return Int8(where, scale)

    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    return jax.tree.map(one, declared, shardings(declared, mesh, rules), is_leaf=is_weight)


def _check_prompts(prompt_ids, prompt_mask) -> None:
    if prompt_ids.ndim != 2 or prompt_ids.shape != prompt_mask.shape:
        raise InputError(
            "prompt_ids and prompt_mask must be two arrays [P, N], "
            f"got {prompt_ids.shape} and {prompt_mask.shape}"
        )


def _check_positions(model, lengths: np.ndarray, budgets: np.ndarray) -> None:
    """Refuses rows that may grow longer than the model was made for.

    Args:
      lengths: [P] tokens of the contexts; budgets: [B], row-major by context.
    """
    if not (isinstance(model, Transformer) and len(lengths)):
        return
    totals = lengths[:, None] + budgets.reshape(len(lengths), -1)
    longest = int(totals.max(initial=0))
    if longest > model.config.max_position:
        row = int(totals.argmax()) // totals.shape[1]
        raise InputError(
            f"context {row} has {lengths[row]} tokens and may grow to {longest}, the model was "
            f"made for {model.config.max_position}: shorten it, or lower max_new_tokens"
        )


def _options(
    rows, max_new_tokens, buffer_length, eos_ids, temperature, top_k, top_p, min_p, pad_id, row_ids,
    slots, stop_table, vocab_size,
) -> dict:  # fmt: skip
    """Checks the sampling options and splits them into static ones and arrays."""
    budgets = np.asarray(fetch(max_new_tokens), np.int32)
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


class _Run(NamedTuple):
    """What one call decodes with, fixed from its beginning to its end."""

    model: Any
    params: Any
    shards: int  # D, parts of a mesh that the rows are split over: each decodes its own prompts'
    ids: jax.Array  # [P, M], every context's last token in the last column
    mask: jax.Array  # [P, M]
    keys: jax.Array  # [B, ..] data of the rows' keys
    budgets: jax.Array  # [B]
    group_size: int
    length: int  # T
    pad_id: int
    place: NamedSharding | None  # how slots, rows and contexts are split over a mesh
    settings: dict  # of `decoding.admit` and `decoding.segment`
    rolling: bool  # the cache can grow and be refilled: a KVCache
    refilled: bool  # rows wait for slots
    sizes: list[int]  # numbers of slots,
    columns: list[int]  # columns of the completions' cache,
    widths: list[int]  # and of contexts that programs are compiled for
    chunk: int  # contexts that a shard reads in one forward

    def put(self, tree):
        return _replicate(tree, self.place)


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
    if isinstance(model, Transformer):
        model, params = merge(model, params)  # once, not for every token
    if isinstance(model, Transformer) and jax.default_backend() == "cpu":
        model, params = model.one_block_per_layer(params)
    place, shards = _batch_sharding(ids), batch_shards(ids)
    if slots % shards:
        raise InputError(
            f"slots={slots} does not divide over the {shards} batch shards of the mesh"
        )
    rolling = isinstance(model, Transformer)  # other caches can neither grow nor be refilled
    (contexts, width), refilled = ids.shape, slots < len(budgets)
    places = min(contexts, slots) if rolling else contexts
    if "stop_table" in drawing:
        drawing["stop_table"] = _replicate(drawing["stop_table"], place)
    columns = column_buckets(length, refilled=refilled) if rolling else [0]
    sizes = slot_buckets(slots, shards) if rolling else [slots]
    run = _Run(
        model, params, shards, ids, mask, decoding.row_keys(key, row_ids),
        _replicate(budgets, place), group_size, length, pad_id, place,
        {"impl": jax.random.key_impl(key), "place": place, **static, **drawing},
        rolling=rolling, refilled=refilled,
        # A program for yet fewer rows saves little where all rows are short.
        sizes=sizes[: 1 + len(columns)],
        columns=columns,
        widths=context_buckets(width) if rolling else [width],
        chunk=prefill_chunk(width, contexts=contexts, places=places, slots=slots, shards=shards)
        if rolling
        else contexts // shards,
    )  # fmt: skip
    contexts = decoding.no_contexts(
        model, params, ids, mask, places=places, length=length, place=place
    )
    state = decoding.start(
        model, contexts, run.keys, slots=slots, columns=run.columns[0], rows=len(budgets),
        length=length, pad_id=pad_id, place=place, stops="stop_table" in drawing,
    )  # fmt: skip
    lies = getattr(ids, "sharding", None)
    if place is None and isinstance(lies, NamedSharding):
        # A mesh of one device: the first program's results would lie "on the mesh" where these
        # zeros do not, and the same program would be compiled once more for them.
        state, contexts = _replicate((state, contexts), lies)
    if rolling:
        state, contexts = _warm_up(run, state, contexts)
    waiting = [part[budgets[part] > 0] for part in np.split(np.arange(len(budgets)), shards)]
    return _decode(run, state, contexts, waiting)


def _decode(run: _Run, state, contexts, waiting: list) -> dict[str, jax.Array]:
    """Runs the programs until no row waits or lives.

    Args:
      waiting: for each shard the rows to be decoded, in the order in which they enter.
    """
    model, params, settings, shards = run.model, run.params, run.settings, run.shards
    occupant = np.full((shards, len(state.row) // shards), -1)  # the row in each slot, -1 = free
    homes, prompts = _Homes(run, len(contexts.start)), None
    while True:
        if run.rolling or (occupant < 0).all():
            new = _next_rows(occupant, waiting)
            if (new >= 0).any():
                occupant, prompts = np.where(new < 0, occupant, new), None
                contexts = homes.read(contexts, occupant, waiting)
                where = run.put((new.ravel(), homes.in_all_shards(occupant).ravel()))
                state = decoding.admit(
                    model, params, state, contexts, run.keys, run.budgets, *where, **settings
                )
        live, count, filled = jax.device_get((state.live, state.count, state.filled))
        live, count = live.reshape(occupant.shape), count.reshape(occupant.shape)
        occupant = np.where(live, occupant, -1)
        waits = np.array([len(rows) > 0 for rows in waiting])
        if not live.any():
            if waits.any():
                continue
            return decoding.finish(state, pad_id=run.pad_id)
        floor, enough = np.zeros(shards, np.int32), shards
        if run.rolling:
            used = int(count[live].max()) - 1  # columns that the oldest live row fills
            while True:
                now = (occupant.size, state.cache.positions.shape[1])
                smaller, wider = _moves(now, used, run)
                fits = 0 if smaller is None or waits.any() else smaller[0] // shards
                if smaller is not None and live.sum(1).max() <= fits:
                    shape = smaller
                elif filled == now[1]:
                    shape = wider
                else:
                    break
                keep = np.argsort(~live, axis=1, kind="stable")  # live ones first
                keep = keep[:, : shape[0] // shards]
                where = run.put((keep, np.int32(filled - used)))
                state = decoding.move(state, *where, columns=shape[1], place=run.place)
                occupant, live = (np.take_along_axis(x, keep, axis=1) for x in (occupant, live))
                filled, prompts = used, None
            if prompts is None:
                prompts = _share(run, contexts.cache, occupant, homes.of(occupant))
            if smaller:
                floor += smaller[0] // shards
            if waits.any():  # until a shard whose rows wait has an eighth of its slots free
                size = occupant.shape[1]
                floor, enough = np.where(waits, size - max(1, size // 8), -1), 1
        until = run.put((floor.astype(np.int32), np.int32(enough)))
        state = decoding.segment(model, params, state, prompts, *until, **settings)


def _next_rows(occupant, waiting: list) -> np.ndarray:
    """Takes rows off the lists of the D shards; returns the row for each free slot, [D, S / D]; -1
    where nobody enters.
    """
    new = np.full(occupant.shape, -1)
    for shard, rows in enumerate(waiting):
        free = np.flatnonzero(occupant[shard] < 0)[: len(rows)]
        new[shard, free], waiting[shard] = rows[: len(free)], rows[len(free) :]
    return new


class _Homes:
    """Which place of `Contexts` holds which context: as many as rows in flight can need."""

    def __init__(self, run: _Run, places: int):
        mask = np.asarray(fetch(run.mask))
        self.run, self.spans = run, mask.shape[1] - mask.argmax(1)  # columns, from the first token
        self.held = np.full((run.shards, places // run.shards), -1)  # the context in each place
        self.place = np.zeros(len(mask), int)  # of each context, within its shard

    def of(self, occupant):
        """Returns [D, S / D], the place within the shard that each slot's row goes on from (any,
        for a free slot).
        """
        return self.place[np.maximum(occupant, 0) // self.run.group_size]

    def in_all_shards(self, occupant):
        """Returns the same, counted through all shards."""
        return self.of(occupant) + self.held.shape[1] * np.arange(self.run.shards)[:, None]

    def read(self, contexts, occupant, waiting: list):
        """Reads the contexts that `occupant` needs and no place holds; long and short ones in
        different forwards, each as wide as its longest.

        A forward reads `chunk` contexts, whatever it is given: what would fill it up are the
        contexts of the next waiting rows, as far as places are free.
        """
        run, missing = self.run, []
        for shard, held in enumerate(self.held):
            needed = np.unique(occupant[shard][occupant[shard] >= 0] // run.group_size)
            new = np.setdiff1d(needed, held)
            free = np.flatnonzero(~np.isin(held, needed))
            if len(new):
                later = np.unique(waiting[shard] // run.group_size)  # rows enter in this order
                free = free[np.argsort(np.isin(held[free], later), kind="stable")]
                unused = (~np.isin(held[free], later)).sum() - len(new)
                later = later[~np.isin(later, [*needed, *held])]
                new = np.append(new, later[: max(0, min(-len(new) % run.chunk, unused))])
            free = free[: len(new)]
            held[free], self.place[new] = new, free
            missing.append(new[np.argsort(self.spans[new], kind="stable")])
        per_shard = len(self.spans) // run.shards
        for first in range(0, max(map(len, missing)), run.chunk):
            rows = np.zeros((run.shards, run.chunk), int)
            places, longest = np.full_like(rows, self.held.shape[1]), 0
            for shard, new in enumerate(missing):
                new = new[first : first + run.chunk]
                rows[shard, : len(new)] = new - shard * per_shard
                places[shard, : len(new)] = self.place[new]
                longest = max(longest, self.spans[new].max(initial=0))
            contexts = decoding.prefill(
                run.model, run.params, contexts, run.ids, run.mask, *run.put((rows, places)),
                width=next(width for width in run.widths if width >= longest), length=run.length,
                place=run.place,
            )  # fmt: skip
        return contexts


def _moves(now, used: int, run: _Run):
    """Returns the shapes (slots, columns) to move to when rows have ended (None: there are no fewer
    slots) and when all columns are filled, from `now`, of which the oldest live row needs `used`.

    Slots halved k times have at least the k-th number of columns: attention costs no more than it
    did with all slots and the first, and there are half as many programs to compile.
    """
    fewer, last = run.sizes.index(now[0]), len(run.columns) - 1
    smaller = None
    if fewer + 1 < len(run.sizes):
        smaller = (run.sizes[fewer + 1], max(now[1], run.columns[min(fewer + 1, last)]))
    # A quarter of room at least: rows that end and begin must not move the cache at every step.
    roomy = (w for w in run.columns[min(fewer, last) :] if w > used + used // 4)
    return smaller, (now[0], next(roomy, run.columns[last]))


_COMPILED: set = set()  # what `_warm_up` has seen, beside jit's own caches


def _warm_up(run: _Run, state, contexts):
    """Compiles every program that this call and later ones of its shapes can need.

    Which of them a call runs depends on where its rows end: without this a training step long after
    the first could stop to compile. Nothing is decoded, for no row is live; (state, contexts) are
    returned.
    """
    options = tuple((k, v) for k, v in run.settings.items() if not isinstance(v, jax.Array))
    arrays = (contexts.hidden, run.ids, state.ids, run.keys)
    shapes = tuple((x.shape, str(x.dtype)) for x in arrays)
    drawing = ((k, v.shape) for k, v in run.settings.items() if isinstance(v, jax.Array))
    shapes += (tuple(sorted(drawing)), state.ids.sharding)
    sizes = (*run.sizes, *run.columns, *run.widths)
    key = (run.model, options, shapes, run.group_size, run.chunk, sizes)
    if key in _COMPILED:
        return state, contexts
    _COMPILED.add(key)
    model, params, settings = run.model, run.params, run.settings
    rows = np.zeros((run.shards, run.chunk), int)
    nothing = run.put((rows, np.full_like(rows, len(contexts.start) // run.shards)))
    for width in run.widths:
        contexts = decoding.prefill(
            model, params, contexts, run.ids, run.mask, *nothing, width=width, length=run.length,
            place=run.place,
        )  # fmt: skip
    nobody = run.put((np.full(run.sizes[0], -1), np.zeros(run.sizes[0], int)))
    state = decoding.admit(
        model, params, state, contexts, run.keys, run.budgets, *nobody, **settings
    )
    zero, until = run.put((np.int32(0), (np.zeros(run.shards, np.int32), np.int32(run.shards))))
    slots_of = lambda size: np.tile(np.arange(size // run.shards), (run.shards, 1))  # noqa: E731
    seen, waiting = set(), [state]
    while waiting:
        at = waiting.pop()
        shape = size, width = len(at.row), at.cache.positions.shape[1]
        if shape in seen:
            continue
        seen.add(shape)
        needed = range(1 if run.refilled else width, width + 1)  # unless refilled, all are
        moves = {target for used in needed for target in _moves(shape, used, run) if target}
        targets = sorted(moves - {shape} if not run.refilled else moves)
        for slots, columns in targets:
            keep = run.put(slots_of(slots))
            waiting.append(decoding.move(at, keep, zero, columns=columns, place=run.place))
        nobody = np.full_like(slots_of(size), -1)
        prompts = _share(run, contexts.cache, nobody, np.zeros_like(nobody))
        at = decoding.segment(model, params, at, prompts, *until, **settings)
        decoding.finish(at, pad_id=run.pad_id)
        state = at if shape == (run.sizes[0], run.columns[0]) else state
    return state, contexts


def prefill_chunk(width: int, *, contexts: int, places: int, slots: int, shards: int = 1) -> int:
    """Returns how many contexts each batch shard reads in one forward.

    >>> prefill_chunk(1024, contexts=64, places=64, slots=512)
    4
    """
    # With fewer places than contexts those of the rows that enter together: an eighth of the slots.
    chunk = slots // 8 // shards if places < contexts else PREFILL_TOKENS // width
    return min(max(1, chunk), places // shards)


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


def context_buckets(width: int) -> list[int]:
    """Returns the widths of contexts that the reading program is compiled for, smallest first.

    >>> context_buckets(1024), context_buckets(96)
    ([128, 256, 512, 1024], [48, 96])
    """
    widths = [width]
    while len(widths) < BUCKETS and widths[0] >= 2 * FEWEST_COLUMNS:
        widths.insert(0, -(-widths[0] // 2))
    return widths


def _share(run: _Run, cache: KVCache, occupant, place) -> SharedPrompts:
    """Returns the contexts of the rows in flight, with a lane for each of them.

    With fewer slots than places, a copy per slot takes no more memory than all places do, and
    contexts that nobody reads any more cost nothing.

    Args:
      occupant, place: [D, S / D], the row in each slot of each shard (-1 = none) and where its
        context lies.
    """
    shards, slots = occupant.shape
    places = cache.positions.shape[0] // shards
    if slots < places or (slots == places and run.group_size > 1):
        lane = np.tile(np.arange(slots), (shards, 1))
        where, lanes, lane = run.put((place, lane[:, :, None], lane))
        cache = decoding.take(cache, where, place=run.place)
    else:
        lanes = np.full((shards, places, min(run.group_size, slots)), slots)
        lane, taken = np.zeros(occupant.shape, int), np.zeros((shards, places), int)
        for shard, slot in zip(*np.nonzero(occupant >= 0), strict=True):
            at = shard, place[shard, slot]
            lanes[*at, taken[at]] = slot
            lane[shard, slot] = at[1] * lanes.shape[2] + taken[at]
            taken[at] += 1
        lanes, lane = run.put((lanes, lane))
    return SharedPrompts(cache.keys, cache.values, cache.positions, lanes, lane)


def _batch_sharding(ids) -> NamedSharding | None:
    """Returns how the rows of an array are split over a mesh; None on a single device."""
    sharding = getattr(ids, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def _replicate(tree, place: NamedSharding | None) -> Any:
    """Copies host arrays to the device, or to all of the mesh: left on one device they would be
    sliced and sent on by programs of their own.
    """
    if place is None:
        return jax.device_put(tree)
    assert isinstance(place.mesh, Mesh)
    return replicate(tree, place.mesh)


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
