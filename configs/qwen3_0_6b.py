"""One small chip (v5e-1, v6e-1, Colab): Qwen3-0.6B with LoRA on GSM8K.

    python -m scope_jax.plan --config qwen3_0_6b --topology v5e:1x1
    python -m scope_jax.train --config qwen3_0_6b --workdir /tmp/qwen3 \
        --config.task.train_file=gsm8k_train.jsonl.gz --config.task.test_file=gsm8k_test.jsonl.gz

16 prompts x 8 rollouts, 512 + 1,024 tokens, 200 steps; base weights in bfloat16. Not trained here.
`plan` says of v5e:1x1 (15.75 GiB): FITS with 16 rows in flight (with 32 the growing cache would
need 20.5 GiB); the update 9.5 GiB, 141 s a step where every rollout takes its 1,024 tokens (an
estimate), 103 s of it sampling: 8 hours at most. The learning rate is UNTUNED.

Qwen3 thinks by itself; here its own sign for "without thinking" (an empty think block) opens the
turn. Why: the PRM (Skywork's, 1.5B: a 7B one would fill the chip) knows solutions in plain steps,
and with 512 + 1,024 tokens they always fit its context; thinking would fill the cache of a chip of
this size. Its layout adds a token a step: what is longer than prm.max_length is left unscored, and
counted. The teacher, Qwen3-1.7B, has the same tokenizer and reads the same prompt.

Arguments: runlocal (two steps of the worksheet's models, for tests).
"""

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
