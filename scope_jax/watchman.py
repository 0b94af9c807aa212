"""A small process beside each process of a run of several (hosts.py): when one ends, all end.

    python watchman.py INDEX COUNT ADDRESS

It outlives its process for a moment, whatever ended that: kill -9, an abort in C++, the system for
lack of memory. A process gives its last word through its watchman's standard input (none: it was
killed); watchmen tell process 0's over TCP, and that one all others. A host that is lost without a
word is missed by TCP's keepalive. Nothing here imports JAX.

    ADDRESS     of process 0's watchman, HOST:PORT; for that one itself the number of the open
                socket that listens there
"""

import contextlib
import os
import select
import signal
import socket
import sys

DONE = "done"  # the last word of a process that did what it had to do
GRACE = 8  # seconds in which a process may end by itself, with its own line, before it is killed
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # 25 s to miss a host
WAIT = 60  # seconds for all watchmen to find each other


def connect(index: int, count: int, address: str) -> dict[int, socket.socket]:
    """Returns the links to other watchmen, by process: process 0's has all, the others' that one.

    Raises:
      OSError: they did not find each other.
    """
    links = {}
    if index:
        host, port = address.rsplit(":", 1)
        links[0] = socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT)
        links[0].sendall(b"%d\n" % index)
    else:
        with socket.socket(fileno=int(address)) as listener:
            listener.settimeout(WAIT)
            while len(links) < count - 1:
                link, _ = listener.accept()
                link.settimeout(WAIT)
                links[int(link.makefile("rb", buffering=0).readline())] = link
    for link in links.values():
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return links


def read_all(source) -> str:
    """Returns what comes until the other end closes; "" if nothing does, or the link breaks."""
    text = b""
    with contextlib.suppress(OSError):
        while part := os.read(source.fileno(), 1 << 12):
            text += part
    return " ".join(text.decode(errors="replace").split())


def send_last(link: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # it is gone too
        link.sendall(text.encode())
        link.shutdown(socket.SHUT_WR)


def news_of(index: int, word: str) -> str:
    """Returns what all should hear of a process's last word; "" if it was done."""
    if word == DONE:
        return ""
    return f"process {index}: {word}" if word else f"process {index} was killed"


def watch_all(links: dict[int, socket.socket]) -> tuple[str, str | None]:
    """Returns (of whom all hear: the first that was not done, else ""; process 0's last word, None
    while it runs), in process 0's watchman, and passes it on.
    """
    news, word, links = "", None, dict(links)
    while not news and (links or word is None):
        sources = [*links.values()] + [sys.stdin] * (word is None)
        ready = select.select(sources, [], [])[0]
        if sys.stdin in ready:  # before the others: they may have ended of its end
            word = read_all(sys.stdin)
            news = news_of(0, word)
            continue
        index = next(i for i, link in links.items() if link in ready)
        news = read_all(links[index]) or f"the host of process {index} is lost"
        if news == DONE:
            news = ""
            del links[index]
    for link in links.values():
        send_last(link, news)
    return news, word


def watch_one(index: int, link: socket.socket) -> tuple[str, str | None]:
    """Returns (of whom all hear, this process's last word or None), in another's watchman."""
    word = None
    if sys.stdin in select.select([sys.stdin, link], [], [])[0]:
        word = read_all(sys.stdin)
        send_last(link, news_of(index, word) or DONE)
        if word == DONE:
            return "", word
    return read_all(link) or "the host of process 0 is lost", word


def main(index: int, count: int, address: str) -> None:
    process = os.getppid()
    links = connect(index, count, address)
    news, word = watch_one(index, links[0]) if index else watch_all(links)
    if not news:
        return
    if word is None and select.select([sys.stdin], [], [], GRACE)[0]:
        word = read_all(sys.stdin)
    if not word and news != news_of(index, ""):  # else it said itself why it ends
        print(f"error: another process is gone: {news}", file=sys.stderr, flush=True)
    if word is None:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to a whole job; this ends with its process
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except (OSError, ValueError) as error:
        print(f"warning: a watchman found no others: {error}", file=sys.stderr, flush=True)
