import dataclasses
import os
import shutil

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


def state_on(spec: PartitionSpec, weights=WEIGHTS):
    places = {"w": NamedSharding(MESH, spec), "b": NamedSharding(MESH, PartitionSpec())}
    return init_state(optax.adamw(1e-3), jax.device_put(weights, places), step=3)


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


LARGE = {"w": np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32), "b": WEIGHTS["b"]}


def saved(tmp_path, *steps):
    """Writes checkpoints whose arrays are too large to lie in Orbax's own files; returns zeros."""
    manager = checkpoint.open_checkpoints(tmp_path, keep=5)
    for step in steps:
        state = state_on(PartitionSpec("fsdp"), LARGE | {"w": LARGE["w"] + step})
        checkpoint.save(manager, step, state, {"next_index": step})
    manager.close()
    return jax.tree.map(jnp.zeros_like, state)


def arrays(folder):
    """Returns the files with a checkpoint's arrays, the largest first."""
    files = [p for p in (folder / "state").rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda p: -p.stat().st_size)


def flip_a_bit(file, where=0.5):
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda step: flip_a_bit(arrays(step)[0]),
    "no arrays": lambda step: arrays(step)[0].unlink(),
    "half of an array": lambda step: os.truncate(arrays(step)[0], 1000),
    "no manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "a changed note": lambda step: (step / "data" / "metadata").write_text(
        (step / "data" / "metadata").read_text().replace("30", "31")
    ),
    "an empty note": lambda step: (step / "data" / "metadata").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, damage):
    blank, said = saved(tmp_path, 20, 30), []
    DAMAGE[damage](tmp_path / "checkpoints" / "30")
    with pytest.raises(InputError, match=r"checkpoints/30 is damaged.*others are of steps 20"):
        checkpoint.restore_params(tmp_path, blank.params)
    manager = checkpoint.open_checkpoints(tmp_path)
    state, data_state = checkpoint.restore(manager, blank, say=said.append)
    assert data_state == {"next_index": 20}
    np.testing.assert_array_equal(state.params["w"], LARGE["w"] + 20)
    assert "checkpoints/30 is damaged" in said[0] and "step 20" in said[1]
    assert (tmp_path / "damaged_checkpoints" / "30_0").is_dir()
    checkpoint.save(manager, 30, state, {"next_index": 30})  # its place is free again
    manager.close()
    assert checkpoint.restore(checkpoint.open_checkpoints(tmp_path), blank)[1]["next_index"] == 30


def test_no_flipped_bit_is_ever_restored(tmp_path):
    blank, found = saved(tmp_path, 7), 0
    expected = state_on(PartitionSpec("fsdp"), LARGE | {"w": LARGE["w"] + 7})
    for where in np.linspace(0, 0.999, 23):
        copy = tmp_path / f"{where:.3f}"
        shutil.copytree(tmp_path / "checkpoints", copy / "checkpoints")
        flip_a_bit(arrays(copy / "checkpoints" / "7")[0], where)
        try:
            state, _ = checkpoint.restore(checkpoint.open_checkpoints(copy), blank)
        except InputError as error:
            found += "can be read: step 7" in str(error)
        else:  # a byte that means nothing
            jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert found >= 15


def test_bit_sums_are_those_of_plain_python_on_any_layout():
    def plain(x):
        total = 0
        for index, bits in enumerate(np.asarray(x).view(f"u{x.dtype.itemsize}").ravel().tolist()):
            h = bits ^ (index * 0x9E3779B9 % 2**32)
            h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            total += h ^ (h >> 16)
        return total % 2**32

    rng = np.random.default_rng(0)
    for shape, dtype in (((8, 4, 3), jnp.float32), ((16,), jnp.bfloat16), ((), jnp.int32)):
        x = rng.normal(size=shape).astype(dtype) * 7
        x = np.asarray(x).astype(dtype)
        assert checkpoint.bit_sums({"x": jnp.asarray(x)}) == {"['x']": [str(x.dtype), plain(x)]}
        if x.ndim:
            spread = jax.device_put(x, NamedSharding(MESH, PartitionSpec(("data", "fsdp"))))
            assert checkpoint.bit_sums([spread]) == {"[0]": [str(x.dtype), plain(x)]}


def test_many_arrays_over_all_devices_are_summed_without_a_deadlock():
    # With their sums in flight together, 2 of 3 such processes hung or were ended by XLA.
    place = NamedSharding(MESH, PartitionSpec(("data", "fsdp")))
    tree = [jax.device_put(np.ones((64, 32 + i), np.float32), place) for i in range(40)]
    first = checkpoint.bit_sums(tree)
    for _ in range(60):
        assert checkpoint.bit_sums(tree) == first


def test_every_tenth_stays(tmp_path):
    manager = checkpoint.open_checkpoints(tmp_path, keep=1, keep_every=10)
    for step in (10, 11, 12):
        checkpoint.save(manager, step, state_on(PartitionSpec()), {})
    manager.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "12"]


def test_a_save_that_died_is_no_checkpoint(tmp_path):
    blank = saved(tmp_path, 20)
    unfinished = tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "20", unfinished)
    for clear in (False, True):
        manager = checkpoint.open_checkpoints(tmp_path, clear=clear)
        assert checkpoint.restore(manager, blank)[1] == {"next_index": 20}
        manager.close()
        assert unfinished.exists() is not clear
