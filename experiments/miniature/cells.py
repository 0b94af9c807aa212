"""What is run: the ONE table of the experiment. grid.py runs it, tables.py reads its results, and
PREREGISTRATION.md quotes `grid_table`, `arms_table` and `claims_table` (a test keeps them equal).

A cell is one training run and its final evaluation. Its budget is the same for every method by
construction: the same prompts x group size x steps, and the same number of optimizer updates; what
it then used of policy and teacher tokens is recorded.
"""

import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = "shipped"  # the base that the package brings along, for --smoke
TEACHERS = {"own": "teacher", "verbose": "teacher_verbose", "imperfect": "teacher_imperfect"}


class Arm(NamedTuple):
    """A row of the tables."""

    method: str  # of scope_jax.methods.METHODS; "" = the base policy as it is, not trained
    teacher: str = "own"
    overrides: tuple[str, ...] = ()  # of the config
    rate_of: str = ""  # the arm whose pilot gives the learning rate; "" = its own


ARMS = {
    "base": Arm(""),
    # on-policy
    "dr_grpo": Arm("dr_grpo"),
    "grpo": Arm("grpo"),
    # By default its length penalty begins at four fifths of max_new_tokens, and right solutions are
    # longer than that here.
    "dapo": Arm("dapo", overrides=("returns.overlong_share=0.1",)),
    "gspo": Arm("gspo"),
    # step scores as reward
    "prm_blend": Arm("prm_blend"),
    "prm_returns": Arm("prm_returns"),
    "vppo": Arm("vppo"),
    # whole traces of the teacher
    "luffy": Arm("luffy"),
    "rl_sft": Arm("rl_sft"),
    "sft": Arm("sft"),
    # repair at a step: by the PRM, and its controls
    "scope": Arm("scope"),
    "scope_step": Arm("scope_step"),
    "scope_plus": Arm("scope_plus"),
    "scope_random": Arm("scope_random"),
    "scope_random_correct": Arm("scope_random_correct"),
    "scope_zero": Arm("scope_zero"),
    "scope_oracle": Arm("scope_oracle"),
    # ablations: one option of scope each, at scope's learning rate
    "tau_0.3": Arm("scope", overrides=("locate.tau=0.3",), rate_of="scope"),
    "tau_0.8": Arm("scope", overrides=("locate.tau=0.8",), rate_of="scope"),
    "append": Arm("scope", overrides=("correct.insert=append",), rate_of="scope"),
    "three_repairs": Arm("scope", overrides=("correct.n_correct=3",), rate_of="scope"),
    "any_accepted": Arm("scope", overrides=("correct.accept=any",), rate_of="scope"),
    "linear": Arm("scope", overrides=("loss.off_policy=linear",), rate_of="scope"),
    "sft_suffix": Arm("scope", overrides=("loss.off_policy=sft",), rate_of="scope"),
    "no_prefix": Arm("scope", overrides=("credit.prefix_in_loss=False",), rate_of="scope"),
    "on_policy_mean": Arm("scope", overrides=("advantages.baseline=on_policy",), rate_of="scope"),
    # and of scope_plus, at its rate
    "plus_one": Arm("scope_plus", overrides=("correct.n_correct=1",), rate_of="scope_plus"),
    "plus_shaped": Arm("scope_plus", overrides=("loss.off_policy=shaped",), rate_of="scope_plus"),
    "plus_returns": Arm(
        "scope_plus", overrides=("returns.kind=prm_returns",), rate_of="scope_plus"
    ),
    "plus_all_wrong": Arm(
        "scope_plus", overrides=("select.trigger=all_wrong",), rate_of="scope_plus"
    ),
    "plus_random_correct": Arm(
        "scope_plus", overrides=("locate.locator=random_correct",), rate_of="scope_plus"
    ),
    "plus_zero": Arm(
        "scope_plus",
        overrides=("locate.locator=zero", "select.min_prefix_steps=0"),
        rate_of="scope_plus",
    ),
    # other teachers, each with the rate of its method
    "scope_verbose": Arm("scope", "verbose", rate_of="scope"),
    "luffy_verbose": Arm("luffy", "verbose", rate_of="luffy"),
    "rl_sft_verbose": Arm("rl_sft", "verbose", rate_of="rl_sft"),
    "scope_plus_verbose": Arm("scope_plus", "verbose", rate_of="scope_plus"),
    "scope_imperfect": Arm("scope", "imperfect", rate_of="scope"),
    "luffy_imperfect": Arm("luffy", "imperfect", rate_of="luffy"),
    "rl_sft_imperfect": Arm("rl_sft", "imperfect", rate_of="rl_sft"),
    "scope_plus_imperfect": Arm("scope_plus", "imperfect", rate_of="scope_plus"),
    # rl_sft with fewer teacher tokens: traces for those groups alone that solved nothing
    "rl_sft_all_wrong": Arm("rl_sft", overrides=("select.trigger=all_wrong",), rate_of="rl_sft"),
    # the arms that collapsed with the verbose teacher, at a quarter of their rate (1.6e-3)
    "rl_sft_verbose_slow": Arm(
        "rl_sft", "verbose", overrides=("optimizer.learning_rate=0.0004",), rate_of="rl_sft"
    ),
    "scope_plus_verbose_slow": Arm(
        "scope_plus", "verbose", overrides=("optimizer.learning_rate=0.0004",), rate_of="scope_plus"
    ),
}
METHODS = ("dr_grpo", "grpo", "dapo", "gspo", "prm_blend", "prm_returns", "vppo", "luffy", "rl_sft",
           "sft", "scope", "scope_step", "scope_plus", "plus_one", "scope_random",
           "scope_random_correct", "scope_zero", "scope_oracle")  # fmt: skip
ABLATIONS = ("tau_0.3", "tau_0.8", "append", "three_repairs", "any_accepted", "linear",
             "sft_suffix", "no_prefix", "on_policy_mean", "plus_shaped", "plus_returns",
             "plus_all_wrong", "plus_random_correct", "plus_zero")  # fmt: skip
OTHER_TEACHERS = ("scope_verbose", "luffy_verbose", "rl_sft_verbose", "scope_plus_verbose",
                  "scope_imperfect", "luffy_imperfect", "rl_sft_imperfect",
                  "scope_plus_imperfect")  # fmt: skip
REFERENCES = (
    "dr_grpo",
    "scope",
    "scope_plus",
)  # every arm is tested against these, on the same (base, seed)
# The claims: (better, than, column), in every (task, n) of the block "headline".
PRIMARY = (
    ("scope", "dr_grpo", "pass@1"),
    ("scope", "luffy", "pass@1"),
    ("scope", "scope_random_correct", "pass@1"),
    ("scope", "dr_grpo", "distinct"),
    ("scope", "dr_grpo", "ood_pass@1"),
    ("plus_one", "scope", "pass@1"),
    ("plus_one", "scope", "ood_pass@1"),
    ("scope_plus", "rl_sft", "pass@1"),
    ("scope_plus", "rl_sft", "ood_pass@1"),
    ("scope_plus", "dapo", "pass@1"),
    ("scope_plus", "dr_grpo", "distinct"),
)
# Not registered: asked of the same (task, n) when the results were known.
ASKED_LATER = (
    ("plus_one", "rl_sft", "pass@1"),
    ("plus_one", "rl_sft", "ood_pass@1"),
    ("plus_one", "rl_sft_all_wrong", "pass@1"),
    ("plus_one", "rl_sft_all_wrong", "ood_pass@1"),
    ("scope_plus", "rl_sft", "distinct"),
)


class Block(NamedTuple):
    """Cells of one purpose: all of its sizes x bases x seeds x arms."""

    name: str
    task: str  # a config: configs/TASK.py
    sizes: tuple[int, ...]  # n, the difficulty
    bases: tuple[str, ...]  # seeds of the base models, made by scope_jax.pretrain
    seeds: tuple[int, ...]  # of the RL run
    arms: tuple[str, ...]
    steps: int = 0  # of training; 0 = the plan's


class Plan(NamedTuple):
    """A grid with its pilot and what all of its cells share."""

    blocks: tuple[Block, ...]
    rates: dict[str, tuple[float, ...]]  # task -> learning rates of the pilot
    pilot_sizes: dict[str, int]  # task -> n of the pilot's cells
    pilot_base: str  # made for the pilot alone: its results are in no table
    pilot_seeds: tuple[int, ...]
    steps: int
    shared: tuple[str, ...]  # overrides of every cell
    # Of the final evaluation: problems and samples of each, of the test and the OOD split; `among`:
    # the m of "distinct valid solutions among m correct samples"
    final: dict[str, int]


BASES = tuple(map(str, range(1, 7)))
SECOND_TASK = ("dr_grpo", "dapo", "prm_returns", "luffy", "rl_sft", "scope", "scope_plus",
               "plus_one", "scope_random_correct", "scope_zero")  # fmt: skip
HARDER = ("base", "dr_grpo", "luffy", "rl_sft", "scope", "scope_plus", "scope_random_correct")
COMPARED = tuple(arm for arm in METHODS if any(arm in claim[:2] for claim in PRIMARY))
LONGER = ("dr_grpo", "dapo", "luffy", "rl_sft", "scope", "scope_plus")
EACH_RUN = (
    "eval.split=valid", "eval.ood=False", "eval.group_size=4", "eval.every=10",
    "checkpoint.every=1000", "log.rollouts_every=60", "log.diversity_every=10",
)  # fmt: skip
FULL = Plan(
    blocks=(  # in the order in which they run
        Block("headline", "worksheet", (5, 6), BASES, (0,), ("base", *METHODS)),
        Block("headline", "ledger", (6,), BASES, (0, 1), ("base", *SECOND_TASK)),
        Block("ablations", "worksheet", (5,), BASES, (0,), ABLATIONS),
        Block("teachers", "worksheet", (5,), BASES, (0,), OTHER_TEACHERS),
        Block("difficulty", "worksheet", (4, 7), BASES, (0,), HARDER),
        Block("longer", "worksheet", (5,), BASES, (0,), LONGER, steps=60),
        Block("headline", "worksheet", (5, 6), BASES, (1,), COMPARED),
        Block("afterwards", "worksheet", (5, 6), BASES, (0, 1), ("rl_sft_all_wrong",)),
        Block("afterwards", "ledger", (6,), BASES, (0, 1), ("rl_sft_all_wrong",)),
        Block(
            "afterwards", "worksheet", (5,), BASES, (0,),
            ("rl_sft_verbose_slow", "scope_plus_verbose_slow"),
        ),
    ),
    rates={
        "worksheet": (4e-4, 8e-4, 1.6e-3, 3.2e-3),
        "ledger": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
    },
    pilot_sizes={"worksheet": 5, "ledger": 6},
    pilot_base="100",
    pilot_seeds=(100, 101),
    steps=30,
    shared=EACH_RUN,
    final={"problems": 256, "samples": 16, "ood_problems": 256, "ood_samples": 4, "among": 4},
)  # fmt: skip
SMOKE = Plan(
    blocks=(Block("headline", "worksheet", (2,), (SHIPPED,), (0,), ("base", "dr_grpo", "scope")),),
    rates={"worksheet": (3e-4,)},
    pilot_sizes={"worksheet": 2},
    pilot_base=SHIPPED,
    pilot_seeds=(100,),
    steps=3,
    shared=(
        *EACH_RUN, "eval.every=2", "eval.problems=16", "eval.batch_size=16",
        "data.prompts_per_step=4", "sample.group_size=4", "log.diversity_every=1",
    ),
    final={"problems": 32, "samples": 8, "ood_problems": 32, "ood_samples": 2, "among": 2},
)  # fmt: skip


class Cell(NamedTuple):
    task: str
    n: int
    steps: int
    base: str
    seed: int
    arm: str
    rate: float | None = None  # of the pilot's cells; of the others the pilot decides

    @property
    def name(self) -> str:
        """Its id in cells.jsonl, and its folder's name."""
        rate = "" if self.rate is None else f"-r{self.rate:g}"
        return f"{self.task}-n{self.n}-t{self.steps}-b{self.base}-s{self.seed}-{self.arm}{rate}"


def grid_cells(plan: Plan) -> list[Cell]:
    """Returns the plan's cells, each once, in the blocks' order; within a block by seed and base
    first, so that a grid that is cut short has all arms of a few pairs.
    """
    cells = {}
    for block in plan.blocks:
        for seed in block.seeds:
            for base in block.bases:
                for n in block.sizes:
                    for arm in block.arms:
                        # the base policy is the same for every RL seed
                        seed_of = seed if arm != "base" else 0
                        steps = block.steps or plan.steps
                        cell = Cell(block.task, n, steps, base, seed_of, arm)
                        cells[cell.name] = cell
    return list(cells.values())


def teachers_of(plan: Plan, task: str, base: str) -> list[str]:
    """Returns the teachers that the plan wants of a base, "own" first."""
    blocks = [block for block in plan.blocks if block.task == task and base in block.bases]
    wanted = {ARMS[arm].teacher for block in blocks for arm in block.arms} | {"own"}
    return [teacher for teacher in TEACHERS if teacher in wanted]


def tuned_as(cell: Cell) -> str:
    """Returns the arm whose pilot gives the cell's learning rate."""
    return ARMS[cell.arm].rate_of or cell.arm


def tuned_arms(plan: Plan) -> dict[tuple[str, int], list[str]]:
    """Returns (task, steps) -> the arms that have a pilot of their own there."""
    found: dict[tuple[str, int], dict[str, None]] = {}
    for block in plan.blocks:
        arms = [ARMS[arm].rate_of or arm for arm in block.arms if ARMS[arm].method]
        found.setdefault((block.task, block.steps or plan.steps), {}).update(dict.fromkeys(arms))
    return {setting: list(arms) for setting, arms in found.items()}


def pilot_cells(plan: Plan) -> list[Cell]:
    return [
        Cell(task, plan.pilot_sizes[task], steps, plan.pilot_base, seed, arm, rate)
        for (task, steps), arms in tuned_arms(plan).items()
        for seed in plan.pilot_seeds
        for arm in arms
        for rate in plan.rates[task]
    ]


def choose_rate(accuracies: dict[float, list[float]], seeds: int) -> float | None:
    """Returns a pilot's learning rate: the best mean accuracy over the seeds, of equals the lowest.

    Args:
      accuracies: rate -> pass@1 on the valid split of each seed; a run that failed counts 0.
      seeds: how many there must be.
    Returns:
      None while a rate has fewer, and where every run failed.
    """
    if any(len(found) < seeds for found in accuracies.values()):
        return None
    if not any(map(any, accuracies.values())):
        return None
    return min(accuracies, key=lambda rate: (-sum(accuracies[rate]), rate))


def options(cell: Cell, plan: Plan, models: pathlib.Path, rate: float | None) -> list[str]:
    """Returns a cell's command line of scope_jax.train and of final.py, less the folders.

    Args:
      models: folder of its base: policy, prm, and the teachers.
      rate: learning rate; None for the base policy, which is not trained.
    """
    arm = ARMS[cell.arm]
    # A verbose teacher needs longer completions: the config knows how long.
    teacher = f",teacher={arm.teacher}" if arm.teacher != "own" else ""
    overrides = [
        f"total_steps={cell.steps}", f"seed={cell.seed}", f"model.path={models / 'policy'}",
        f"prm.path={models / 'prm'}", f"teacher.path={models / TEACHERS[arm.teacher]}",
    ]  # fmt: skip
    overrides += [f"method={arm.method}", f"optimizer.learning_rate={rate}"] if arm.method else []
    overrides += [*plan.shared, *arm.overrides]
    return [
        "--config",
        f"{cell.task}:n={cell.n}{teacher}",
        *(f"--config.{text}" for text in overrides),
    ]


def grid_table(plan: Plan = FULL) -> str:
    """Returns the blocks as a Markdown table."""
    lines = [
        "| block | task | n | steps | bases | RL seeds | arms | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for block in plan.blocks:
        n, bases, seeds = (
            ", ".join(map(str, values)) for values in (block.sizes, block.bases, block.seeds)
        )
        arms = [arm for arm in block.arms if arm != "base"]
        runs = len(block.sizes) * len(block.bases) * len(block.seeds) * len(arms)
        columns = (n, block.steps or plan.steps, bases, seeds, ", ".join(arms), runs)
        lines.append(f"| {block.name} | {block.task} | {' | '.join(map(str, columns))} |")
    seeds = ", ".join(map(str, plan.pilot_seeds))
    for (task, steps), arms in tuned_arms(plan).items():
        rates = ", ".join(f"{rate:g}" for rate in plan.rates[task])
        columns = (plan.pilot_sizes[task], steps, plan.pilot_base, seeds)
        columns += (f"{', '.join(arms)}, at {rates}",)
        columns += (len(arms) * len(plan.pilot_seeds) * len(plan.rates[task]),)
        lines.append(f"| pilot | {task} | {' | '.join(map(str, columns))} |")
    return "\n".join(lines) + "\n"


def arms_table() -> str:
    """Returns what an arm is, as a Markdown table."""
    lines = ["| arm | method | teacher | overrides | rate of |", "|---|---|---|---|---|"]
    for name, arm in ARMS.items():
        columns = (arm.method or "(not trained)", arm.teacher, ", ".join(arm.overrides) or "-")
        lines.append(f"| {name} | {' | '.join(columns)} | {arm.rate_of or '-'} |")
    return "\n".join(lines) + "\n"


def claims_table(claims: tuple[tuple[str, str, str], ...] = PRIMARY) -> str:
    lines = ["| better | than | column |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in claims]) + "\n"
