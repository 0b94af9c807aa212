"""Times one update on given rollouts (W2 of ../shared/peers): loss, gradients, clip, AdamW.

    python experiments/bench_update.py --model-dir tiny --B 16 --new-tokens 128
    python experiments/bench_update.py --model-dir tiny --B 64 --new-tokens 256 --micro 8 --pack

The last line of the output is one JSON object. Its `share_of_peak` is what the arithmetic of the
weights alone (6 FLOP a weight and token, the unembedding's for completion tokens only; attention
and recomputation not counted) takes of this machine's measured matrix-product rate.

`--pack` is another work: completions of log-normal lengths (W4's: median --len-median, by default
new-tokens / 6, sigma --len-sigma, by default 1, clipped to 8 .. new-tokens), and groups of --G rows
with one prompt, which the unpacked update reads once where --micro holds whole groups. Packed and
unpacked updates take turns, on the same rollouts in as many micro-batches of --micro rows (default
an eighth of B); `seconds` is the packed one's.
"""

import dataclasses
import statistics
import time

from peer_work import machine, make_work, parse, peak_mb, report, timed


def main() -> None:
    args = parse(__doc__.split("\n")[0], new_tokens=64)
    import jax

    from scope_jax.metrics import CompileCounter
    from scope_jax.models.hf import load_hf
    from scope_jax.update import init_state, make_optimizer, train_step

    work, compiles = make_work(args, "W2"), CompileCounter()
    model, params = load_hf(args.model_dir, dtype="float32")
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=args.remat))
    of_layers = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    of_unembedding = params["embed"].size
    optimizer = make_optimizer(10**6, learning_rate=args.lr)
    state, loaded = init_state(optimizer, params), peak_mb("VmRSS")
    del params  # the state's arrays are donated to the update
    batch = make_batch(work)
    if args.pack:
        compare(args, model, optimizer, state, work, batch)
        return
    batch = jax.device_put(batch)
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


def make_batch(work):
    """Returns the work's `TrainBatch` on the host."""
    import numpy as np

    from scope_jax.records import PAD, POLICY, TrainBatch

    shape = work["completions"].shape
    lengths = work.get("lengths", np.full(shape[0], shape[1]))
    mask = np.arange(shape[1])[None] < lengths[:, None]
    return TrainBatch(
        prompt_ids=work["prompts"].astype(np.int32),
        prompt_mask=np.ones_like(work["prompts"], bool),
        completion_ids=np.where(mask, work["completions"], 0).astype(np.int32),
        completion_mask=mask,
        token_source=np.where(mask, POLICY, PAD).astype(np.int8),
        old_logps=work["old_logp"],
        advantages=np.repeat(work["advantages"][:, None], shape[1], axis=1),
    )


def compare(args, model, optimizer, state, work, batch) -> None:
    """Times packed against unpacked updates of rollouts with a long tail."""
    import jax

    from scope_jax.packing import pack
    from scope_jax.update import train_step

    micro = args.micro or max(1, args.B // 8)
    parts, packing = args.B // micro, []

    def pack_it():
        start = time.perf_counter()
        rows = pack(batch, rows_per_part=micro, parts=parts)
        packing.append(time.perf_counter() - start)
        return rows

    batches = {"unpacked": jax.device_put(batch), "packed": jax.device_put(pack_it())}
    groups = {"unpacked": args.G if micro % args.G == 0 else 1, "packed": 1}
    walls, infos = {name: [] for name in batches}, {}

    def step(name):
        nonlocal state
        start = time.perf_counter()
        state, infos[name] = train_step(
            model, optimizer, state, batches[name], micro_batches=parts, group_size=groups[name],
            loss_agg="token-mean",
        )  # fmt: skip
        jax.block_until_ready(state)
        walls[name].append(time.perf_counter() - start)

    for name in batches:
        step(name)  # compiles
        walls[name].clear()
    _, cpu_share = timed(lambda _: [step(name) for name in batches], args.reps)
    seconds = {name: statistics.median(times) for name, times in walls.items()}
    infos = {name: {k: float(v) for k, v in info.items()} for name, info in infos.items()}
    tokens = int(batch.prompt_mask.sum() + batch.completion_mask.sum())
    report(
        args, "W2 packed", work, walls["packed"], cpu_share, tokens, B=args.B, micro=micro,
        remat=args.remat, group_size=groups["unpacked"], pack_s=round(packing[0], 4),
        mean_length=round(float(work["lengths"].mean()), 1),
        padding={name: round(info["update/padding"], 3) for name, info in infos.items()},
        unpacked_s=round(seconds["unpacked"], 4),
        unpacked_over_packed=round(seconds["unpacked"] / seconds["packed"], 3),
        peak_rss_mb=peak_mb(),
        check={name: info["loss"] for name, info in infos.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
