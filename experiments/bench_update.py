"""Times one update on given rollouts (W2 of ../shared/peers): loss, gradients, clip, AdamW.

    python experiments/bench_update.py --model-dir tiny --B 16 --new-tokens 128

The last line of the output is one JSON object. Its `share_of_peak` is what the arithmetic of the
weights alone (6 FLOP a weight and token, the unembedding's for completion tokens only; attention
and recomputation not counted) takes of this machine's measured matrix-product rate.
"""

import dataclasses
import statistics
import time

from peer_work import machine, make_work, parse, peak_mb, report, timed


def main() -> None:
    args = parse(__doc__.split("\n")[0], new_tokens=64)
    import jax
    import numpy as np

    from scope_jax.metrics import CompileCounter
    from scope_jax.models.hf import load_hf
    from scope_jax.records import POLICY, TrainBatch
    from scope_jax.update import init_state, make_optimizer, train_step

    work, compiles = make_work(args, "W2"), CompileCounter()
    model, params = load_hf(args.model_dir, dtype="float32")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=args.remat))
    of_layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    of_unembedding = params["embed"].size
    optimizer = make_optimizer(10**6, learning_rate=args.lr)
    state, loaded = init_state(optimizer, params), peak_mb("VmRSS")
    del params  # the state's arrays are donated to the update
    shape = work["completions"].shape
    batch = jax.device_put(
        TrainBatch(
            prompt_ids=work["prompts"].astype(np.int32),
            prompt_mask=np.ones_like(work["prompts"], bool),
            completion_ids=work["completions"].astype(np.int32),
            completion_mask=np.ones(shape, bool),
            token_source=np.full(shape, POLICY, np.int8),
            old_logps=work["old_logp"],
            advantages=np.repeat(work["advantages"][:, None], shape[1], axis=1),
        )
    )
    parts, trace = args.B // (args.micro or args.B), []

    def step(_):
        nonlocal state
        state, info = train_step(
            model, optimizer, state, batch, micro_batches=parts, loss_agg="token-mean"
        )
        jax.block_until_ready(state)
        trace.append((float(info["loss"]), float(info["grad_norm"])))

    start = time.perf_counter()
    step(0)  # compiles
    warm_up, compiled = time.perf_counter() - start, compiles.count
    walls, cpu_share = timed(step, args.reps)
    compiled_late, peak = compiles.count - compiled, peak_mb()
    flops, _ = machine()
    tokens, written = args.B * (args.prompt_len + args.new_tokens), args.B * args.new_tokens
    arithmetic = 6 * (of_layers * tokens + of_unembedding * written)
    seconds = statistics.median(walls)
    report(
        args, "W2", work, walls, cpu_share, tokens, B=args.B, micro=args.B // parts,
        remat=args.remat,
        warmup_s=round(warm_up, 3), peak_rss_mb=peak, rss_loaded_mb=loaded,
        programs_compiled=compiled, compiled_while_timed=compiled_late,
        completion_tokens_per_s=round(written / seconds, 3),
        machine={"gflops": round(flops / 1e9, 1)},
        share_of_peak=round(arithmetic / seconds / flops, 3),
        check={
            "first_loss": trace[0][0], "first_grad_norm": trace[0][1],
            "last_loss": trace[-1][0], "last_grad_norm": trace[-1][1],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
