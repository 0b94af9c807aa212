"""A run: a config's roles bound together, and what is done with its rows by several of them.

Rows are host arrays; `params` are the policy's current ones.
"""

import concurrent.futures
import copy
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from scope_jax.configlib import load_object
from scope_jax.data import Ahead, decode_completions, prompt_iterator
from scope_jax.metrics import Timer
from scope_jax.monte_carlo import success_rates
from scope_jax.records import (
    PAD,
    POLICY,
    Continuations,
    CorrectionRequests,
    ScoreRequests,
    StepScores,
    TrainBatch,
)
from scope_jax.roles import Policy, load_policy, load_scorer, load_teacher
from scope_jax.sampling import continue_from, decoding_layout
from scope_jax.sharding import host_part, own_rows, put_batch, put_parts, replicate
from scope_jax.steps import segment_steps
from scope_jax.stepwise import correct_stepwise
from scope_jax.teachers import BoundTeacher, whole_trace_teacher
from scope_jax.update import fill_logps, make_optimizer, reference

# (requests, key, params) -> what a scorer returns
BoundScorer = Callable[..., tuple[StepScores, dict[str, int]]]

PROMPTS_CHECKED = 16  # at the start


class Run(NamedTuple):
    """What does not change during a run."""

    policy: Policy
    scorer: Any  # BoundScorer, None where nothing reads step scores
    teacher: Any  # BoundTeacher, None where nothing is repaired
    whole_trace: Any  # BoundTeacher where its traces stand in for repairs that failed, else None
    optimizer: optax.GradientTransformation
    ref_params: Any  # None unless kl_coef > 0
    seed_key: jax.Array
    timer: Timer
    skipped: list[dict[str, Any]]  # lines of the data files that were left out
    notes: Sequence[str]  # what else there is to say of the data
    after_step: Callable[[int, dict], dict | None]  # the user's own; returns more metrics


def load_run(config: ConfigDict, workdir: pathlib.Path) -> tuple[Run, Any, Any]:
    """Returns (Run, the policy's params, the iterator over its training problems) of a config."""
    policy, params = load_policy(config)
    problems = policy.problems("train")
    others = (config.eval.split, *(("ood",) if config.eval.ood else ()))
    all_splits = [problems, *(policy.problems(split) for split in others)]
    batches = prompt_iterator(
        problems, batch_size=config.data.prompts_per_step, seed=config.seed,
        part=host_part(policy.mesh),
    )  # fmt: skip
    # A prompt that does not fit stops the run before it starts (of what is made or read when asked
    # for: the first few).
    sources = getattr(problems, "sources", (problems,))
    for source in sources:
        few = range(min(PROMPTS_CHECKED, len(source)))
        policy.tokenize(source if isinstance(source, list) else [source[i] for i in few])
    # The next batch is tokenised beside the step, by a tokenizer of its own (see Pending).
    tokenizer = copy.deepcopy(policy.tokenizer)
    data = Ahead(batches, functools.partial(policy.tokenize, tokenizer=tokenizer))
    plain, teacher = load_scorer(config, policy, params), load_teacher(config, policy, workdir)
    scorer = plain and (lambda requests, key, params: plain(requests))  # noqa: ARG005
    if config.locate.locator == "monte_carlo" and config.correct.n_correct:
        scorer = functools.partial(score_by_rollouts, config, policy)
    after_step, traces = config.hooks.after_step, config.correct.fallback == "whole_trace"
    whole_trace = traces and whole_trace_teacher(
        policy.tokenizer, policy_eos_id=policy.tokenizer.eos_token_id,
        max_new_tokens=config.sample.max_new_tokens,
    )  # fmt: skip
    run = Run(
        policy=policy,
        scorer=scorer,
        teacher=None if teacher is None else teach_in_scope(config, policy, teacher, scorer),
        whole_trace=whole_trace and (lambda requests, key, params: whole_trace(requests, key)),  # noqa: ARG005
        optimizer=make_optimizer(
            config.total_steps * config.learn.mini_batches, **config.optimizer
        ),
        ref_params=reference(params) if config.loss.kl_coef else None,
        seed_key=jax.random.key(config.seed),
        timer=Timer(),
        skipped=[line for split in all_splits for line in getattr(split, "skipped", ())],
        notes=[
            "pass rates: " + ", ".join(f"{count} {name}" for name, count in source.rated.items())
            for source in sources
            if hasattr(source, "rated")
        ],
        after_step=load_object(after_step, "hooks.after_step") if after_step else _no_hook,
    )
    return run, params, data


def _no_hook(step: int, measured: dict) -> None:
    """Stands for hooks.after_step where there is none."""


class Pending:
    """An array that a thread is still computing; numpy waits for it where it is first read.

    The devices work on meanwhile: verification is the host's. Its exception is raised where the
    array is read. `fn` may use neither jax (a transfer guard is of its thread) nor a tokenizer that
    the caller goes on using (one that encodes in two threads may raise "Already borrowed").
    """

    def __init__(self, timer: Timer, phase: str, fn: Callable[..., np.ndarray], *args: Any) -> None:
        """Starts fn(*args); the timer gets its seconds as `phase`, those waited as `phase`_wait."""

        def work() -> np.ndarray:
            with timer(phase):
                return fn(*args)

        self._timer, self._phase = timer, phase
        threads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=phase)
        self._result = threads.submit(work)
        threads.shutdown(wait=False)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:  # noqa: ARG002
        with self._timer(f"{self._phase}_wait"):
            return np.array(self._result.result(), dtype)


def verify_rows(policy: Policy, ids, mask, records) -> np.ndarray:
    """Returns the rewards [B] float32 of completions [B, T] of B records."""
    texts = decode_completions(policy.tokenizer, ids, mask)
    return policy.rewards([record["gold"] for record in records], texts)


def score_rows(
    config: ConfigDict, policy: Policy, scorer: BoundScorer | None, params, key, prompt_ids,
    prompt_mask, ids, mask, finished, records,
):  # fmt: skip
    """Cuts completions into steps and scores them: step_ends, scores, step_mask [B, S], counts."""
    cut = segment_steps(policy.tokenizer, ids, mask, **config.steps)
    if scorer is None:
        return cut[0], np.ones(cut[0].shape, np.float32), cut[1], {}
    columns = (prompt_ids, prompt_mask, ids, mask, finished, *cut)
    scored, counts = scorer(ScoreRequests(*columns, records=tuple(records)), key, params)
    return cut[0], scored.scores, scored.mask, counts


def continue_policy(
    config: ConfigDict, policy: Policy, params, requests: CorrectionRequests, key
) -> Continuations:
    """The policy goes on from cut rollouts, as it sampled them."""
    mesh, sampling = policy.decode_mesh, ("temperature", "top_k", "top_p", "min_p")
    columns = (requests.prompt_ids, requests.prompt_mask, requests.prefix_ids)
    columns = put_batch((*columns, requests.prefix_length, requests.budgets), mesh)
    layout = decoding_layout(policy.model, params, mesh, int8=config.sample.int8)
    written = continue_from(
        *layout, *columns[:4], key=key, max_new_tokens=columns[4],
        buffer_length=config.sample.max_new_tokens, **policy.ends,
        **{name: config.sample[name] for name in sampling},
    )  # fmt: skip
    own = own_rows(written, mesh)
    return Continuations(own.completion_ids, own.completion_mask, own.logps, own.finished)


def acceptable(config: ConfigDict, rewards, score: Callable[[], tuple]) -> np.ndarray:
    """Returns which spliced rows pass `correct.accept`, [C] bool; `score()` gives their steps'."""
    if config.correct.accept == "verified_correct":
        return rewards >= config.reward.solved_at
    if config.correct.accept == "prm_ok":
        _, scores, step_mask, _ = score()
        return step_mask.any(1) & ~((scores < config.locate.tau) & step_mask).any(1)
    return np.ones(len(rewards), bool)


def current_logps(run: Run, config: ConfigDict, params, rows: dict[str, Any]) -> np.ndarray:
    """Returns the log-prob of each token of a step's rows, a teacher's too, under `params`.

    One forward pass in parts as large as the update's: for the rollout files, that say what an
    update did to a token. All processes must call it.

    Args:
      rows: as trained on; "prompt_ids", "prompt_mask", "ids", "mask" are read.
    Returns:
      [B, T] float32, temperature-scaled; 0 where the mask is False.
    """
    mask, learn = rows["mask"], config.learn
    nothing = np.zeros(mask.shape, np.float32)
    batch = TrainBatch(
        prompt_ids=rows["prompt_ids"], prompt_mask=rows["prompt_mask"],
        completion_ids=rows["ids"], completion_mask=mask,
        token_source=np.where(mask, POLICY, PAD).astype(np.int8),
        old_logps=nothing, advantages=nothing,
    )  # fmt: skip
    (whole,) = put_parts(batch, 1, run.policy.mesh)
    filled = fill_logps(
        run.policy.model, params, whole, parts=learn.mini_batches * learn.micro_batches,
        temperature=config.sample.temperature, chunk_size=config.loss.chunk_size, field="old_logps",
    )  # fmt: skip
    return np.where(mask, own_rows(filled.old_logps, run.policy.mesh), 0.0)


_key_of_call = jax.jit(jax.random.fold_in)


def score_by_rollouts(
    config: ConfigDict, policy: Policy, requests: ScoreRequests, key, params
) -> tuple[StepScores, dict[str, int]]:
    """Scores a step 1 if any of `monte_carlo.tries` of the policy's own continuations of the
    solution up to and with it is right, else 0: the first 0 is Self-Explore's first pit
    (https://arxiv.org/abs/2404.10346). Wrong, finished rollouts alone are scored.
    """
    rows, width = requests.completion_ids.shape
    rewards = verify_rows(
        policy, requests.completion_ids, requests.completion_mask, requests.records
    )
    wrong = np.asarray(requests.finished) & (rewards < config.reward.solved_at)
    step_mask = requests.step_mask & wrong[:, None]

    def go_on(index, prefix, call):
        cut = CorrectionRequests(
            requests.prompt_ids[index], requests.prompt_mask[index],
            requests.completion_ids[index], prefix,
            np.where(prefix > 0, width - prefix, 0).astype(np.int32),
            records=tuple(requests.records[i] for i in index),
        )  # fmt: skip
        on_device = replicate(np.int32(call), policy.mesh)
        written = continue_policy(config, policy, params, cut, _key_of_call(key, on_device))
        return written.ids, written.mask

    def solved(index, completions):
        texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        golds = [requests.records[i]["gold"] for i in index]
        return policy.rewards(golds, texts) >= config.reward.solved_at

    rates = success_rates(
        requests.completion_ids, np.zeros(rows), requests.step_ends, step_mask, go_on, solved,
        tries=config.monte_carlo.tries, rows=rows,
    )  # fmt: skip
    scores = np.where(wrong[:, None], rates > 0, True).astype(np.float32)
    return StepScores(scores, np.asarray(requests.step_mask)), {}


def teach_in_scope(
    config: ConfigDict, policy: Policy, teacher: BoundTeacher, scorer: BoundScorer | None
) -> BoundTeacher:
    """Returns the teacher of whole suffixes, or of single steps."""
    if config.correct.scope == "suffix":
        return teacher
    eos_id = policy.tokenizer.eos_token_id
    cut_steps = functools.partial(segment_steps, policy.tokenizer, **config.steps)

    def judge(key, params, requests: CorrectionRequests, mask, finished):
        rows = (requests.prompt_ids, requests.prompt_mask, requests.prefix_ids, mask, finished)
        right = verify_rows(policy, rows[2], mask, requests.records) >= config.reward.solved_at
        ends, scores, step_mask, _ = score_rows(
            config, policy, scorer, params, key, *rows, records=requests.records
        )
        low = (scores < config.locate.tau) & step_mask
        first = low.argmax(1)  # the first wrong step begins where the one before it ends
        cut = np.where(first > 0, ends[np.arange(len(ends)), first - 1], 0)
        return right, np.where(low.any(1), cut, -1).astype(np.int32)

    def teach(requests, key, params):
        return correct_stepwise(
            requests, key, max_rounds=config.correct.max_rounds,
            teach=lambda requests, key: teacher(requests, key, params),
            go_on=functools.partial(continue_policy, config, policy, params),
            judge=functools.partial(judge, key, params),
            first_end=lambda ids, mask: cut_steps(ids, mask)[0][:, 0], policy_eos_id=eos_id,
        )  # fmt: skip

    return teach
