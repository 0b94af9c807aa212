"""A real pretrained language model on real word problems: SmolLM2-135M-Instruct and GSM8K.

    python ../shared/tools/make_smollm2.py /tmp/smollm2    # or any Llama or Qwen2 directory
    python -m scope_jax.train --config configs/gsm8k_smollm2.py --workdir /tmp/gsm8k \
        --config.model.path=/tmp/smollm2 --config.task.train_file=gsm8k_train.jsonl.gz \
        --config.task.test_file=gsm8k_test.jsonl.gz --config.total_steps=3

Rollouts are cut by line; the PRM is a RANDOM head on the policy's backbone (the run says so: set
--config.prm.path to a trained one); repairs come from the problem's own worked solution, aligned
by the results that the prefix already has. The sizes are for two CPU cores: one to two minutes a
step. On an accelerator raise data.prompts_per_step, sample.* and model.dtype.
Expect no gain in three steps: this shows that the whole loop runs on a real model.

Arguments: runlocal (two steps of the smallest size, for tests).
"""

from scope_jax.configlib import parse_arg
from scope_jax.methods import default_config

SYSTEM = "You solve word problems in short steps, one on each line, without other text."
TEMPLATE = """Question: Tom has 3 boxes with 4 pens each. He gives 2 pens away. How many are left?
He has 3*4=12 pens.
After giving 2 away, 12-2=10 are left.
#### 10

Question: {problem}"""


def get_config(arg: str = ""):
    arguments = parse_arg(arg, runlocal=False)
    config = default_config()
    config.total_steps = 100
    config.task = {
        "module": "scope_jax.tasks.math_problems",
        "train_file": "gsm8k_train.jsonl.gz",
        "test_file": "gsm8k_test.jsonl.gz",
        "ood_file": "",
        "bad_lines": "strict",  # | "skip": bad lines are left out, and counted
        "mix": (),  # (("FILE", weight), ..): more training problems; train_file's weight is 1
        "pass_rates": "",  # FILE of rows {id or problem, pass_rate or reward}, for the next two
        "min_pass_rate": 0.0,  # training problems solved less often are left out
        "max_pass_rate": 1.0,  # and those solved more often
    }
    config.reward.fn = "scope_jax.rewards:verify"
    config.prompt.update(template=TEMPLATE, system=SYSTEM)
    config.model.update(path="smollm2", remat="attention")
    config.teacher.kind = "dataset"
    config.prm.max_length = 512
    config.data.update(prompts_per_step=2, max_prompt_length=320)
    config.sample.update(group_size=4, max_new_tokens=128)
    config.steps.update(splitter="\n", max_steps=16)
    config.learn.update(mini_batches=2, micro_batches=2)
    config.optimizer.update(learning_rate=1e-6, schedule="constant", warmup_steps=2)
    config.eval.update(problems=4, batch_size=4, group_size=2, max_new_tokens=128, ood=False)
    config.checkpoint.update(every=10, keep=1)
    config.log.update(rollouts_every=1, diversity_every=1)
    if arguments.runlocal:
        config.total_steps = 2
        config.data.update(prompts_per_step=8, max_prompt_length=256)
        config.sample.update(group_size=2, max_new_tokens=16)
        config.learn.update(mini_batches=1, micro_batches=1)
        config.eval.update(problems=8, batch_size=8, group_size=1, max_new_tokens=16)
    return config
