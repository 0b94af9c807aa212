"""Another family at the paper's scale: Llama-3.1-8B-Instruct on OpenR1's problems.

    python -m scope_jax.plan --config llama3_1_8b --topology v5p:2x2x2
    python -m scope_jax.train --config llama3_1_8b --workdir /mnt/bucket/run \
        --config.task.train_file=openr1_math_46k.jsonl.gz --config.task.test_file=math500.jsonl.gz

128 prompts x 8 rollouts, 1,024 + 3,072 tokens, two updates a step, 500 steps. Not trained here.
`plan` says of v5p:2x2x2 (8 chips of 95.7 GiB): FITS; at most 82.5 GiB (the cache as it grows), 80.5
in the update; 435 s a step where every rollout takes its 3,072 tokens (an estimate): 60 hours at
most. The plan takes the PRM's head for Qwen's, which is a little smaller.

No think tags: the PRM (RLHFlow's, one user turn a step) was trained on plain solutions, and the
policy writes such. Its context is the policy's (131k), so nothing is cut, capped or read in
windows; with its turns a text of 4,096 tokens stays below prm.max_length, unless it has hundreds of
steps: it is left unscored then, and counted. The teacher, OpenMath2-Llama3.1-8B, is a Llama 3.1
tuned on plain solutions: the same family and kind of text.

Arguments: fsdp (chips that hold the weights together, default 8), runlocal (two steps of the
worksheet's models, for tests).
"""

from scope_jax.configlib import parse_arg, shrink
from scope_jax.methods import default_config


def get_config(arg: str = ""):
    arguments = parse_arg(arg, fsdp=8, runlocal=False)
    config = default_config()
    config.total_steps = 500
    config.task = {
        "module": "scope_jax.tasks.math_problems",
        "train_file": "openr1_math_46k.jsonl.gz",
        "test_file": "math500.jsonl.gz",
        "ood_file": "",
        "bad_lines": "strict",  # | "skip": bad lines are left out, and counted
    }
    config.reward.fn = "scope_jax.rewards:verify"
    config.prompt.system = "Please reason step by step, and put your final answer within \\boxed{}."
    config.data.update(prompts_per_step=128, max_prompt_length=1024)
    config.model.update(
        path="meta-llama/Llama-3.1-8B-Instruct", dtype="float32", compute_dtype="bfloat16",
        remat="products",
    )  # fmt: skip
    config.prm.update(
        path="RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", format="rlhflow", max_length=6144,
        batch_size=128,
    )  # fmt: skip
    config.teacher.path = "nvidia/OpenMath2-Llama3.1-8B"
    config.sample.update(group_size=8, max_new_tokens=3072, slots=512)
    config.optimizer.update(learning_rate=1e-6, schedule="constant")
    config.mesh.update(data=-1, fsdp=arguments.fsdp, model=1, decode_model=4)
    config.learn.update(mini_batches=2, micro_batches=max(1, 128 // arguments.fsdp))
    config.eval.update(problems=500, ood=False, temperature=0.6, max_new_tokens=3072)
    return shrink(config) if arguments.runlocal else config
