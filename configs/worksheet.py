"""The default: a two-layer policy learns its worksheet (scope_jax/tasks/worksheet.py) on a laptop,
in minutes.

    python -m scope_jax.train --config configs/worksheet.py --workdir /tmp/run
    python -m scope_jax.train --config configs/worksheet.py:n=6 --workdir /tmp/run6
    --config.method=dr_grpo

Arguments: n (sums on a sheet, default 5; out-of-distribution sheets have two more), runlocal (two
steps, tiny).
Models: the package's own 0.15 M parameter policy, teacher and TRAINED process reward model (python
-m scope_jax.pretrain).
Hardware: 2 CPU cores.
"""

from scope_jax.configlib import parse_arg
from scope_jax.methods import default_config

MODELS = "scope_jax/tasks/worksheet_models"


def get_config(arg: str = ""):
    arguments = parse_arg(arg, n=5, runlocal=False)
    config, n = default_config(), arguments.n
    config.total_steps = 60
    config.task = {"module": "scope_jax.tasks.worksheet", "n": n, "ood_n": n + 2, "seed": 0}
    config.reward.fn = "scope_jax.tasks.worksheet:verify"
    config.prompt.chat = False
    config.data.update(prompts_per_step=16, max_prompt_length=3 * (n + 2))
    config.model.path, config.teacher.path, config.prm.path = (
        f"{MODELS}/policy",
        f"{MODELS}/teacher",
        f"{MODELS}/prm",
    )
    config.prm.reads = "policy_tokens"  # it was trained on rollouts of this very policy
    config.sample.max_new_tokens = 5 * n + 6
    config.steps.update(splitter="\n", max_steps=n + 2)
    config.optimizer.learning_rate = 3e-4
    config.eval.update(problems=256, batch_size=256, max_new_tokens=5 * (n + 2) + 6)
    if arguments.runlocal:
        config.total_steps = 2
        config.data.prompts_per_step = 8  # divides over the 8 virtual devices of the tests
        config.sample.group_size = 4
        config.eval.update(problems=8, batch_size=8, group_size=2)
        config.log.update(rollouts_every=1, diversity_every=1)
    return config
