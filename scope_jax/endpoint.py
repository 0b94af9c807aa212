"""Texts continued by an OpenAI-compatible server (vLLM, SGLang): client, budgets and cache.

Whatever the server does, a call returns one `Answer` for every request, in time. Randomness (seeds,
jitter) is a function of the request, and what was answered or failed is kept in a file, so that a
resumed run goes the same way.

Requests are sent in waves. A wave takes requests in order for as long as their `max_tokens` fit in
what is left of the budget; what they did not use is given back when the wave is done.
"""

import asyncio
import dataclasses
import email.utils
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx2 as httpx

from scope_jax.records import InputError

# Why a request has no text.
FAILURES = ("failed_timeout", "failed_status", "failed_body", "failed_connection")
FAILURES += ("out_of_budget", "out_of_time")
RETRIED = (408, 429, 500, 502, 503, 504)
REFUSED = (429, 503)  # nothing was generated; so too with the other 4xx
MAX_WAIT = 30.0  # seconds of backoff
_LOG = logging.getLogger(__name__)
# They log headers, and a server may send the key back in one.
for _name in ("httpx2", "httpcore2"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Wanted(NamedTuple):
    """A text to be continued."""

    row: int  # its seed is a function of the step's key and this
    text: str
    max_tokens: int


class Answer(NamedTuple):
    """What became of a request."""

    text: str | None = None
    stopped: bool = False  # the server says that it ended by itself
    tokens: int = 0  # counted against the budget, over all tries
    failure: str = ""  # of FAILURES, where there is no text
    cached: bool = False


class _Try(NamedTuple):
    """One exchange with the server."""

    answer: Answer
    again: bool = False
    wait: float = 0.0  # seconds that the server asks for


@dataclasses.dataclass
class _Budget:
    """Tokens that may still be asked for; None = no limit."""

    free: int | None

    def take(self, tokens: int) -> bool:
        if self.free is None:
            return True
        if tokens > self.free:
            return False
        self.free -= tokens
        return True

    def give_back(self, tokens: int) -> None:
        if self.free is not None:
            self.free += tokens


class Cache:
    """Answers and failures in an append-only file, a JSON object per line, found by request.

    An answer is reused whenever the same request comes again; a failure only in the step (the key)
    that it happened in. The last of several lines on a request counts.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.ignored = path, 0  # `ignored`: lines of another shape
        self._places: dict[str, int] = {}  # where a request's line begins; texts stay in the file
        self._size, self._new = 0, []
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # torn: the run was killed in the middle of it
                if (entry := _read_entry(line)) is None:
                    self.ignored += 1
                else:
                    self._places[entry["request"]] = self._size
                self._size += len(line)
        if self.ignored:
            _LOG.warning("%s: %d lines of another shape were ignored", path, self.ignored)

    def get(self, request: str, step: str) -> Answer | None:
        """Returns what is known of a request (its sha256) that is asked in a step."""
        if request not in self._places:
            return None
        with self.path.open("rb") as file:
            file.seek(self._places[request])
            entry = _read_entry(file.readline())
        if entry is None or (entry["failure"] and entry["step"] != step):
            return None
        return Answer(
            **{k: entry[k] for k in ("text", "stopped", "tokens", "failure")}, cached=True
        )

    def add(self, request: str, step: str, answer: Answer) -> None:
        """Keeps an answer for the next `write`."""
        entry = {"request": request, "step": step, **answer._asdict()}
        del entry["cached"]
        self._new.append((request, json.dumps(entry, sort_keys=True).encode() + b"\n"))

    def write(self) -> None:
        """Appends the new answers, past any torn line, and waits for the disk."""
        if not self._new:
            return
        with self.path.open("ab") as file:
            file.truncate(self._size)
            for request, line in self._new:
                file.write(line)
                self._places[request] = self._size
                self._size += len(line)
            file.flush()
            os.fsync(file.fileno())
        self._new.clear()


class Endpoint:
    """Asks a server's /v1/completions to continue texts.

    Args:
      url: up to and with /v1; see `check_url`.
      model: its name there.
      count_tokens: text -> tokens, where the server does not say.
      api_key: "" = no Authorization header; see `read_api_key`.
      temperature, top_p: of sampling.
      timeout_seconds: of one exchange, from connecting to the answer's last byte.
      retries: tries after the first one.
      concurrency: exchanges at a time.
      tokens, seconds: budget of a call; None = no limit.
      cache: None = nothing is kept.
      backoff_seconds: before the first retry; doubles with each.
    """

    def __init__(
        self, url: str, model: str, count_tokens: Callable[[str], int], *, api_key: str = "",
        temperature: float = 1.0, top_p: float = 1.0, timeout_seconds: float = 120.0,
        retries: int = 3, concurrency: int = 64, tokens: int | None = None,
        seconds: float = 600.0, cache: Cache | None = None, backoff_seconds: float = 0.5,
    ):  # fmt: skip
        self.url, self.count_tokens, self.cache = check_url(url), count_tokens, cache
        self.options = {
            "model": model, "temperature": temperature, "top_p": top_p, "n": 1, "stream": False,
            "add_special_tokens": False,  # vLLM's: chat templates write their own
        }  # fmt: skip
        self.timeout_seconds, self.retries, self.concurrency = timeout_seconds, retries, concurrency
        self.tokens, self.seconds, self.backoff_seconds = tokens, seconds, backoff_seconds
        self._key, self._told = api_key, set()
        # A compressed answer could be any size: it is asked for and read as it is.
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def __call__(self, wanted: list[Wanted], step: str) -> list[Answer]:
        """Returns an answer per request.

        Args:
          step: hex of the key that the requests' seeds come from.
        """
        answers = _run(self._ask_all(wanted, step)) if wanted else []
        if self.cache is not None:
            self.cache.write()
        return answers

    async def _ask_all(self, wanted: list[Wanted], step: str) -> list[Answer]:
        end = asyncio.get_running_loop().time() + self.seconds
        bodies = [self._body(request, step) for request in wanted]
        names = [hashlib.sha256(body).hexdigest() for body in bodies]
        answers, waiting = [Answer() for _ in wanted], list(range(len(wanted)))
        budget, slots = _Budget(self.tokens), asyncio.Semaphore(self.concurrency)
        # Neither proxies nor .netrc: nothing but the config says where the key and texts go.
        async with httpx.AsyncClient(
            headers=self._headers, timeout=None, trust_env=False,
            limits=httpx.Limits(max_connections=None),
        ) as client:  # fmt: skip
            while waiting:
                wave, live = [], []
                while waiting and budget.take(wanted[waiting[0]].max_tokens):
                    wave.append(waiting.pop(0))
                if not wave:  # it does not fit though nothing else is reserved
                    answers[waiting.pop(0)] = Answer(failure="out_of_budget")
                for i in wave:
                    known = self.cache.get(names[i], step) if self.cache else None
                    if known is None:
                        live.append(i)
                    else:
                        answers[i] = known
                        budget.give_back(wanted[i].max_tokens - known.tokens)
                asked = [
                    self._ask(client, slots, bodies[i], names[i], wanted[i].max_tokens, budget, end)
                    for i in live
                ]
                for i, answer in zip(live, await asyncio.gather(*asked), strict=True):
                    answers[i] = answer
                    if self.cache is not None:
                        self.cache.add(names[i], step, answer)
        return answers

    def _body(self, request: Wanted, step: str) -> bytes:
        """Returns what is sent; its sha256 names the request."""
        digest = hashlib.sha256(f"{step}:{request.row}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big") >> 1  # of 31 bits
        own = {"prompt": request.text, "max_tokens": request.max_tokens, "seed": seed}
        return json.dumps(self.options | own, sort_keys=True).encode()

    async def _ask(
        self, client, slots, body: bytes, name: str, max_tokens: int, budget: _Budget, end: float
    ) -> Answer:
        """Returns the answer to a request whose tokens are reserved; gives back what is not used.

        An exchange of unknown outcome counts as all its tokens, and every retry reserves its own.
        """
        clock = asyncio.get_running_loop().time
        answer, used, reserved, sent = Answer(failure="out_of_time"), 0, max_tokens, False
        try:
            async with asyncio.timeout_at(end), slots:
                for attempt in range(self.retries + 1):
                    if clock() >= end:
                        raise TimeoutError
                    if attempt:
                        if not budget.take(max_tokens):
                            break
                        reserved = max_tokens
                    sent = True
                    answer, again, wait = await self._exchange(client, body, max_tokens)
                    sent, reserved = False, 0
                    used += answer.tokens
                    budget.give_back(max_tokens - answer.tokens)
                    jitter = hashlib.sha256(f"{name}:{attempt}".encode()).digest()[0] / 256
                    backoff = self.backoff_seconds * 2**attempt * (0.5 + jitter)
                    wait = max(wait, min(backoff, MAX_WAIT))
                    if not again or attempt == self.retries or clock() + wait >= end:
                        break
                    await asyncio.sleep(wait)
        except TimeoutError:
            answer = Answer(failure="out_of_time")
            used += max_tokens if sent else 0
            budget.give_back(0 if sent else reserved)
        return answer._replace(tokens=used)

    async def _exchange(self, client, body: bytes, max_tokens: int) -> _Try:
        content, broken = bytearray(), ""
        most = 256 * max_tokens + 65_536  # bytes; a real token takes some dozens at worst
        try:
            async with (
                asyncio.timeout(self.timeout_seconds),
                client.stream("POST", self.url, content=body) as response,
            ):
                try:
                    async for chunk in response.aiter_raw():
                        content += chunk
                        if len(content) > most:
                            broken = "too long"
                            break
                except httpx.HTTPError as error:
                    broken = type(error).__name__
        except TimeoutError:
            return self._failed("timeout", f"{self.timeout_seconds} s", max_tokens, again=True)
        except httpx.ConnectError as error:
            return self._failed("connection", type(error).__name__, 0, again=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return self._failed("connection", type(error).__name__, max_tokens, again=True)
        status = response.status_code
        if status != 200:
            tokens = 0 if status in REFUSED or status < 500 else max_tokens
            wait = retry_after(response.headers.get("Retry-After", ""))
            why = f"{status} {content.decode(errors='replace')}"
            return self._failed("status", why, tokens, again=status in RETRIED, wait=wait)
        parsed = "" if broken else read_completion(bytes(content))
        if broken or isinstance(parsed, str):
            return self._failed("body", broken or str(parsed), max_tokens, again=True)
        text, stopped, told = parsed
        if self._key and self._key in text:
            return self._failed("body", "it holds the API key", max_tokens, again=False)
        plain = type(told) is int and (0 < told <= max_tokens or (told == 0 and not text))
        tokens = told if plain else self.count_tokens(text)
        return _Try(Answer(text, stopped, min(tokens, max_tokens)))

    def _failed(self, kind: str, why: str, tokens: int, *, again: bool, wait=0.0) -> _Try:
        """Says what went wrong, once of each kind, without the key."""
        if kind not in self._told:
            self._told.add(kind)
            why = redact(why, self._key)[:200]
            _LOG.warning("teacher endpoint: %s: %r; more of these are only counted", kind, why)
        return _Try(Answer(failure=f"failed_{kind}", tokens=tokens), again, wait)


def _run(work: Coroutine) -> Any:
    """Returns what `work` does, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, work).result()


def read_completion(content: bytes) -> tuple[str, bool, Any] | str:
    """Returns (text, stopped, completion tokens as told or None) of a body, or what is wrong."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return "no JSON"
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        return "no choices[0].text"
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    return text, choice.get("finish_reason") == "stop", usage.get("completion_tokens")


def retry_after(header: str) -> float:
    """Returns the seconds of a Retry-After header, a number or a date; 0 where it is neither.

    >>> retry_after("2"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (2.0, 0.0, 0.0)
    """
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", header.strip(), re.ASCII):
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return 0.0


def redact(text: str, key: str) -> str:
    """Returns a text for people without the API key, however it is escaped there.

    >>> redact("401 Bearer sk-secret1", "sk-secret1")
    '401 Bearer [key]'
    """
    forms = {key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key, safe="")} if key else ()
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "[key]")
    return text


def check_url(url: str) -> str:
    """Returns the address that completions are asked from.

    >>> check_url("http://localhost:8000/v1/")
    'http://localhost:8000/v1/completions'

    Raises:
      InputError: not http(s), or with a name, password or query: they would end up in files.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        secret = "@" in parts.netloc or "?" in url or "#" in url
    except ValueError:
        sound = secret = False
    if secret:
        raise InputError(
            "teacher.url must have no user, password or query: put a key into the environment "
            "variable that teacher.api_key_env names"
        )
    if not sound or not re.fullmatch(r"[!-~]+", url):
        raise InputError("teacher.url must be like http://localhost:8000/v1")
    return url.rstrip("/").removesuffix("/completions") + "/completions"


def read_api_key(name: str) -> str:
    """Returns the API key in an environment variable; "" where it is unset or no name is given.

    Raises:
      InputError: `name` cannot be one (it may be the key itself: it is not repeated), or the key is
      no key.
    """
    if not name:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise InputError(
            "teacher.api_key_env must be the NAME of an environment variable, in capitals"
        )
    key = os.environ.get(name, "").strip()
    if key and not re.fullmatch(r"[!-~]{8,}", key):
        raise InputError(
            f"the API key in ${name} must be at least 8 visible ASCII characters; leave it empty "
            "for a server that asks for none"
        )
    return key


def open_cache(workdir: pathlib.Path, process: int) -> Cache:
    """Returns the cache of a run's process, WORKDIR/teacher_cache[.PROCESS].jsonl."""
    return Cache(workdir / f"teacher_cache{f'.{process}' if process else ''}.jsonl")


def _read_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    kinds = {"request": str, "step": str, "failure": str, "stopped": bool, "tokens": int}
    sound = all(type(entry.get(name)) is kind for name, kind in kinds.items()) and (
        entry["tokens"] >= 0
        and entry["failure"] in ("", *FAILURES)
        and isinstance(entry.get("text"), str) != bool(entry["failure"])
    )
    return entry if sound else None
