"""SCOPE against Dr.GRPO on a real language model: SmolLM2-135M-Instruct, word problems of one and
two calculations (experiments/word_problems.py), 200 updates.

    python ../shared/tools/make_smollm2.py /tmp/smollm2
    python experiments/word_problems.py --out /tmp/word_problems
    cd /tmp/word_problems && head -n 3600 train.jsonl > prm.jsonl \
        && tail -n 400 train.jsonl > prm_valid.jsonl && cd -
    python experiments/gsm8k_step_labels.py --data /tmp/word_problems/prm.jsonl --layout trl \
        --corrupted 0.8 --out /tmp/word_problems/prm_train.jsonl
    python experiments/gsm8k_step_labels.py --data /tmp/word_problems/prm_valid.jsonl \
        --layout processbench --out /tmp/word_problems/prm_test.jsonl
    python -m scope_jax.train_prm --model /tmp/smollm2 --data /tmp/word_problems/prm_train.jsonl \
        --labels trl --workdir /tmp/wp_prm --layers 20 --train-layers 8 --reads 10 --probe 1600 \
        --learning-rate 4e-5 --total-steps 250 --max-length 192
    python -m scope_jax.evaluate --prm /tmp/wp_prm/prm --data /tmp/word_problems/prm_test.jsonl
    python -m scope_jax.train --config word_problems_smollm2:dr_grpo --workdir /tmp/wp_dr_grpo
    python -m scope_jax.train --config word_problems_smollm2 --workdir /tmp/wp_scope \
        --config.prm.path=/tmp/wp_prm/prm --config.locate.tau=T   # T: its best threshold there

Hardware: ONE accelerator of at least 16 GiB that computes in bfloat16 (TPU v5e-1, a GPU such as
L4). NOT RUN: there was none; experiments/real_llm.md has the places that wait for the numbers.
`python -m scope_jax.plan --config word_problems_smollm2 --topology v5e:1x1` fits: at most 3.8 of
15.75 GiB; 3 s a training step is its estimate, not a measurement.
Budget of either method: 100 steps of 16 prompts x 8 rollouts, two updates each; teacher tokens come
on top, and are counted. Repairs come from the problem's own worked solution. The learning rate is
UNTUNED, and one seed is no result: give both the same few rates, and choose on problems that the
evaluation does not read (the second half of test.jsonl).
The prompt, the temperature and the size of the numbers were chosen so that the untrained model
solves some: 6 % of 128 samples of 32 test problems, with a right one for 6 of the 32 (on a CPU).

Arguments: data (directory that word_problems.py wrote, default /tmp/word_problems), runlocal (two
steps of the smallest size, for tests).
"""

from scope_jax.configlib import parse_arg
from scope_jax.methods import default_config

SYSTEM = "You solve word problems in short steps, one on each line, without other text."
TEMPLATE = """Question: Ann has 4 pens. Dan gives her 3 more. How many pens does Ann have now?
Ann has 4 + 3 = 7 pens now.
#### 7

Question: Dan buys 3 sets of cups with 4 cups in each set. Then he gives 2 cups to Ann. How many \
cups does Dan have left?
Dan buys 3 * 4 = 12 cups.
Dan has 12 - 2 = 10 cups left.
#### 10

Question: Ann puts 20 plates on 5 tables, the same number on each table. How many plates are on \
each table?
There are 20 / 5 = 4 plates on each table.
#### 4

Question: Ann has 9 stamps. She loses 3 of them. Dan has 8 times as many as Ann has now. How many \
stamps does Dan have?
Ann has 9 - 3 = 6 stamps.
Dan has 6 * 8 = 48 stamps.
#### 48

Question: {problem}"""


def get_config(arg: str = ""):
    arguments = parse_arg(arg, data="/tmp/word_problems", runlocal=False)
    config = default_config()
    config.total_steps = 100
    config.task = {
        "module": "scope_jax.tasks.math_problems",
        "train_file": f"{arguments.data}/train.jsonl",
        "test_file": f"{arguments.data}/test.jsonl",
        "ood_file": f"{arguments.data}/ood.jsonl",
        "bad_lines": "strict",  # | "skip": bad lines are left out, and counted
        "mix": (),  # (("FILE", weight), ..): more training problems; train_file's weight is 1
        "pass_rates": "",  # FILE of rows {id or problem, pass_rate or reward}, for the next two
        "min_pass_rate": 0.0,  # training problems solved less often are left out
        "max_pass_rate": 1.0,  # and those solved more often
    }
    config.reward.fn = "scope_jax.rewards:verify"
    config.prompt.update(template=TEMPLATE, system=SYSTEM)
    config.model.update(path="/tmp/smollm2", compute_dtype="bfloat16", remat="attention")
    config.teacher.kind = "dataset"
    config.prm.max_length = 512
    config.data.update(prompts_per_step=16, max_prompt_length=384)
    # At temperature 1 the untrained model writes little that is to the point; it goes on with
    # questions of its own where nothing stops it.
    config.sample.update(group_size=8, max_new_tokens=128, temperature=0.6, stop=("\n\n",))
    config.steps.update(splitter="\n", max_steps=16)
    config.learn.update(mini_batches=2, micro_batches=2)
    config.optimizer.update(learning_rate=3e-6, schedule="constant", warmup_steps=10)
    config.eval.update(
        every=20, problems=256, batch_size=32, group_size=8, max_new_tokens=128, temperature=0.6
    )
    config.checkpoint.update(every=20, keep=1)
    if arguments.runlocal:
        config.total_steps = 2
        config.prompt.template = "Question: {problem}"
        config.data.update(prompts_per_step=8, max_prompt_length=256)
        config.sample.update(group_size=2, max_new_tokens=16)
        config.learn.update(mini_batches=1, micro_batches=1)
        config.eval.update(
            every=0, problems=8, batch_size=8, group_size=1, max_new_tokens=16, ood=False
        )
        config.log.update(rollouts_every=1, diversity_every=1)
    return config
