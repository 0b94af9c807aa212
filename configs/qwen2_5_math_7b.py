"""The paper's scale: Qwen2.5-Math-7B on OpenR1's problems, LUFFY's recipe (METHOD section 5).

    python -m scope_jax.plan --config qwen2_5_math_7b --topology v5p:2x2x2
    python -m scope_jax.plan --config qwen2_5_math_7b:fsdp=16 --topology v6e:4x4
    python -m scope_jax.train --config qwen2_5_math_7b --workdir /mnt/bucket/run \
        --config.task.train_file=openr1_math_46k.jsonl.gz --config.task.test_file=math500.jsonl.gz

128 prompts x 8 rollouts, 1,024 + 8,192 tokens, two updates a step, 500 steps. Not trained here:
there was no TPU. `plan` says of v5p:2x2x2 (8 chips of 95.7 GiB): FITS; at most 91.5 GiB (the
cache as it grows), 83.4 in the update; 1,248 s a step where EVERY rollout takes its 8,192 tokens:
an estimate, and 173 hours of it at most; --tokens 2000 plans what you expect.

R1-style thinking is not what the PRM was trained on, and is often longer than its 4,096 tokens.
  * The default follows METHOD section 5: <think> opens the assistant's turn, the reward reads what
    stands behind </think> (0 without it), positions are stretched (rope theta 10,000 -> 40,000,
    16k), and the PRM reads long texts in windows of whole steps (prm.window). Why: unscored, the
    longest rollouts would never be repaired. Its verdict there is a guess of unknown worth: it may
    take a trial that the policy corrects later for an error. Only verified repairs are accepted,
    so that such a guess costs teacher tokens and a shorter prefix. What to watch: prm/windows,
    prm/too_long, corrections/accepted. A prefix that holds </think> is not repaired: the teacher's
    tokenizer takes it for a mark of its own (teacher/alignment_failed).
  * `:plain` stays in the PRM's domain: no think tag, 3,072 tokens and 64 steps at most, so that
    prompt and completion fit its 4,096; the teacher is Qwen2.5-Math-7B-Instruct, which writes such
    text and shares the policy's tokenizer. Nothing is stretched. Not the paper's recipe.

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
    }
    config.total_steps = 500
    config.reward.fn = "scope_jax.rewards:verify"
    config.data.update(prompts_per_step=128, max_prompt_length=1024)
    config.model.update(
        path="Qwen/Qwen2.5-Math-7B", dtype="float32", compute_dtype="bfloat16", remat="products"
    )
    config.prm.update(path="Qwen/Qwen2.5-Math-PRM-7B", max_length=4096, batch_size=128)
    if arguments.plain:
        config.prompt.system = PLAIN
        config.teacher.path = "Qwen/Qwen2.5-Math-7B-Instruct"
        config.sample.update(group_size=8, max_new_tokens=3072, slots=512)
        config.steps.max_steps = 64
    else:
        config.prompt.update(system=THINK, assistant="<think>\n")
        config.reward.after = "</think>"
        config.model.update(rope_theta=40000.0, max_position=16384)
        config.teacher.path = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
        config.prm.window = 4096
        config.sample.update(group_size=8, max_new_tokens=8192, slots=512)
        config.steps.max_steps = 256
    config.optimizer.update(
        learning_rate=1e-6, schedule="constant", b1=0.9, b2=0.999, weight_decay=0.01,
        max_grad_norm=1.0,
    )  # fmt: skip
    config.loss.update(entropy_coef=0.001, kl_coef=0.0)
    config.mesh.update(data=-1, fsdp=arguments.fsdp, model=1, decode_model=4)
    # Two rows for every chip at a time: what a v5p holds.
    config.learn.update(mini_batches=2, micro_batches=max(1, 256 // arguments.fsdp))
    config.eval.update(
        problems=500, ood=False, temperature=0.6, max_new_tokens=config.sample.max_new_tokens
    )
    return shrink(config) if arguments.runlocal else config
