"""The paper's recipe on its smaller sister, Qwen2.5-Math-1.5B; see qwen2_5_math_7b.py.

    python -m scope_jax.plan --config qwen2_5_math_1_5b --topology v6e:2x4
    python -m scope_jax.train --config qwen2_5_math_1_5b --workdir /mnt/bucket/run \
        --config.task.train_file=openr1_math_46k.jsonl.gz --config.task.test_file=math500.jsonl.gz

Hardware: `plan` says that v6e:2x4 does NOT hold it: all fits (update 26.9 of 31.25 GiB, 31.1 % MFU)
but the 7B teacher's prefill, 34.8 GiB. More chips, or a smaller --config.teacher.path, were not
planned. All but what stands below is the 7B's. Two key-value heads: decode_model is 2 at most.

Thinking text: as qwen2_5_math_7b.py, with the same `:plain`, for the same reasons.

Arguments: fsdp (chips that hold the weights together, default 8), plain, runlocal (two steps of the
worksheet's models, for tests).
"""

from scope_jax.configlib import load_config, parse_arg, shrink


def get_config(arg: str = ""):
    arguments = parse_arg(arg, fsdp=8, plain=False, runlocal=False)
    config = load_config(f"qwen2_5_math_7b:fsdp={arguments.fsdp},plain={arguments.plain}", [])
    config.model.path = "Qwen/Qwen2.5-Math-1.5B"
    config.prm.batch_size = 64
    config.sample.slots = 256
    config.mesh.decode_model = 2
    return shrink(config) if arguments.runlocal else config
