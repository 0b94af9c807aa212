"""Times a whole RL step (W3 of ../shared/peers): rollouts, rewards, advantages, one update.

    python experiments/bench_rl_step.py --model-dir tiny --P 8 --G 8 --new-tokens 128

The stages are those of train.py without a repair: `decoding_layout` and `generate`, a reward on the
host (share of the digit 7 in the ids, as the peers count it), `assign_credit`, `update_policy` with
the sampler's log-probs as pi_old. The last line of the output is one JSON object; `phases` are
median seconds.
"""

import dataclasses
import statistics
import time

from peer_work import make_work, parse, peak_mb, report


def main() -> None:
    args = parse(__doc__.split("\n")[0], new_tokens=64)
    import jax
    import numpy as np

    from scope_jax.credit import assign_credit
    from scope_jax.metrics import CompileCounter
    from scope_jax.models.hf import load_hf
    from scope_jax.records import TrainBatch
    from scope_jax.sampling import decoding_layout, generate
    from scope_jax.update import init_state, make_optimizer, update_policy

    work, compiles = make_work(args, "W3"), CompileCounter()
    model, params = load_hf(args.model_dir, dtype="float32")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=args.remat))
    optimizer = make_optimizer(10**6, learning_rate=args.lr)
    state, loaded = init_state(optimizer, params), peak_mb("VmRSS")
    del params  # the state's arrays are donated to the update
    prompts, mask = jax.device_put(
        (work["prompts"].astype(np.int32), np.ones_like(work["prompts"], bool))
    )
    rows, phases, trace = args.P * args.G, {"sample": [], "reward": [], "update": []}, []
    parts = rows // (args.micro or rows)

    def step(number: int):
        nonlocal state
        marks = [time.perf_counter()]
        rollouts = generate(
            *decoding_layout(model, state.params), prompts, mask, jax.random.key(number),
            group_size=args.G, max_new_tokens=args.new_tokens, eos_ids=(), slots=args.slots,
        )  # fmt: skip
        ids = jax.device_get(rollouts.completion_ids)
        marks.append(time.perf_counter())
        texts = (" ".join(map(str, row)) for row in ids)
        rewards = np.array([text.count("7") / args.new_tokens for text in texts], np.float32)
        marks.append(time.perf_counter())
        advantages, source, _ = assign_credit(
            jax.device_put(rewards), rollouts.token_source, np.ones(rows, bool),
            group_size=args.G, scale="std", baseline="group",
        )  # fmt: skip
        batch = TrainBatch(
            prompt_ids=rollouts.prompt_ids, prompt_mask=rollouts.prompt_mask,
            completion_ids=rollouts.completion_ids, completion_mask=rollouts.completion_mask,
            token_source=source, old_logps=rollouts.logps, advantages=advantages,
        )  # fmt: skip
        state, infos = update_policy(
            model, optimizer, state, [batch], group_size=args.G, micro_batches=parts,
            loss_agg="seq-mean-token-mean",
        )  # fmt: skip
        jax.block_until_ready(state)
        marks.append(time.perf_counter())
        assert ids.shape == (rows, args.new_tokens)
        trace.append((float(infos[0]["loss"]), float(infos[0]["log_ratio_max"])))
        for name, began, ended in zip(phases, marks, marks[1:], strict=False):
            phases[name].append(ended - began)
        return marks[-1] - marks[0]

    start = time.perf_counter()
    step(0)  # compiles
    step(1)
    warm_up, compiled = time.perf_counter() - start, compiles.count
    cpu, began = time.process_time(), time.perf_counter()
    walls = [step(2 + rep) for rep in range(args.reps)]
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - began)
    timed = {
        name: round(statistics.median(seconds[2:]), 4) for name, seconds in phases.items()
    }  # fmt: skip
    report(
        args, "W3", work, walls, cpu_share, rows * args.new_tokens, micro=rows // parts,
        remat=args.remat,
        warmup_s=round(warm_up, 3), peak_rss_mb=peak_mb(), rss_loaded_mb=loaded, phases=timed,
        programs_compiled=compiled, compiled_while_timed=compiles.count - compiled,
        check={
            "steps": len(trace), "rows_per_step": rows,
            "logp_gap": max(gap for _, gap in trace),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
