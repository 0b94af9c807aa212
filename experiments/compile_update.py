"""What does a TPU need for one update? Compiled for a topology that this machine has not.

    pip install libtpu
    python experiments/compile_update.py --topology v5p:2x2x2 --fsdp 8 --rows 8 --prompt-len 1024 \
        --new-tokens 3072

The work of ../shared/peers/tunix_aot.py: Qwen2.5-7B's shapes, one update of `rows` rows, float32
weights and moments, bfloat16 computation. Prints one JSON line: HBM of a chip, how much of it is
temporary, seconds to trace and to compile, whether logits of a row or scores of all pairs of tokens
exist anywhere in the program, and the estimated time (scope_jax/hlo.py). Nothing runs. Hardware: 2
CPU cores, about half a minute.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu looks for the machine's metadata otherwise
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs: processes may compile side by side

from scope_jax.hardware import GIB, topology_devices
from scope_jax.hlo import estimate, parse
from scope_jax.models.flops import causal_pairs, forward_flops
from scope_jax.models.hf import config_from_hf
from scope_jax.models.published import PUBLISHED
from scope_jax.models.transformer import REMAT, Transformer, declare
from scope_jax.programs import abstract_batch, abstract_params, compile_with_text, memory
from scope_jax.sharding import make_mesh
from scope_jax.update import lower_train_step, make_optimizer, state_shapes


def shapes(text: str) -> set[tuple[int, ...]]:
    """Returns the shapes of all arrays of a program."""
    found = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
    return {tuple(int(n) for n in dims.split(",")) for dims in set(found)}


def holds_logits(text: str, vocab: int, tokens: int, embed_dim: int) -> bool:
    """Returns whether there are logits for as many positions as a row has (weights left out)."""
    return any(
        vocab in dims and embed_dim not in dims and math.prod(dims) >= vocab * tokens
        for dims in shapes(text)
    )


def holds_scores(text: str, tokens: int) -> bool:
    """Returns whether there is an array with two dimensions of a row's tokens, padded or not."""
    return any(sum(tokens <= n < tokens + 512 for n in dims) > 1 for dims in shapes(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5p:2x2x2", help="v5e:2x4, v5p:2x2x2, ..")
    parser.add_argument("--model", default="Qwen/Qwen2.5-Math-7B", choices=PUBLISHED)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--micro", type=int, default=1, help="parts that the rows are cut into")
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=3072)
    parser.add_argument("--remat", default="attention", choices=REMAT)
    args = parser.parse_args()
    chip, devices = topology_devices(args.topology)
    mesh = make_mesh(fsdp=args.fsdp, devices=devices)
    options = {"max_position": 32768, "dtype": "bfloat16", "remat": args.remat}
    shape = config_from_hf(PUBLISHED[args.model], args.model)
    model = Transformer(dataclasses.replace(shape, **options))
    optimizer = make_optimizer(1000)
    state = state_shapes(optimizer, abstract_params(declare(model.config), mesh, "float32"))
    batch = abstract_batch(mesh, rows=args.rows, width=args.prompt_len, length=args.new_tokens)
    began = time.perf_counter()
    lowered = lower_train_step(model, optimizer, state, batch, micro_batches=args.micro)
    traced = time.perf_counter()
    compiled, text = compile_with_text(lowered)
    done = time.perf_counter()
    coords = [device.coords for device in mesh.devices.flat]
    took = estimate(parse(text), chip, coords)
    tokens = args.prompt_len + args.new_tokens
    flops = 3 * args.rows * forward_flops(
        model.config, tokens=tokens, pairs=causal_pairs(tokens), logits=args.new_tokens
    )  # fmt: skip
    gib = lambda x: round(x / GIB, 2)  # noqa: E731
    print(json.dumps({
        "library": "scope_jax", "topology": args.topology, "model": args.model, "fsdp": args.fsdp,
        "rows": args.rows, "tokens": tokens, "micro": args.micro, "remat": args.remat,
        "trace_s": round(traced - began, 1), "compile_s": round(done - traced, 1),
        "temp_gib": gib(compiled.memory_analysis().temp_size_in_bytes),
        "hbm_gib": gib(memory(compiled)),
        "logits_of_a_row": holds_logits(
            text, model.config.vocab_size, args.new_tokens, model.config.embed_dim
        ),
        "scores_of_a_row": holds_scores(text, tokens),
        "seconds": round(took.seconds, 4), "seconds_compute": round(took.compute, 4),
        "mfu": round(flops / (took.seconds * len(devices) * chip.flops), 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
