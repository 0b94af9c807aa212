"""Several processes, one on each host, that run the same command: they find each other, compare
notes and end together. A single process does nothing of it.

    SCOPE_JAX_COORDINATOR=auto                  the same on every host: Cloud TPU, Slurm, Open MPI,
                                                Kubernetes (jax[k8s]) tell a process who it is
    SCOPE_JAX_COORDINATOR=10.0.0.2:8476         elsewhere: process 0's address, which all can reach,
    SCOPE_JAX_NUM_PROCESSES=4                   how many processes there are
    SCOPE_JAX_PROCESS_ID=0                      and which of them this is, 0 .. 3

What goes wrong with the input while a run is set up ends all processes with one line. Whatever ends
one of them later ends the others within GRACE seconds, each with a line that says which is gone and
why: each process has a watchman (watchman.py) beside it, for JAX itself leaves the others in a
computation that never ends, or aborts them from C++ before Python could say anything. A host that
is lost without a word is missed after some 25 s. Should a watchman fail, JAX's own heartbeat is
left (HEARTBEAT). Watchmen talk to that of process 0 over a TCP port that is free there.
"""

import atexit
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state  # who coordinates: JAX does not say it elsewhere
from jax.experimental import multihost_utils

from scope_jax.records import InputError
from scope_jax.watchman import DONE, GRACE

LAST_WAIT = 60  # seconds that a process waits at its end for the others
HEARTBEAT = 40  # seconds without one until JAX takes a process for dead
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
        jax.distributed.initialize(
            **who, shutdown_timeout_seconds=LAST_WAIT, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"SCOPE_JAX_COORDINATOR={address}: cannot join: {reason}") from None
    if jax.process_count() > 1:
        _start_watchman()


_watchman: subprocess.Popen | None = None


def _start_watchman() -> None:
    global _watchman
    index, command = jax.process_index(), pathlib.Path(__file__).with_name("watchman.py")
    with contextlib.ExitStack() as stack:
        port, inherited = None, ()
        if index == 0:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
            stack.enter_context(listener)
            port, inherited = listener.getsockname()[1], (listener.fileno(),)
        host = str(global_state.coordinator_address).rsplit(":", 1)[0]
        address = f"{host}:{all_hosts(port)[0]}"
        who = [str(index), str(jax.process_count()), str(inherited[0]) if inherited else address]
        _watchman = subprocess.Popen(
            [sys.executable, "-I", "-S", str(command), *who],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=inherited,
        )  # fmt: skip
    atexit.register(_say_last_word)  # not where the process is killed


def _say_last_word(word: str = "") -> None:
    """Tells the watchman why this process ends; the first word counts."""
    stdin = _watchman.stdin if _watchman else None
    if stdin is None or stdin.closed:
        return
    uncaught = getattr(sys, "last_value", None)
    word = word or (DONE if uncaught is None else _line(uncaught))
    with contextlib.suppress(OSError):
        stdin.write(word.encode())
        stdin.close()


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """An error in one of several processes ends all, the others with a line that quotes it.

    For the whole of a command after `join_hosts`. An error that only says that the connection to
    another process is lost waits for the watchman, who knows which process it was and why. A
    process that raised does not wait longer than the others need to hear of it, which it would do
    at its exit in JAX's last barrier.
    """
    try:
        yield
    except BaseException as error:
        if _watchman is None:
            raise
        lost = "gloo|connection|socket closed|UNAVAILABLE|heartbeat|coordination"
        if isinstance(error, jax.errors.JaxRuntimeError) and re.search(lost, str(error), re.I):
            time.sleep(HEARTBEAT)
        _say_last_word(_line(error))
        code = 2 if isinstance(error, (InputError, OSError)) else 1
        threading.Thread(target=_leave, args=(code,), daemon=True).start()
        raise


def _leave(code: int) -> None:
    time.sleep(GRACE / 2)  # before the others are killed: JAX would abort this one for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
