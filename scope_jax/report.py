"""A run as one HTML file: curves, and a browser of its rollouts that shows who wrote each token.

    python -m scope_jax.report --workdir /tmp/run
    python -m scope_jax.report --workdir /tmp/run --compare /tmp/other --out both.html

The page (report_page.html) asks no network and works from file://. What a model or a data set wrote
reaches it as JSON only, in which no "<" stands, and its script puts it into the document as text.
Beyond that a policy in the page allows no script but its own, by its hash, and no request at all.
"""

import argparse
import base64
import datetime
import gzip
import hashlib
import importlib.resources
import itertools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from scope_jax.configlib import flat_keys, one_line_errors, read_command
from scope_jax.records import POLICY, TEACHER, InputError

MAX_BYTES = 12_000_000  # of the packed rollouts: a page stays below 15 MB
MAX_READ = 150_000_000  # of rollout files, on the disk
MAX_POINTS = 400  # of a curve; more are averaged
CHARTS = (  # title, axis ("zero": from 0 | "" | "log"), {label: metric}
    ("Reward in training", "", {"reward": "reward", "solved": "solve_rate"}),
    ("pass@1, held out", "zero", {"in distribution": "eval/pass@1", "OOD": "eval/ood_pass@1"}),
    ("pass@k, held out", "zero", {"in distribution": "eval/pass@k", "OOD": "eval/ood_pass@k"}),
    ("Repairs", "zero", {"made": "corrections/made", "accepted": "corrections/accepted"}),
    (
        "Repairs: how much was right",
        "zero",
        {
            "accepted of made": "corrections/accepted_share",
            "steps before the error": "corrections/correct_share",
            "PRM agrees with verifier": "prm/agreement",
        },
    ),
    ("Groups with signal", "zero", {"groups with signal": "groups_with_signal"}),
    (
        "Diversity of a group",
        "zero",
        {
            "textual": "diversity/textual_diversity",
            "1 - self-BLEU": "diversity/one_minus_self_bleu",
            "distinct-2": "diversity/distinct_2",
            "equations": "diversity/equation_diversity",
        },
    ),
    ("Entropy, nats per token", "", {"entropy": "entropy"}),
    (
        "Policy against sampler, and moved",
        "log",
        {"log-prob gap": "logp_gap", "approx. KL": "approx_kl"},
    ),
    ("Gradient norm", "log", {"gradient norm": "grad_norm"}),
    (
        "Teacher's part of the trained tokens",
        "zero",
        {"teacher tokens": "teacher_token_share", "p of the policy": "teacher_prob_mean"},
    ),
    (
        "Seconds by phase",
        "log",
        {
            name: f"seconds/{name}"
            for name in ("step", "sample", "verify", "score", "teach", "update")
        },
    ),
)


def write_report(
    workdir: pathlib.Path, compare: pathlib.Path | None = None, out: pathlib.Path | None = None, *,
    plain: bool = False, max_bytes: int = MAX_BYTES,
) -> pathlib.Path:  # fmt: skip
    """Writes a run's report, WORKDIR/report.html if `out` says nothing else; returns its path.

    Args:
      workdir: of a training run, finished or not; compare: of another one, shown beside it.
      plain: the rollouts are not packed, for browsers that cannot unpack (from before 2023).
      max_bytes: of all rollouts as written; where they are more, whole steps are left out evenly,
        then rollouts.
    Raises:
      InputError: a workdir without metrics.
    """
    workdirs = [pathlib.Path(path) for path in (workdir, compare) if path is not None]
    runs = [read_run(path) for path in workdirs]
    rollouts, problems = gather([run.pop("records") for run in runs])
    packed, shown = _fit({"rollouts": rollouts, "problems": problems}, plain, max_bytes)
    data = {
        "runs": runs,
        "charts": [chart for spec in CHARTS if (chart := _chart(spec, runs))],
        "made": datetime.datetime.now().isoformat(" ", "seconds"),
        "left_out": sum(run["left_out"] for run in runs) + len(rollouts) - shown,
        "packed": not plain,
    }
    for run in runs:
        del run["rows"]
    out = pathlib.Path(out or workdirs[0] / "report.html")
    new = out.with_name(f"{out.name}.{os.getpid()}.new")
    new.write_text(page(data, packed))
    new.replace(out)
    return out


def page(data: dict, rollouts: str) -> str:
    """Returns the page with its data in it.

    Args:
      data: JSON-able; rollouts: JSON, or base64 of it gzipped.
    """
    text = (importlib.resources.files("scope_jax") / "report_page.html").read_text()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    values = {"SCRIPT_HASH": digest, "DATA": to_json(data), "ROLLOUTS": rollouts}
    return re.sub(r"@@(SCRIPT_HASH|DATA|ROLLOUTS)@@", lambda match: values[match[1]], text)


def to_json(value: Any) -> str:
    """Returns strict JSON in ASCII that cannot end, begin or comment anything in HTML.

    >>> to_json("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ------------------------------------------------------------------------------ reading a workdir


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns a run's {"name", "path", "config", "rows", "records", "left_out", "unreadable",
    "solved_at", "tau"}.

    Raises:
      InputError: there is no metrics.jsonl.
    """
    if not (workdir / "metrics.jsonl").is_file():
        raise InputError(
            f"{workdir / 'metrics.jsonl'} is missing: give the --workdir of a training run"
        )
    bad: list[str] = []
    rows = [row for row in _lines(workdir / "metrics.jsonl", bad) if _is_step(row.get("step"))]
    files = sorted((workdir / "rollouts").glob("step_*.jsonl"))
    size = sum(file.stat().st_size for file in files)
    kept = thin(files, MAX_READ / size if size else 1.0)
    records = []
    for file in kept:
        for line in _lines(file, bad):
            try:
                records.append(shown_record(line))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
                bad.append(f"{file.name}: a record of another form")
    try:
        config = json.loads((workdir / "config.json").read_text(errors="replace"))
        flat = flat_keys(config)
    except (OSError, ValueError, AttributeError):
        flat = {}
    skipped = sum(file.stat().st_size for file in set(files) - set(kept))
    return {
        "name": workdir.resolve().name,
        "path": str(workdir),
        "config": {key: json.dumps(value) for key, value in flat.items()},
        "solved_at": _number(flat.get("reward.solved_at")) or 1.0,
        "tau": _number(flat.get("locate.tau")) or 0.5,
        "rows": rows,
        "records": records,
        "unreadable": bad[:5] + ([f"and {len(bad) - 5} more"] if len(bad) > 5 else []),
        # Of files that were not read: as many as their bytes would hold.
        "left_out": round(skipped / (size - skipped) * len(records)) if skipped else 0,
    }


def _lines(file: pathlib.Path, bad: list[str]) -> Iterator[dict]:
    """Yields the objects of a JSON-lines file; lines that are none are named in `bad`."""
    with file.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("no object")
                yield value
            except (ValueError, RecursionError):
                bad.append(f"{file.name}, line {number} is no record")


def shown_record(record: dict) -> dict[str, Any]:
    """Returns what the page needs of a line of rollouts/; lines of older runs have less.

    Tokens are texts; without "token_chars" a reasoning step (and a kept prefix) counts as one.

    Raises:
      KeyError, TypeError, ValueError, ..: it is no such line.
    """
    text = str(record["completion"])
    kept_prefix = record.get("kept_prefix")
    if "token_chars" in record:
        tokens = _cut(text, itertools.accumulate(map(int, record["token_chars"])))
        ends = [int(end) for end in record.get("step_ends", [])]
    else:
        steps = list(itertools.accumulate(len(step) for step in record.get("steps", [])))
        cuts = {*steps, len(text)} | ({len(kept_prefix)} if kept_prefix else set())
        cuts = sorted(cut for cut in cuts if 0 < cut <= len(text))
        tokens = _cut(text, cuts)
        ends = [cuts.index(cut) + 1 for cut in steps if cut in cuts]
    if any(not 0 <= a <= b <= len(tokens) for a, b in itertools.pairwise([0, *ends])):
        raise ValueError("step ends that do not ascend within the tokens")
    if not _is_step(record["step"]):
        raise ValueError("step is no whole number")
    shown = {
        "step": record["step"],
        "problem": [str(record.get(key, "")) for key in ("id", "problem", "gold")],
        "group": record.get("group"),
        "reward": _number(record["reward"]),
        "finished": bool(record.get("finished", True)),
        "tokens": tokens,
        "ends": ends,
        "scores": [_number(x) for x in record.get("step_scores", [])],
        "first_error": int(record.get("first_error", -1)),
        "logps": _hundredths(record.get("logps")),
        "after": _hundredths(record.get("logps_after")),
        "advantages": _runs(record.get("advantages")),
    }
    if "correction" in record:
        shown["repair"] = _repair(record, text, tokens)
    return {key: value for key, value in shown.items() if value not in (None, [])}


def _repair(record: dict, text: str, tokens: list[str]) -> dict[str, Any]:
    repair, after = record.get("repair"), _number(record.get("reward_after"))
    if repair is None:  # of an older run
        prefix, ends = str(record["kept_prefix"]), itertools.accumulate(map(len, tokens))
        kept = [0, *ends].index(len(prefix)) if text.startswith(prefix) else 0
        rest = str(record["correction"])
        source = [[POLICY, kept], [TEACHER, 1]] if kept else [[TEACHER, 1]]
        return {"kept": kept, "tokens": [rest], "source": source, "reward": after}
    kept, new = int(repair["kept"]), [str(token) for token in repair["tokens"]]
    if not 0 <= kept <= len(tokens):
        raise ValueError("more tokens kept than there are")
    source, advantages = _runs(repair["source"]), _runs(repair.get("advantages"))
    return {
        "kept": kept, "tokens": new, "source": source, "advantages": advantages, "reward": after,
        "after": _hundredths(repair.get("logps_after")),
    }  # fmt: skip


def gather(runs: Sequence[list[dict]]) -> tuple[list[dict], list[list[str]]]:
    """Returns (all rollouts, each with "run" and the index of its "problem"; the problems). What
    has no "group" yet gets one: rollouts of a step in a row that have one problem.
    """
    problems, found = {}, []
    for number, records in enumerate(runs):
        previous, group = None, -1
        for record in records:
            key = (record["step"], record["problem"])
            group = 0 if previous is None or key[0] != previous[0] else group + (key != previous)
            previous = key
            index = problems.setdefault(tuple(record["problem"]), len(problems))
            own = {"run": number, "problem": index, "group": record.get("group", group)}
            found.append(record | own)
    return found, [list(problem) for problem in problems]


def thin(items: Sequence, share: float) -> list:
    """Returns about so large a share of the items, evenly spaced and with the last one.

    >>> thin([1, 2, 3, 4, 5, 6], 0.5)
    [2, 4, 6]
    """
    every = max(1, math.ceil(1 / share)) if share > 0 else len(items)
    return list(items[::-1][::every][::-1])


def _fit(data: dict, plain: bool, max_bytes: int) -> tuple[str, int]:
    """Returns (the rollouts, written, in max_bytes or less if that can be; how many they are)."""
    rollouts = data["rollouts"]
    while True:
        steps = sorted({rollout["step"] for rollout in rollouts})
        used = sorted({rollout["problem"] for rollout in rollouts})
        place = {old: new for new, old in enumerate(used)}
        kept = [rollout | {"problem": place[rollout["problem"]]} for rollout in rollouts]
        text = to_json({"rollouts": kept, "problems": [data["problems"][i] for i in used]})
        if not plain:
            text = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
        if len(text) <= max_bytes or len(rollouts) <= 1:
            return text, len(rollouts)
        if len(steps) > 1:
            chosen = set(thin(steps, max_bytes / len(text)))
            rollouts = [rollout for rollout in rollouts if rollout["step"] in chosen]
        else:
            rollouts = rollouts[: max(1, int(len(rollouts) * max_bytes / len(text)))]


# ------------------------------------------------------------------------------ curves


def _chart(spec: tuple[str, str, dict[str, str]], runs: list[dict]) -> dict[str, Any] | None:
    """Returns a chart's {"title", "unit", "series"}; None where no run has any of its metrics."""
    title, unit, metrics = spec
    series = []
    for number, run in enumerate(runs):
        for place, (label, metric) in enumerate(metrics.items()):
            if points := curve(run["rows"], metric):
                series.append({"label": label, "place": place, "run": number, "points": points})
    return {"title": title, "unit": unit, "series": series} if series else None


def curve(rows: list[dict], metric: str, max_points: int = MAX_POINTS) -> list[list[float]]:
    """Returns [[step, value], ..] of a metric; neighbours are averaged where there are too many.

    "corrections/accepted_share" is computed of the steps in which a repair was made.
    """
    points = []
    for row in rows:
        value = _number(row.get(metric))
        if metric == "corrections/accepted_share":
            made, accepted = (_number(row.get(f"corrections/{k}")) for k in ("made", "accepted"))
            value = accepted / made if made and accepted is not None else None
        if value is not None:
            points.append((row["step"], value))
    size = math.ceil(len(points) / max_points) if points else 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    mean = lambda values: math.fsum(values) / len(values)  # noqa: E731
    short = lambda x: float(f"{x:.5g}")  # noqa: E731
    return [[short(mean([p[i] for p in part])) for i in (0, 1)] for part in parts]


# ------------------------------------------------------------------------------ small things


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> float | None:
    """Returns a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= 1e300 else None  # False for NaN, too


def _hundredths(values: Any) -> list[int | None]:
    """Returns log-probs in whole hundredths: of all in a page they pack worst."""
    return [None if _number(x) is None else round(100 * x) for x in values or []]


def _runs(value: Any) -> list[list[float]]:
    """Returns runs [[value, count], ..] as they should be. Raises ValueError, TypeError."""
    return [[float(x), int(count)] for x, count in value or [] if _number(x) is not None]


def _cut(text: str, ends: Any) -> list[str]:
    cuts = [0, *ends]
    if any(a > b for a, b in itertools.pairwise(cuts)) or cuts[-1] != len(text):
        raise ValueError("lengths of tokens that are not those of the text")
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.report",
        description="Writes a run's curves and rollouts as one HTML file that needs no network.",
        epilog="example: python -m scope_jax.report --workdir /tmp/run --compare /tmp/other",
    )
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of a training run")
    parser.add_argument("--compare", type=pathlib.Path, help="the workdir of a second run")
    parser.add_argument("--out", type=pathlib.Path, help="file to write (WORKDIR/report.html)")
    parser.add_argument("--plain", action="store_true", help="do not pack the rollouts (larger)")
    parser.add_argument("--max-mb", type=float, default=MAX_BYTES / 1e6, help="of its rollouts")
    args, _ = read_command(parser, argv)
    options = {"plain": args.plain, "max_bytes": int(args.max_mb * 1e6)}
    out = write_report(args.workdir, args.compare, args.out, **options)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, open it in a browser")


if __name__ == "__main__":
    sys.exit(main())
