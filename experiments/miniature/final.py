"""The final evaluation of one run: what the tables' columns are computed from.

    python experiments/miniature/final.py --config worksheet:n=5 --workdir RUN --out RUN/final.json

Without --workdir it is the config's own policy (--config.model.path=DIR), not trained. Every run is
asked the same problems with the same keys. Diversity is counted among CORRECT samples only, a wrong
digit is not diversity:

* distinct_all: distinct valid solutions (keys of the task's `valid_order`) among the correct
  samples of a problem; it grows with their number.
* distinct: how many there are among m correct samples, on average over all draws of m (rarefaction,
  `diversity.expected_distinct`); problems with at least m correct samples.
* same: the chance that two correct samples of a problem are the same solution (problems with two
  or more). "distinct" nears its ceiling m where there are many valid solutions; this one does not.
* td, ed: DIVER's textual and equational diversity among the correct samples, problems with two or
  more. TD cannot see texts of fewer than five words (to it even copies differ): null there. ED
  counts formulas in $..$; a task without any has 0.
"""

import argparse
import importlib
import json
import pathlib
import sys
from collections import Counter

import jax
import numpy as np

from scope_jax.checkpoint import restore_params
from scope_jax.configlib import load_config, one_line_errors
from scope_jax.diversity import (
    equation_diversity,
    expected_distinct,
    pass_at_k,
    textual_diversity,
)
from scope_jax.evaluate import decode_groups, sample_completions
from scope_jax.roles import load_policy
from scope_jax.sampling import decoding_layout

EVALUATION_KEY = 20260224  # of every run, whatever its seed


def problem_columns(gold: str, texts: list[str], solved: list[bool], valid_order, among: int):
    """Returns one problem's entry: {"correct": c, "distinct_all", "distinct", "same", "td", "ed"};
    None where there are too few correct samples to measure it.
    """
    right = [text for text, good in zip(texts, solved, strict=True) if good]
    kinds = Counter(valid_order(gold, text) for text in right)
    several = len(right) > 1
    words = min((len(text.split()) for text in right), default=0)
    return {
        "correct": len(right),
        "distinct_all": len(kinds) if right else None,
        "distinct": expected_distinct(list(kinds.values()), among) if len(right) >= among else None,
        "same": 2 - expected_distinct(list(kinds.values()), 2) if several else None,
        "td": textual_diversity(right) if several and words >= 5 else None,
        "ed": equation_diversity(right) if several else None,
    }


def columns_of(problems: list[dict], samples: int) -> dict[str, float | None]:
    """Returns the run's columns: pass@k for k = 1, 2, 4, .. samples, and the means of the diversity
    columns over the problems that have them.

    Args:
      problems: of `problem_columns`, `samples` samples each.
    """
    ks = [k for k in (1, 2, 4, 8, 16, 32) if k <= samples]
    columns: dict[str, float | None] = {
        f"pass@{k}": float(np.mean([pass_at_k(samples, p["correct"], k) for p in problems]))
        for k in ks
    }
    for name in ("distinct_all", "distinct", "same", "td", "ed"):
        values = [problem[name] for problem in problems if problem[name] is not None]
        columns[name] = float(np.mean(values)) if values else None
        columns[f"{name}_problems"] = len(values)
    return columns


def evaluate(config, workdir: pathlib.Path | None, sizes: dict[str, int]) -> dict:
    """Returns {"columns", "problems"} of a run, or of the config's own policy."""
    policy, params = load_policy(config)
    if workdir is not None:
        params = restore_params(workdir, params)
    model, params = decoding_layout(policy.model, params, policy.decode_mesh)
    policy, key = policy._replace(model=model), jax.random.key(EVALUATION_KEY)
    options = {"max_new_tokens": config.eval.max_new_tokens, "batch_size": config.eval.batch_size}

    def sample(split: str, count: int, group_size: int, temperature: float):
        source = policy.problems(split)
        records = [source[i] for i in range(count)]
        more = {"group_size": group_size, "temperature": temperature, **options}
        rewards, completions = sample_completions(policy, params, records, key, **more)
        texts = decode_groups(policy.tokenizer, completions, group_size)
        return records, texts, rewards >= config.reward.solved_at

    count, samples = sizes["problems"], sizes["samples"]
    records, texts, solved = sample("test", count, samples, 1.0)
    *_, greedy = sample("test", count, 1, 0.0)
    *_, ood = sample("ood", sizes["ood_problems"], sizes["ood_samples"], 1.0)
    valid_order = importlib.import_module(config.task.module).valid_order
    problems = [
        problem_columns(record["gold"], group, right.tolist(), valid_order, sizes["among"])
        for record, group, right in zip(records, texts, solved, strict=True)
    ]
    columns = columns_of(problems, samples)
    columns |= {"greedy": float(greedy.mean()), "ood_pass@1": float(ood.mean())}
    return {"columns": columns, "problems": problems}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, help="of a finished run")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a JSON file")
    for name, default in {
        "problems": 256, "samples": 16, "ood_problems": 256, "ood_samples": 4, "among": 4,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args, overrides = parser.parse_known_args(argv)
    sizes = {k: v for k, v in vars(args).items() if k not in ("config", "workdir", "out")}
    result = evaluate(load_config(args.config, overrides), args.workdir, sizes)
    args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result["columns"]))


if __name__ == "__main__":
    sys.exit(main())
