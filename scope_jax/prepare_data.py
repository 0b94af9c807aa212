"""Makes a directory of training problems from Parquet and JSONL files: filtered, counted, shuffled.

    python -m scope_jax.prepare_data --data openr1_math_46k.parquet --out problems \\
        --exclude math500.jsonl.gz aime24.parquet --tokenizer qwen --max-prompt-tokens 1024

DIR holds ArrayRecord shards (a JSON object {"id", "problem", "gold", "solution"}, perhaps "system"
and "row_id", each) and manifest.json: schema, sources with their sha256, what every filter removed,
shards with their counts. `--config.task.train_file=DIR` trains on it. The same files and options
give the same bytes. DIR appears whole or not at all.

The filters, in this order; a row counts for the first that removes it, and read = kept + removed:

    bad_line             no JSON, no problem, an id twice; an error unless --bad-lines skip
    long_problem, long_solution                     characters
    long_prompt, long_solution_tokens               tokens, with --tokenizer
    excluded             the problem is one of --exclude, by its normal text (decontamination)
    too_hard, too_easy   its pass rate is out of the range
    unverifiable_gold    there is no gold, or `verify` does not find it equal to itself in a box
    duplicate            an earlier row that stayed has the same problem, by its normal text

Normal text (`math_problems.normal_text`) is the problem less its layout; a problem that is worded
anew is not found.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from scope_jax.configlib import one_line_errors, read_command
from scope_jax.data import (
    MANIFEST,
    Prepared,
    describe_bad_lines,
    read_rows,
    render_prompt,
    render_record,
    stream_rows,
)
from scope_jax.models.hf import load_tokenizer
from scope_jax.records import InputError
from scope_jax.rewards import read_gold, verify_batch
from scope_jax.tasks.math_problems import (
    check_id,
    normal_text,
    pass_rate_of,
    problem_text,
    read_pass_rates,
    read_problem,
)

SCHEMA = {
    "id": "file:line, or of Parquet file:row N",
    "problem": "text",
    "gold": "the answer that `verify` compares with",
    "solution": 'worked solution, "" without one',
    "system": "system message that the problem came with; only where there is one",
    "row_id": "the row's own id; only where it has one",
}
VERIFIED_AT_A_TIME = 256  # golds
BAD_LINES_LISTED = 100  # in the manifest
WRITER_OPTIONS = "group_size:1,zstd:3"  # one record a chunk: what random access needs

Removes = Callable[[dict[str, Any]], str | None]  # record -> the filter that removes it, if one


def prepare(
    files: list[str],
    removes: list[Removes],
    counts: collections.Counter,
    bad: list[dict[str, Any]],
    *,
    drop_system: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields the records of some files that stay.

    Args:
      removes: filters in their order.
      drop_system: leave out the system messages that problems came with.
      counts: gets "read", "kept" and the rows that each filter removed.
      bad: gets the bad lines, {"file", "line", "reason"}.
    """
    seen: set[bytes] = set()
    records = _read(files, removes, counts, bad, drop_system)
    while batch := list(itertools.islice(records, VERIFIED_AT_A_TIME)):
        for record, right in zip(batch, _verifiable(batch), strict=True):
            text = hashlib.sha256(normal_text(record["problem"]).encode()).digest()
            if not right:
                counts["unverifiable_gold"] += 1
            elif text in seen:
                counts["duplicate"] += 1
            else:
                seen.add(text)
                counts["kept"] += 1
                yield record


def _read(files, removes, counts, bad, drop_system) -> Iterator[dict[str, Any]]:
    for file in files:
        lines: dict[str | int, str] = {}
        for number, row in stream_rows(file):
            counts["read"] += 1
            try:
                if isinstance(row, InputError):
                    raise row
                record = read_problem(row)
                check_id(row, lines)
            except InputError as error:
                counts["bad_line"] += 1
                bad.append({"file": str(file), "line": number, "reason": str(error)})
                continue
            if drop_system:
                record.pop("system", None)
            found = next(filter(None, (remove(record) for remove in removes)), None)
            if found:
                counts[found] += 1
            else:
                yield record


def _verifiable(records: list[dict[str, Any]]) -> list[bool]:
    """Returns whether each gold equals itself, written as a policy would write it."""
    golds = [record["gold"] for record in records]
    right = [bool(read_gold(gold)) for gold in golds]
    some = [gold for gold, there in zip(golds, right, strict=True) if there]
    verdicts = iter(verify_batch(some, [f"\\boxed{{{gold}}}" for gold in some]))
    return [there and next(verdicts) for there in right]


def too_long(name: str, size: Callable[[dict[str, Any]], int], limit: int) -> Removes:
    """Returns the filter of records whose size is over a limit."""
    return lambda record: name if size(record) > limit else None


def excluded(files: list[str]) -> tuple[Removes, int]:
    """Returns the filter of problems that stand in some files, which need no answers there, and how
    many problems these hold.
    """
    texts = {
        text
        for file in files
        for text in read_rows(file, lambda row: normal_text(problem_text(row)[0]))
    }
    return lambda record: "excluded" if normal_text(record["problem"]) in texts else None, len(
        texts
    )


def out_of_range(rates: dict[str, float], low: float, high: float, counts) -> Removes:
    """Returns the filter by pass rate; problems without a rate stay, and are counted."""

    def remove(record):
        rate = pass_rate_of(record, rates)
        if rate is None:
            counts["without_rate"] += 1
            return None
        counts["with_rate"] += 1
        return "too_hard" if rate < low else "too_easy" if rate > high else None

    return remove


def make_filters(args, counts: collections.Counter) -> tuple[list[Removes], dict[str, Any]]:
    """Returns the filters that the arguments ask for, but the last two, and what the manifest says
    of each filter, by its name.
    """
    solution = lambda record: len(record["solution"])  # noqa: E731
    filters = [
        too_long("long_problem", lambda r: len(r["problem"]), args.max_problem_characters),
        too_long("long_solution", solution, args.max_solution_characters),
    ]
    about: dict[str, Any] = {
        "bad_line": args.bad_lines,
        "long_problem": f"over {args.max_problem_characters} characters",
        "long_solution": f"over {args.max_solution_characters} characters",
    }
    if args.tokenizer:
        tokenizer, _ = load_tokenizer(args.tokenizer)
        chat = bool(tokenizer.chat_template)

        def render(problem, system=args.system):
            return render_prompt(tokenizer, problem, template="{problem}", chat=chat, system=system)

        def tokens(text):
            return len(tokenizer.encode(text, add_special_tokens=False))

        if args.max_prompt_tokens:
            prompt = lambda record: tokens(render_record(render, record))  # noqa: E731
            filters.append(too_long("long_prompt", prompt, args.max_prompt_tokens))
            about["long_prompt"] = f"over {args.max_prompt_tokens} tokens of {args.tokenizer}"
        if limit := args.max_solution_tokens:
            solution = lambda record: tokens(record["solution"])  # noqa: E731
            filters.append(too_long("long_solution_tokens", solution, limit))
            about["long_solution_tokens"] = f"over {limit} tokens of {args.tokenizer}"
    if args.exclude:
        remove, problems = excluded(args.exclude)
        filters.append(remove)
        about["excluded"] = f"one of {problems} problems"
    if args.pass_rates:
        low, high = args.min_pass_rate, args.max_pass_rate
        filters.append(out_of_range(read_pass_rates(args.pass_rates), low, high, counts))
        about |= {"too_hard": f"pass rate below {low}", "too_easy": f"pass rate above {high}"}
    return filters, about | {"unverifiable_gold": "verify", "duplicate": "normal text"}


def write_shards(
    records: Iterable[dict[str, Any]], folder: pathlib.Path, records_per_shard: int
) -> list[dict[str, Any]]:
    """Writes records to shards; returns {"file", "records"} of each."""
    from array_record.python.array_record_module import ArrayRecordWriter  # not on Windows

    counts, records = [], iter(records)
    while some := list(itertools.islice(records, 1)):
        file = folder / f"{len(counts):05d}.arrayrecord"
        count = 0
        try:
            writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
            for record in itertools.chain(some, itertools.islice(records, records_per_shard - 1)):
                writer.write(json.dumps(record, ensure_ascii=False).encode())
                count += 1
            writer.close()
        except RuntimeError as error:  # a full disk
            raise InputError(f"cannot write {file}: {' '.join(f'{error}'.split())}") from None
        counts.append(count)
    names = [f"problems-{i:05d}-of-{len(counts):05d}.arrayrecord" for i in range(len(counts))]
    for i, name in enumerate(names):
        (folder / f"{i:05d}.arrayrecord").rename(folder / name)
    return [{"file": n, "records": count} for n, count in zip(names, counts, strict=True)]


def write_manifest(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives OUT.partial to write to; it becomes `out` if all goes well, and else is removed.

    Raises:
      InputError: `out` exists, or OUT.partial does and is not what a killed run left.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise InputError(f"{out} exists: delete it, or use another --out")
    if partial.exists():
        known = partial.is_dir() and all(
            file.is_file() and (file.suffix == ".arrayrecord" or file.name == MANIFEST)
            for path in partial.iterdir()
            for file in (path.iterdir() if path.is_dir() else [path])
        )
        if not known:
            raise InputError(f"{partial} exists and was not left by this command: move it away")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _sources(files: list[str]) -> list[dict[str, str]]:
    found = []
    for name in files:
        with open(name, "rb") as file:
            found.append({"file": name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
    return found


def _shuffled(
    records: Iterable[dict[str, Any]], folder: pathlib.Path, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the records in the order of a seed; they wait on the disk meanwhile."""
    folder.mkdir()
    write_manifest(folder, {"shards": write_shards(records, folder, 1 << 62)})
    source = Prepared(folder)
    for row in np.random.default_rng(seed).permutation(len(source)):
        yield source[row]
    shutil.rmtree(folder)


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Does what the command's arguments say; returns the manifest."""
    _check(args)
    counts: collections.Counter = collections.Counter()
    bad: list[dict[str, Any]] = []
    filters, about = make_filters(args, counts)
    records: Iterable[dict[str, Any]] = prepare(
        args.data, filters, counts, bad, drop_system=args.drop_system
    )

    def finish(shards):
        if bad and args.bad_lines == "strict":
            raise InputError(
                f"{describe_bad_lines(bad)}; correct or delete them, or leave bad lines out with "
                "--bad-lines skip"
            )
        removed = [{"name": k, "removes": v, "removed": counts[k]} for k, v in about.items()]
        for name, number in [("read", counts["read"])] + [
            (f["name"], -f["removed"]) for f in removed
        ]:
            say(f"{name:22}{number:9}")
        say(f"{'kept':22}{counts['kept']:9}")
        if args.pass_rates:
            say(f"{counts['without_rate']} problems have no pass rate, and stay")
            if not counts["with_rate"]:
                raise InputError(f"{args.pass_rates} has no rate of any problem of --data")
        if not counts["kept"]:
            raise InputError("the filters leave no problem")
        return {
            "schema": SCHEMA,
            "records": counts["kept"],
            "read": counts["read"],
            "filters": removed,
            "without_rate": counts["without_rate"],
            "bad_lines": bad[:BAD_LINES_LISTED],
            "sources": _sources(args.data),
            "exclude": _sources(args.exclude),
            "pass_rates": _sources([args.pass_rates] if args.pass_rates else []),
            "seed": args.seed,
            "shards": shards,
        }

    if args.dry_run:
        collections.deque(records, maxlen=0)
        return finish([])
    with whole_directory(args.out) as folder:
        if args.seed is not None:
            records = _shuffled(records, folder / "unshuffled", args.seed)
        manifest = finish(write_shards(records, folder, args.records_per_shard))
        write_manifest(folder, manifest)
    say(f"{args.out}: {counts['kept']} problems in {len(manifest['shards'])} shards")
    return manifest


def _check(args: argparse.Namespace) -> None:
    """Refuses arguments that do not fit together, before anything is read."""
    if args.out is None and not args.dry_run:
        raise InputError("--out DIR is missing (or --dry-run, which only counts)")
    if args.out is not None and args.out.exists():
        raise InputError(f"{args.out} exists: delete it, or use another --out")
    if (args.max_prompt_tokens or args.max_solution_tokens) and not args.tokenizer:
        raise InputError("--max-prompt-tokens and --max-solution-tokens need --tokenizer DIR")
    if args.tokenizer and not (args.max_prompt_tokens or args.max_solution_tokens):
        raise InputError("--tokenizer needs --max-prompt-tokens or --max-solution-tokens")
    for name in (
        "max_problem_characters", "max_solution_characters", "max_prompt_tokens",
        "max_solution_tokens", "records_per_shard",
    ):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.min_pass_rate <= args.max_pass_rate <= 1:
        raise InputError("--min-pass-rate and --max-pass-rate are no range in 0 .. 1")
    if (args.min_pass_rate, args.max_pass_rate) != (0, 1) and not args.pass_rates:
        raise InputError("--min-pass-rate and --max-pass-rate need --pass-rates FILE")
    if args.seed is not None and args.seed < 0:
        raise InputError("--seed must be at least 0")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.prepare_data",
        description="Makes a directory of training problems from Parquet and JSONL files.",
        epilog="example: python -m scope_jax.prepare_data --data openr1_math_46k.parquet "
        "--out problems --exclude math500.jsonl.gz --seed 0",
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, help=".parquet, .jsonl or .jsonl.gz", metavar="FILE")
    add("--out", type=pathlib.Path, help="new directory", metavar="DIR")
    add("--dry-run", action="store_true", help="only prints the counts")
    add("--seed", type=int, help="shuffles the records (default: they stay in order)")
    add("--records-per-shard", type=int, default=8192, help="default 8192")
    add("--bad-lines", choices=["strict", "skip"], default="strict", help="default strict")
    add("--drop-system", action="store_true", help="leaves out the problems' own system messages")
    add("--exclude", nargs="+", default=[], help="files of test problems", metavar="FILE")
    add("--max-problem-characters", type=int, default=10_000, help="default 10000")
    add("--max-solution-characters", type=int, default=200_000, help="default 200000")
    add("--tokenizer", help="of the limits in tokens: a Hugging Face directory", metavar="DIR")
    add("--max-prompt-tokens", type=int, help="of the problem in the chat template")
    add("--max-solution-tokens", type=int)
    add("--system", default="", help="system message of prompts that have none of their own")
    add("--pass-rates", help="rows {id or problem, pass_rate or reward}", metavar="FILE")
    add("--min-pass-rate", type=float, default=0.0, help="default 0")
    add("--max-pass-rate", type=float, default=1.0, help="default 1")
    run(read_command(parser, argv)[0])


if __name__ == "__main__":
    sys.exit(main())
