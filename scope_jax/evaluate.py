"""Evaluation: how often a policy solves held-out problems, and the command that runs it alone.

python -m scope_jax.evaluate --config worksheet --workdir W          (a run's newest checkpoint)
python -m scope_jax.evaluate --config worksheet --model DIR          (a Hugging Face directory)
python -m scope_jax.evaluate --config eval_math --model DIR --out O  (the paper's nine sets)
python -m scope_jax.evaluate --config eval_math --completions FILE   (what somebody else sampled)
python -m scope_jax.evaluate --compare OUT_A OUT_B                   (two evaluations of these sets)
python -m scope_jax.evaluate --prm DIR --data FILE.jsonl.gz          (a PRM: evaluate_prm.py)
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from scope_jax.benchmark import GROUPS, BenchmarkSet, digest, read_sets
from scope_jax.benchmark_report import (
    accuracy_tables,
    agreement,
    compare,
    comparison_table,
    detail_table,
    results,
)
from scope_jax.checkpoint import open_checkpoints, restore_params
from scope_jax.configlib import (
    claim_workdir,
    flat_keys,
    load_config,
    load_object,
    lora_options,
    one_line_errors,
    read_command,
    run_config,
)
from scope_jax.data import decode_completions
from scope_jax.diversity import correct_diversity
from scope_jax.evaluate_prm import evaluate_prm, print_report
from scope_jax.evaluate_sets import complete_samples, grade_stored
from scope_jax.hosts import end_together, join_hosts, on_first_host, shared_errors
from scope_jax.records import InputError
from scope_jax.roles import Policy, load_policy
from scope_jax.sampling import decoding_layout, generate
from scope_jax.sharding import fetch, host_part, put_batch


def sample_completions(
    policy: Policy, params, records, key, *, batch_size, group_size, **sampling
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Samples completions of every record; returns (rewards [len(records), group_size], (ids, mask)
    [len(records) * group_size, T] in the same order, see `decode_groups`). Each process (of
    several) verifies a part of them.

    Args:
      records: rows of the task; the last batch is filled up by repeating the last one, so one
        program serves all.
      batch_size: problems at a time.
      sampling: max_new_tokens, temperature (`generate`'s).
    """
    rewards, written, (part, parts) = [], [], host_part(policy.decode_mesh)
    for start in range(0, len(records), batch_size):
        batch = [records[min(i, len(records) - 1)] for i in range(start, start + batch_size)]
        batch = batch[part * batch_size // parts : (part + 1) * batch_size // parts]
        prompts = policy.tokenize(batch)
        ids, mask = put_batch((prompts.ids, prompts.mask), policy.decode_mesh)
        row_ids = np.arange(start * group_size, (start + batch_size) * group_size, dtype=np.int32)
        rollouts = generate(
            policy.model, params, ids, mask, key, group_size=group_size, row_ids=row_ids,
            **policy.ends, **sampling,
        )  # fmt: skip
        written.append(fetch((rollouts.completion_ids, rollouts.completion_mask)))
        golds = [record["gold"] for record in batch for _ in range(group_size)]
        mine = slice(part * len(golds), (part + 1) * len(golds))
        texts = decode_completions(policy.tokenizer, *(x[mine] for x in written[-1]))
        own = policy.rewards(golds, texts).tolist()
        if parts > 1:
            own = fetch(put_batch(np.array(own, np.float32), policy.decode_mesh)).tolist()
        rewards += own
    ids, mask = (np.concatenate(x)[: len(records) * group_size] for x in zip(*written, strict=True))
    return np.asarray(rewards).reshape(-1, group_size)[: len(records)], (ids, mask)


def decode_groups(tokenizer, completions, group_size: int) -> list[list[str]]:
    """Returns the texts of completions (ids, mask), a list for each record."""
    texts = decode_completions(tokenizer, *completions)
    return [texts[i : i + group_size] for i in range(0, len(texts), group_size)]


def evaluate_policy(policy: Policy, params, config: ConfigDict) -> dict[str, float]:
    """Returns pass@1 (mean over samples) and pass@k (k = group_size) on the test and OOD splits.

    eval.greedy adds the share that one completion at temperature 0 solves, eval.diversity the
    diversity among correct completions, both on the test split. The same problems and keys each
    time, so that two evaluations of a run are paired.
    """
    options = dict(config.eval)
    count, split, ood, greedy, diversity = (
        options.pop(key) for key in ("problems", "split", "ood", "greedy", "diversity")
    )
    options.pop("every")
    key = jax.device_put(jax.random.key(config.seed + 1))
    model, params = decoding_layout(policy.model, params, policy.decode_mesh)
    policy, results = policy._replace(model=model), {}
    for name, prefix in [(split, "")] + ([("ood", "ood_")] if ood else []):
        source = policy.problems(name)
        records = [source[i] for i in range(min(count, len(source)))]
        rewards, completions = sample_completions(policy, params, records, key, **options)
        solved = rewards >= config.reward.solved_at
        results[f"eval/{prefix}pass@1"] = float(solved.mean())
        results[f"eval/{prefix}pass@k"] = float(solved.any(1).mean())
        if greedy and not prefix:
            one = options | {"group_size": 1, "temperature": 0.0}
            rewards, _ = sample_completions(policy, params, records, key, **one)
            results["eval/greedy"] = float((rewards >= config.reward.solved_at).mean())
        if diversity and not prefix:
            texts = decode_groups(policy.tokenizer, completions, solved.shape[1])
            among = correct_diversity(texts, solved.tolist())
            results |= {f"eval/correct_{name}": value for name, value in among.items()}
    return {**results, "eval/k": float(options["group_size"])}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.evaluate",
        description="Samples a policy on the config's held-out problems and prints pass@1, pass@k; "
        "on the paper's benchmark sets; compares two such evaluations; grades stored completions; "
        "or measures how well a PRM finds the first wrong step of labelled solutions.",
        epilog="example: python -m scope_jax.evaluate --config worksheet:n=6 --workdir /tmp/run "
        "--config.eval.problems=512; "
        "python -m scope_jax.evaluate --config eval_math --model DIR --out /tmp/eval "
        "--config.data_dir=luffy_data; "
        "python -m scope_jax.evaluate --compare /tmp/eval_a /tmp/eval_b; "
        "python -m scope_jax.evaluate --config eval_math --completions FILE.jsonl "
        "--config.sets.math500.file=math500.jsonl.gz; "
        "python -m scope_jax.evaluate --prm /tmp/prm --data champ_processbench.jsonl.gz "
        "--out /tmp/prm_report",
    )
    policy_args = parser.add_argument_group("a policy")
    policy_args.add_argument("--config", help="file or shipped name, with :arg if any")
    policy_args.add_argument("--workdir", help="of a training run: its newest checkpoint")
    policy_args.add_argument("--model", help="Hugging Face directory, or a run's workdir")
    set_args = parser.add_argument_group("benchmark sets, with a --config that has `sets`")
    set_args.add_argument(
        "--out",
        help="gets samples.jsonl and results.json; goes on where it stopped "
        "(a run's: WORKDIR/evaluation/..); of a PRM: report.json, scores.jsonl, reliability.png",
    )
    set_args.add_argument("--completions", metavar="FILE", help="grades these; loads no model")
    set_args.add_argument(
        "--compare", nargs=2, metavar=("OUT_A", "OUT_B"), help="paired bootstrap of two --out"
    )
    prm_args = parser.add_argument_group("a PRM")
    prm_args.add_argument("--prm", help="directory of a PRM")
    prm_args.add_argument("--data", help=".jsonl[.gz] of {id, problem, steps, label}")
    prm_args.add_argument("--format", help="of its texts, where the directory does not say it")
    prm_args.add_argument("--threshold", type=float, help="scores below it are wrong (0.5)")
    prm_args.add_argument("--batch-size", type=int, help="solutions a forward (8)")
    prm_args.add_argument("--max-length", type=int, help="tokens; longer ones are not scored")
    prm_args.add_argument("--limit", type=int, help="only the first so many solutions")
    args, overrides = read_command(parser, argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    of_policy = [name for name in ("config", "workdir", "model", "completions") if name in given]
    if "compare" in given:
        others = [f"--{name}" for name in given if name != "compare"] + overrides
        if others:
            raise InputError(f"{others[0]} does not go with --compare")
        _compare(*args.compare)
    elif set(given) <= {*of_policy, "out"} and of_policy:
        join_hosts()
        with end_together():
            _measure(args, overrides)
    elif given:
        _measure_prm(given, [f"--{name}" for name in of_policy] + overrides)
    else:
        _measure(args, overrides)


def _measure_prm(options: dict, foreign: list[str]) -> None:
    """Runs `evaluate_prm` with the options that were given; `foreign` arguments are refused."""
    if "prm" not in options or "data" not in options:
        flags = [f"--{name.replace('_', '-')}" for name in options if f"--{name}" not in foreign]
        raise InputError(f"{flags[0]} is for a PRM: give both --prm DIR and --data FILE")
    if foreign:
        raise InputError(f"{foreign[0]} does not go with --prm")
    report = evaluate_prm(options.pop("prm"), options.pop("data"), **options)
    print_report(report, options.get("out"))


def _measure(args: argparse.Namespace, overrides: list[str]) -> None:
    """Measures a policy, on a task or on benchmark sets; or grades stored completions."""
    models = sum(x is not None for x in (args.workdir, args.model, args.completions))
    if args.config is None or models != 1:
        raise InputError(
            "give --config C with --workdir DIR or --model DIR, or --prm DIR with --data FILE"
        )
    config = load_config(args.config, overrides)
    if "sets" not in config and (args.out or args.completions):
        flag = "--completions" if args.completions else "--out"
        raise InputError(f"{flag} is for a config with benchmark sets (eval_math), or a PRM")
    workdir = args.workdir
    if args.model is not None and (pathlib.Path(args.model) / "checkpoints").is_dir():
        workdir = args.model
    elif args.model is not None:
        config.model.path = args.model
    if args.completions:
        _grade_stored(args, config)
    elif "sets" in config:
        _measure_sets(args, config, workdir)
    else:
        _measure_policy(config, workdir)


def _measure_policy(config: ConfigDict, workdir: str | None) -> None:
    if workdir is not None:  # what its checkpoints hold is not for the command line to say
        config.model.update(lora_options(run_config(pathlib.Path(workdir))["model"]))
    policy, params = load_policy(config)
    params = params if workdir is None else restore_params(workdir, params)
    measured = evaluate_policy(policy, params, config)
    title = f"{workdir or config.model.path}, {config.eval.problems} problems"
    table = Table("metric", "value", title=title, title_justify="left")
    for key, value in measured.items():
        table.add_row(key.removeprefix("eval/"), f"{value:.3f}")
    Console().print(table)
    print(json.dumps(measured))


# ------------------------------------------------------------------------------ benchmark sets


def _measure_sets(args: argparse.Namespace, config: ConfigDict, workdir: str | None) -> None:
    """Samples what --out does not hold yet, then prints and writes the figures of all of it."""
    if args.out is None and workdir is None:
        raise InputError("--model with benchmark sets needs --out DIR, for the samples")
    with shared_errors():
        sets = _sets(config)
        problems, skipped = read_sets(sets, config.data_dir)
        notes = _take_from_run(config, pathlib.Path(workdir)) if workdir is not None else []
        config.sample.max_new_tokens = config.eval.max_new_tokens  # nothing else is sampled
        policy, params = load_policy(config)
    step = None
    if workdir is not None:
        step = _newest_step(workdir)
        params = restore_params(workdir, params, step)
    name = pathlib.Path(args.config.partition(":")[0]).stem
    out = pathlib.Path(args.out or f"{workdir}/evaluation/{name}-step{step}")
    kept = [chosen for chosen in sets if chosen.key in problems]
    record = _record(config, kept, problems, workdir, step)
    on_first_host(claim_workdir, out, record, "--out")
    samples = complete_samples(
        policy, params, kept, problems, out / "samples.jsonl",
        seed=config.seed, batch_size=config.eval.batch_size, after=config.reward.after,
        reward_fn=load_object(config.reward.fn, "reward.fn"),
        max_new_tokens=config.eval.max_new_tokens, temperature=config.eval.temperature,
        slots=config.sample.slots,
    )  # fmt: skip
    if jax.process_index() == 0:
        found = results(samples, record["sets"], config.reward.solved_at)
        found["skipped"] = skipped
        write_json(out / "results.json", found)
        _print_results(found, record["sets"], sets, f"{workdir or config.model.path}", notes)
        accuracy = {key: figures["accuracy"] for key, figures in found["sets"].items()}
        line = {f"{group}_average": found["averages"][group] for group in GROUPS}
        print(json.dumps({**line, "accuracy": accuracy, "out": str(out)}))


def _sets(config: ConfigDict) -> list[BenchmarkSet]:
    return [BenchmarkSet(key=key, **options) for key, options in config.sets.items()]


def _take_from_run(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
    """Sets the config's model to that of a run; returns what else the two say differently."""
    run = run_config(workdir)
    model: dict[str, Any] = run["model"]
    config.model.update({**lora_options(model), "dtype": model["dtype"]})
    for key in ("path", "compute_dtype", "rope_theta", "max_position"):
        config.model[key] = config.model[key] or model.get(key, config.model[key])
    notes = []
    for key, ours in flat_keys(
        {"prompt": config.prompt.to_dict(), "reward": {"after": config.reward.after}}
    ).items():
        theirs = flat_keys(run).get(key, "")
        if ours != theirs:
            notes.append(f"{key} is {ours!r} here and was {theirs!r} in training")
    return notes


def _newest_step(workdir: str) -> int | None:
    """Returns the step of a run's newest checkpoint, None where it has none."""
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        return None
    manager = open_checkpoints(workdir)
    step = manager.latest_step()
    manager.close()
    return step


def _record(config: ConfigDict, sets, problems, workdir, step: int | None) -> dict[str, Any]:
    """Returns what the samples depend on: two evaluations of the same record are the same."""
    options = ("samples", "grade", "group", "name")
    model = {name: x for name, x in config.model.to_dict().items() if name != "remat"}
    record = {
        "model": model,
        "workdir": workdir,
        "restored_step": step,
        "seed": config.seed,
        "prompt": config.prompt.to_dict(),
        "reward": config.reward.to_dict(),
        "sampling": {
            "temperature": config.eval.temperature,
            "max_new_tokens": config.eval.max_new_tokens,
            "stop": config.sample.stop,
        },
        "sets": {
            chosen.key: {
                **{name: getattr(chosen, name) for name in options},
                "problems": len(problems[chosen.key]),
                "sha256": digest(problems[chosen.key]),
            }
            for chosen in sets
        },
    }
    return json.loads(json.dumps(record))  # tuples become lists, as they will be read back


def _print_results(found, entries, sets: list[BenchmarkSet], title: str, notes: list[str]) -> None:
    console = Console()
    console.print(title, markup=False, highlight=False)
    of = {group: sum(chosen.group == group for chosen in sets) for group in GROUPS}
    for table in (*accuracy_tables(found, entries, of), detail_table(found, entries)):
        console.print(table)
    for chosen in sets:
        if chosen.key in found["skipped"]:
            print(f"left out: {chosen.name}: {found['skipped'][chosen.key]}")
    for note in notes:
        print(f"note: {note}")


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a file, all of it or nothing."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    unfinished.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(unfinished, path)


def _compare(out_a: str, out_b: str) -> None:
    found = compare(out_a, out_b)
    Console().print(comparison_table(found, out_a, out_b))
    for key in found["changed"]:
        print(f"differs: {key}")
    print(json.dumps(found))


def _grade_stored(args: argparse.Namespace, config: ConfigDict) -> None:
    """Grades completions of a file, and lists where it disagrees with the labels there."""
    sets = _sets(config)
    named = any(chosen.file for chosen in sets) or config.data_dir
    problems, _ = read_sets(sets, config.data_dir) if named else ({}, {})
    rows = grade_stored(
        args.completions, sets, problems, after=config.reward.after,
        reward_fn=load_object(config.reward.fn, "reward.fn"),
    )  # fmt: skip
    found = agreement(rows, config.reward.solved_at)
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "agreement.json", found)
    differ = found.pop("disagreements")
    for row in differ:
        shown = {name: row[name] for name in ("set", "id", "gold", "answer", "reward", "correct")}
        print(f"disagreement: {json.dumps(shown)}")
    print(json.dumps({**found, "disagreements": len(differ)}))


if __name__ == "__main__":
    sys.exit(main())
