"""SIGTERM, which a machine that is taken away (a preemptible TPU VM, a Kubernetes job) gets
some seconds before: the run finishes its step, saves and ends.
"""

import os
import signal
import socket
import sys
import threading

from scope_jax.hosts import all_hosts

UNSAVED = 128 + signal.SIGTERM  # exit code where no step ended in time


class Preemption:
    """Listens for SIGTERM while it is entered.

    A step cannot be cut short: its arrays were given to the update. So where none ends, and is
    saved, within `grace` seconds of the signal the process says so and exits with code UNSAVED; the
    last checkpoint stays what it was. Outside of the main thread (some notebooks) nothing is
    listened for.
    """

    def __init__(self, grace: float):
        self.grace, self.asked, self._ended = grace, False, threading.Event()
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Preemption":
        if self._listens:
            # A handler in Python waits for the computation that the main thread is in; the byte
            # that the interpreter writes at once does not.
            self._bytes, self._wakeup = socket.socketpair()
            self._wakeup.setblocking(False)
            self._before = signal.signal(signal.SIGTERM, self._ask)
            self._fd = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._listens:
            signal.set_wakeup_fd(self._fd)
            signal.signal(signal.SIGTERM, self._before)
            self._wakeup.close()  # ends the thread

    def anywhere(self) -> bool:
        """Returns whether any process was asked to end; all must call it, once a step."""
        return any(all_hosts(self.asked))

    def _ask(self, *_) -> None:
        self.asked = True

    def _watch(self) -> None:
        while byte := self._bytes.recv(1):
            if byte[0] == signal.SIGTERM:
                break
        self._bytes.close()
        if not byte:
            return
        self.asked = True
        if not self._ended.wait(self.grace):
            print(
                f"error: SIGTERM: no step was finished and saved within {self.grace:g} s "
                "(checkpoint.grace_seconds); the same command goes on from the last checkpoint",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(UNSAVED)
