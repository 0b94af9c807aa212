"""Times training steps that verify answers beside PRM scoring against steps that do both in turn.

    python experiments/bench_overlap.py --prm-layers 4 --pairs 7
    python experiments/bench_overlap.py --prompts 64 --checks 2 --dtype bfloat16    (a GPU)

The verifier-heavy case: the worksheet run (sample, score, repair, update), where the answer of each
rollout is a formula with roots that math-verify has to compare in its worker processes, another
pair of formulas for each rollout and step, and where the PRM has a real model's shape (random
weights; its time does not depend on them). Both kinds of steps are the code of train.py; in turn,
`Pending` finishes where it is made. Pairs of steps alternate. The last line of the output is one
JSON object: `ratio` is the median over the pairs of the seconds of the step with overlap over those
of its neighbour without; the phases are medians.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from scope_jax import train
from scope_jax.configlib import load_config
from scope_jax.metrics import Timer
from scope_jax.models.hf import config_from_hf
from scope_jax.models.published import PUBLISHED
from scope_jax.models.transformer import Transformer, init_params
from scope_jax.prm import PRM, score_steps
from scope_jax.rewards import verify_batch
from scope_jax.run import Pending, load_run
from scope_jax.scorers import token_scorer
from scope_jax.sharding import own_rows, put_batch
from scope_jax.update import init_state

PHASES = ("sample", "verify", "verify_wait", "score", "teach", "update", "step")


class InTurn:
    """`Pending` without a thread: its work is done where it is started."""

    def __init__(self, timer: Timer, phase: str, fn, *args) -> None:
        with timer(phase):
            self._result = fn(*args)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:  # noqa: ARG002
        return np.array(self._result, dtype)


def formulas(rng: np.random.Generator, count: int) -> tuple[list[str], list[str]]:
    """Golds, and answers that equal every other one of them, in another shape."""
    golds, answers = [], []
    for index in range(count):
        a, b, c, d = (int(x) for x in rng.integers(2, 60, 4))
        golds.append(f"\\frac{{{a}+{b}\\sqrt{{{c}}}}}{{{d}}}")
        answers.append(
            f"\\boxed{{\\frac{{{a + index % 2}}}{{{d}}}+\\frac{{{b}\\sqrt{{{c}}}}}{{{d}}}}}"
        )
    return golds, answers


def heavy_rewards(rewards, rng, per_row, workers, golds, texts) -> np.ndarray:
    """The task's own rewards, after `per_row` checks of formulas for each row."""
    verify_batch(*formulas(rng, per_row * len(texts)), num_workers=workers)
    return rewards(golds, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prm", default="Qwen/Qwen2.5-Math-1.5B", help="of models/published.py")
    parser.add_argument("--prm-layers", type=int, default=0, help="only so many; 0 = all")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--checks", type=int, default=1, help="formulas for each rollout")
    parser.add_argument("--workers", type=int, default=2, help="processes that verify")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="of the PRM")
    args = parser.parse_args()

    config = load_config("worksheet", [])
    config.data.prompts_per_step, config.sample.group_size = args.prompts, args.group_size
    config.sample.max_new_tokens, config.steps.max_steps = args.new_tokens, 16
    run, params, data = load_run(config, pathlib.Path(tempfile.mkdtemp()))
    shape = config_from_hf(PUBLISHED[args.prm], args.prm)
    layers = args.prm_layers or shape.num_layers
    shape = dataclasses.replace(shape, dtype=args.dtype, num_layers=layers)
    prm = PRM(Transformer(shape))
    weights = init_params(prm.declare(), jax.random.key(0), args.dtype)

    def score_fn(*columns):
        columns = put_batch(tuple(columns), run.policy.mesh)
        return own_rows(score_steps(prm, weights, *columns), run.policy.mesh)

    scorer = token_scorer(score_fn, max_length=prm.max_position)
    rewards = functools.partial(
        heavy_rewards, run.policy.rewards, np.random.default_rng(0), args.checks, args.workers
    )
    run = run._replace(
        policy=run.policy._replace(rewards=rewards),
        scorer=lambda requests, key, params: scorer(requests),  # noqa: ARG005
    )
    state, seconds, phases = init_state(run.optimizer, params), {}, {}
    ways = {"overlap": Pending, "in_turn": InTurn}
    for step in range(1, 2 * args.pairs + 5):  # two of each way first, which compile
        way = list(ways)[
            (0, 1, 1, 0)[(step - 1) % 4]
        ]  # a pair's first is now the one, now the other
        train.Pending = ways[way]
        start = time.perf_counter()
        state, *_ = train.training_step(run, config, state, data, step)
        jax.block_until_ready(state)
        taken = run.timer.flush() | {"seconds/step": time.perf_counter() - start}
        if step > 4:
            seconds.setdefault(way, []).append(taken["seconds/step"])
            phases.setdefault(way, []).append(taken)
    result = {
        "ratio": statistics.median(
            a / b for a, b in zip(*(seconds[way] for way in ways), strict=True)
        )
    }
    for way in ways:
        medians = {
            p: statistics.median(t.get(f"seconds/{p}", 0.0) for t in phases[way]) for p in PHASES
        }
        result[way] = {phase: round(value, 3) for phase, value in medians.items()}
    print(json.dumps(result | {"device": jax.devices()[0].device_kind, **vars(args)}))


if __name__ == "__main__":
    main()
