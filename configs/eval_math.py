"""The paper's evaluation: six math sets and three out of distribution (METHOD section 7).

    python -m scope_jax.evaluate --config configs/eval_math.py --model DIR --out OUT \
        --config.data_dir=luffy_data
    python -m scope_jax.evaluate --config configs/eval_math.py --workdir W \
        --config.sets.math500.file=math500.jsonl.gz --config.sets.gpqa.file=gpqa.jsonl
    python -m scope_jax.evaluate --compare OUT_A OUT_B

| set | problems | samples each | graded by | `source` | LUFFY's file |
|---|---|---|---|---|---|
| AIME24 | 30 | 32 | the answer | aime | valid.all.parquet |
| AIME25 | 30 | 32 | the answer | aime25 | valid.all.parquet |
| AMC | 83 | 32 | the answer | amc | valid.all.parquet |
| MATH-500 | 500 | 1 | the answer | math | valid.all.parquet |
| Minerva | 272 | 1 | the answer | minerva | valid.all.parquet |
| OlympiadBench | 675 | 1 | the answer | olympiad_bench | valid.all.parquet |
| ARC-Challenge | 1,172 | 1 | the option's letter | arc_c | valid.arc_c.parquet |
| GPQA-diamond | 198 | 1 | the option's letter | gpqa | valid.gpqa.parquet |
| MMLU-Pro | 12,032 | 1 | the option's letter | mmlu_pro | valid.mmlu_pro.parquet |

All at temperature 0.6, top-p 1 and at most 8,192 new tokens. The files are not in the package: they
are in the `data` folder of LUFFY's repository (github.com/ElliottYan/LUFFY), or your own Parquet or
JSONL (scope_jax/benchmark.py says what rows look like). `data_dir` is searched for KEY.parquet,
KEY.jsonl[.gz] and LUFFY's file of each set; a set that has none is left out, and the tables say so.
The data_sources above are what other people's scripts for these files name (aime25 is a guess); one
that your file spells differently is said with those it holds: --config.sets.aime25.source=...

A row's own system message is kept (LUFFY's rows have one); rows without one get prompt.system. What
a thinking model writes before its answer is cut off with --config.reward.after="</think>".
Qwen2.5-Math's 4,096 positions are too few: give it --config.model.rope_theta=40000.0
--config.model.max_position=16384, as it was trained. Of a --workdir the model and these two are the
run's.

Never run here at this size: there was neither a TPU nor the files. 19,425 samples (4,576 of AIME24,
AIME25 and AMC, 1,447 of the other math sets, 13,402 of multiple choice); eval.batch_size is the
samples between two writes, sample.slots those that are decoded at a time: lower it where memory
ends.

Argument: runlocal (the worksheet's tiny policy and reward, for tests: name the files).
"""

from scope_jax.configlib import parse_arg
from scope_jax.methods import default_config

MATH, OOD = "valid.all.parquet", "valid.{}.parquet"
SETS = (  # key, name, data_source, samples, grade, group, LUFFY's file
    ("aime24", "AIME24", "aime", 32, "math", "math", MATH),
    ("aime25", "AIME25", "aime25", 32, "math", "math", MATH),
    ("amc", "AMC", "amc", 32, "math", "math", MATH),
    ("math500", "MATH-500", "math", 1, "math", "math", MATH),
    ("minerva", "Minerva", "minerva", 1, "math", "math", MATH),
    ("olympiad", "OlympiadBench", "olympiad_bench", 1, "math", "math", MATH),
    ("arc_c", "ARC-Challenge", "arc_c", 1, "choice", "ood", OOD.format("arc_c")),
    ("gpqa", "GPQA-diamond", "gpqa", 1, "choice", "ood", OOD.format("gpqa")),
    ("mmlu_pro", "MMLU-Pro", "mmlu_pro", 1, "choice", "ood", OOD.format("mmlu_pro")),
)


def get_config(arg: str = ""):
    arguments = parse_arg(arg, runlocal=False)
    config = default_config()
    config.data_dir = ""  # folder of the sets' files; "" = only files that are named
    config.sets = {
        key: {
            "name": name,
            "file": "",  # Parquet or JSONL, of data_dir if relative; "" = searched there
            "luffy_file": luffy_file,
            "source": source,  # its rows' data_source; rows without one all belong to the set
            "samples": samples,  # of each problem
            "grade": grade,  # "math": reward.fn | "choice": the option's letter
            "group": group,  # "math" | "ood": table and average
            "problems": 0,  # only the first so many; 0 = all
        }
        for key, name, source, samples, grade, group, luffy_file in SETS
    }
    config.task = {"module": "scope_jax.tasks.math_problems", "test_file": ""}  # not read
    config.reward.fn = "scope_jax.rewards:verify"
    config.prompt.system = "Please reason step by step, and put your final answer within \\boxed{}."
    config.model.dtype = "bfloat16"  # of a directory; a run's checkpoint is read as it was written
    config.data.max_prompt_length = 2048
    config.sample.slots = 128
    config.eval.update(batch_size=512, max_new_tokens=8192, temperature=0.6)
    if arguments.runlocal:
        config.reward.fn = "scope_jax.tasks.worksheet:verify"
        config.prompt.update(chat=False, system="")
        config.model.update(path="scope_jax/tasks/worksheet_models/policy", dtype="float32")
        config.data.update(prompts_per_step=8, max_prompt_length=64)
        config.sample.update(max_new_tokens=24, slots=0)
        config.eval.update(batch_size=8, max_new_tokens=24)
    return config
