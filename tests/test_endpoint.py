"""Tests of the teacher behind a server: a real one, in its own process, that misbehaves on demand.

A problem's text begins with the fault that its row gets (endpoint_server.py).
"""

import asyncio
import contextlib
import json
import logging
import pathlib
import socket
import subprocess
import sys
import time
import types
import urllib.request

import jax
import numpy as np
import pytest
from test_train import run, training_rows

from scope_jax import roles, train
from scope_jax.configlib import load_config
from scope_jax.endpoint import FAILURES, Cache, Endpoint, Wanted, check_url, open_cache, redact
from scope_jax.models.hf import load_tokenizer
from scope_jax.records import POLICY, TEACHER, CorrectionRequests, InputError
from scope_jax.splicing import splice
from scope_jax.teachers import count_tokens, endpoint_teacher

TOKENIZER, (EOS,) = load_tokenizer("scope_jax/tasks/worksheet_models/policy")
U, T, SECRET = 24, 40, "sk-very\\secret/1234"


@contextlib.contextmanager
def started_server():
    script = pathlib.Path(__file__).with_name("endpoint_server.py")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        yield int(server.stdout.readline())
        server.kill()


@pytest.fixture(scope="module")
def port():
    with started_server() as port:
        yield port


@pytest.fixture
def stats(port):
    """What the server was asked since the test began."""

    def read(path="stats"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as reply:
            return json.loads(reply.read())

    read("reset")
    return read


def endpoint(port, cache=None, **options) -> Endpoint:
    options = {"timeout_seconds": 10.0, "retries": 2, "backoff_seconds": 0.01} | options
    return Endpoint(
        f"http://127.0.0.1:{port}/v1", "teacher", lambda text: count_tokens(TOKENIZER, text),
        cache=cache, **options,
    )  # fmt: skip


def ask(client, faults, step="00ff"):
    return client([Wanted(i, f"{fault}|{i}", U) for i, fault in enumerate(faults)], step)


def requests_for(faults, prefix="a1=3\n\na2=7\n\n", budget=U):
    kept = TOKENIZER.encode(prefix, add_special_tokens=False) if isinstance(prefix, str) else prefix
    ids = np.full((len(faults), T), 7, np.int32)
    ids[:, : len(kept)] = kept
    lengths = np.full(len(faults), len(kept), np.int32)
    return CorrectionRequests(
        np.ones((len(faults), 3), np.int32), np.ones((len(faults), 3), bool), ids, lengths,
        np.where([fault is None for fault in faults], 0, budget).astype(np.int32),
        tuple({"problem": f"{fault}|{row}|"} for row, fault in enumerate(faults)),
    )  # fmt: skip


def teach(client, requests, seed=0, **options):
    teacher = endpoint_teacher(
        client, TOKENIZER, lambda problem: problem, policy_eos_id=EOS, max_new_tokens=U, **options
    )
    written = teacher(requests, jax.random.key(seed))
    rows = len(requests.records)
    assert written.ids.shape == written.mask.shape == written.logps.shape == (rows, U)
    assert not written.ids[~written.mask].any() and not (written.stopped & written.unaligned).any()
    counts = {name.removeprefix("teacher/"): n for name, n in written.counts.items()}
    outcomes = ("finished", "unfinished", "alignment_failed", *FAILURES)
    assert set(counts) == {"requests", "cached", "tokens_charged", *outcomes}
    assert sum(counts[name] for name in outcomes) == counts["requests"]
    assert counts["requests"] == (requests.budgets > 0).sum()
    assert counts["finished"] == written.stopped.sum()
    return written, counts


def same(a, b):
    for name in ("ids", "mask", "logps", "stopped", "unaligned"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


# --- All rows are accounted for, and come again after a resume ------------------------------------

FAULTS = {
    "500": "failed_status", "404": "failed_status", "text": "failed_body", "huge": "failed_body",
    "truncated": "failed_body", "text-null": "failed_body", "cut": "failed_connection",
    "hang": "failed_timeout", "drip": "failed_timeout", "length": "unfinished",
    "surrogate": "alignment_failed", "429-once": "finished", "500-once": "finished",
}  # fmt: skip


def test_200_corrections_with_faults_are_accounted_for_and_served_again(port, stats, tmp_path):
    faults = ["ok"] * 200
    for number in range(20):  # 10 %
        faults[10 * number + 1] = list(FAULTS)[number % len(FAULTS)]
    requests, line = requests_for(faults), requests_for(["ok"], "a1=3\n\n").prefix_length[0]
    one = (np.arange(200) % 3 == 0).astype(np.int32)  # these rows keep one line, the others two
    requests = requests.replace(prefix_length=requests.prefix_length - one * line)
    before = requests.prefix_ids.copy()
    options = {"timeout_seconds": 3.0, "retries": 1}
    written, counts = teach(endpoint(port, open_cache(tmp_path, 0), **options), requests)
    expected = [FAULTS.get(fault, "finished") for fault in faults]
    for outcome in {*FAULTS.values(), "finished"}:
        assert counts[outcome] == expected.count(outcome), (outcome, counts)
    assert counts["cached"] == 0 and counts["out_of_time"] == 0

    np.testing.assert_array_equal(requests.prefix_ids, before)
    mask = np.ones((200, T), bool)
    ids, _, source, overflowed = splice(
        requests.prefix_ids, mask, requests.prefix_length, written.ids, written.mask, pad_id=0
    )
    kept = np.arange(T) < requests.prefix_length[:, None]
    np.testing.assert_array_equal(np.asarray(ids)[kept], before[kept])
    assert (np.asarray(source)[kept] == POLICY).all() and not np.asarray(overflowed).any()
    np.testing.assert_array_equal((np.asarray(source) == TEACHER).sum(1), written.mask.sum(1))
    seeds = {body["prompt"].split("|")[1]: body["seed"] for body in stats()["bodies"]}
    for row in np.flatnonzero(written.stopped):
        length = requests.prefix_length[row] + written.mask[row].sum()
        *spliced, end = np.asarray(ids)[row, :length].tolist()
        assert end == EOS
        prefix = "a1=3\n\n" if one[row] else "a1=3\n\na2=7\n\n"
        assert TOKENIZER.decode(spliced) == f"{prefix}a3={seeds[str(row)] % 97}\n\n"

    asked = stats()["requests"]
    again, recounted = teach(endpoint(port, open_cache(tmp_path, 0), **options), requests)
    assert stats()["requests"] == asked  # not one more
    same(written, again)
    assert recounted == counts | {"cached": 200}


def test_failures_come_again_in_their_own_step_only(port, stats, tmp_path):
    requests = requests_for(["500-once", "ok"])
    first, counts = teach(endpoint(port, open_cache(tmp_path, 0), retries=0), requests)
    assert counts["failed_status"] == counts["finished"] == 1
    same(first, teach(endpoint(port, open_cache(tmp_path, 0), retries=0), requests)[0])
    assert stats()["requests"] == 2
    later, counts = teach(endpoint(port, open_cache(tmp_path, 0), retries=0), requests, seed=1)
    assert counts["finished"] == 2 and counts["cached"] == 0 and stats()["requests"] == 4
    assert (later.ids[1] != first.ids[1]).any()  # another attempt is another request
    cache = open_cache(tmp_path, 0)
    known = [json.loads(line) for line in cache.path.read_text().splitlines()]
    failed = next(entry for entry in known if entry["failure"])
    assert cache.get(failed["request"], failed["step"]).failure == "failed_status"
    assert cache.get(failed["request"], "another step") is None


def test_torn_and_foreign_lines_of_the_cache(port, stats, tmp_path):
    requests = requests_for(["ok"] * 5)
    first, _ = teach(endpoint(port, open_cache(tmp_path, 0)), requests)
    path = tmp_path / "teacher_cache.jsonl"
    foreign = [b"\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 50_000 + b"\n"]
    entry = json.loads(path.read_bytes().splitlines()[0])
    for change in ({"text": 3}, {"tokens": -1}, {"failure": "odd"}, {"failure": "failed_body"}):
        foreign.append(json.dumps(entry | change).encode() + b"\n")
    path.write_bytes(b"".join(foreign) + path.read_bytes()[:-7])  # kill -9 in the last write
    cache = open_cache(tmp_path, 0)
    assert cache.ignored == len(foreign)
    again, counts = teach(endpoint(port, cache), requests)
    same(first, again)
    assert counts["cached"] == 4 and stats()["requests"] == 6
    again, counts = teach(endpoint(port, open_cache(tmp_path, 0)), requests)
    same(first, again)
    assert counts["cached"] == 5 and stats()["requests"] == 6
    assert open_cache(tmp_path, 0).ignored == len(foreign)


def test_nothing_is_written_before_the_first_answer(port, tmp_path):
    teach(endpoint(port, open_cache(tmp_path, 3)), requests_for([None]))
    assert not list(tmp_path.iterdir())
    teach(endpoint(port, open_cache(tmp_path, 3)), requests_for(["ok"]))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher_cache.3.jsonl"]


# --- One fault at a time --------------------------------------------------------------------------


def test_each_fault_has_its_reason_and_its_tries(port, stats):
    table = {  # fault: (reason, tries, tokens charged)
        "400": ("failed_status", 1, 0), "401": ("failed_status", 1, 0),
        "302": ("failed_status", 1, 0), "404": ("failed_status", 1, 0),
        "501": ("failed_status", 1, U), "408": ("failed_status", 3, 0),
        "429": ("failed_status", 3, 0), "500": ("failed_status", 3, 3 * U),
        "502": ("failed_status", 3, 3 * U), "503": ("failed_status", 3, 0),
        "cut": ("failed_connection", 3, 3 * U),
    }  # fmt: skip
    for fault in ("text", "latin", "deep", "gzip", "huge", "truncated", "list", "no-choices",
                  "choices-dict", "text-null", "text-number", "text-missing", "null"):  # fmt: skip
        table[fault] = ("failed_body", 3, 3 * U)
    answers = ask(endpoint(port), table)
    tries = {fault: 0 for fault in table}
    for body in stats()["bodies"]:
        tries[body["prompt"].split("|")[0]] += 1
    for (fault, expected), answer in zip(table.items(), answers, strict=True):
        assert (answer.failure, tries[fault], answer.tokens) == expected, fault
        assert answer.text is None and not answer.stopped


def test_what_fails_once_is_asked_again(port, stats):
    faults = ["429-once", "503-once", "500-once", "cut-once", "truncated-once", "text-once"]
    answers = ask(endpoint(port), faults)
    assert all(answer.text and answer.stopped for answer in answers)
    assert stats()["requests"] == 2 * len(faults)


def test_retry_after_is_waited_for_within_the_budget_only(port, stats):
    began = time.monotonic()
    (answer,) = ask(endpoint(port), ["429-once"])
    assert answer.stopped and time.monotonic() - began >= 0.1
    (answer,) = ask(endpoint(port), ["later"])  # in 28 hours
    assert answer.failure == "failed_status" and stats()["requests"] == 3


def test_wrong_token_counts_are_counted_by_our_tokenizer(port):
    faults = ["usage-negative", "usage-huge", "usage-text", "usage-zero", "usage-missing"]
    for answer in ask(endpoint(port), faults):
        assert answer.stopped and answer.tokens == count_tokens(TOKENIZER, answer.text)
    (answer,) = ask(endpoint(port), ["ok"])
    assert answer.tokens == len(answer.text) + 1  # as told


def test_refused_connection_costs_no_tokens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (answer,) = ask(endpoint(free.getsockname()[1]), ["ok"])
    assert answer.failure == "failed_connection" and answer.tokens == 0


def test_no_more_exchanges_at_a_time_than_allowed(port, stats):
    assert all(a.stopped for a in ask(endpoint(port, concurrency=3), ["slow"] * 9))
    assert stats()["most_at_once"] == 3


# --- Budgets --------------------------------------------------------------------------------------


def test_token_budget_is_given_out_in_row_order_and_never_exceeded(port, stats, tmp_path):
    budget = 8 * U + 3
    requests = requests_for(["ok", None, "500"] + ["ok"] * 40)
    client = endpoint(port, open_cache(tmp_path, 0), tokens=budget)
    written, counts = teach(client, requests)
    assert 0 < counts["out_of_budget"] and counts["finished"] > 8  # more than one wave
    assert counts["tokens_charged"] <= budget
    assert written.mask.sum() <= counts["tokens_charged"] - U  # a failure counts in full
    answered = np.flatnonzero(written.stopped)
    assert answered.tolist() == [0, *range(3, 3 + len(answered) - 1)]
    asked, admitted = stats()["requests"], counts["requests"] - counts["out_of_budget"]
    again, recounted = teach(endpoint(port, open_cache(tmp_path, 0), tokens=budget), requests)
    same(written, again)
    assert recounted == counts | {"cached": admitted} and stats()["requests"] == asked


def test_what_fails_counts_as_all_it_may_have_cost(port, stats):
    answers = ask(endpoint(port, tokens=5 * U + 1), ["500", "truncated", "text", "cut"] * 5)
    assert stats()["max_tokens"] <= 5 * U + 1 and stats()["requests"] == 5
    assert sum(answer.tokens for answer in answers) == 5 * U
    assert sum(answer.failure == "out_of_budget" for answer in answers) >= 15


def test_seconds_run_out_for_all_that_is_in_flight_or_waits(port, stats, tmp_path):
    options = {"seconds": 1.5, "concurrency": 2}
    client = endpoint(port, open_cache(tmp_path, 0), **options)
    began = time.monotonic()
    answers = ask(client, ["ok", "hang", "drip", "hang", "drip", "hang"])
    assert time.monotonic() - began < 8  # each of them would take 20 s, or 10 tries of 10
    assert [a.failure for a in answers] == [""] + 5 * ["out_of_time"]
    assert sum(a.tokens for a in answers[1:]) == 2 * U  # of the two in flight
    asked, client = stats()["requests"], endpoint(port, open_cache(tmp_path, 0), **options)
    again = ask(client, ["ok", "hang", "drip", "hang", "drip", "hang"])
    assert [a._replace(cached=False) for a in again] == answers
    assert all(a.cached for a in again) and stats()["requests"] == asked


# --- Text -----------------------------------------------------------------------------------------


def test_hostile_texts_are_never_accepted(port):
    faults = ["nul", "surrogate", "special", "unknown", "long", "megabyte", "empty"]
    written, counts = teach(endpoint(port), requests_for(faults))
    assert written.stopped.tolist() == [False] * 6 + [True]
    assert written.unaligned.tolist() == [True] * 4 + [False] * 3
    assert counts["failed_body"] == counts["unfinished"] == 1  # the megabyte; the long one
    assert written.ids[6].tolist() == [EOS] + [0] * (U - 1)  # the teacher had nothing to add


def test_prefix_without_exact_text_is_not_sent(port, stats):
    for prefix in ([5, EOS, 6], [0], [EOS]):
        written, counts = teach(endpoint(port), requests_for(["ok"], prefix=prefix))
        assert written.unaligned.tolist() == [True] and counts["alignment_failed"] == 1
    assert stats()["requests"] == 0


def test_continuation_and_its_end_must_fit_the_budget(port):
    for budget, stopped in ((7, True), (4, True), (24, True)):  # the server heeds max_tokens
        written, _ = teach(endpoint(port), requests_for(["ok"], budget=budget))
        assert written.stopped.tolist() == [stopped] and written.mask.sum() <= budget
    written, counts = teach(endpoint(port), requests_for(["stopstring"], budget=5))
    assert counts["unfinished"] == 1 and written.mask.sum() == 5  # longer than asked for


def test_stop_string_ends_a_text_and_is_kept(port):
    written, _ = teach(endpoint(port), requests_for(["stopstring"]), stop=("\n\n",))
    assert written.stopped.all()
    assert TOKENIZER.decode(written.ids[0][written.mask[0]].tolist()) == "a3=1\n\n"


# --- The key --------------------------------------------------------------------------------------


def test_the_key_is_sent_and_kept_nowhere(port, stats, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    client = endpoint(port, open_cache(tmp_path, 0), api_key=SECRET)
    answers = ask(client, ["401", "500", "echo", "ok", "text"])
    assert stats()["authorized"] == stats()["requests"] > 0
    assert [a.failure for a in answers] == [
        "failed_status", "failed_status", "failed_body", "", "failed_body"
    ]  # fmt: skip
    kept = (tmp_path / "teacher_cache.jsonl").read_text()
    assert "401 bad: Bearer [key]" in caplog.text or "500 bad: Bearer [key]" in caplog.text
    for text in (kept, caplog.text, repr(answers), json.dumps(client.options), repr(client)):
        for form in (SECRET, json.dumps(SECRET)[1:-1], repr(SECRET)[1:-1], "secret/1234"):
            assert form not in text
    assert redact(f"a {json.dumps(SECRET)} {SECRET}", SECRET) == 'a "[key]" [key]'
    assert all(a.stopped for a in ask(endpoint(port), ["ok"]))
    assert stats()["authorized"] == stats()["requests"] - 1  # no key, no header


# --- In a run -------------------------------------------------------------------------------------


def options_of(**teacher):
    config = load_config("worksheet:n=3,runlocal", [])
    config.teacher.update({"kind": "endpoint", "path": "", "model": "teacher"} | teacher)
    return config


def load(config, workdir=None):
    return roles.load_endpoint(config, types.SimpleNamespace(tokenizer=TOKENIZER), workdir)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000/v1", "ftp://a/v1", "http:///v1", "http://a:99999/v1", "http://[a/v1"]
    + ["http://a b/v1", "http://é/v1", "http://a/v1\n"],
)
def test_bad_url_is_one_line(url):
    with pytest.raises(InputError, match=r"^teacher.url must be like http://localhost:8000/v1$"):
        load(options_of(url=url))


@pytest.mark.parametrize("secret", ["user:pass12@a", "pass12@a", "a/v1?key=pass12", "a/#pass12"])
def test_url_with_a_secret_is_refused_without_showing_it(secret):
    with pytest.raises(InputError, match="teacher.url must have no user") as error:
        load(options_of(url=f"http://{secret}"))
    assert "pass12" not in str(error.value)


def test_bad_options_are_one_line(monkeypatch):
    url = "http://localhost:1/v1"
    for name, value in {
        "timeout_seconds": 0.0, "retries": -1, "concurrency": 0, "tokens_per_step": -1,
        "seconds_per_step": -1.0,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"^teacher.{name} must be at least"):
            load(options_of(url=url, **{name: value}))
    with pytest.raises(InputError, match="teacher.model must name"):
        load(options_of(url=url, model=""))
    with pytest.raises(InputError, match="must be the NAME of an environment") as error:
        load(options_of(url=url, api_key_env="sk-abcdef"))
    assert "sk-abcdef" not in str(error.value)
    for key in ("short", "with space in it", "zweiunddreißig"):
        monkeypatch.setenv("A_KEY", key)
        with pytest.raises(InputError, match=r"the API key in \$A_KEY must be") as error:
            load(options_of(url=url, api_key_env="A_KEY"))
        assert key not in str(error.value)
    assert check_url("https://[::1]:8000/v1/completions") == "https://[::1]:8000/v1/completions"


def test_processes_and_attempts_share_the_budgets(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(roles, "endpoint_teacher", lambda ask, *_, **__: found.append(ask))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    config = options_of(url="http://a/v1", tokens_per_step=803, seconds_per_step=50.0)
    config.correct.attempts = 2
    load(config, tmp_path)
    assert (found[0].tokens, found[0].seconds, found[0].concurrency) == (100, 25.0, 16)
    assert isinstance(found[0].cache, Cache)
    assert found[0].cache.path == tmp_path / "teacher_cache.2.jsonl"
    load(options_of(url="http://a/v1"))
    assert found[1].tokens is None and found[1].cache is None
    config.correct.scope, config.correct.max_rounds = "step", 5  # calls of an attempt
    load(config, tmp_path)
    assert (found[2].tokens, found[2].seconds) == (20, 5.0)


def run_with(port, workdir, *overrides):
    teacher = {"kind": "endpoint", "path": "", "model": "far", "url": f"http://127.0.0.1:{port}/v1"}
    options = [f"--config.teacher.{name}={value}" for name, value in teacher.items()]
    options += ["--config.eval.ood=False", *overrides]
    run(workdir, *options, config="worksheet:n=3,runlocal")


def test_worksheet_trains_with_a_teacher_behind_a_server(port, stats, tmp_path, capsys):
    run_with(port, tmp_path / "run")
    assert f"teacher: far at http://127.0.0.1:{port}/v1" in capsys.readouterr().out
    steps = training_rows(tmp_path / "run")
    assert len(steps) == 2 and all(np.isfinite(row["loss"]) for row in steps)
    assert stats()["requests"] == sum(row["corrections/made"] for row in steps) > 0


def test_a_run_goes_on_with_the_answers_it_had_though_the_server_is_gone(tmp_path, monkeypatch):
    options = [
        "--config.total_steps=3",
        "--config.checkpoint.every=2",
        "--config.correct.accept=any",
    ]
    learn, calls = train.learn, []

    def killed_in_step_3(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return learn(*args)

    with started_server() as port:
        run_with(port, tmp_path / "calm", *options)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(train, "learn", killed_in_step_3)
            run_with(port, tmp_path / "run", *options)
    run_with(port, tmp_path / "run", *options)
    of_process = ("seconds/", "tokens_per_s/", "mfu/", "hbm_peak_gib", "recompiles")
    of_process += ("teacher/cached",)
    calm, resumed = (
        [{k: v for k, v in row.items() if not k.startswith(of_process)} for row in training_rows(d)]
        for d in (tmp_path / "calm", tmp_path / "run")
    )
    assert resumed == calm and len(calm) == 3
    assert calm[2]["corrections/accepted"] > 0 and calm[2]["teacher/finished"] > 0
    last = training_rows(tmp_path / "run")[2]
    assert last["teacher/cached"] == last["teacher/requests"] > 0


def test_a_notebook_whose_event_loop_runs_can_ask(port):
    async def cell():
        return ask(endpoint(port), ["ok", "404"])

    assert [answer.failure for answer in asyncio.run(cell())] == ["", "failed_status"]
