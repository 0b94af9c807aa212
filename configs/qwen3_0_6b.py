"""Qwen3-0.6B."""

from scope_jax.configlib import parse_arg, shrink
from scope_jax.methods import default_config


def get_config(arg: str = ""):
    arguments = parse_arg(arg, runlocal=False)
    config = default_config()
    config.total_steps = 200
    config.task = {
        "module": "scope_jax.tasks.math_problems",
        "train_file": "gsm8k_train.jsonl.gz",
        "test_file": "gsm8k_test.jsonl.gz",
        "ood_file": "",
        "bad_lines": "strict",  # | "skip": bad lines are left out, and counted
    }
    config.reward.fn = "scope_jax.rewards:verify"
    config.prompt.update(
        system="Please reason step by step, and put your final answer within \\boxed{}.",
        assistant="<think>\n\n</think>\n\n",  # Qwen3's own sign for "without thinking"
    )
    config.data.update(prompts_per_step=16, max_prompt_length=512)
    config.model.update(
        path="Qwen/Qwen3-0.6B", dtype="bfloat16", remat="attention", lora_rank=32, lora_alpha=64.0
    )
    config.prm.update(
        path="Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", max_length=1536, batch_size=16
    )
    config.teacher.path = "Qwen/Qwen3-1.7B"
    config.sample.update(group_size=8, max_new_tokens=1024, slots=16)
    config.steps.max_steps = 32
    config.learn.update(mini_batches=2, micro_batches=16)
    # What is added is small: LoRA takes ten times the rate and more of a full update's.
    config.optimizer.update(learning_rate=2e-5, schedule="constant", warmup_steps=10)
    config.eval.update(
        every=50, problems=256, batch_size=16, group_size=4, max_new_tokens=1024, ood=False
    )
    config.checkpoint.update(every=20, keep=1)
    return shrink(config) if arguments.runlocal else config
