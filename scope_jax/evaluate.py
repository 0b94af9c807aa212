"""Evaluation: how often a policy solves held-out problems, and the command that runs it alone.

python -m scope_jax.evaluate --config worksheet --workdir W          (a run's newest checkpoint)
python -m scope_jax.evaluate --config worksheet --model DIR          (a Hugging Face directory)
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
from scope_jax.configlib import load_config, one_line_errors
from scope_jax.data import decode_completions
from scope_jax.diversity import pass_at_k
from scope_jax.rewards import score_completions
from scope_jax.roles import Policy, load_policy
from scope_jax.sampling import generate
from scope_jax.sharding import put_batch


def sample_rewards(policy: Policy, params, records, key, *, batch_size, group_size, **sampling):
    """Samples `group_size` completions of every record and returns their rewards [len(records),
    group_size].

    Args:
      records: rows of the task; the last batch is filled up by repeating the last one, so one
        program serves all.
      batch_size: problems at a time.
      sampling: max_new_tokens, temperature (`generate`'s).
    """
    rewards = []
    for start in range(0, len(records), batch_size):
        batch = [records[min(i, len(records) - 1)] for i in range(start, start + batch_size)]
        prompts = policy.tokenize(batch)
        ids, mask = put_batch((prompts.ids, prompts.mask), policy.mesh)
        row_ids = np.arange(start * group_size, (start + batch_size) * group_size, dtype=np.int32)
        rollouts = generate(
            policy.model, params, ids, mask, key, group_size=group_size, eos_ids=policy.eos_ids,
            pad_id=policy.pad_id, row_ids=row_ids, **sampling,
        )  # fmt: skip
        completions = jax.device_get((rollouts.completion_ids, rollouts.completion_mask))
        texts = decode_completions(policy.tokenizer, *completions)
        golds = [record["gold"] for record in batch for _ in range(group_size)]
        rewards += score_completions(policy.reward_fn, golds, texts)
    return np.asarray(rewards).reshape(-1, group_size)[: len(records)]


def evaluate_policy(policy: Policy, params, config: ConfigDict) -> dict[str, float]:
    """Returns pass@1 (mean over samples) and pass@k (k = group_size) on the test and OOD splits.

    The same problems and keys each time, so that two evaluations of a run are paired.
    """
    options = dict(config.eval)
    options.pop("every")
    count, splits = (
        options.pop("problems"),
        {"test": "", "ood": "ood_"} if options.pop("ood") else {"test": ""},
    )
    key = jax.device_put(jax.random.key(config.seed + 1))
    results = {}
    for split, prefix in splits.items():
        source = policy.problems(split)
        records = [source[i] for i in range(min(count, len(source)))]
        rewards = sample_rewards(policy, params, records, key, **options)
        solved = (rewards >= config.reward.solved_at).sum(1)
        k = rewards.shape[1]
        results[f"eval/{prefix}pass@1"] = float(solved.mean() / k)
        results[f"eval/{prefix}pass@k"] = float(np.mean([pass_at_k(k, int(c), k) for c in solved]))
    return {**results, "eval/k": float(options["group_size"])}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.evaluate",
        description="Samples a policy on the config's held-out problems; prints pass@1, pass@k.",
        epilog="example: python -m scope_jax.evaluate --config worksheet:n=6 --workdir /tmp/run "
        "--config.eval.problems=512",
    )
    parser.add_argument("--config", required=True, help="file or shipped name, with :arg if any")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", help="of a training run: its newest checkpoint is evaluated")
    which.add_argument("--model", help="Hugging Face directory, or a run's workdir")
    args, overrides = parser.parse_known_args(argv)
    config, workdir = load_config(args.config, overrides), args.workdir
    if args.model is not None and (pathlib.Path(args.model) / "checkpoints").is_dir():
        workdir = args.model
    elif args.model is not None:
        config.model.path = args.model
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
