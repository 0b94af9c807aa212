"""Tests of meshes and rules on 8 virtual devices: what lies where, and errors that name it."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.models.transformer import TransformerConfig, Weight, declare
from scope_jax.records import InputError
from scope_jax.sharding import (
    TRAINING,
    Rules,
    decoding_mesh,
    make_mesh,
    make_meshes,
    put_batch,
    replicate,
    shardings,
    spec,
)

CONFIG = TransformerConfig(
    vocab_size=12, embed_dim=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=16
)


# --- Specs ------------------------------------------------------------------------------------


def test_logical_axes_map_to_mesh_axes():
    assert spec(("embed", "heads", None)) == PartitionSpec("fsdp", "model", None)
    assert spec(("layers", "mlp", "embed")) == PartitionSpec(None, "model", "fsdp")
    assert spec(("batch",)) == PartitionSpec(("data", "fsdp"))
    assert spec(()) == PartitionSpec()


def test_rules_can_be_changed_one_by_one():
    rules = dataclasses.replace(TRAINING, embed=None, vocab="fsdp")
    assert spec(("vocab", "embed"), rules) == PartitionSpec("fsdp", None)


def test_unknown_logical_axis_is_an_error_that_lists_the_known_ones():
    with pytest.raises(InputError, match=r"unknown logical axes \['width'\].*'embed'.*'vocab'"):
        spec(("embed", "width"))


def test_two_dimensions_on_one_mesh_axis_are_an_error_that_shows_both():
    with pytest.raises(InputError, match=r"\('heads', 'mlp'\) collide.*\['model', 'model'\]"):
        spec(("heads", "mlp"))
    with pytest.raises(InputError, match="collide"):  # also inside a tuple
        spec(("batch", "embed"))
    with pytest.raises(InputError, match="collide"):
        spec(("vocab", "embed"), Rules(embed="model"))


# --- Meshes -----------------------------------------------------------------------------------


def test_decoding_has_a_mesh_of_the_same_devices_in_the_same_order():
    mesh, decode = make_meshes(data=2, fsdp=4, model=1, decode_model=2)
    assert dict(decode.shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert list(decode.devices.flat) == list(mesh.devices.flat)
    assert decoding_mesh(mesh, 0) is mesh
    with pytest.raises(InputError, match=r"decode_model=3 .* fsdp x model = 4; 2 would"):
        decoding_mesh(mesh, 3)


@pytest.mark.parametrize(
    "sizes, want",
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": -1, "model": 2}, (2, 2, 2)),
        ({"data": 1, "model": 8}, (1, 1, 8)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(sizes, want):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert tuple(mesh.shape.values()) == want
    assert set(mesh.devices.flat) == set(jax.devices())


def test_axes_are_auto_so_that_a_gather_on_a_sharded_vocabulary_works():
    mesh = make_mesh(data=1, model=-1)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    table = jax.device_put(np.arange(16.0), NamedSharding(mesh, PartitionSpec("model")))
    assert jax.jit(lambda x: x[np.array([3, 9])])(table).tolist() == [3.0, 9.0]


@pytest.mark.parametrize(
    "sizes, shown",
    [
        ({"data": 3}, "data=3, fsdp=1, model=1"),
        ({"fsdp": 3}, "data=-1, fsdp=3, model=1"),
        ({"data": 8, "model": 2}, "data=8, fsdp=1, model=2"),
        ({"fsdp": -1, "model": 8}, "data=-1, fsdp=-1, model=8"),
        ({"fsdp": 0}, "data=-1, fsdp=0, model=1"),
        ({"data": -2, "fsdp": -4}, "data=-2, fsdp=-4, model=1"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices_are_an_error_that_names_both(sizes, shown):
    with pytest.raises(InputError, match=f"mesh {shown} does not match 8 devices"):
        make_mesh(**sizes)


# --- Weights ----------------------------------------------------------------------------------


def test_every_weight_lies_as_its_declaration_says():
    mesh = make_mesh(2, 2, 2)
    declared = declare(CONFIG)
    places = shardings(declared, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(
        jax.tree.map(lambda _: 0, declared, is_leaf=lambda x: isinstance(x, Weight))
    )
    assert places["embed"].spec == PartitionSpec("model", "fsdp")
    assert places["layers"]["q"]["w"].spec == PartitionSpec(None, "fsdp", "model", None)
    assert places["layers"]["down"].spec == PartitionSpec(None, "model", "fsdp")
    assert places["final_norm"].spec == PartitionSpec(None)
    weight = jax.device_put(
        np.zeros(declared["layers"]["q"]["w"].shape), places["layers"]["q"]["w"]
    )
    assert weight.sharding.shard_shape(weight.shape) == (2, 8 // 2, 4 // 2, 4)


def test_weight_that_its_axis_does_not_divide_is_an_error_that_names_it():
    mesh = make_mesh(1, 2, 4)
    with pytest.raises(InputError, match="2 does not divide over model=4") as error:
        shardings(declare(CONFIG), mesh)
    assert "('layers', 'embed', 'kv_heads', None) of shape (2, 8, 2, 4)" in str(error.value)
    replicated = dataclasses.replace(TRAINING, kv_heads=None)
    places = shardings(declare(CONFIG), mesh, replicated)
    assert places["layers"]["k"]["w"].spec == PartitionSpec(None, "fsdp", None, None)


# --- Batches ----------------------------------------------------------------------------------


def test_batch_rows_are_split_over_data_and_fsdp_in_order():
    mesh = make_mesh(2, 2, 2)
    batch = {"ids": np.arange(24).reshape(8, 3), "rewards": np.arange(8.0, dtype=np.float32)}
    placed = put_batch(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].sharding.spec == PartitionSpec(("data", "fsdp"))
        assert {shard.data.shape[0] for shard in placed[name].addressable_shards} == {8 // 4}
    row_of = {s.device: s.index[0].start or 0 for s in placed["rewards"].addressable_shards}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        assert row_of[device] == (data * 2 + fsdp) * 2


def test_copies_to_the_mesh_are_explicit():
    mesh = make_mesh(2, 2, 2)
    with jax.transfer_guard("disallow"):
        placed = put_batch({"ids": np.zeros((8, 3), np.int32)}, mesh)
        everywhere = replicate(np.int32(3), mesh)
    assert len(placed["ids"].sharding.device_set) == len(everywhere.sharding.device_set) == 8


def test_rows_that_the_mesh_does_not_divide_are_an_error_that_names_both():
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(InputError, match=r"6 rows do not divide over the .*4 batch shards"):
        put_batch({"ids": np.zeros((6, 3))}, mesh)
    with pytest.raises(InputError, match="6 rows do not divide"):  # any array of the tree
        put_batch((np.zeros((8, 3)), np.zeros(6)), mesh)


def test_replicated_arrays_lie_whole_on_every_device():
    placed = replicate({"step": np.int32(3), "norm": np.ones(5, np.float32)}, make_mesh(2, 2, 2))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))
    assert len(placed["norm"].addressable_shards) == 8
    assert int(placed["step"]) == 3
