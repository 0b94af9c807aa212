"""Train a reasoning model by repairing its failed rollouts at their first wrong step (SCOPE, arXiv 2602.24110).

    python -m scope_jax.train --config configs/worksheet.py --workdir /tmp/run

SCOPE is Dr.GRPO (sample a group, verify, reward minus group mean, clipped ratio, sum / L_max) with five additions:
  1. a process reward model scores every reasoning step; the first below tau is where a wrong rollout went wrong;
  2. the group's wrong rollouts are ranked by how much of them is right, and the best is cut before its wrong step;
  3. a teacher continues from the policy's own tokens; the two are spliced token for token and verified again;
  4. the repaired rollout takes its source's place in the group BEFORE the advantages are computed;
  5. policy tokens keep the clipped ratio, teacher tokens get LUFFY's -f(p) A with f(p) = p / (p + 0.1).
Without an accepted repair the update is Dr.GRPO's, bit for bit.

Arrays on the host are numpy, and every copy to or from the devices is spelled out (the loop runs under
jax.transfer_guard). `rows` is the one record that the stages hand on: a dict of arrays [B, ...], a row per rollout.
"""

import argparse
import functools
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from scope_jax import checkpoint
from scope_jax.configlib import claim_workdir, load_config
from scope_jax.data import decode_completions, decode_steps, prompt_iterator
from scope_jax.evaluate import evaluate_policy
from scope_jax.locate import plan_corrections
from scope_jax.losses import assign_credit
from scope_jax.metrics import CompileCounter, Timer, Writer, mean_diversity, rollout_records
from scope_jax.prm import score_steps
from scope_jax.records import CorrectionRequests, InputError, TrainBatch, TrainState
from scope_jax.rewards import score_completions
from scope_jax.roles import Policy, describe, load_policy, load_scorer, load_teacher
from scope_jax.sampling import generate
from scope_jax.sharding import put_batch, replicate
from scope_jax.splicing import insert_rows, splice, splice_values
from scope_jax.steps import segment_steps
from scope_jax.update import make_optimizer, split_rows, update_policy

Rows = dict[str, Any]
splice, splice_values = jax.jit(splice, static_argnames="pad_id"), jax.jit(splice_values, static_argnames="fill")


class Run(NamedTuple):
    """What does not change during a run."""

    policy: Policy
    prm: Any  # None where nothing reads step scores
    prm_params: Any
    teacher: Any  # None where nothing is repaired
    optimizer: Any
    ref_params: Any  # None unless kl_coef > 0
    timer: Timer


@functools.partial(jax.jit, static_argnames="attempts")
def step_keys(seed_key, step, attempts):
    """Returns a step's keys (sample, locate, insert, [teach ..]): a function of (seed, step, purpose), never state."""
    keys = [jax.random.fold_in(jax.random.fold_in(seed_key, step), purpose) for purpose in range(3 + attempts)]
    return *keys[:3], keys[3:]


# ---------------------------------------------------------------------------------------- sample, verify


def sample(run: Run, config: ConfigDict, params, records, key) -> tuple[Rows, dict]:
    """Samples a group of completions for each problem and verifies them; returns (rows, metrics)."""
    policy, size = run.policy, config.sample.group_size
    with run.timer("sample"):
        prompts = policy.tokenize(records)
        device = put_batch((prompts.ids, prompts.mask), policy.mesh)
        options = {"eos_ids": policy.eos_ids, "pad_id": policy.pad_id, **config.sample}
        rollouts = jax.device_get(generate(policy.model, params, *device, key, **options))
    rows = {
        "prompt_ids": rollouts.prompt_ids, "prompt_mask": rollouts.prompt_mask,
        "ids": rollouts.completion_ids, "mask": rollouts.completion_mask, "source": rollouts.token_source,
        "logps": rollouts.logps, "finished": rollouts.finished, "record": np.repeat(np.arange(len(records)), size),
    }  # fmt: skip
    rows["rewards"] = verify(run, rows, records)
    metrics = {
        "reward": rows["rewards"].mean(),
        "solve_rate": (rows["rewards"] >= config.reward.solved_at).mean(),
        "finished": rows["finished"].mean(),
        "policy_tokens": rows["mask"].sum(),
    }
    return rows, metrics


def verify(run: Run, rows: Rows, records) -> np.ndarray:
    """Returns the reward of each row, [B] float32."""
    with run.timer("verify"):
        texts = decode_completions(run.policy.tokenizer, rows["ids"], rows["mask"])
        golds = [records[i]["gold"] for i in rows["record"]]
        return np.asarray(score_completions(run.policy.reward_fn, golds, texts), np.float32)


# ---------------------------------------------------------------------------------------- score, repair


def score(run: Run, config: ConfigDict, rows: Rows, records):
    """Segments completions into steps and scores each; returns (step_ends, scores, step_mask), numpy [B, S]."""
    policy = run.policy
    with run.timer("score"):
        step_ends, step_mask = segment_steps(policy.tokenizer, rows["ids"], rows["mask"], **config.steps)
        scores = np.ones(step_ends.shape, np.float32)
        if config.locate.locator == "oracle":
            for row, steps in enumerate(decode_steps(policy.tokenizer, rows["ids"], step_ends, step_mask)):
                gold = records[rows["record"][row]]["gold"]
                scores[row, : len(steps)] = policy.check_steps(gold, steps, bool(rows["finished"][row]))
        elif run.prm is not None:
            ids = np.concatenate([rows["prompt_ids"], rows["ids"]], axis=1)
            mask = np.concatenate([rows["prompt_mask"], rows["mask"]], axis=1)
            read_at = np.where(step_mask, rows["prompt_ids"].shape[1] + step_ends - 1, 0).astype(np.int32)
            device = put_batch((ids, mask, read_at, step_mask), policy.mesh)
            scored = jax.device_get(score_steps(run.prm, run.prm_params, *device))
            scores, step_mask = scored.scores, scored.mask
    return step_ends, scores, step_mask


def repair(run: Run, config: ConfigDict, rows: Rows, records, locate_key, insert_key, teach_keys):
    """Repairs each group's best wrong rollouts at their first wrong step.

    Returns:
      (rows with the accepted corrections in place, metrics, trace: what was seen and done, for the rollout files).
    """
    options, put = config.correct, functools.partial(put_batch, mesh=run.policy.mesh)
    replaces = options.insert != "append"
    step_ends, scores, step_mask = score(run, config, rows, records)
    columns = put((rows["rewards"], rows["finished"], scores, step_ends, step_mask))
    first_error, chosen, is_real, kept, targets = jax.device_get(
        plan_corrections(
            *columns, (locate_key, insert_key), group_size=config.sample.group_size,
            solved_at=config.reward.solved_at, n_correct=options.n_correct,
            spare_last_wrong=options.keep_last_wrong and replaces and config.advantages.baseline == "group",
            replace_random=options.insert == "replace_random_wrong", **config.locate, **config.select,
        )
    )  # fmt: skip
    corrected = {name: value[chosen] for name, value in rows.items()}
    accepted, teacher_tokens = np.zeros(len(chosen), bool), 0
    for key in teach_keys:
        wanted = is_real & ~accepted
        requests = CorrectionRequests(
            corrected["prompt_ids"], corrected["prompt_mask"], corrected["ids"], kept,
            budgets=np.where(wanted, rows["ids"].shape[1] - kept, 0).astype(np.int32),
            records=tuple(records[i] for i in corrected["record"]),
        )  # fmt: skip
        with run.timer("teach"):
            written = run.teacher(requests, key)
        spliced, fits = join(run, corrected, kept, written)
        spliced["rewards"] = verify(run, spliced, records)
        good = wanted & written.stopped & fits & acceptable(run, config, spliced, records)
        for name, value in corrected.items():
            corrected[name] = np.where(good.reshape(-1, *[1] * (value.ndim - 1)), spliced[name], value)
        accepted |= good
        teacher_tokens += int(written.mask.sum())
    inserted = insert_rows(
        rows, corrected, targets=targets, accepted=accepted, group_size=config.sample.group_size, insert=options.insert
    )
    share = (first_error / np.maximum(step_mask.sum(1), 1))[chosen][is_real]
    scored, wrong = step_mask.any(1), rows["rewards"] < config.reward.solved_at
    metrics = {
        "corrections/made": is_real.sum(), "corrections/accepted": accepted.sum(),
        "corrections/correct_share": share.mean() if share.size else 0.0,
        "corrections/first_error": first_error[chosen][is_real].mean() if share.size else -1.0,
        "teacher_tokens": teacher_tokens,
        "prm/agreement": ((first_error >= 0) == wrong)[scored].mean() if scored.any() else 0.0,
        "prm/unscored": (~scored).sum(),
    }  # fmt: skip
    trace = {"step_ends": step_ends, "step_mask": step_mask, "scores": scores, "first_error": first_error}
    return inserted, metrics, {**trace, "corrected": corrected, "chosen": chosen, "accepted": accepted}


def join(run: Run, corrected: Rows, kept, written) -> tuple[Rows, np.ndarray]:
    """Splices continuations onto prefixes, ids and log-probs alike; returns (rows, which of them fit into T)."""
    names = (corrected["ids"], corrected["logps"], corrected["mask"], kept)
    ids, logps, mask, kept = put_batch(names, run.policy.mesh)
    new_ids, new_logps, new_mask = put_batch((written.ids, written.logps, written.mask), run.policy.mesh)
    spliced = splice(ids, mask, kept, new_ids, new_mask, pad_id=run.policy.pad_id)
    logps = splice_values(logps, mask, kept, new_logps, new_mask, fill=0.0)[0]
    (ids, mask, source, overflowed), logps = jax.device_get((spliced, logps))
    fields = {"ids": ids, "mask": mask, "source": source, "logps": logps, "finished": written.stopped}
    return {**corrected, **fields}, ~overflowed


def acceptable(run: Run, config: ConfigDict, spliced: Rows, records) -> np.ndarray:
    """Returns which repaired rows pass `correct.accept`, [C] bool."""
    if config.correct.accept == "verified_correct":
        return spliced["rewards"] >= config.reward.solved_at
    if config.correct.accept == "prm_ok":
        _, scores, step_mask = score(run, config, spliced, records)
        return step_mask.any(1) & ~((scores < config.locate.tau) & step_mask).any(1)
    return np.ones(len(spliced["rewards"]), bool)


# ---------------------------------------------------------------------------------------- learn


def learn(run: Run, config: ConfigDict, state: TrainState, rows: Rows) -> tuple[TrainState, dict]:
    """Turns a step's rows into advantages and takes `mini_batches` optimizer updates."""
    mesh, slots = run.policy.mesh, len(rows["rewards"]) // config.data.prompts_per_step
    columns = put_batch((rows["rewards"], rows["source"], rows["row_mask"]), mesh)
    options = {"group_size": slots, **config.advantages, **config.credit}
    per_token, source, advantages = jax.device_get(assign_credit(*columns, **options))
    batch = TrainBatch(
        prompt_ids=rows["prompt_ids"], prompt_mask=rows["prompt_mask"], completion_ids=rows["ids"],
        completion_mask=rows["mask"], token_source=source, old_logps=rows["logps"], advantages=per_token,
    )  # fmt: skip
    with run.timer("update"):
        update = {name: value for name, value in config.learn.items() if name != "mini_batches"}
        minis = [put_batch(mini, mesh) for mini in split_rows(batch, config.learn.mini_batches)]
        state, infos = update_policy(
            run.policy.model, run.optimizer, state, minis, ref_params=run.ref_params,
            temperature=config.sample.temperature, max_length=config.sample.max_new_tokens, **update, **config.loss,
        )  # fmt: skip
        infos = jax.device_get(infos)
    metrics = {name: np.mean([info[name] for info in infos]) for name in infos[0]}
    signal = (advantages.reshape(-1, slots) != 0).any(1).mean()
    return state, {**metrics, "logp_gap": infos[0]["log_ratio_max"], "groups_with_signal": signal}


# ---------------------------------------------------------------------------------------- the loop


def evaluate(run: Run, config: ConfigDict, state: TrainState, writer: Writer, step: int) -> dict[str, float]:
    began = time.perf_counter()
    results = evaluate_policy(run.policy, state.params, config)
    writer.evaluation(step, results, time.perf_counter() - began)
    return results


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Runs the loop to `total_steps`; returns the last evaluation."""
    compiles = CompileCounter()
    policy, params = load_policy(config)
    problems = policy.problems("train")
    data = prompt_iterator(problems, batch_size=config.data.prompts_per_step, seed=config.seed)
    policy.tokenize(problems if isinstance(problems, list) else [problems[0]])  # bad prompts stop the run before it starts
    prm, prm_params = load_scorer(config, policy, params)
    optimizer = make_optimizer(total_steps=config.total_steps * config.learn.mini_batches, **config.optimizer)
    ref_params = jax.tree.map(jnp.copy, params) if config.loss.kl_coef else None
    run = Run(policy, prm, prm_params, load_teacher(config, policy), optimizer, ref_params, Timer())
    claim_workdir(workdir, config)

    # Where to start: 1. the workdir's newest checkpoint; 2. model.path.
    checkpoints = checkpoint.open_checkpoints(workdir, keep=config.checkpoint.keep)
    state = TrainState(params, jax.jit(optimizer.init)(params), replicate(np.int32(0), policy.mesh))
    if (restored := checkpoint.restore(checkpoints, state)) is not None:
        state, data_state = restored
        data.set_state(data_state)
    start = int(state.step)
    if start >= config.total_steps:
        raise InputError(f"{workdir} is at step {start} of {config.total_steps}: raise --config.total_steps")
    writer = Writer(workdir, start)
    writer.say(describe(config, policy, params, start))

    seed_key, warm = jax.random.key(config.seed), None
    before = after = evaluate(run, config, state, writer, start)
    for step in range(start + 1, config.total_steps + 1):
        began = time.perf_counter()
        with jax.transfer_guard("disallow"):
            records = next(data)
            keys = step_keys(seed_key, jax.device_put(np.int32(step)), attempts=config.correct.attempts)
            rows, metrics = sample(run, config, state.params, records, keys[0])
            repaired, trace = rows | {"row_mask": np.ones(len(rows["ids"]), bool)}, None
            if config.correct.n_correct:
                repaired, corrections, trace = repair(run, config, rows, records, *keys[1:])
                metrics |= corrections
            state, learnt = learn(run, config, state, repaired)
            state = state.replace(step=replicate(np.int32(step), policy.mesh))
        run.timer.seconds["step"] = time.perf_counter() - began
        tokens = {"sample": metrics["policy_tokens"], "update": repaired["mask"].sum()}
        metrics |= learnt | run.timer.flush(**tokens, teach=metrics.get("teacher_tokens", 0))
        if step % config.log.diversity_every == 0:
            texts = decode_completions(policy.tokenizer, rows["ids"], rows["mask"])
            metrics |= mean_diversity(texts, config.sample.group_size)
        warm = compiles.count if warm is None else warm
        writer.step(step, metrics | {"recompiles": compiles.count - warm})
        if step % config.log.rollouts_every == 0:
            groups = config.log.rollout_groups
            writer.rollouts(step, rollout_records(step, rows, trace, records, policy.tokenizer, groups))
        last = step == config.total_steps
        if last or step % config.checkpoint.every == 0:
            checkpoint.save(checkpoints, step, state, data.get_state())
        if last or (config.eval.every and step % config.eval.every == 0):
            after = evaluate(run, config, state, writer, step)
    checkpoints.wait_until_finished()
    writer.finish(before, after, compiles.count - warm)
    return after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.train",
        description="Trains a policy; repaired rollouts join their group (SCOPE).",
        epilog="example: python -m scope_jax.train --config worksheet:n=6 --workdir /tmp/run --config.method=dr_grpo",
    )
    parser.add_argument("--config", required=True, help="config file or shipped name, with an optional :arg")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of this run; continued if it has a checkpoint")
    args, overrides = parser.parse_known_args(argv)
    try:
        train(load_config(args.config, overrides), args.workdir)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
