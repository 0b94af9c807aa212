"""What a process of tests/test_hosts.py does: python hosts_worker.py FOLDER MESHES [ARGUMENT ..].

The environment says which of how many it is. On each mesh (4x2x1,2x2x2) it checks the copies from
host to device and trains on fixed rollouts; process 0 writes the losses to FOLDER/curves.json. With
arguments it is then `python -m scope_jax.train ARGUMENT ..`; without, it samples (tokens.json).
--fail-after=STEP is an argument of this file: at the end of that step this process raises an error.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax import metrics, sharding
from scope_jax import train as train_module
from scope_jax.configlib import claim_workdir
from scope_jax.hosts import all_hosts, join_hosts, on_first_host
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.records import PAD, POLICY, TEACHER, InputError, TrainBatch
from scope_jax.sampling import continue_from, decoding_layout
from scope_jax.sharding import (
    fetch,
    host_part,
    make_mesh,
    own_rows,
    put_batch,
    put_parts,
    replicate,
    shardings,
)
from scope_jax.update import init_state, make_optimizer, put_minis, update_policy

CONFIG = TransformerConfig(
    vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32
)
ROWS, PROMPT, LENGTH, GROUP = 16, 6, 10, 2


def fixed_rollouts(rng: np.random.Generator) -> TrainBatch:
    """A whole batch: every process makes the same one and takes its rows."""
    prompts = np.repeat(rng.integers(1, 32, (ROWS // GROUP, PROMPT)), GROUP, axis=0)
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (ROWS, 1))
    source = np.where(mask, rng.choice([POLICY, POLICY, TEACHER], mask.shape), PAD)
    return TrainBatch(
        prompt_ids=prompts.astype(np.int32), prompt_mask=np.ones(prompts.shape, bool),
        completion_ids=np.where(mask, rng.integers(1, 32, mask.shape), 0).astype(np.int32),
        completion_mask=mask, token_source=source.astype(np.int8),
        old_logps=np.where(mask, rng.normal(-3.5, 0.1, mask.shape), 0).astype(np.float32),
        advantages=np.repeat(rng.normal(size=(ROWS, 1)), LENGTH, axis=1).astype(np.float32),
    )  # fmt: skip


def loss_curve(mesh, steps: int = 3, *, packing: bool = False) -> list[float]:
    """Losses and gradient norms of two updates a step, on fixed rollouts."""
    micro_batches = 2 if packing and mesh.shape["model"] > 1 else 1  # of 8 rows
    model, rng = Transformer(CONFIG), np.random.default_rng(0)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    part, parts = host_part(mesh)

    def place(x, where):
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    optimizer = make_optimizer(2 * steps, learning_rate=1e-2)
    params = jax.tree.map(place, params, shardings(declare(CONFIG), mesh))
    state, found = init_state(optimizer, params), []
    for _ in range(steps):
        rows = jax.tree.map(lambda x: np.split(x, parts)[part], fixed_rollouts(rng))
        minis = put_minis(rows, 2, mesh, packing=packing, micro_batches=micro_batches)
        state, infos = update_policy(
            model, optimizer, state, minis, group_size=GROUP, micro_batches=micro_batches,
            max_length=LENGTH,
        )  # fmt: skip
        found += [float(x) for info in infos for x in (info["loss"], info["grad_norm"])]
    return found


def sampled(mesh) -> list[list[int]]:
    """Completions of all rows: fewer slots than rows, contexts of all lengths, a budget a row."""
    model, rng = Transformer(CONFIG), np.random.default_rng(1)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(2)))
    places = shardings(declare(CONFIG), mesh)

    def place(x, where):
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    part, parts = host_part(mesh)
    ids = rng.integers(1, 32, (ROWS, PROMPT)).astype(np.int32)
    mask = np.arange(PROMPT) >= rng.integers(0, PROMPT, (ROWS, 1))
    budgets = rng.integers(0, LENGTH, ROWS).astype(np.int32)
    lengths = rng.integers(1, PROMPT, ROWS).astype(np.int32)
    own = put_batch([np.split(x, parts)[part] for x in (ids, mask, ids, lengths, budgets)], mesh)
    layout = decoding_layout(model, jax.tree.map(place, params, places), mesh)
    rollouts = continue_from(
        *layout, *own[:4], jax.random.key(3), max_new_tokens=own[4], eos_ids=(0,),
        buffer_length=LENGTH, slots=ROWS // 2,
    )  # fmt: skip
    return fetch(rollouts.completion_ids).tolist()


def check_copies(mesh) -> None:
    """Rows and shared values go to the mesh and come back, without a copy that is not spelled."""
    part, parts = host_part(mesh)
    assert parts == jax.process_count()
    whole = {"ids": np.arange(64).reshape(16, 4), "mask": np.arange(16) % 3 == 0}
    own = jax.tree.map(lambda x: np.split(x, parts)[part], whole)
    guards = jax.transfer_guard_host_to_device("disallow")
    with guards, jax.transfer_guard_device_to_host("disallow"):
        placed = put_batch(own, mesh)
        jax.tree.map(np.testing.assert_array_equal, own_rows(placed, mesh), own)
        jax.tree.map(np.testing.assert_array_equal, fetch(placed), whole)
        everywhere = replicate(whole, mesh)
        jax.tree.map(np.testing.assert_array_equal, fetch(everywhere), whole)
        jax.tree.map(np.testing.assert_array_equal, own_rows(everywhere, mesh), own)
        halves = put_parts(own, 2, mesh)
        found = fetch(halves)
    assert all(x.sharding == placed["ids"].sharding for x in jax.tree.leaves(halves))
    np.testing.assert_array_equal(np.concatenate([half["ids"] for half in found]), whole["ids"])
    assert int(jnp.sum(placed["ids"])) == whole["ids"].sum()


def check_meshes() -> None:
    """A mesh that would part a batch shard between hosts is refused, one out of order is sorted."""
    local, count = jax.local_device_count(), jax.process_count()
    nearest = f"data={count}, fsdp=1, model={local}"
    with pytest.raises(InputError, match=f"the nearest that does not: {nearest}"):
        make_mesh(1, 1, -1)
    assert make_mesh(count, 1, local).size == count * local  # it does work
    mesh = make_mesh()
    mixed = np.array(jax.devices()).reshape(count, local).T.reshape(mesh.devices.shape)
    mixed = jax.sharding.Mesh(mixed, mesh.axis_names, axis_types=mesh.axis_types)
    assert sharding._in_order_of_hosts(mixed) == mesh


def check_errors(workdir: pathlib.Path) -> None:
    """Process 0 claims the workdir, for all; what it finds wrong is said by all."""
    on_first_host(claim_workdir, workdir, {"seed": 0})
    assert (workdir / "config.json").exists()
    prefix = f"process 0: {workdir}" if jax.process_index() else str(workdir)
    with pytest.raises(InputError, match=f"^{prefix} belongs to another config: seed is 0 there"):
        on_first_host(claim_workdir, workdir, {"seed": 1})
    assert all_hosts(jax.process_index()) == list(range(jax.process_count()))


def main(folder: pathlib.Path, meshes: str, *of_train: str) -> int:
    join_hosts()
    if meshes:
        check_meshes()
        check_errors(folder / "claimed")
        curves = {}
        for sizes in meshes.split(","):
            mesh = make_mesh(*map(int, sizes.split("x")))
            check_copies(mesh)
            curves[sizes] = [loss_curve(mesh), loss_curve(mesh, steps=1, packing=True)]
        tokens = None if of_train else sampled(mesh)
        if jax.process_index() == 0:
            (folder / "curves.json").write_text(json.dumps(curves))
            (folder / "tokens.json").write_text(json.dumps(tokens))
    rest = [text for text in of_train if not text.startswith("--fail-after=")]
    for text in of_train:
        if text not in rest:
            fail_after(*text.removeprefix("--fail-after=").split(","))
    return train_module.main(rest) if rest else 0


def fail_after(step: str, kind: str) -> None:
    """Makes the writer of this process raise an error after it wrote the row of a step."""
    write, errors = metrics.Writer.step, {"InputError": InputError, "KeyError": KeyError}

    def failing(writer, at, row):
        write(writer, at, row)
        if at == int(step):
            raise errors[kind]("no such thing")

    metrics.Writer.step = failing


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), *sys.argv[2:]))
