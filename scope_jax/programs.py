"""The programs of a training step, lowered from shapes alone: for a plan, or to read what a TPU
would run.

Nothing is loaded and nothing runs: arrays are `jax.ShapeDtypeStruct`s with the shardings that a run
gives them, on a mesh that may be one of devices to compile for (`hardware.topology_devices`). The
functions that are lowered are those that a run calls.
"""

import dataclasses
import functools
import math
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from scope_jax.models import decoding
from scope_jax.models.int8 import quantise_weights
from scope_jax.models.kv_cache import SharedPrompts
from scope_jax.models.transformer import Transformer, Weight, declare
from scope_jax.prm import lower_score_steps
from scope_jax.records import TrainBatch, TrainState
from scope_jax.sampling import column_buckets, prefill_chunk, shardings_of_int8
from scope_jax.sharding import DECODING, TRAINING, shardings, spec
from scope_jax.update import fill_logps, lower_train_step


def on_device(tree) -> int:
    """Returns the bytes of a tree's parts on one device."""
    sizes = [
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    ]
    return sum(sizes)


def memory(compiled) -> int:
    """Returns the bytes that a device needs while a compiled program runs."""
    m = compiled.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return held + m.temp_size_in_bytes


def compile_with_text(lowered):
    """Returns (the compiled program, its text with the compiler's estimates of cycles), of a TPU.

    `as_text` fails on some programs (jax 0.10.2); what the compiler writes itself does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        return compiled, next(pathlib.Path(folder).glob("*.after_codegen.txt")).read_text()


def abstract(tree, where):
    """Returns the shapes of a tree with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def abstract_params(declared, mesh, dtype, rules=TRAINING):
    """Returns the params of a tree of declarations, as they lie on the mesh."""
    return jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=s),
        declared, shardings(declared, mesh, rules), is_leaf=lambda x: isinstance(x, Weight),
    )  # fmt: skip


def abstract_batch(mesh, *, rows: int, width: int, length: int) -> TrainBatch:
    """Returns the batch of an update: prompts of `width` tokens, completions of `length`."""
    place = NamedSharding(mesh, spec(("batch",)))

    def array(columns, dtype) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=place)

    return TrainBatch(
        prompt_ids=array(width, jnp.int32), prompt_mask=array(width, jnp.bool_),
        completion_ids=array(length, jnp.int32), completion_mask=array(length, jnp.bool_),
        token_source=array(length, jnp.int8), old_logps=array(length, jnp.float32),
        advantages=array(length, jnp.float32),
    )  # fmt: skip


def update_programs(model, optimizer, state: TrainState, batch: TrainBatch, **options):
    """Returns {name: function that lowers it} of one mini-batch's update.

    Args:
      options: `train_step`'s; `old_logps`="recompute" adds the forward before it.
    """
    recompute = options.pop("old_logps", "sampler") == "recompute"
    settings = {k: options[k] for k in ("group_size", "temperature", "chunk_size") if k in options}
    programs = {
        "update": functools.partial(lower_train_step, model, optimizer, state, batch, **options)
    }
    if recompute:
        programs["recompute"] = functools.partial(
            fill_logps.lower, model, state.params, batch, field="old_logps", **settings
        )
    return programs


def score_program(prm, params, mesh, *, rows: int, length: int, steps: int):
    """Returns the function that lowers the scoring of `rows` rollouts in one forward."""
    place = NamedSharding(mesh, spec(("batch",)))

    def array(columns, dtype) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=place)

    return functools.partial(
        lower_score_steps, prm, params, array(length, jnp.int32), array(length, jnp.bool_),
        array(steps, jnp.int32), array(steps, jnp.bool_),
    )  # fmt: skip


def decode_programs(
    config, mesh, *, prompts: int, group: int, width: int, columns: int, slots: int = 0,
    rules=DECODING, int8=(),
):  # fmt: skip
    """Lowers the programs of `generate` (or of `continue_from`: a group of 1) at their largest.

    Args:
      config: of the model.
      width: tokens of a context; columns: of a completion.
      slots: as `generate`'s; 0 = all rows in flight.
      int8: as `decoding_layout`'s.
    Returns:
      ({"segment", "prefill", "move": function that lowers it}, {"weights", "kv": bytes on a device,
      of keys and values: of completions and of their prompts}).
    """
    if "cache" in int8:
        config = dataclasses.replace(config, cache_dtype="int8")
    model, place = Transformer(config), NamedSharding(mesh, spec(("batch",), rules))
    rows, shards = prompts * group, mesh.shape["data"] * mesh.shape["fsdp"]
    slots = min(slots or rows, rows)
    everywhere = NamedSharding(mesh, spec((), rules))

    def array(shape, dtype, where=everywhere) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    declared = declare(config)
    params = abstract_params(declared, mesh, config.dtype, rules)
    if "weights" in int8:
        quantise = functools.partial(quantise_weights, declared=declared["layers"])
        layers = jax.eval_shape(quantise, params["layers"], params["layers"])
        params["layers"] = abstract(layers, shardings_of_int8(declared["layers"], mesh, rules))
    ids, mask = (array((prompts, width), dtype, place) for dtype in (jnp.int32, jnp.bool_))
    places, refilled = min(prompts, slots), slots < rows
    held = column_buckets(columns, refilled=refilled)[-1]
    empty = functools.partial(
        decoding.no_contexts.fn, model, places=places, length=columns, place=None
    )
    contexts = jax.eval_shape(empty, params, ids, mask)
    contexts = abstract(contexts, decoding.placement(contexts, place))
    keys, key = array((rows, 2), jnp.uint32), jax.random.key(0)
    start = functools.partial(
        decoding.start.fn, model, slots=slots, columns=held, rows=rows, length=columns,
        pad_id=0, place=None, stops=False,
    )  # fmt: skip
    state = jax.eval_shape(start, contexts, keys)
    state = abstract(state, decoding.placement(state, place))
    cache = contexts.cache
    shared = SharedPrompts(
        cache.keys, cache.values, cache.positions,
        array((shards, places // shards, min(group, slots)), jnp.int32),
        array((shards, slots // shards), jnp.int32),
    )  # fmt: skip
    segment = functools.partial(
        decoding.segment.lower, model, params, state, shared, array((shards,), jnp.int32),
        array((), jnp.int32), place=place, impl=jax.random.key_impl(key), eos_ids=(1,),
        greedy=False, top_k=0, temperature=array((), jnp.float32),
    )  # fmt: skip
    read = prefill_chunk(width, contexts=prompts, places=places, slots=slots, shards=shards)
    chunk = array((shards, read), jnp.int32)
    prefill = functools.partial(
        decoding.prefill.lower, model, params, contexts, ids, mask, chunk, chunk, width=width,
        length=columns, place=place,
    )  # fmt: skip
    keep, first = array((shards, slots // shards), jnp.int32), array((), jnp.int32)
    half = jax.eval_shape(functools.partial(start, columns=held // 2), contexts, keys)
    half = abstract(half, decoding.placement(half, place))
    move = functools.partial(decoding.move.lower, half, keep, first, columns=held, place=place)
    sizes = {
        "weights": on_device(params),
        "kv": on_device((state.cache.keys, state.cache.values)),
        "prompts_kv": on_device((cache.keys, cache.values)),
        "chunk": read * shards,  # contexts that a prefill reads
    }
    return {"segment": segment, "prefill": prefill, "move": move}, sizes
