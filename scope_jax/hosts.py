"""Several processes, one on each host, that run the same command: they find each other, compare
notes and end together. A single process does nothing of it.

    SCOPE_JAX_COORDINATOR=auto                  the same on every host: Cloud TPU, Slurm, Open MPI,
                                                Kubernetes (jax[k8s]) tell a process who it is
    SCOPE_JAX_COORDINATOR=10.0.0.2:8476         elsewhere: process 0's address, which all can reach,
    SCOPE_JAX_NUM_PROCESSES=4                   how many processes there are
    SCOPE_JAX_PROCESS_ID=0                      and which of them this is, 0 .. 3

What goes wrong with the input while a run is set up ends all processes with one line. Later a
process that fails leaves the others in a computation that never ends, until JAX aborts them: one
that raised an error waits for the others at its exit, for LAST_WAIT at most, and of one that was
killed no heartbeat comes for 100 s (over gloo a closed connection raises an error at once, and then
it is LAST_WAIT again). If process 0 is killed the others are aborted at once.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from scope_jax.records import InputError

LAST_WAIT = 60  # seconds that a process waits at its end for the others
NOTE_BYTES = 1 << 14  # of a process's note to the others: one size, so one program


def join_hosts() -> None:
    """Connects this process to the others if the environment says so (see above).

    It has to run before anything asks JAX for its devices.

    Raises:
      InputError: variables that are missing or make no sense, or nobody to connect to.
    """
    names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
    given = {name: os.environ.get(f"SCOPE_JAX_{name}", "") for name in names}
    if not any(given.values()) or jax.distributed.is_initialized():
        return
    address, *numbers = given.values()
    who = {}
    if address != "auto":
        count, index = (int(text) if text.isdecimal() else -1 for text in numbers)
        if not (":" in address and 0 <= index < count):
            shown = ", ".join(f"SCOPE_JAX_{name}={text!r}" for name, text in given.items())
            raise InputError(
                "several hosts need SCOPE_JAX_COORDINATOR=auto, or HOST:PORT with "
                f"SCOPE_JAX_NUM_PROCESSES=N and SCOPE_JAX_PROCESS_ID=0 .. N-1; got {shown}"
            )
        who = {"coordinator_address": address, "num_processes": count, "process_id": index}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**who, shutdown_timeout_seconds=LAST_WAIT)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"SCOPE_JAX_COORDINATOR={address}: cannot join: {reason}") from None


def all_hosts(value: Any) -> list[Any]:
    """Returns what each process gave, in their order, in every process; all must call it.

    Args:
      value: anything that JSON can hold, in NOTE_BYTES.
    """
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    note = np.zeros(NOTE_BYTES, np.uint8)
    note[: len(text)] = np.frombuffer(text, np.uint8)
    notes = multihost_utils.process_allgather(note)
    return [json.loads(bytes(note).rstrip(b"\0")) for note in notes]


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """What is wrong with one process's input ends all of them, each with the same line.

    All processes must pass through it, and compute nothing together inside.

    Raises:
      InputError: of any process.
    """
    error = None
    try:
        yield
    except (InputError, OSError) as raised:
        error = raised
    texts = all_hosts(None if error is None else str(error)[: NOTE_BYTES // 16])
    if error is not None:
        raise error
    for process, text in enumerate(texts):
        if text is not None:
            raise InputError(f"process {process}: {text}")


def on_first_host(fn: Callable, *args) -> None:
    """Calls `fn` in process 0 alone; the others wait for it, and share its InputError."""
    with shared_errors():
        if jax.process_index() == 0:
            fn(*args)
