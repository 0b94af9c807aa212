"""The paper's recipe at the paper's width, for a few steps, without an accelerator.

    python ../shared/tools/make_qwen_tokenizer.py /tmp/qwen
    python ../shared/tools/make_qwen_tokenizer.py --prm /tmp/qwen_prm
    python experiments/paper_shape.py --tokenizer /tmp/qwen --prm-tokenizer /tmp/qwen_prm \
        --out /tmp/paper_shape

`scope_jax.train` on configs/qwen2_5_math_7b.py, on eight virtual CPU devices, with a policy of
Qwen2.5-Math-7B's shape but two layers, a PRM with its head and a teacher with another tokenizer
(Qwen's with <think> and </think> in it, as DeepSeek-R1-Distill-Qwen has), both as wide as
Qwen2.5-Math-1.5B, two layers, too. It computes in float32, for a CPU has nothing for bfloat16, and
holds Adam's first moments in bfloat16: weights, moments and gradients take 22 GB, the sampler's
weights 12, so that 24 GiB are too few; on 16 cores with 125 GiB a step takes a minute. --tiny
(hidden size 64, the vocabulary as it is) needs 4 GiB.

The weights are random, but for a bias: the policy and the teacher write short words, blank lines
and end tokens rather than any of 152,064 tokens, else there would be no text, no steps and no end.
No answer would ever be right, so the reward is another here: 1 where a completion says "six", which
about half of them do and most of the teacher's (`says_six`; reward.after is off). And as this PRM
knows nothing either, its head leans to "right", and a wrong rollout is cut at the step it likes
least (locate.on_no_error=argmin). Batch, lengths and mesh are smaller (`overrides`), repairs get
three attempts; the rest is the recipe's, correct.accept=verified_correct too. The numbers show
that the parts fit together at this width, not that anything is learnt.

Each step is checked: all metrics are finite; tokens by writer add up to the rows' tokens; the PRM
scored every rollout that has a text; the teacher wrote where a rollout could be repaired; accepted
repairs keep their prefix; groups differ in reward; two optimizer updates. In all steps together
repairs are accepted and windows read. Prints a table and, last, one JSON object.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time

WORDS = " the a so we x y is of and add then now sum let it to be one two six has have get that"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of Qwen2.5-Math-7B and -1.5B but for the layers, and of --tiny. The 1.5B has 2 key-value heads; 4
# divide over the mesh's model axis.
WIDE = {"embed_dim": 3584, "num_heads": 28, "num_kv_heads": 4, "mlp_dim": 18944, "head_dim": 128}
NARROW = {"embed_dim": 1536, "num_heads": 12, "num_kv_heads": 4, "mlp_dim": 8960, "head_dim": 128}
TINY = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 128, "head_dim": 16}
SHOWN = ("loss", "reward", "groups_with_signal", "policy_tokens", "teacher_tokens", "prm/scored",
         "prm/windows", "corrections/made", "corrections/accepted", "corrections/correct_share",
         "logp_gap", "grad_norm", "entropy", "seconds/step")  # fmt: skip


def says_six(gold: str, completion: str) -> bool:
    """A reward that random words get as often as not."""
    del gold
    return " six" in completion


def write_models(out: pathlib.Path, tiny: bool, tokenizer_dir: str, prm_tokenizer_dir: str) -> None:
    """Writes out/{policy, teacher, prm}, two layers each, in bfloat16."""
    import jax
    import jax.numpy as jnp
    from transformers import AutoTokenizer

    from scope_jax.models.hf import save_hf
    from scope_jax.models.transformer import Transformer, TransformerConfig
    from scope_jax.prm import PRM, save_prm
    from scope_jax.prm_formats import PRMFormat

    own, of_prm = (AutoTokenizer.from_pretrained(d) for d in (tokenizer_dir, prm_tokenizer_dir))
    of_teacher = AutoTokenizer.from_pretrained(tokenizer_dir)
    of_teacher.add_tokens(["<think>", "</think>"])
    for tokenizer in (own, of_prm, of_teacher):
        tokenizer.chat_template = TEMPLATE
    # As the published models: rope theta and positions as they are before the recipe's override.
    wide, narrow = (
        TransformerConfig(
            vocab_size=152064, num_layers=2, qkv_bias=True, rope_theta=10000.0,
            max_position=4096, **(TINY if tiny else shape),
        )
        for shape in (WIDE, NARROW)
    )  # fmt: skip

    def init(key, model, speaks):
        """Random weights; with `speaks` dimension 0 of every token is the same, and the head reads
        from it the bias [V] of the logits."""
        params = model.init(key, jnp.bfloat16)  # not in one jit: one float32 array at a time
        params["embed"] = params["embed"] * 50  # deviation 1, so that layers do not drown it
        if speaks is not None:
            norm = model.config.embed_dim**0.5
            params["embed"] = params["embed"].at[:, 0].set(2 * norm)
            # 0.75: share of the final norm that stays in dimension 0 behind two layers
            share = (speaks / (0.75 * norm)).astype(jnp.bfloat16)
            params["unembed"] = params["unembed"].at[0].set(share)
        return params

    def bias(tokenizer, six=0.0):
        ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        words = [i for word in WORDS.split() for i in ids(f" {word}")]
        logits = jnp.zeros(wide.vocab_size).at[jnp.array(words)].set(14.0)
        # Of 25 words' weight 2 go to each kind of blank line, 1 to the end: a row of 64 ends often.
        logits = logits.at[jnp.array([ids("\n\n")[0], ids(".\n\n")[0]])].set(14 + math.log(2))
        logits = logits.at[jnp.array(ids(" six"))].add(six)
        return logits.at[tokenizer.eos_token_id].set(14.0)

    policy, teacher = (
        Transformer(wide),
        Transformer(dataclasses.replace(narrow, max_position=131072)),
    )
    params = init(jax.random.key(0), policy, bias(own))
    save_hf(out / "policy", policy, params, own)
    params = init(jax.random.key(1), teacher, bias(of_teacher, math.log(8)))
    save_hf(out / "teacher", teacher, params, of_teacher)
    del params
    prm = PRM(Transformer(narrow), "mlp2_at_token", PRMFormat("qwen_math"))
    backbone = init(jax.random.key(2), prm.backbone, None)
    del backbone["unembed"]
    head = prm.init_head(jax.random.key(3))
    head["out"]["b"] = jnp.array([0.0, 2.0])
    save_prm(out / "prm", prm, {"backbone": backbone, "head": head}, of_prm)


def overrides(out: pathlib.Path, steps: int) -> list[str]:
    """Returns what the run changes of the recipe, as a command line would."""
    changes = {
        "model.path": out / "policy", "prm.path": out / "prm", "teacher.path": out / "teacher",
        "task.train_file": out / "train.jsonl", "task.test_file": out / "train.jsonl",
        "total_steps": steps,
        "model.compute_dtype": "float32",
        "optimizer.mu_dtype": "bfloat16",
        "data.prompts_per_step": 4, "data.max_prompt_length": 128,
        "sample.group_size": 4, "sample.max_new_tokens": 64, "sample.slots": 0,
        "steps.max_steps": 16, "prm.batch_size": 16, "prm.max_length": 96, "prm.window": 96,
        "mesh.fsdp": 2, "mesh.model": 4, "mesh.decode_model": 4,
        "learn.micro_batches": 2,
        "reward.fn": "paper_shape:says_six", "reward.after": "", "locate.on_no_error": "argmin",
        "correct.attempts": 3,
        "eval.problems": 8, "eval.batch_size": 8, "eval.group_size": 1, "eval.max_new_tokens": 8,
        "log.rollouts_every": 1, "log.diversity_every": 1,
    }  # fmt: skip
    return [f"--config.{key}={value}" for key, value in changes.items()]


def optimizer_count(state) -> int:
    """Returns how many updates Adam has counted."""
    import jax

    counts = [
        x for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith(".count")
    ]  # fmt: skip
    return int(max(jax.device_get(counts)))


def check_step(before: int, taken) -> dict[str, bool]:
    """Returns what was asked of a step and whether it holds.

    Args:
      before: optimizer updates before the step.
      taken: what `train.training_step` returns.
    """
    import numpy as np

    from scope_jax.records import PAD, POLICY, TEACHER

    state, _, rows, repaired, trace, measured = taken
    *_, chosen, accepted, fixed = trace
    source, mask = repaired["source"], repaired["mask"]
    by_writer = (source == POLICY).sum() + (source == TEACHER).sum()
    own = fixed["source"][accepted] == POLICY
    kept = own.sum(1)
    same = (fixed["ids"][accepted] == rows["ids"][chosen[accepted]]) | ~own
    replaced = (rows["mask"] & (source == TEACHER).any(1)[:, None]).sum()
    return {
        "finite": all(np.isfinite(float(value)) for value in measured.values()),
        "tokens conserved": bool(
            by_writer == mask.sum()
            and ((source != PAD) == mask).all()
            and rows["mask"].sum() == measured["policy_tokens"]
            and mask.sum() - fixed["mask"][accepted].sum() == rows["mask"].sum() - replaced
            and (source == TEACHER).sum() <= measured["teacher_tokens"]
        ),
        "PRM scored": bool(
            measured["prm/scored"] > len(rows["ids"]) / 2
            and measured["prm/unscored"]
            == measured["prm/alignment_failed"] + measured["prm/too_long"]
        ),
        "teacher wrote": measured["teacher_tokens"] > 0 or measured["corrections/made"] == 0,
        "prefixes kept": bool(same.all() and (kept > 0).all()),
        "groups differ": measured["groups_with_signal"] > 0 and 0 < measured["reward"] < 1,
        "two updates": optimizer_count(state) - before == 2 and measured["skipped"] == 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="Qwen2.5's, as a directory")
    parser.add_argument("--prm-tokenizer", required=True, help="the same with <extra_0>")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="new, for models and run")
    parser.add_argument("--tiny", action="store_true", help="hidden size 64")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    flags = os.environ.get("XLA_FLAGS", "")
    if "device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from scope_jax import train as train_module
    from scope_jax.configlib import load_config

    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    sums = [
        {"problem": f"Ann has {a} pens and gets {b} more. How many has she?", "answer": str(a + b)}
        for a in range(3, 9) for b in range(2, 8)
    ]  # fmt: skip
    (args.out / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    write_models(args.out, args.tiny, args.tokenizer, args.prm_tokenizer)
    made = time.perf_counter() - began
    taken, checked = [], []
    plain_step = train_module.training_step

    def checked_step(run, config, state, *rest):
        before = optimizer_count(state)
        out = plain_step(run, config, state, *rest)
        checked.append(check_step(before, out))
        taken.append({name: float(value) for name, value in out[-1].items()})
        failed = [name for name, holds in checked[-1].items() if not holds]
        print(f"checks of step {rest[-1]}: {', '.join(failed) or 'all hold'}", flush=True)
        return out

    train_module.training_step = checked_step
    try:
        config = load_config("qwen2_5_math_7b", overrides(args.out, args.steps))
        train_module.train(config, args.out / "run")
    finally:
        train_module.training_step = plain_step
    rows = [json.loads(line) for line in (args.out / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    for name in SHOWN:
        print(f"{name:28}" + "".join(f"{row.get(name, math.nan):>14.6g}" for row in rows))
    for name in checked[0]:
        print(f"{name:28}" + "".join(f"{'yes' if c[name] else 'NO':>14}" for c in checked))
    windows = sum(row["prm/windows"] for row in rows)
    repairs = sum(row["corrections/accepted"] for row in rows)
    good = all(all(c.values()) for c in checked) and len(checked) == args.steps
    good = good and windows > 0 and repairs > 0
    peak = int(next(
        line.split()[1] for line in pathlib.Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )) / 2**20  # fmt: skip
    print(json.dumps({
        "tiny": args.tiny, "ok": good, "devices": jax.device_count(), "steps": len(rows),
        "peak_gib": round(peak, 1), "models_seconds": round(made, 1),
        "seconds": round(time.perf_counter() - began, 1),
        **{name: [row.get(name) for row in rows] for name in SHOWN},
    }))  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
