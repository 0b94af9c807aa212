"""A completions server with faults, for tests/test_endpoint.py: python endpoint_server.py.

Prints its port. A prompt begins with the fault it gets, "429-once|..": FAULTS; anything else is
answered. GET /stats tells what was asked of it so far, GET /reset forgets it.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOCK = threading.Lock()
STATS = {"requests": 0, "max_tokens": 0, "at_once": 0, "most_at_once": 0, "authorized": 0}
SEEN: dict[str, int] = {}  # requests per prompt
BODIES: list[dict] = []


def good(request: dict, **changes) -> dict:
    """A worksheet's lines, as many characters as max_tokens allows at most, another per seed."""
    text = f"a3={request['seed'] % 97}\n\n"[: request["max_tokens"] - 1]
    choice = {"index": 0, "text": text, "finish_reason": "stop"} | changes
    usage = {"prompt_tokens": 1, "completion_tokens": len(text) + 1}
    return {"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}


SHAPES = {
    "list": [],
    "no-choices": {"choices": []},
    "choices-dict": {"choices": {"0": {"text": "a"}}},
    "text-null": {"choices": [{"text": None, "finish_reason": "stop"}]},
    "text-number": {"choices": [{"text": 3, "finish_reason": "stop"}]},
    "text-missing": {"choices": [{"finish_reason": "stop"}]},
    "null": None,
}
TEXTS = {
    "nul": "a\0b",
    "surrogate": "a3=\ud83d",
    "special": "a3=1<eos>a4",
    "unknown": "a3=則",
    "long": "a3=1\n\n" * 8_000,
    "megabyte": "a3=1\n\n" * 200_000,
    "empty": "",
}
USAGES = {"usage-negative": -5, "usage-huge": 10**12, "usage-text": "7", "usage-zero": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: bytes, length: int | None = None, **headers) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        with LOCK:
            stats = json.dumps(STATS | {"bodies": BODIES}).encode()
            if self.path == "/reset":
                STATS.update(dict.fromkeys(STATS, 0))
                SEEN.clear()
                BODIES.clear()
        self.reply(200, stats)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            STATS["requests"] += 1
            STATS["max_tokens"] += request["max_tokens"]
            STATS["authorized"] += self.headers["Authorization"] is not None
            STATS["at_once"] += 1
            STATS["most_at_once"] = max(STATS["most_at_once"], STATS["at_once"])
            BODIES.append(request)
            seen = SEEN[request["prompt"]] = SEEN.get(request["prompt"], 0) + 1
        try:
            self.answer(request, request["prompt"].split("|")[0], seen)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client had enough
        finally:
            with LOCK:
                STATS["at_once"] -= 1

    def answer(self, request: dict, fault: str, seen: int) -> None:
        name, _, once = fault.partition("-once")
        if self.path != "/v1/completions":
            return self.reply(404, b"{}")
        if fault.endswith("-once") and seen > 1:
            name = "ok"
        if name.isdigit():
            echo = f"bad: {self.headers['Authorization']}".encode()
            wait = {"Retry_After": "0.1"} if name == "429" else {}
            return self.reply(int(name), echo, X_Echo=str(self.headers["Authorization"]), **wait)
        if name == "later":
            return self.reply(429, b"{}", Retry_After="100000")
        if name == "hang":
            time.sleep(20)
        if name == "slow":
            time.sleep(0.2)
        whole = json.dumps(good(request)).encode()
        if name == "drip":
            self.reply(200, b"", length=len(whole))
            for byte in whole:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
            return None
        if name == "truncated":
            self.reply(200, whole[:-10], length=len(whole))
            self.close_connection = True
            return None
        if name == "cut":  # no answer at all
            self.close_connection = True
            return None
        if name == "text":
            return self.reply(200, b"<html>busy</html>")
        if name == "latin":
            return self.reply(200, b'{"choices": [{"text": "\xe9"}]}')
        if name == "deep":
            return self.reply(200, b"[" * 50_000)
        if name == "gzip":
            return self.reply(200, b"\x1f\x8b\x08\0", Content_Encoding="gzip")
        if name == "huge":
            self.reply(200, b"", length=10**10)
            while True:
                self.wfile.write(b" " * 65_536)
        if name in SHAPES:
            return self.reply(200, json.dumps(SHAPES[name]).encode())
        if name == "echo":  # the key as a completion
            key = str(self.headers["Authorization"]).removeprefix("Bearer ")
            return self.reply(200, json.dumps(good(request, text=key)).encode())
        if name == "length":
            return self.reply(200, json.dumps(good(request, finish_reason="length")).encode())
        if name in TEXTS:
            return self.reply(200, json.dumps(good(request, text=TEXTS[name])).encode())
        if name in USAGES:
            told = good(request) | {"usage": {"completion_tokens": USAGES[name]}}
            return self.reply(200, json.dumps(told).encode())
        if name == "usage-missing":
            told = good(request)
            del told["usage"]
            return self.reply(200, json.dumps(told).encode())
        if name == "stopstring":
            return self.reply(200, json.dumps(good(request, text="a3=1\n\na4=2")).encode())
        return self.reply(200, whole)


class Server(ThreadingHTTPServer):
    request_queue_size = (
        256  # connections that wait to be accepted: no fault that was not asked for
    )


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
