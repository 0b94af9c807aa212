"""The paper's recipe on its smaller sister, Qwen2.5-Math-1.5B; see qwen2_5_math_7b.py.

    python -m scope_jax.plan --config qwen2_5_math_1_5b --topology v6e:2x4
    python -m scope_jax.train --config qwen2_5_math_1_5b --workdir /mnt/bucket/run \
        --config.task.train_file=openr1_math_46k.jsonl.gz --config.task.test_file=math500.jsonl.gz

Hardware: `plan` says that v6e:2x4 does NOT hold it: all fits (update 26.9 of 31.25 GiB, 31.1 % MFU)
but the 7B teacher's prefill, 34.8 GiB. More chips, or a smaller --config.teacher.path, were not
planned. Batch, lengths, PRM, teacher and optimizer
are the 7B's. Two key-value heads: decode_model is 2 at most.

Thinking text: as qwen2_5_math_7b.py, with the same `:plain`, for the same reasons.

Arguments: fsdp (chips that hold the weights together, default 8), plain, runlocal (two steps of the
worksheet's models, for tests).
"""

from scope_jax.configlib import parse_arg, shrink
from scope_jax.methods import default_config

THINK = (
    "Reason about the problem inside <think> and </think>: plan, try, check and correct yourself. "
    "Then write the solution, with the final answer within \\boxed{}."
)
PLAIN = "Please reason step by step, and put your final answer within \\boxed{}."


def get_config(arg: str = ""):
    arguments = parse_arg(arg, fsdp=8, plain=False, runlocal=False)
    config = default_config()
    config.task = {
        "module": "scope_jax.tasks.math_problems",
        "train_file": "openr1_math_46k.jsonl.gz",
        "test_file": "math500.jsonl.gz",
        "ood_file": "",
        "bad_lines": "strict",  # | "skip": bad lines are left out, and counted
        "mix": (),  # (("FILE", weight), ..): more training problems; train_file's weight is 1
        "pass_rates": "",  # FILE of rows {id or problem, pass_rate or reward}, for the next two
        "min_pass_rate": 0.0,  # training problems solved less often are left out
        "max_pass_rate": 1.0,  # and those solved more often
    }
    config.total_steps = 500
    config.reward.fn = "scope_jax.rewards:verify"
    config.data.update(prompts_per_step=128, max_prompt_length=1024)
    config.model.update(
        path="Qwen/Qwen2.5-Math-1.5B", dtype="float32", compute_dtype="bfloat16", remat="products"
    )
    config.prm.update(path="Qwen/Qwen2.5-Math-PRM-7B", max_length=4096, batch_size=64)
    if arguments.plain:
        config.prompt.system = PLAIN
        config.teacher.path = "Qwen/Qwen2.5-Math-7B-Instruct"
        config.sample.update(group_size=8, max_new_tokens=3072, slots=256)
        config.steps.max_steps = 64
    else:
        config.prompt.update(system=THINK, assistant="<think>\n")
        config.reward.after = "</think>"
        config.model.update(rope_theta=40000.0, max_position=16384)
        config.teacher.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
        config.prm.window = 4096
        config.sample.update(group_size=8, max_new_tokens=8192, slots=256)
        config.steps.max_steps = 256
    config.optimizer.update(learning_rate=1e-6, schedule="constant")
    config.mesh.update(data=-1, fsdp=arguments.fsdp, model=1, decode_model=2)
    config.learn.update(mini_batches=2, micro_batches=max(1, 256 // arguments.fsdp))
    config.eval.update(
        problems=500, ood=False, temperature=0.6, max_new_tokens=config.sample.max_new_tokens
    )
    return shrink(config) if arguments.runlocal else config
