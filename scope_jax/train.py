"""Train a reasoning model by repairing its failed rollouts at their first wrong step.

    python -m scope_jax.train --config configs/worksheet.py --workdir /tmp/run

SCOPE (arXiv 2602.24110) is Dr.GRPO (sample a group, verify, reward minus group mean, clipped
ratio, sum / L_max) with five additions:
  1. a process reward model scores every reasoning step; the first below tau is the wrong one;
  2. a group's wrong rollouts are ranked by how much is right, the best is cut before its error;
  3. a teacher continues from the policy's own tokens; spliced token for token, verified again;
  4. the repaired rollout takes its source's place BEFORE the advantages are computed;
  5. policy tokens keep the clipped ratio, teacher tokens get LUFFY's -f(p) A, f(p) = p / (p + 0.1).
Without an accepted repair the update is Dr.GRPO's, bit for bit.

Host arrays are numpy; every copy to or from the devices is spelled out (there are transfer guards).
`rows` is a dict of arrays [B, ...], a row for each rollout of this process (of several: hosts.py).
"""

import argparse
import collections
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from scope_jax import checkpoint, checks, metrics
from scope_jax.configlib import claim_workdir, load_config, one_line_errors, read_command
from scope_jax.credit import assign_credit, token_returns
from scope_jax.data import decode_completions
from scope_jax.drawing import step_keys
from scope_jax.evaluate import evaluate_policy
from scope_jax.hosts import all_hosts, end_together, join_hosts, on_first_host, shared_errors
from scope_jax.locate import plan_corrections, teacher_share, unrepaired, within_share
from scope_jax.preemption import Preemption
from scope_jax.records import CorrectionRequests, InputError, TrainBatch, TrainState
from scope_jax.refill import refill_groups
from scope_jax.rewards import verifier_counts, verifier_stats
from scope_jax.roles import describe, spares_last_wrong
from scope_jax.run import Pending, Run, acceptable, current_logps, load_run, score_rows
from scope_jax.sampling import decoding_layout, generate
from scope_jax.sharding import own_rows, put_batch, replicate
from scope_jax.splicing import insert_rows, splice_rollouts
from scope_jax.update import init_state, put_minis, update_policy

Rows = dict[str, Any]


def sample(run: Run, config: ConfigDict, params, records, prompts, key) -> tuple[Rows, dict]:
    """Samples a group of completions for each problem; they are verified beside what follows."""
    policy, mesh = run.policy, run.policy.decode_mesh
    with run.timer("sample"):
        prompt_ids, prompt_mask = put_batch((prompts.ids, prompts.mask), mesh)
        options = {k: v for k, v in config.sample.items() if k != "stop"} | policy.ends
        layout = decoding_layout(policy.model, params, mesh, int8=options.pop("int8"))
        rollouts = own_rows(generate(*layout, prompt_ids, prompt_mask, key, **options), mesh)
    rows = {
        "record": np.repeat(np.arange(len(records)), config.sample.group_size),
        "prompt_ids": rollouts.prompt_ids, "prompt_mask": rollouts.prompt_mask,
        "ids": rollouts.completion_ids, "mask": rollouts.completion_mask,
        "source": rollouts.token_source, "logps": rollouts.logps, "finished": rollouts.finished,
    }  # fmt: skip
    rows["rewards"] = verify(run, rows, records)
    return rows, {"finished": rows["finished"].mean(), "policy_tokens": rows["mask"].sum()}


def verify(run: Run, rows: Rows, records) -> Pending:
    """Starts to verify each row; its reward, [B] float32, is waited for where it is first read."""
    texts = decode_completions(run.policy.tokenizer, rows["ids"], rows["mask"])
    golds = [records[i]["gold"] for i in rows["record"]]
    return Pending(run.timer, "verify", run.policy.rewards, golds, texts)


def score(run: Run, config: ConfigDict, params, key, rows: Rows, records):
    """Cuts completions into steps and scores them: step_ends, scores, step_mask [B, S], counts."""
    columns = [rows[k] for k in ("prompt_ids", "prompt_mask", "ids", "mask", "finished")]
    of_row = [records[i] for i in rows["record"]]
    with run.timer("score"):
        return score_rows(config, run.policy, run.scorer, params, key, *columns, records=of_row)


def repair(run: Run, config: ConfigDict, params, rows: Rows, records, scored, keys, share):
    """Repairs the best wrong rollouts of a `share` of the groups at their first wrong step; returns
    (rows with the accepted corrections in place, metrics, trace for the rollout files).
    """
    options, mesh, size = config.correct, run.policy.mesh, config.sample.group_size
    solved_at, width = config.reward.solved_at, rows["ids"].shape[1]
    (step_ends, scores, step_mask), (locate_key, insert_key, teach_keys) = scored, keys
    columns = (rows["rewards"], rows["finished"], scores, step_ends, step_mask)
    spared = spares_last_wrong(config)
    plan = plan_corrections(
        *put_batch(columns, mesh), (locate_key, insert_key), group_size=size, solved_at=solved_at,
        n_correct=options.n_correct, replace_random=options.insert == "replace_random_wrong",
        spare_last_wrong=spared, **config.locate, **config.select,
    )  # fmt: skip
    first_error, chosen, is_real, kept, targets = (np.array(x) for x in own_rows(plan, mesh))
    chosen, targets = chosen % len(first_error), targets % len(first_error)  # among our own rows
    is_real &= (allowed := within_share(len(chosen), len(first_error) // size, share))
    fixed = {name: value[chosen] for name, value in rows.items()}
    accepted, counts = np.zeros(len(chosen), bool), collections.Counter(teacher_tokens=0)

    def attempt(teach, wanted, key) -> np.ndarray:
        """Lets a teacher continue the wanted rows; those that pass stand in `fixed` afterwards."""
        budgets = np.where(wanted, width - kept, 0).astype(np.int32)
        requests = CorrectionRequests(
            fixed["prompt_ids"], fixed["prompt_mask"], fixed["ids"], kept, budgets,
            records=tuple(records[i] for i in fixed["record"]),
        )  # fmt: skip
        with run.timer("teach"):
            written = teach(requests, key, params)
        columns = (fixed["ids"], fixed["mask"], fixed["logps"], kept, written.ids, written.mask)
        columns = put_batch((*columns, written.logps, written.source), mesh)
        spliced = own_rows(splice_rollouts(*columns, pad_id=run.policy.pad_id), mesh)
        names = ("ids", "mask", "source", "logps", "overflowed")
        new = fixed | dict(zip(names, spliced, strict=True)) | {"finished": written.stopped}
        new["rewards"] = new["values"] = np.asarray(verify(run, new, records))
        if "returns" in new:
            new["returns"] = np.broadcast_to(new["values"][:, None], new["returns"].shape)
        steps_of = functools.partial(score, run, config, params, key, new, records)
        right = acceptable(config, new["rewards"], steps_of)
        good = wanted & written.stopped & ~new["overflowed"] & right
        for name, value in fixed.items():
            value[good] = new[name][good]
        counts.update({"teacher_tokens": written.teacher_tokens(), **(written.counts or {})})
        return good

    for key in teach_keys:
        accepted |= attempt(run.teacher, is_real & ~accepted, key)
    if run.whole_trace:
        bounds = {"solved_at": solved_at, "spare_last_wrong": spared, "group_size": size}
        slots, sources = unrepaired(rows["rewards"], accepted, allowed, **bounds)
        chosen[slots], targets[slots], kept[slots] = sources, sources, 0
        for name, value in fixed.items():
            value[slots] = rows[name][sources]
        accepted |= (traces := attempt(run.whole_trace, slots, teach_keys[-1]))
        counts["corrections/whole_traces"] = int(traces.sum())
    repaired = insert_rows(
        rows, fixed, targets=targets, accepted=accepted, group_size=size, insert=options.insert
    )
    checks.check_splices(rows, fixed, chosen, kept, accepted)
    if spared:
        checks.check_groups(rows["rewards"], repaired["rewards"], solved_at, size)
    wrong = rows["rewards"] < solved_at
    plan = (first_error, chosen, is_real)
    measured = metrics.correction_metrics(plan, accepted, step_mask, wrong) | counts
    trace = (step_ends, step_mask, scores, first_error, chosen, accepted, fixed)
    return repaired, measured, trace


def learn(run: Run, config: ConfigDict, state: TrainState, rows: Rows) -> tuple[TrainState, dict]:
    """Turns a step's rows into advantages and takes `mini_batches` optimizer updates."""
    mesh, slots = run.policy.mesh, len(rows["rewards"]) // (rows["record"][-1] + 1)
    columns = put_batch([rows.get(k) for k in ("values", "source", "row_mask", "returns")], mesh)
    credit = assign_credit(*columns, group_size=slots, **config.advantages, **config.credit)
    rows["advantages"], source, per_row = own_rows(credit, mesh)
    batch = TrainBatch(
        prompt_ids=rows["prompt_ids"], prompt_mask=rows["prompt_mask"],
        completion_ids=rows["ids"], completion_mask=rows["mask"], token_source=source,
        old_logps=rows["logps"], advantages=rows["advantages"],
    )  # fmt: skip
    with run.timer("update"):
        options = {**config.learn, **config.loss, "temperature": config.sample.temperature}
        options |= {"group_size": slots, "max_length": config.sample.max_new_tokens}
        packing = {"packing": options.pop("packing"), "micro_batches": options["micro_batches"]}
        minis = put_minis(batch, options.pop("mini_batches"), mesh, **packing)
        state, infos = update_policy(
            run.policy.model, run.optimizer, state, minis, ref_params=run.ref_params, **options
        )
        infos = jax.device_get(infos)
    return state, metrics.learning_metrics(infos, per_row.reshape(-1, slots))


def training_step(run: Run, config: ConfigDict, state: TrainState, data, step: int) -> Any:
    """Takes a step; returns (state, problems, rows as sampled, as trained on, trace, metrics)."""

    def draw(key):
        records, prompts = next(data)
        return records, *sample(run, config, state.params, records, prompts, key)

    checks.check_weights(int(jax.device_get(state.step)), step)
    verified = verifier_stats()
    on_device = replicate(np.int32(step), run.policy.mesh)
    keys = step_keys(run.seed_key, on_device, config.correct.attempts, config.refill.rounds)
    records, rows, measured = draw(keys[0])
    verdicts = rows["rewards"]  # still being found, while the PRM scores
    below = config.reward.solved_at if config.refill.all_wrong == "repair" else None
    records, rows, measured = refill_groups(draw, keys[1], records, rows, measured, below)
    scored, trace = (), None
    if config.correct.n_correct or run.scorer:
        *scored, counts = score(run, config, state.params, keys[2], rows, records)
        measured |= counts
    rows["rewards"] = np.asarray(rows["rewards"])
    measured |= metrics.reward_metrics(verdicts, config.reward.solved_at)
    bounds = {"tau": config.locate.tau, "solved_at": config.reward.solved_at}
    rows |= token_returns(rows["rewards"], rows["mask"], *scored, **bounds, **config.returns)
    repaired = rows | {"row_mask": np.ones(len(rows["ids"]), bool)}
    if config.correct.n_correct:
        share = teacher_share(step, **config.teacher_budget)
        args = (state.params, rows, records, scored, keys[2:], share)
        repaired, corrections, trace = repair(run, config, *args)
        measured |= corrections
    measured |= verifier_counts(verified)
    if any(all_hosts(checks.find_non_finite(repaired))):
        measured["skipped"] = config.learn.mini_batches
    else:
        state, learnt = learn(run, config, state, repaired)
        measured |= learnt
    return dataclasses.replace(state, step=on_device), records, rows, repaired, trace, measured


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Runs the loop to `total_steps`, or until SIGTERM; returns the last evaluation."""
    compiles = metrics.CompileCounter()
    with shared_errors():
        run, params, data = load_run(config, workdir)
    on_first_host(claim_workdir, workdir, config)
    policy, shown = run.policy, config.log.rollout_groups

    # Where to start: 1. the workdir's newest checkpoint that is whole; 2. model.path.
    keep = {key: config.checkpoint[key] for key in ("keep", "keep_every")}
    checkpoints = checkpoint.open_checkpoints(workdir, **keep, clear=True)
    state, start = checkpoint.go_on(checkpoints, init_state(run.optimizer, params), data)
    shows = {key: config.log[key] for key in ("tracker", "profile_from", "profile_steps")}
    writer = metrics.Writer(workdir, start, run.skipped, config.total_steps, **shows)
    if start >= config.total_steps and writer.evaluated == start:
        raise InputError(f"{workdir} has done {start} steps: raise --config.total_steps to go on")
    writer.say("\n".join([describe(config, policy, params, start), *run.notes]))

    after, last, every = {}, config.total_steps, config.eval.every
    evaluates = lambda step: step in (0, last) or (every and step % every == 0)  # noqa: E731
    if evaluates(start) and writer.evaluated != start:
        writer.evaluation(start, after := evaluate_policy(policy, state.params, config))
    with Preemption(config.checkpoint.grace_seconds) as preemption:
        for step in range(start + 1, last + 1):
            began = time.perf_counter()
            compiling = compiles.watch(warm=step > start + 1)
            with writer.watching(step, run.timer), metrics.no_hidden_copies(), compiling:
                state, *of_step = training_step(run, config, state, data, step)
            records, rows, trained, trace, measured = of_step
            run.timer.seconds["step"] = time.perf_counter() - began
            measured |= metrics.speeds(run.timer, policy.model, rows, trained, measured)
            measured["recompiles"] = compiles.recompiles
            if step % config.log.diversity_every == 0:
                texts = decode_completions(policy.tokenizer, rows["ids"], rows["mask"])
                measured |= metrics.mean_diversity(texts, config.sample.group_size)
            measured = metrics.over_hosts(measured)
            measured |= run.after_step(step, measured) or {}
            measured["spike"] = checks.gradient_spike(measured, writer.recent, **config.checks)
            checkpoint.settle(checkpoints)  # the last save ran beside this step
            writer.step(step, measured)
            if step % config.log.rollouts_every == 0:
                trained["logps_after"] = current_logps(run, config, state.params, trained)
                writer.rollouts(step, rows, trace, records, policy.tokenizer, shown, trained)
            checks.keep_skipped(workdir, step, measured, trained)
            checks.stop_if_broken(measured, writer.recent, **config.checks)
            stopping = preemption.anywhere()
            if step == last or stopping or step % config.checkpoint.every == 0:
                checkpoint.save(checkpoints, step, state, data.get_state())
            if stopping:
                checkpoint.settle(checkpoints)
                writer.say(f"SIGTERM: saved after step {step}; the same command goes on from here")
                return after
            if evaluates(step):
                writer.evaluation(step, after := evaluate_policy(policy, state.params, config))
    checkpoint.settle(checkpoints)
    checkpoints.close()
    writer.finish(after, compiles.recompiles)
    return after


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.train",
        description="Trains a policy; its repaired rollouts join their group (SCOPE).",
        epilog="example: python -m scope_jax.train --config worksheet:n=6 --workdir /tmp/run "
        "--config.method=dr_grpo --config.optimizer.learning_rate=1e-4",
    )
    parser.add_argument("--config", required=True, help="file or shipped name, with :arg if any")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="new or to go on with")
    args, overrides = read_command(parser, argv)
    join_hosts()
    with end_together():
        train(load_config(args.config, overrides), args.workdir)


if __name__ == "__main__":
    sys.exit(main())
