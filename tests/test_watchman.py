"""Watchmen beside small processes that do nothing: who hears what, and who is ended."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from scope_jax import watchman

COMMAND = pathlib.Path(watchman.__file__)
# A process that starts its watchman and gives it the word that it is told; exits with 7 unless
# that is "done".
PROCESS = """
import subprocess, sys
command, index, count, address = sys.argv[1:]
own = (int(address),) if index == "0" else ()
beside = subprocess.Popen([sys.executable, "-I", "-S", command, index, count, address],
                          stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=own)
print("up", flush=True)
word = sys.stdin.readline().strip()
beside.stdin.write(word.encode())
beside.stdin.close()
sys.exit(0 if word == "done" else 7)
"""


class Job:
    """So many processes with watchmen; their outputs are files of `folder`."""

    def __init__(self, folder, count):
        self.files, self.processes = [folder / f"{i}.txt" for i in range(count)], []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port, number = listener.getsockname()[1], listener.fileno()
            for i, file in enumerate(self.files):
                address, inherited = (f"127.0.0.1:{port}", ()) if i else (str(number), (number,))
                command = [sys.executable, "-I", "-S", "-c", PROCESS, str(COMMAND), str(i)]
                with file.open("w") as output:
                    process = subprocess.Popen(
                        [*command, str(count), address], stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, stderr=output, pass_fds=inherited, text=True,
                    )  # fmt: skip
                self.processes.append(process)
        assert [process.stdout.readline() for process in self.processes] == ["up\n"] * count

    def tell(self, index, word):
        stdin = self.processes[index].stdin
        assert stdin is not None
        stdin.write(f"{word}\n")
        stdin.flush()

    def codes(self):
        return [process.wait(60) for process in self.processes]

    def texts(self, wanted):
        """Returns the lines of each process once there are as many as wanted."""
        for _ in range(600):
            texts = [file.read_text() for file in self.files]
            if [text.count("\n") for text in texts] == wanted:
                break
            time.sleep(0.05)
        return texts


@pytest.fixture
def start(tmp_path):
    jobs = []

    def begin(count=3):
        jobs.append(Job(tmp_path, count))
        return jobs[-1]

    yield begin
    for process in jobs[0].processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_that_are_done_end_without_a_word(start, order):
    job = start()
    for index in order:
        job.tell(index, "done")
        assert job.processes[index].wait(60) == 0
    assert job.texts([0, 0, 0]) == ["", "", ""]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(start, victim):
    job = start()
    os.kill(job.processes[victim].pid, signal.SIGKILL)
    assert job.codes() == [-signal.SIGKILL] * 3
    want = [f"error: another process is gone: process {victim} was killed\n"] * 3
    want[victim] = ""
    assert job.texts([text.count("\n") for text in want]) == want


def test_the_first_error_ends_the_others_and_is_quoted(start):
    job = start()
    job.tell(2, "KeyError:  'no such thing'")
    assert job.codes() == [-signal.SIGKILL, -signal.SIGKILL, 7]
    line = "error: another process is gone: process 2: KeyError: 'no such thing'\n"
    assert job.texts([1, 1, 0]) == [line, line, ""]


def test_who_says_itself_why_it_ends_is_left_in_peace(start):
    job = start()
    for index in (1, 0, 2):
        job.tell(index, "the same line")
    assert job.codes() == [7, 7, 7]
    assert job.texts([0, 0, 0]) == ["", "", ""]


def test_one_that_is_done_is_not_missed(start):
    job = start()
    job.tell(1, "done")
    assert job.processes[1].wait(60) == 0
    job.processes[2].kill()
    assert job.processes[0].wait(60) == -signal.SIGKILL
    line = "error: another process is gone: process 2 was killed\n"
    assert job.texts([1, 0, 0]) == [line, "", ""]
