"""The default: a two-layer policy learns its worksheet (scope_jax/tasks/worksheet.py) on a laptop,
in minutes.

    python -m scope_jax.train --config configs/worksheet.py --workdir /tmp/run
    python -m scope_jax.train --config configs/worksheet.py:n=6 --workdir /tmp/run6
    --config.method=dr_grpo

Arguments: n (sums on a sheet, default 5; out-of-distribution sheets have two more), models
(directory that python -m scope_jax.pretrain made, default the package's own), teacher (own |
verbose | imperfect; the last two are not in the package), runlocal (two steps, tiny).
Models: the package's own 0.15 M parameter policy, teacher and TRAINED process reward model (python
-m scope_jax.pretrain).
Hardware: 2 CPU cores.
"""

from scope_jax.configlib import parse_arg
from scope_jax.methods import default_config
from scope_jax.records import InputError

MODELS = "scope_jax/tasks/worksheet_models"
TEACHERS = {"own": "teacher", "verbose": "teacher_verbose", "imperfect": "teacher_imperfect"}


def get_config(arg: str = ""):
    arguments = parse_arg(arg, n=5, models=MODELS, teacher="own", runlocal=False)
    if arguments.teacher not in TEACHERS:
        raise InputError(f"teacher={arguments.teacher!r} is none of {', '.join(TEACHERS)}")
    config, n, models = default_config(), arguments.n, arguments.models
    config.total_steps = 60
    config.task = {"module": "scope_jax.tasks.worksheet", "n": n, "ood_n": n + 2, "seed": 0}
    config.reward.fn = "scope_jax.tasks.worksheet:verify"
    config.prompt.chat = False
    config.data.update(prompts_per_step=16, max_prompt_length=3 * (n + 2))
    config.model.path, config.prm.path = f"{models}/policy", f"{models}/prm"
    config.teacher.path = f"{models}/{TEACHERS[arguments.teacher]}"
    config.prm.reads = "policy_tokens"  # it was trained on rollouts of this very policy
    line = 8 if arguments.teacher == "verbose" else 5  # tokens
    config.sample.max_new_tokens = line * n + 6
    config.steps.update(splitter="\n", max_steps=n + 2)
    config.optimizer.learning_rate = 3e-4
    config.eval.update(problems=256, batch_size=256, max_new_tokens=line * (n + 2) + 6)
    if arguments.runlocal:
        config.total_steps = 2
        config.data.prompts_per_step = 8  # divides over the 8 virtual devices of the tests
        config.sample.group_size = 4
        config.eval.update(problems=8, batch_size=8, group_size=2)
        config.log.update(rollouts_every=1, diversity_every=1)
    return config
