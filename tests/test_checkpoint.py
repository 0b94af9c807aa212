import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax import checkpoint
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.records import InputError
from scope_jax.sharding import make_mesh, shardings
from scope_jax.update import init_state

MESH = make_mesh(data=2, fsdp=4)
WEIGHTS = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "b": np.ones(4, np.float32)}


def state_on(spec: PartitionSpec):
    places = {"w": NamedSharding(MESH, spec), "b": NamedSharding(MESH, PartitionSpec())}
    return init_state(optax.adamw(1e-3), jax.device_put(WEIGHTS, places), step=3)


def test_a_checkpoint_restores_every_bit_onto_another_layout(tmp_path):
    state = state_on(PartitionSpec("fsdp"))
    manager = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save(manager, 3, state, {"next_index": 12})
    manager.close()

    other = state_on(PartitionSpec(None, "data"))
    blank = jax.tree.map(jnp.zeros_like, other)
    restored, data_state = checkpoint.restore(checkpoint.open_checkpoints(tmp_path), blank)
    assert data_state == {"next_index": 12} and int(restored.step) == 3
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored.params["w"].sharding == other.params["w"].sharding

    params = checkpoint.restore_params(tmp_path, blank.params)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_run_of_mesh_4x2_restores_every_bit_on_2x2_and_8x1(tmp_path):
    model = Transformer(
        TransformerConfig(
            vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
            mlp_dim=32,
        )
    )  # fmt: skip
    weights, optimizer = model.init(jax.random.key(0)), optax.adamw(1e-3)

    def state_on(mesh, weights):
        return init_state(
            optimizer, jax.device_put(weights, shardings(declare(model.config), mesh)), step=3
        )

    state = state_on(make_mesh(4, 2), weights)
    updates, opt_state = jax.jit(optimizer.update)(state.params, state.opt_state, state.params)
    del updates  # moments that are not all zero
    state = dataclasses.replace(state, opt_state=opt_state)
    manager = checkpoint.open_checkpoints(tmp_path)
    checkpoint.save(manager, 3, state, {"next_index": 3})
    manager.close()
    blank = jax.tree.map(jnp.zeros_like, weights)
    for mesh in (make_mesh(2, 2, devices=jax.devices()[:4]), make_mesh(8, 1)):
        other = state_on(mesh, blank)
        restored, _ = checkpoint.restore(checkpoint.open_checkpoints(tmp_path), other)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        places = jax.tree.map(lambda x: x.sharding, restored)
        assert places == jax.tree.map(lambda x: x.sharding, other)


def test_only_the_newest_are_kept(tmp_path):
    manager = checkpoint.open_checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoint.save(manager, step, state_on(PartitionSpec()), {"next_index": step})
    manager.close()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["2", "3"]


def test_moments_lie_where_their_params_lie():
    state = state_on(PartitionSpec("fsdp"))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (8, 4)]
    assert len(moments) == 2
    assert all(x.sharding == state.params["w"].sharding for x in moments)


def test_a_workdir_without_a_checkpoint_is_named(tmp_path):
    assert checkpoint.restore(checkpoint.open_checkpoints(tmp_path), None) is None
    with pytest.raises(InputError, match="holds no finished checkpoint"):
        checkpoint.restore_params(tmp_path, WEIGHTS)
    with pytest.raises(InputError, match="holds no checkpoints/"):
        checkpoint.restore_params(tmp_path / "nothing", WEIGHTS)
