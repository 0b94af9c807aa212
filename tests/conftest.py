"""Switches of every test: 8 virtual devices, typed keys, no rank promotion, no warnings."""

import os
import pathlib

# Tests compile thousands of small programs and hardly run them: unoptimised they compile in 2/3 of
# the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from scope_jax import sampling

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

SHARED = pathlib.Path(__file__).parents[2] / "shared"


def pytest_runtest_teardown(item, nextitem):
    """Lets go of compiled programs after each file, and within one that has many.

    On a CPU each of them maps some hundred pieces of memory, and Linux lets a process have 65,530
    mappings: XLA aborts at the next compilation.
    """
    maps = pathlib.Path("/proc/self/maps")
    many = maps.exists() and maps.read_bytes().count(b"\n") > 40_000
    if many or nextitem is None or nextitem.path != item.path:
        jax.clear_caches()
        sampling._COMPILED.clear()  # what `generate` takes for compiled


@pytest.fixture(scope="session")
def shared():
    """The folder of real data beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: no golden outputs or data sets to test against")
    return SHARED


@pytest.fixture(scope="session")
def smollm2():
    """Directory of SmolLM2-135M-Instruct (shared/tools/make_smollm2.py); .ci/run builds it."""
    path = os.environ.get("SCOPE_JAX_SMOLLM2", "")
    if not path or not pathlib.Path(path).is_dir():
        pytest.skip(
            "SCOPE_JAX_SMOLLM2 names no directory: build one with shared/tools/make_smollm2.py"
        )
    return pathlib.Path(path)


def pytest_collection_modifyitems(items):
    """Starts with the longest file, so that the other worker does the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_train.py")
