"""Times decoding: every row writes exactly --new-tokens tokens (W1 of ../shared/peers).

    python experiments/bench_decode.py --model-dir tiny --P 8 --G 8 --new-tokens 128

The last line of the output is one JSON object. Its `share_of_peak` is what the arithmetic of the
weights alone (2 FLOP a weight and token; attention and draws not counted) takes of this machine's
measured matrix-product rate, `share_of_bandwidth` what reading every weight once a step takes of
its measured memory bandwidth.
"""

import statistics
import time

from peer_work import machine, make_work, parse, peak_mb, report, timed


def main(workload: str = "W1", *, new_tokens: int = 64) -> None:
    args = parse(__doc__.split("\n")[0], new_tokens=new_tokens)
    import jax
    import numpy as np

    from scope_jax.metrics import CompileCounter
    from scope_jax.models.hf import load_hf
    from scope_jax.sampling import generate

    work, compiles = make_work(args, workload), CompileCounter()
    model, params = load_hf(args.model_dir, dtype=args.dtype)
    model, params = model.one_block_per_layer(params)  # once: nothing trains these weights
    loaded = peak_mb("VmRSS")
    prompts, mask = jax.device_put(
        (work["prompts"].astype(np.int32), np.ones_like(work["prompts"], bool))
    )

    lengths, first = work["lengths"].astype(np.int32), np.ones_like(work["lengths"], np.int32)

    def run(seed: int, budgets=lengths):
        rollouts = generate(
            model, params, prompts, mask, jax.random.key(seed), group_size=args.G, eos_ids=(),
            max_new_tokens=budgets, buffer_length=args.new_tokens, slots=args.slots,
        )  # fmt: skip
        return jax.device_get(rollouts)

    start = time.perf_counter()
    run(0)  # compiles every program of the timed runs
    warm_up = time.perf_counter() - start
    run(0, first)
    compiled = compiles.count
    walls, cpu_share = timed(run, args.reps)
    ttft, _ = timed(lambda seed: run(seed, first), args.reps)
    compiled_late, rollouts = compiles.count - compiled, run(args.reps)
    assert rollouts.completion_mask.sum(-1).tolist() == work["lengths"].tolist()
    peak = peak_mb()  # what is measured below is not the sampler's
    extra = {"mean_logp": round(float(rollouts.logps[rollouts.completion_mask].mean()), 5)}
    if args.check:
        extra["max_abs_logp_diff"] = logp_difference(model, params, rollouts)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    weights -= params["embed"].nbytes  # a token looks up one row of it
    flops, bandwidth = machine()
    seconds, steps = statistics.median(walls), int(work["lengths"].max())
    multiplied = weights / params["embed"].dtype.itemsize
    tokens = int(work["lengths"].sum())
    read = args.P * args.prompt_len + tokens
    report(
        args, workload, work, walls, cpu_share, tokens, ttft_s=round(statistics.median(ttft), 4),
        warmup_s=round(warm_up, 3), peak_rss_mb=peak, rss_loaded_mb=loaded,
        programs_compiled=compiled, compiled_while_timed=compiled_late, check=extra,
        machine={"gflops": round(flops / 1e9, 1), "gb_per_s": round(bandwidth / 1e9, 1)},
        share_of_peak=round(2 * multiplied * read / seconds / flops, 3),
        share_of_bandwidth=round(weights * steps / seconds / bandwidth, 3),
    )  # fmt: skip


def logp_difference(model, params, rollouts) -> float:
    """Returns the largest difference between the sampler's log-probs and a full forward's."""
    import jax
    import numpy as np

    from scope_jax.update import completion_logps

    one = jax.jit(completion_logps, static_argnums=0)
    worst = 0.0
    for row in range(len(rollouts.logps)):
        batch = jax.tree.map(lambda x, row=row: x[row : row + 1], rollouts)
        logps = np.asarray(one(model, params, batch)[0])
        mask = batch.completion_mask
        worst = max(worst, float(np.abs(logps - batch.logps)[mask].max()))
    return worst


if __name__ == "__main__":
    main()
