"""Makes a task's small models: the base policy, its teachers and the process reward model.

    python -m scope_jax.pretrain --out scope_jax/tasks/worksheet_models        (re-makes what the
    package ships)
    python -m scope_jax.pretrain --task ledger --seed 1 --teachers own verbose imperfect --out DIR

* policy/: a two-layer Llama trained on solutions in which a hard fact (the task's hard_facts) has a
fixed wrong value
  three times out of four. It writes well-formed solutions and is right about a problem only now and
  then.
* teacher/: the same network trained on with the right values.
* teacher_verbose/: that one, trained on with lines that restate what they start from.
* teacher_imperfect/: that one, trained on with wrong values for a few of the hard facts, always.
* prm/: the teacher's backbone and a fresh head, trained on the policy's own rollouts with the
checker's step labels.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from scope_jax.calibration import process_bench
from scope_jax.configlib import one_line_errors, read_command
from scope_jax.data import decode_completions, decode_steps, tokenize_prompts
from scope_jax.models.hf import save_hf
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.pretrain_texts import RIGHT_SHARE, TEXTS, WORKSHEET, TaskText, make_tokenizer
from scope_jax.prm import PRM, save_prm, score_steps
from scope_jax.records import InputError
from scope_jax.sampling import decoding_layout, generate
from scope_jax.steps import segment_steps

MAX_N = 8  # problems of 2 .. 8 sums or payments
IMPERFECT_SHARE = 1 / 16  # of the facts: 70 % of problems of 5 or 6 hold none of them
TEACHERS = ("own", "verbose", "imperfect")


def fit(params, loss_fn, next_batch, *, steps: int, peak: float, name: str):
    """Trains with AdamW under a warmed-up cosine; returns params.

    Args:
      params: donated.
      loss_fn: (params, batch) -> [] float32.
      next_batch: () -> a batch, a tree of host arrays; a new shape is compiled anew.
      steps, peak: updates, and the highest learning rate.
      name: of the model, for the progress lines.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 10), steps, 0.02 * peak)
    adamw = optax.adamw(rate, b2=0.98, weight_decay=0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, start = optimizer.init(params), time.time()
    for step in range(1, steps + 1):
        params, opt_state, loss = update(params, opt_state, next_batch())
        if step % 250 == 0 or step == steps:
            took = f"{time.time() - start:.0f}s"
            print(f"{name:8} step {step:5}/{steps}  loss {float(loss):.3f}  {took}", flush=True)
    return params


def train_text(
    model,
    params,
    *,
    text: TaskText,
    rows: int,
    wrong: dict[str, int],
    right_share: float = RIGHT_SHARE,
    verbose: bool = False,
    seed: int,
    **schedule,
):
    """Trains on the solutions of freshly drawn problems of 2 .. MAX_N items; returns params.

    A fact in `wrong` has its right value with probability `right_share`.
    """
    rng = np.random.default_rng(seed)

    def next_batch():
        n = int(rng.integers(2, MAX_N + 1))
        ids, prompt_length = text.solved(
            rows, n, rng, wrong, right_share=right_share, verbose=verbose
        )
        return {"problems": ids[:, :prompt_length], "solutions": ids[:, prompt_length:]}

    def loss_fn(params, batch):
        ids = jnp.concatenate([batch["problems"], batch["solutions"]], axis=1)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1)[None], ids[:, 1:].shape)
        hidden, _ = model(params, ids[:, :-1], positions=positions)
        logits = hidden[:, batch["problems"].shape[1] - 1 :] @ model.unembed(params)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["solutions"])
        return losses.mean()

    return fit(params, loss_fn, next_batch, **schedule)


def tokenize_problems(records: list[dict], tokenizer, bucket: int):
    """Returns `Prompts` of the bare problems."""
    return tokenize_prompts(
        records,
        tokenizer=tokenizer,
        render=str,
        max_prompt_length=bucket,
        pad_id=tokenizer.pad_token_id,
    )


def label_rollouts(model, params, tokenizer, *, count: int, seed: int, text: TaskText = WORKSHEET):
    """Samples the policy on problems of 3 .. MAX_N items and labels each step of each rollout with
    the checker.

    Returns:
      dict of ids, mask [count, L], score_positions, step_mask, labels [count, S].
    """
    by_n = range(3, MAX_N + 1)
    records = [
        text.task.problems("prm", n=n, seed=seed)[i]
        for n in by_n
        for i in range(-(-count // len(by_n)))
    ][:count]
    bucket = text.prompt_length(MAX_N)
    prompts = tokenize_problems(records, tokenizer, bucket)
    rollouts = jax.device_get(
        generate(
            model, params, prompts.ids, prompts.mask, jax.random.key(seed), group_size=1,
            max_new_tokens=text.line * MAX_N + 1, eos_ids=(tokenizer.eos_token_id,),
            pad_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    ends, step_mask = segment_steps(tokenizer, ids, mask, "\n", max_steps=MAX_N + 2)
    labels = np.zeros(ends.shape, np.int32)
    for row, steps in enumerate(decode_steps(tokenizer, ids, ends, step_mask)):
        labels[row, : len(steps)] = text.task.check_steps(
            records[row]["gold"], steps, bool(rollouts.finished[row])
        )
    return {
        "ids": np.concatenate([prompts.ids, ids], axis=1),
        "mask": np.concatenate([prompts.mask, mask], axis=1),
        "score_positions": np.where(step_mask, bucket + ends - 1, 0),
        "step_mask": step_mask,
        "labels": labels,
    }


def train_prm(prm, params, data, *, rows: int, seed: int, **schedule):
    """Trains a PRM, backbone and head, on the step labels of `label_rollouts`; returns params."""
    rng = np.random.default_rng(seed)

    def next_batch():
        chosen = rng.integers(0, len(data["ids"]), rows)
        return {name: value[chosen] for name, value in data.items()}

    def loss_fn(params, batch):
        positions = positions_from_mask(batch["mask"])
        logits = prm.logits(params, batch["ids"], positions, batch["score_positions"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.where(batch["step_mask"], losses, 0.0).sum() / batch["step_mask"].sum()

    return fit(params, loss_fn, next_batch, **schedule)


def first_error_accuracy(prm, params, data, threshold: float = 0.5) -> dict[str, float]:
    """Returns how often a PRM's first error is the checker's, on wrong and on right rollouts, and
    ProcessBench's F1 of the two.
    """
    mask = data["step_mask"]
    scores = np.asarray(
        score_steps(prm, params, data["ids"], data["mask"], data["score_positions"], mask).scores
    )
    wrong = (data["labels"] == 0) & mask
    found = process_bench(
        [row[real] for row, real in zip(scores, mask, strict=True)],
        np.where(wrong.any(1), wrong.argmax(1), -1),
        threshold,
    )
    names = {"first_error_exact": "acc_error", "no_error_exact": "acc_correct", "f1": "f1"}
    return {name: float(found[key]) for name, key in names.items()}


def solve_rate(
    model,
    params,
    tokenizer,
    n: int,
    count: int = 256,
    text: TaskText = WORKSHEET,
    temperature: float = 1.0,
) -> float:
    """Returns the share of held-out problems of `n` items that one sample each solves."""
    source = text.task.problems("test", n=n)
    records = [source[i] for i in range(count)]
    prompts = tokenize_problems(records, tokenizer, text.prompt_length(n))
    rollouts = generate(
        model, params, prompts.ids, prompts.mask, jax.random.key(1), group_size=1,
        max_new_tokens=text.verbose_line * n + 1, eos_ids=(tokenizer.eos_token_id,),
        temperature=temperature,
    )  # fmt: skip
    completions = jax.device_get((rollouts.completion_ids, rollouts.completion_mask))
    texts = decode_completions(tokenizer, *completions)
    solved = [text.task.verify(r["gold"], t) for r, t in zip(records, texts, strict=True)]
    return sum(solved) / count


copy = functools.partial(jax.tree.map, jnp.copy)  # training donates its params


def make_teachers(model, policy, teachers, *, text: TaskText, wrong, rows, steps, seed) -> dict:
    """Returns {directory: params}: "teacher", from the policy's params, and the asked others, from
    the teacher's. The own-style teacher also learns what the policy is still unsure of in the form.
    """
    options = {"text": text, "rows": rows, "peak": 2e-3}
    made = {
        "teacher": train_text(
            model, copy(policy), wrong={}, seed=seed + 1, steps=int(text.teacher_share * steps),
            name="teacher", **options,
        )
    }  # fmt: skip
    if "verbose" in teachers:
        made["teacher_verbose"] = train_text(
            model, copy(made["teacher"]), wrong={}, verbose=True, seed=seed + 3, steps=steps // 4,
            name="verbose", **options,
        )  # fmt: skip
    if "imperfect" in teachers:
        few = dict(list(wrong.items())[: round(len(text.task.FACTS) * IMPERFECT_SHARE)])
        made["teacher_imperfect"] = train_text(
            model, copy(made["teacher"]), wrong=few, right_share=0.0, seed=seed + 4,
            steps=steps // 4, name="imperfect", **options,
        )  # fmt: skip
    return made


def make_prm(model, policy, teacher, tokenizer, *, text: TaskText, rows, steps, seed):
    """Returns (PRM, params, what it is right about on held-out rollouts) for a policy."""
    data = label_rollouts(model, policy, tokenizer, count=max(64 * rows, 512), seed=seed, text=text)
    order = np.random.default_rng(seed).permutation(len(data["ids"]))
    part = lambda chosen: {name: value[chosen] for name, value in data.items()}  # noqa: E731
    held_out, train = part(order[: len(order) // 8]), part(order[len(order) // 8 :])
    prm = PRM(model)
    params = {"backbone": copy(teacher), "head": prm.init_head(jax.random.key(seed + 2))}
    steps = int(text.prm_share * steps)
    params = train_prm(prm, params, train, seed=seed, rows=rows, steps=steps, peak=2e-3, name="prm")
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(jnp.float32), params)
    return prm, params, first_error_accuracy(prm, params, held_out)


def run(out: pathlib.Path, *, text: TaskText, teachers, seed: int, steps: int, rows: int) -> dict:
    """Makes the models below `out` and returns the numbers that say what they can do."""
    tokenizer, wrong = make_tokenizer(text), text.task.hard_facts(seed)
    model = Transformer(
        TransformerConfig(
            vocab_size=len(text.vocab), embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=4,
            head_dim=32, mlp_dim=192, tie_embeddings=True, max_position=256,
        )
    )  # fmt: skip
    params = model.init(jax.random.key(seed))
    # At the usual 0.02 the look-up of a sum by its label takes three times as long to form.
    params["embed"] *= 10.0
    options = {"text": text, "rows": rows}
    params = train_text(
        model, params, wrong=wrong, seed=seed, steps=steps, peak=3e-3, name="policy", **options
    )
    options |= {"steps": steps, "seed": seed}
    models = {"policy": params, **make_teachers(model, params, teachers, wrong=wrong, **options)}
    prm, prm_params, accuracy = make_prm(model, params, models["teacher"], tokenizer, **options)

    shrink = functools.partial(jax.tree.map, lambda x: x.astype(ml_dtypes.bfloat16))
    report = {}
    for name, weights in models.items():
        stored = shrink(weights)
        save_hf(out / name, model, stored, tokenizer)
        read = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
        decoder = decoding_layout(model, read)
        report[f"{name}_pass@1"] = {
            f"n={n}": solve_rate(*decoder, tokenizer, n, text=text) for n in (5, 6, 7)
        }
    save_prm(out / "prm", prm, shrink(prm_params), tokenizer)
    return {**report, "prm": accuracy, "params": sum(x.size for x in jax.tree.leaves(params))}


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.pretrain",
        description="Trains a task's base policy, teachers and PRM (5 to 8 minutes on 2 cores).",
        epilog="example: python -m scope_jax.pretrain --out /tmp/worksheet_models --seed 0",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="directory for policy/, teacher/ and prm/"
    )
    parser.add_argument("--task", choices=TEXTS, default="worksheet")
    parser.add_argument(
        "--teachers", nargs="+", choices=TEACHERS, default=["own"],
        help='"own" is always made; "verbose" and "imperfect" if asked for',
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the text and the hard facts"
    )
    parser.add_argument(
        "--steps", type=int,
        help="updates of the policy (2400 for the worksheet, 1500 for the ledger)",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=64, help="problems a batch")
    args, _ = read_command(parser, argv)
    text = TEXTS[args.task]
    steps = text.steps if args.steps is None else args.steps
    if steps < 8 or args.rows < 8:
        raise InputError("--steps and --rows must be at least 8")
    start = time.time()
    report = run(
        args.out, text=text, teachers=args.teachers, seed=args.seed, steps=steps, rows=args.rows
    )
    report |= {"task": args.task, "seed": args.seed, "steps": steps}
    printed = json.dumps(report, indent=2)
    (args.out / "pretrain.json").write_text(printed + "\n")
    print(printed, f"{time.time() - start:.0f} s", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
