"""What chips can do: the vendors' figures that plans and utilisation are measured against."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from scope_jax.records import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip. Flop/s, memory and links are Google's (https://cloud.google.com/tpu/docs)."""

    flops: float  # per second, bfloat16
    hbm: float  # bytes that programs can use: what XLA's out-of-memory errors name
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s of one link to a neighbour, in one direction
    clock: float  # cycles/s; flops / clock is what XLA's cycle estimates of products imply


GIB = 2**30
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 45e9, 1.5e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 90e9, 1.75e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1640e9, 90e9, 1.75e9),
}
# bfloat16 flop/s by what JAX calls a device
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# What XLA compiles updates with. Left to itself it cuts a product whose weights lie on other chips
# into one product for every arriving piece, which reads and writes the whole result each time (7B,
# 8 chips: 1.2 s in place of 0.75 s); whole weights are gathered instead. The SparseCores send them
# while the matrix units compute (v5e has none: there collectives are fused into products).
_WHOLE_WEIGHTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_SPARSE_CORE = {
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    **{
        f"xla_tpu_enable_sparse_core_collective_offload_{name}": "true"
        for name in ("all_gather", "2d_all_gather", "3d_all_gather", "all_reduce")
        + ("reduce_scatter", "nd_reduce_scatter")
    },
}
UPDATE_OPTIONS = {
    "TPU v5": _WHOLE_WEIGHTS | _SPARSE_CORE,
    # Its products need more than the 16 MiB of VMEM that a program gets by default.
    "TPU v6 lite": _WHOLE_WEIGHTS | _SPARSE_CORE | {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    "TPU v5 lite": _WHOLE_WEIGHTS,
}


@functools.cache
def update_compiler_options(device: Any) -> dict[str, str]:
    """Returns the options of XLA that updates are compiled with for a device; {} where it has none,
    or where the compiler does not know them any more.
    """
    options = UPDATE_OPTIONS.get(device.device_kind, {})
    if options:
        x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
        try:
            jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()
        except Exception:  # whatever a later XLA raises for an option that it has dropped
            return {}
    return options


@functools.cache
def peak_flops() -> float:
    """Returns the flop/s of one of this process's devices.

    The vendor's figure for bfloat16 where the device is known; elsewhere, on a CPU say, what a
    float32 product of 1,024 x 1,024 matrices reaches, the best of five.
    """
    device = jax.local_devices()[0]
    if device.device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device.device_kind]
    size = 1024
    product = jax.jit(jnp.matmul)
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Virtual devices of one CPU share its cores.
    sharing = jax.local_device_count() if device.platform == "cpu" else 1
    return 2 * size**3 / min(seconds) / sharing


def peak_memory() -> float | None:
    """Returns the most bytes of device memory in use so far, of this process's fullest device; None
    where the platform does not count them (CPU).
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def topology_devices(name: str) -> tuple[Chip, list[Any]]:
    """Returns (the chip, devices to compile for) of a TPU topology, on a machine that has no TPU.

    Args:
      name: generation and shape, "v5p:2x2x2", "v6e:4x4".
    Raises:
      InputError: libtpu is missing, or there is no such topology.
    """
    from jax.experimental import topologies

    generation = name.partition(":")[0]
    if generation not in CHIPS:
        raise InputError(
            f"topology {name!r}: known generations are {', '.join(CHIPS)}, as in v5e:2x4, "
            "v5p:2x2x2 or v6e:4x4"
        )
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu's own kinds of errors, by message only
        said = str(error).split("\n")[0]
        if "libtpu" in said.lower() or "not installed" in said:
            raise InputError(
                "compiling for a TPU needs libtpu: pip install 'scope_jax[aot]'"
            ) from None
        near = {"v5e": "v5e:2x4, v5e:4x4", "v5p": "v5p:2x2x1, v5p:2x2x2", "v6e": "v6e:2x4, v6e:4x4"}
        raise InputError(
            f"topology {name!r} does not exist ({said}): {generation} comes as "
            f"{near[generation]} and larger multiples of a host's chips"
        ) from None
    return CHIPS[generation], list(described.devices)
