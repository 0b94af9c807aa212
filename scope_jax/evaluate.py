"""Evaluation: how often a policy solves held-out problems, and the command that runs it alone.

python -m scope_jax.evaluate --config worksheet --workdir W          (a run's newest checkpoint)
python -m scope_jax.evaluate --config worksheet --model DIR          (a Hugging Face directory)
python -m scope_jax.evaluate --prm DIR --data FILE.jsonl.gz          (a PRM: evaluate_prm.py)
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from scope_jax.checkpoint import restore_params
from scope_jax.configlib import load_config, lora_options, one_line_errors, run_config
from scope_jax.data import decode_completions
from scope_jax.diversity import correct_diversity
from scope_jax.evaluate_prm import evaluate_prm, print_report
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
        "or measures how well a PRM finds the first wrong step of labelled solutions.",
        epilog="example: python -m scope_jax.evaluate --config worksheet:n=6 --workdir /tmp/run "
        "--config.eval.problems=512; or: python -m scope_jax.evaluate --prm /tmp/prm "
        "--data champ_processbench.jsonl.gz --out /tmp/prm_report",
    )
    policy_args = parser.add_argument_group("a policy")
    policy_args.add_argument("--config", help="file or shipped name, with :arg if any")
    policy_args.add_argument("--workdir", help="of a training run: its newest checkpoint")
    policy_args.add_argument("--model", help="Hugging Face directory, or a run's workdir")
    prm_args = parser.add_argument_group("a PRM")
    prm_args.add_argument("--prm", help="directory of a PRM")
    prm_args.add_argument("--data", help=".jsonl[.gz] of {id, problem, steps, label}")
    prm_args.add_argument("--format", help="of its texts, where the directory does not say it")
    prm_args.add_argument("--out", help="gets report.json, scores.jsonl and reliability.png")
    prm_args.add_argument("--threshold", type=float, help="scores below it are wrong (0.5)")
    prm_args.add_argument("--batch-size", type=int, help="solutions a forward (8)")
    prm_args.add_argument("--max-length", type=int, help="tokens; longer ones are not scored")
    prm_args.add_argument("--limit", type=int, help="only the first so many solutions")
    args, overrides = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    of_policy = [name for name in ("config", "workdir", "model") if name in given]
    if len(of_policy) < len(given):
        _measure_prm(given, [f"--{name}" for name in of_policy] + overrides)
    else:
        _measure_policy(args, overrides)


def _measure_prm(options: dict, foreign: list[str]) -> None:
    """Runs `evaluate_prm` with the options that were given; `foreign` arguments are refused."""
    if "prm" not in options or "data" not in options:
        flags = [f"--{name.replace('_', '-')}" for name in options if f"--{name}" not in foreign]
        raise InputError(f"{flags[0]} is for a PRM: give both --prm DIR and --data FILE")
    if foreign:
        raise InputError(f"{foreign[0]} does not go with --prm")
    report = evaluate_prm(options.pop("prm"), options.pop("data"), **options)
    print_report(report, options.get("out"))


def _measure_policy(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.config is None or (args.workdir is None) == (args.model is None):
        raise InputError(
            "give --config C with --workdir DIR or --model DIR, or --prm DIR with --data FILE"
        )
    config, workdir = load_config(args.config, overrides), args.workdir
    if args.model is not None and (pathlib.Path(args.model) / "checkpoints").is_dir():
        workdir = args.model
    elif args.model is not None:
        config.model.path = args.model
    if workdir is not None:  # what its checkpoints hold is not for the command line to say
        config.model.update(lora_options(run_config(pathlib.Path(workdir))["model"]))
    policy, params = load_policy(config)
    params = params if workdir is None else restore_params(workdir, params)
    results = evaluate_policy(policy, params, config)
    title = f"{workdir or config.model.path}, {config.eval.problems} problems"
    table = Table("metric", "value", title=title, title_justify="left")
    for key, value in results.items():
        table.add_row(key.removeprefix("eval/"), f"{value:.3f}")
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
