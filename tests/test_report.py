"""Tests of the report: what goes into its data, and the page itself in a headless Chromium."""

import base64
import gzip
import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from scope_jax import report
from scope_jax.metrics import rollout_records
from scope_jax.records import PAD, POLICY, TEACHER, InputError
from scope_jax.report import (
    curve,
    gather,
    main,
    read_run,
    shown_record,
    thin,
    to_json,
    write_report,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
]  # fmt: skip
# Each would raise a dialog, set window.hacked or ask for a file, were it anything but text.
RUN = "window.hacked=1;alert(1)"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</SCRIPT ><script>{RUN}//",
    f"<!--<script>{RUN}</script>-->",
    f"--><script>{RUN}</script>",
    f"<![CDATA[<script>{RUN}</script>]]>",
    f"<img src=x onerror={RUN}>",
    f'<img src="x" onerror="{RUN}">',
    f"<image/src/onerror={RUN}>",
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"<svg/onload={RUN}//",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<svg><a xlink:href='javascript:{RUN}'>x</a>",
    f"<body onload={RUN}>",
    f"<iframe src='javascript:{RUN}'></iframe>",
    "<iframe src=http://a.test/></iframe>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'>",
    f"<object data='javascript:{RUN}'>",
    "<embed src=http://a.test/x.swf>",
    "<link rel=stylesheet href=http://a.test/x.css>",
    "<style>@import 'http://a.test/x.css';</style>",
    "<style>*{background:url(http://a.test/x)}</style>",
    "<base href=http://a.test/>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<meta http-equiv=refresh content='0;url=http://a.test/'>",
    f"<a href='javascript:{RUN}'>x</a>",
    f"<form action='javascript:{RUN}'><button>x</button></form>",
    f"<input autofocus onfocus={RUN}>",
    f"<details open ontoggle={RUN}>x</details>",
    f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>",
    f"<marquee onstart={RUN}>x</marquee>",
    f"<div style='x:expression({RUN})'>",
    f"<math><mtext></mtext><script>{RUN}</script></math>",
    f"<template><script>{RUN}</script></template>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>",
    f"<textarea></textarea><script>{RUN}</script>",
    f"</textarea><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f'"><script>{RUN}</script>',
    f"'><script>{RUN}</script>",
    f"'-{RUN}-'",
    f'";{RUN};//',
    f"';{RUN};//",
    f"`${{{RUN}}}`",
    f"${{{RUN}}}",
    f"{{{{constructor.constructor('{RUN}')()}}}}",
    f'\\";{RUN}//',
    f"\\u003cscript>{RUN}</script>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"&#60;script&#62;{RUN}",
    f"%3Cscript%3E{RUN}%3C/script%3E",
    f"<scr\x00ipt>{RUN}</scr\x00ipt>",
    f"<script\x0c>{RUN}</script>",
    f"<script\n>{RUN}</script\n>",
    f"\u2028{RUN}\u2029",
    f"\u202e<script>{RUN}</script>",
    f"\ufeff<script>{RUN}</script>",
    f"+ADw-script+AD4-{RUN}+ADw-/script+AD4-",
    f"<xss id=x tabindex=1 onfocus={RUN}>",
    f"<p onpointerover={RUN}>hover</p>",
    '{"__proto__":{"hidden":true}}',
    "__proto__",
    "@@DATA@@",
    "@@ROLLOUTS@@",
    "\\1 \\g<0>",
    "\ud800",
    "x\ud83d",
    "<?php echo 1 ?>",
    "<% 1 %>",
    f"javascript:{RUN}",
    "data:text/html,<script>alert(1)</script>",
]


class Characters:
    """A tokenizer whose ids are code points."""

    @staticmethod
    def decode(ids) -> str:
        return "".join(map(chr, ids))


def record(step=1, problem="1+1?", text="a\nb\n", **more):
    return {
        "step": step, "id": f"id {problem}", "problem": problem, "gold": "2", "completion": text,
        "reward": 0.0, "finished": True, "token_chars": [1] * len(text),
    } | more  # fmt: skip


def repaired(**more):
    """Two steps, the second one wrong and written anew."""
    repair = {
        "kept": 2, "tokens": ["c", "\n"], "source": [[POLICY, 2], [TEACHER, 2]],
        "advantages": [[0.75, 4]], "logps_after": [-0.25, -0.5, -1.0, -2.0],
    }  # fmt: skip
    scores = {"step_ends": [2, 4], "step_scores": [0.9, 0.1], "first_error": 1}
    texts = {"kept_prefix": "a\n", "correction": "c\n", "reward_after": 1.0}
    return record(repair=repair, steps=["a\n", "b\n"], logps=[-0.5] * 4, **scores, **texts, **more)


def make_workdir(path: pathlib.Path, records, rows=None) -> pathlib.Path:
    (path / "rollouts").mkdir(parents=True)
    if rows is None:
        rows = [{"step": s, "reward": s / 10, "seconds/step": 1.0} for s in range(1, 11)]
        rows += [{"step": s, "eval/pass@1": s / 20, "eval/k": 8.0} for s in (0, 10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"reward": {"solved_at": 1.0}, "locate": {"tau": 0.5}, "name": path.name}
    (path / "config.json").write_text(json.dumps(config))
    for step, of_step in itertools.groupby(records, lambda r: r["step"]):
        text = "".join(json.dumps(one) + "\n" for one in of_step)
        (path / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    return path


def parts_of(page: pathlib.Path) -> tuple[dict, dict]:
    """Returns (data, rollouts) as the page holds them, by means that know nothing of report.py."""
    text = page.read_text()
    data = json.loads(re.search('id="data">(.*?)</script>', text)[1])
    rollouts = re.search('id="rollouts">(.*?)</script>', text)[1]
    unpacked = gzip.decompress(base64.b64decode(rollouts)) if data["packed"] else rollouts
    return data, json.loads(unpacked)


# ------------------------------------------------------------------------------ data


@pytest.mark.parametrize("plain", [False, True])
def test_the_page_holds_what_the_workdir_holds(tmp_path, plain):
    records = [repaired(), record(problem="2+2?", reward=1.0, advantages=[[0.5, 4]]), record(2)]
    workdir = make_workdir(tmp_path / "run", records)
    assert write_report(workdir, plain=plain) == workdir / "report.html"
    data, found = parts_of(workdir / "report.html")
    first, second, third = found["rollouts"]
    assert found["problems"] == [["id 1+1?", "1+1?", "2"], ["id 2+2?", "2+2?", "2"]]
    assert first["tokens"] == ["a", "\n", "b", "\n"] and first["ends"] == [2, 4]
    assert (first["scores"], first["first_error"]) == ([0.9, 0.1], 1)
    assert first["repair"]["tokens"] == ["c", "\n"] and first["repair"]["kept"] == 2
    assert first["repair"]["source"] == [[POLICY, 2], [TEACHER, 2]]
    assert (first["repair"]["advantages"], first["repair"]["reward"]) == ([[0.75, 4]], 1.0)
    assert second["advantages"] == [[0.5, 4]] and second["reward"] == 1.0
    assert [(r["problem"], r["group"], r["step"]) for r in (first, second, third)] == [
        (0, 0, 1), (1, 1, 1), (0, 0, 2)
    ]  # fmt: skip
    charts = {chart["title"]: chart["series"] for chart in data["charts"]}
    assert charts["pass@1, held out"][0]["points"] == [[0, 0.0], [10, 0.5]]
    assert charts["Reward in training"][0]["points"][2] == [3, 0.3]


def test_lines_of_runs_before_there_were_tokens_are_read():
    old = {
        "step": 3, "id": "a", "problem": "p", "gold": "g", "completion": "ab\ncd\nef",
        "reward": 0.0, "finished": True, "steps": ["ab\n", "cd\n", "ef"],
        "step_scores": [0.9, 0.2, 0.8], "first_error": 1, "kept_prefix": "ab\n",
        "correction": "xy\nz", "reward_after": 1.0,
    }  # fmt: skip
    shown = shown_record(old)
    assert shown["tokens"] == ["ab\n", "cd\n", "ef"] and shown["ends"] == [1, 2, 3]
    repair = {"kept": 1, "tokens": ["xy\nz"], "source": [[POLICY, 1], [TEACHER, 1]], "reward": 1.0}
    assert shown["repair"] == repair
    plain = {key: old[key] for key in ("step", "id", "problem", "gold", "completion", "reward")}
    assert shown_record(plain)["tokens"] == ["ab\ncd\nef"]
    whole = shown_record(plain | {"kept_prefix": "", "correction": "q", "reward_after": 0.0})
    assert (whole["repair"]["kept"], whole["repair"]["source"]) == (0, [[TEACHER, 1]])


def test_what_cannot_be_read_is_left_out_and_said(tmp_path):
    workdir = make_workdir(tmp_path / "run", [record(), record(problem="q")])
    file = workdir / "rollouts" / "step_000001.jsonl"
    bad = [
        "{", "[1]", "null", "[" * 5000, json.dumps(record() | {"token_chars": [1]}),
        json.dumps(record() | {"step_ends": [3, 2]}), json.dumps(record() | {"step": "<b>"}),
        json.dumps(repaired() | {"repair": {"kept": 99, "tokens": [], "source": []}}),
        json.dumps({"step": 1}), json.dumps(record() | {"advantages": 3}),
    ]  # fmt: skip
    file.write_text(file.read_text() + "\n".join(bad) + "\n")
    metrics = workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 11, "rew\n')
    run = read_run(workdir)
    assert len(run["records"]) == 2 and len(run["rows"]) == 12
    assert run["unreadable"][-1] == f"and {len(bad) + 1 - 5} more"
    write_report(workdir)
    assert parts_of(workdir / "report.html")[0]["runs"][0]["unreadable"] == run["unreadable"]


def test_numbers_json_cannot_hold_become_nothing(tmp_path):
    odd = '{"step": 1, "reward": NaN, "loss": Infinity, "entropy": 1e999, "grad_norm": "x"}'
    workdir = make_workdir(tmp_path / "run", [], rows=[])
    (workdir / "metrics.jsonl").write_text(odd + '\n{"step": 2, "reward": 0.5}\n')
    line = json.dumps(record()).replace('"reward": 0.0', '"reward": NaN')
    (workdir / "rollouts" / "step_000001.jsonl").write_text(line + "\n")
    write_report(workdir)
    data, found = parts_of(workdir / "report.html")
    assert [c["series"][0]["points"] for c in data["charts"]] == [[[2, 0.5]]]
    assert "reward" not in found["rollouts"][0]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_place_in_the_page(tmp_path, text):
    records = [record(text=text, problem=text, gold=text), repaired()]
    workdir = make_workdir(tmp_path / "run", records)
    clean = make_workdir(tmp_path / "clean", [record(), repaired()])
    tags = lambda path: re.findall("<[^>]*>?", path.read_text())  # noqa: E731
    page = write_report(workdir, plain=True)
    _, found = parts_of(page)
    assert found["problems"][0][1] == text
    assert "".join(found["rollouts"][0]["tokens"]) == text
    # No "<" more than in the page of a run that wrote nothing of the kind.
    assert len(tags(page)) == len(tags(write_report(clean, plain=True)))


def test_json_in_html_holds_no_markup():
    for text in HOSTILE:
        assert not set(to_json({text: [text]})) & set("<>&")
        assert json.loads(to_json({text: [text]})) == {text: [text]}


def test_a_curve_is_averaged_to_few_points_and_keeps_its_mean():
    values = np.random.default_rng(0).random(1000)
    rows = [{"step": i, "x": float(v)} for i, v in enumerate(values)]
    points = curve(rows, "x", max_points=100)
    assert len(points) == 100 and points[0][0] == np.mean(range(10))
    for (_, value), part in zip(points, values.reshape(100, 10), strict=True):
        assert value == pytest.approx(part.mean(), rel=1e-4)
    repairs = [{"step": 1, "corrections/made": 4, "corrections/accepted": 3}]
    repairs += [{"step": 2, "corrections/made": 0, "corrections/accepted": 0}]
    assert curve(repairs, "corrections/accepted_share") == [[1, 3 / 4]]


def test_a_page_stays_small_and_says_what_is_left_out(tmp_path):
    letters = np.random.default_rng(0).integers(97, 123, (40, 500))
    texts = ["".join(map(chr, row)) for row in letters]
    records = [record(step, text=text) for step, text in enumerate(texts, 1)]
    workdir = make_workdir(tmp_path / "run", records)
    size = len(re.search('id="rollouts">(.*?)<', write_report(workdir).read_text())[1])
    page = write_report(workdir, max_bytes=size // 3)
    data, found = parts_of(page)
    steps = [rollout["step"] for rollout in found["rollouts"]]
    assert 5 < len(steps) < 14 and steps[-1] == 40 and data["left_out"] == 40 - len(steps)
    assert len(set(np.diff(steps))) == 1  # evenly
    assert [found["problems"][r["problem"]][1] for r in found["rollouts"]] == ["1+1?"] * len(steps)
    one_step = make_workdir(tmp_path / "one", [record(1, text=text) for text in texts])
    assert 0 < len(parts_of(write_report(one_step, max_bytes=size // 3))[1]["rollouts"]) < 20


def test_thinning_is_even_and_keeps_the_last():
    for n, share in itertools.product((0, 1, 2, 7, 100), (1.0, 0.5, 0.3, 0.01)):
        kept = thin(range(n), share)
        assert len(kept) <= max(1, n * share + 1) and kept[-1:] == list(range(n))[-1:]
        assert len(set(np.diff(kept))) <= 1


def test_groups_of_old_runs_are_neighbours_with_one_problem():
    shown = [{"step": s, "problem": [p, p, "g"]} for s, p in ["1a", "1a", "1b", "1a", "2a"]]
    found, problems = gather([shown, shown[:1]])
    assert [r["group"] for r in found] == [0, 0, 1, 2, 0, 0]
    assert [r["run"] for r in found] == [0, 0, 0, 0, 0, 1]
    assert problems == [["a", "a", "g"], ["b", "b", "g"]]


def test_records_of_the_writer_come_out_token_by_token():
    ids = np.array([[ord(c) for c in "ab\ncd"], [ord(c) for c in "ab\nxy"]])
    rows = {
        "record": np.array([0, 0]), "ids": ids, "mask": np.ones_like(ids, bool),
        "rewards": np.array([0.0, 1.0]), "finished": np.ones(2, bool), "logps": -np.ones((2, 5)),
    }  # fmt: skip
    fixed = {
        "ids": np.array([[ord(c) for c in "ab\nz"] + [0]]), "rewards": np.ones(1),
        "source": np.array([[POLICY] * 3 + [TEACHER, PAD]], np.int8),
    }  # fmt: skip
    ends, mask, scores = np.array([[3, 5]] * 2), np.ones((2, 2), bool), np.array([[0.9, 0.1]] * 2)
    trace = (ends, mask, scores, np.array([1, -1]), np.array([0]), np.array([True]), fixed)
    trained = {
        "record": rows["record"], "ids": np.array([fixed["ids"][0], ids[1]]),
        "mask": np.array([[True] * 4 + [False], [True] * 5]), "row_mask": np.ones(2, bool),
        "source": np.array([fixed["source"][0], [POLICY] * 5]),
        "advantages": np.array([[0.5] * 3 + [0.25, 0.0], [-0.5] * 5]),
    }  # fmt: skip
    problem = {"id": "a", "problem": "p", "gold": "g"}
    made = rollout_records(3, rows, trace, [problem], Characters, 1, trained)
    one, two = (shown_record(json.loads(json.dumps(r))) for r in made)
    assert one["tokens"] == list("ab\ncd") and one["repair"]["tokens"] == ["z"]
    assert one["repair"]["kept"] == 3 and one["repair"]["source"] == [[POLICY, 3], [TEACHER, 1]]
    assert one["repair"]["advantages"] == [[0.5, 3], [0.25, 1]]
    assert "advantages" not in one  # the rejected row itself was not trained on
    assert two["advantages"] == [[-0.5, 5]] and two["logps"] == [-100] * 5


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path, capsys):
    one = make_workdir(tmp_path / "one", [record()])
    two = make_workdir(tmp_path / "two", [record()])
    out = tmp_path / "both.html"
    assert main(["--workdir", str(one), "--compare", str(two), "--out", str(out)]) == 0
    assert "both.html: 0." in capsys.readouterr().out
    assert [run["name"] for run in parts_of(out)[0]["runs"]] == ["one", "two"]
    assert main(["--workdir", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "metrics.jsonl is missing" in line
    with pytest.raises(InputError):
        write_report(one, tmp_path / "none")


# ------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium to test the report's page")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """Returns a function that opens a page; what the page should not do fails at the end."""
    said, asked, dialogs, pages = [], [], [], []

    def open_page(file: pathlib.Path, **options):
        page = browser.new_page(**options)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        pages.append(page)
        return page

    yield open_page
    hacked = [page.evaluate("window.hacked === undefined") for page in pages]
    for page in pages:
        page.close()
    assert not said and not dialogs and all(hacked), (said, dialogs)
    # blob: is the page's own, of unpacking; everything else is the file.
    assert all(url.startswith(("file://", "blob:")) for url in asked), asked
    assert len([url for url in asked if url.startswith("file://")]) == len(pages), asked


def texts(page, selector: str) -> list[str]:
    return page.eval_on_selector_all(selector, "found => found.map(one => one.textContent)")


def some_records():
    for step in (1, 2):
        for problem in ("1+1?", "2+2?"):
            yield repaired() | {"step": step, "problem": problem, "id": problem}
            yield record(step, problem, "right\n", reward=1.0, id=problem)
            yield record(step, problem, "cut", finished=False, id=problem)


def test_the_page_shows_who_wrote_what_and_filters(tmp_path, show):
    page = show(write_report(make_workdir(tmp_path / "run", list(some_records()))))
    assert texts(page, "#title") == ["run"] and page.title() == "run, report"
    assert page.locator(".chart path.curve").count() == 3  # reward, pass@1, seconds
    assert texts(page, "#count") == ["12 of 12 rollouts, in 4 groups"]
    assert [t.strip() for t in texts(page, ".group .dots")] == ["↻✓…"] * 4
    card = page.locator(".rollout").first
    assert card.locator(".step.error").inner_text().count("first error") == 1
    assert "".join(card.locator(".rejected .tok").all_text_contents()) == "b\n"
    assert "".join(card.locator(".correction .tok.teacher").all_text_contents()) == "c\n"
    struck = "getComputedStyle(document.querySelector('.rejected .step .tok')).textDecorationLine"
    assert page.evaluate(struck) == "line-through"
    card.locator(".correction .tok").first.hover()
    assert texts(page, "#tip") == [
        '"c"  token 3, teacher\nadvantage +0.750\np after the update 0.368'
    ]
    card.locator(".tok").first.hover()
    tip = texts(page, "#tip")[0]
    assert "p 0.607" in tip  # exp(-0.5)
    assert "p after the update 0.779, ratio 1.28" in tip  # exp(-0.25), exp(-0.25 + 0.5)

    for selector, value, count in [
        ("#filter-outcome", "right", 4), ("#filter-outcome", "cut", 4),
        ("#filter-outcome", "wrong", 8),
        ("#filter-repaired", "yes", 4), ("#filter-repaired", "no", 4), ("#filter-repaired", "", 8),
        ("#filter-step", "2", 4), ("#filter-outcome", "", 6),
    ]:  # fmt: skip
        page.select_option(selector, value)
        assert texts(page, "#count")[0].startswith(f"{count} of 12"), (selector, value)
    page.fill("#filter-text", "2+2")
    assert texts(page, "#count") == ["3 of 12 rollouts, in 1 group"]
    page.fill("#filter-text", "nothing of the kind")
    assert texts(page, "#groups") == ["nothing matches"] and not texts(page, ".rollout")
    page.fill("#filter-text", "")
    page.select_option("#filter-repaired", "yes")
    assert page.locator(".rollout").count() == 1
    page.check("#whole")
    assert page.locator(".rollout").count() == 3
    page.click("#next")
    assert texts(page, "#problem") == ["2+2?"]
    page.locator("svg.plot").first.hover()
    assert texts(page, "#tip")[0].startswith("step ")


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_it_is_light_or_dark_as_the_reader_has_it(tmp_path, show, scheme, dark):
    page = show(write_report(make_workdir(tmp_path / "run", [repaired()])), color_scheme=scheme)
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert (page.evaluate(light) < 100) == dark
    page.click("#theme")  # auto -> dark
    assert page.evaluate(light) < 100
    page.click("#theme")
    assert page.evaluate(light) > 200


def test_two_runs_are_shown_together(tmp_path, show):
    one = make_workdir(tmp_path / "one", list(some_records()))
    two = make_workdir(tmp_path / "two", list(some_records()))
    page = show(write_report(one, two, tmp_path / "both.html"))
    assert page.locator(".chart path.curve.run0").count() == 3
    assert page.locator(".chart path.curve.run1").count() == 3
    assert "1 differ: name" in texts(page, "#config-title")[0]
    assert texts(page, "tr.differs td") == ["name", '"one"', '"two"']
    page.select_option("#filter-run", "1")
    assert texts(page, "#count")[0].startswith("12 of 24")
    assert all("two" in name for name in texts(page, ".group .name"))


# Turns to every group, points at its correction, and returns what is shown.
WALK = """() => {
  const found = [], of = (selector) => document.querySelector(selector).textContent;
  for (let more = true; more;) {
    const token = document.querySelector(".correction .tok");
    token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
    found.push([of("#problem"), of(".rollout .tok"), of(".correction")]);
    document.querySelector("#next").click();
    more = document.querySelector(".correction .tok") !== token && found.length < 1000;
    const last = [...document.querySelectorAll(".group")].at(-1).ariaCurrent === "true";
    if (last) { found.push([of("#problem"), of(".rollout .tok"), of(".correction")]); break; }
  }
  return found;
}"""


@pytest.mark.parametrize("plain", [False, True])
def test_hostile_text_is_shown_and_does_nothing(tmp_path, show, plain):
    assert len(set(HOSTILE)) >= 50
    records = []
    for step, text in enumerate(HOSTILE, 1):
        source = [[POLICY, 1], [TEACHER, 1]]
        repair = {"kept": 1, "tokens": [text], "source": source}
        more = {"correction": text, "kept_prefix": text, "reward_after": 1.0, "repair": repair}
        more |= {"id": text, "gold": text + "!", "token_chars": [len(text), 1]}
        records.append(record(step, text, text + "?", **more))
    workdir = make_workdir(tmp_path / "<img src=x onerror=alert(1)>", records)
    config = {"<script>alert(1)</script>": HOSTILE, "__proto__": 1}
    (workdir / "config.json").write_text(json.dumps(config))
    page = show(write_report(workdir, plain=plain))
    # As a browser has it: what is half a character is shown as U+FFFD by no one but encoders.
    literal = [
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in HOSTILE
    ]
    found = page.evaluate(WALK)
    for want, shown, text in zip(literal, found, HOSTILE, strict=True):
        if not re.search("[\ud800-\udfff]", text):  # those cannot leave the browser as they are
            assert shown == [want] * 3
    names = [name.split(" · ", 1)[1] for name in texts(page, ".group .name")]
    assert names[:60] == literal[:60]
    assert page.title() == "<img src=x onerror=alert(1)>, report"
    assert not page.evaluate(
        "document.querySelectorAll('img, iframe, object, embed, base, a').length"
    )


def test_the_policy_in_the_page_lets_no_other_script_run(tmp_path, browser):
    """Even were there a hole, a script put into the page would not run: its hash is not named."""
    file = write_report(make_workdir(tmp_path / "run", [record()]))
    hole = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></main>"
    file.write_text(file.read_text().replace("</main>", hole, 1))
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("window.hacked === undefined")
    page.close()


def test_the_reports_page_is_in_the_package():
    page = pathlib.Path(report.__file__).with_name("report_page.html").read_text()
    assert (
        page.count("@@DATA@@") == page.count("@@ROLLOUTS@@") == page.count("@@SCRIPT_HASH@@") == 1
    )
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "innerHTML" not in page and "document.write" not in page and "eval(" not in page
