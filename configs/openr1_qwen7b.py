"""The paper's scale: Qwen2.5-Math-7B on OpenR1's problems, LUFFY's recipe (METHOD section 5).

    python -m scope_jax.plan --config openr1_qwen7b --topology v5p:2x2x2
    python -m scope_jax.plan --config openr1_qwen7b:fsdp=16 --topology v6e:4x4
    python -m scope_jax.train --config openr1_qwen7b --workdir gs-mounted/run \
        --config.task.train_file=openr1_math_46k.jsonl.gz --config.task.test_file=math500.jsonl.gz

128 prompts x 8 rollouts, 1,024 + 8,192 tokens, about 500 steps. Not trained here: there was no TPU;
what a step needs is `scope_jax.plan`'s estimate. The policy's positions are stretched (rope theta
10,000 -> 40,000, 16k positions). Rollouts beyond the PRM's 4,096 tokens are left unscored, and so
are not repaired; the run counts them.

Arguments: fsdp (chips that hold the weights together, default 8), runlocal (two tiny steps of the
worksheet's policy, for tests).
"""

from scope_jax.configlib import parse_arg
from scope_jax.methods import default_config


def get_config(arg: str = ""):
    arguments = parse_arg(arg, fsdp=8, runlocal=False)
    config = default_config()
    config.task = {
        "module": "scope_jax.tasks.math_problems",
        "train_file": "openr1_math_46k.jsonl.gz",
        "test_file": "math500.jsonl.gz",
        "ood_file": "",
        "bad_lines": "strict",  # | "skip": bad lines are left out, and counted
    }
    config.reward.fn = "scope_jax.rewards:verify"
    config.prompt.system = "Please reason step by step, and put your final answer within \\boxed{}."
    config.model.update(
        path="Qwen/Qwen2.5-Math-7B", dtype="float32", compute_dtype="bfloat16", remat="products",
        rope_theta=40000.0, max_position=16384,
    )  # fmt: skip
    config.prm.update(path="Qwen/Qwen2.5-Math-PRM-7B", max_length=4096, batch_size=128)
    config.teacher.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    config.mesh.update(data=-1, fsdp=arguments.fsdp, model=1, decode_model=4)
    # Two rows of 9,216 tokens for every chip at a time: what a v5p holds.
    config.learn.update(mini_batches=2, micro_batches=max(1, 256 // arguments.fsdp))
    config.eval.update(problems=500, ood=False, temperature=0.6)
    if arguments.runlocal:
        models = "scope_jax/tasks/worksheet_models"
        config.total_steps = 2
        config.task = {"module": "scope_jax.tasks.worksheet", "n": 3, "ood_n": 3, "seed": 0}
        config.reward.fn = "scope_jax.tasks.worksheet:verify"
        config.prompt.update(chat=False, system="")
        config.model.update(path=f"{models}/policy", rope_theta=0.0, max_position=0)
        config.prm.update(path=f"{models}/prm", reads="policy_tokens", batch_size=0)
        config.teacher.path = f"{models}/teacher"
        config.mesh.update(fsdp=1, decode_model=0)
        config.data.update(prompts_per_step=8, max_prompt_length=16)
        config.sample.update(group_size=2, max_new_tokens=24)
        config.steps.update(splitter="\n", max_steps=5)
        config.learn.update(mini_batches=1, micro_batches=1)
        config.eval.update(problems=8, batch_size=8, group_size=2, max_new_tokens=24)
        config.log.update(rollouts_every=1, diversity_every=1)
    return config
