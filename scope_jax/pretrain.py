"""Makes the worksheet's three small models: the base policy, the teacher and the process reward
model.

    python -m scope_jax.pretrain --out scope_jax/tasks/worksheet_models        (re-makes what the
    package ships)

* policy: a two-layer Llama trained on solutions in which a hard fact (worksheet.hard_facts) has a
fixed wrong value
  three times out of four. It writes well-formed solutions and is right about a sheet only now and
  then.
* teacher: the same network trained on with the right values.
* prm: the teacher's backbone and a fresh head, trained on the policy's own rollouts with the
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

from scope_jax.configlib import one_line_errors
from scope_jax.data import decode_completions, decode_steps, tokenize_prompts
from scope_jax.models.hf import save_hf
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.prm import PRM, save_prm, score_steps
from scope_jax.records import InputError
from scope_jax.sampling import decoding_layout, generate
from scope_jax.steps import segment_steps
from scope_jax.tasks import worksheet

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
CHARACTERS = worksheet.LABELS + "0123456789+-*=,?\n"
VOCAB = {token: i for i, token in enumerate([PAD_TOKEN, EOS_TOKEN, *CHARACTERS, *worksheet.FACTS])}
RIGHT_SHARE = 0.25  # how often a hard fact has its right value in the base policy's training text
MAX_SUMS = 8  # sheets of 2 .. 8 sums


def make_tokenizer():
    """Returns the worksheet's tokenizer: a sum ("3*7") is one token, every other character is one.

    So a line is five tokens, and copying a sum from the sheet takes one look-up instead of three.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token=PAD_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[2-9][-+*][2-9]|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def solved_sheets(
    rows: int, n: int, rng: np.random.Generator, hard: dict[str, int]
) -> tuple[np.ndarray, int]:
    """Returns (ids [rows, 8 n + 1] int32 of sheets and their solutions, prompt length 3 n).

    A fact in `hard` gets its right value with probability RIGHT_SHARE, else the wrong one it maps
    to.
    """
    right = np.array([worksheet.fact_value(fact) for fact in worksheet.FACTS])
    wrong = np.array([hard.get(fact, worksheet.fact_value(fact)) for fact in worksheet.FACTS])
    column = lambda char: np.full((rows, n), VOCAB[char])  # noqa: E731

    labels = np.argsort(rng.random((rows, worksheet.MAX_ITEMS)), axis=1)[:, :n] + VOCAB["a"]
    sums = rng.integers(0, len(worksheet.FACTS), (rows, n))
    sheet = np.stack([labels, sums + VOCAB[worksheet.FACTS[0]], column(",")], axis=-1)
    sheet[:, -1, -1] = VOCAB["?"]
    order = np.argsort(rng.random((rows, n)), axis=1)
    labels, sums = np.take_along_axis(labels, order, 1), np.take_along_axis(sums, order, 1)
    values = np.where(rng.random((rows, n)) < RIGHT_SHARE, right[sums], wrong[sums]) + VOCAB["0"]
    lines = [labels, sums + VOCAB[worksheet.FACTS[0]], column("="), values, column("\n")]
    solved = np.stack(lines, axis=-1).reshape(rows, -1)
    end = np.full((rows, 1), VOCAB[EOS_TOKEN])
    return np.concatenate([sheet.reshape(rows, -1), solved, end], axis=1).astype(np.int32), 3 * n


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


def train_text(model, params, *, rows: int, hard: dict[str, int], seed: int, **schedule):
    """Trains on the solutions of freshly drawn sheets of 2 .. MAX_SUMS sums; returns params."""
    rng = np.random.default_rng(seed)

    def next_batch():
        ids, prompt_length = solved_sheets(rows, int(rng.integers(2, MAX_SUMS + 1)), rng, hard)
        return {"sheets": ids[:, :prompt_length], "solutions": ids[:, prompt_length:]}

    def loss_fn(params, batch):
        ids = jnp.concatenate([batch["sheets"], batch["solutions"]], axis=1)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1)[None], ids[:, 1:].shape)
        hidden, _ = model(params, ids[:, :-1], positions=positions)
        logits = hidden[:, batch["sheets"].shape[1] - 1 :] @ model.unembed(params)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["solutions"])
        return losses.mean()

    return fit(params, loss_fn, next_batch, **schedule)


def tokenize_sheets(records: list[dict], tokenizer, bucket: int):
    """Returns `Prompts` of the bare sheets."""
    return tokenize_prompts(
        records,
        tokenizer=tokenizer,
        render=str,
        max_prompt_length=bucket,
        pad_id=tokenizer.pad_token_id,
    )


def label_rollouts(model, params, tokenizer, *, count: int, seed: int):
    """Samples the policy on sheets of 3 .. MAX_SUMS sums and labels each step of each rollout with
    the checker.

    Returns:
      dict of ids, mask [count, L], score_positions, step_mask, labels [count, S].
    """
    by_n = range(3, MAX_SUMS + 1)
    records = [
        worksheet.problems("prm", n=n, seed=seed)[i]
        for n in by_n
        for i in range(-(-count // len(by_n)))
    ][:count]
    bucket = 3 * MAX_SUMS
    prompts = tokenize_sheets(records, tokenizer, bucket)
    rollouts = jax.device_get(
        generate(
            model, params, prompts.ids, prompts.mask, jax.random.key(seed), group_size=1,
            max_new_tokens=5 * MAX_SUMS + 1, eos_ids=(tokenizer.eos_token_id,),
            pad_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    ends, step_mask = segment_steps(tokenizer, ids, mask, "\n", max_steps=MAX_SUMS + 2)
    labels = np.zeros(ends.shape, np.int32)
    for row, steps in enumerate(decode_steps(tokenizer, ids, ends, step_mask)):
        labels[row, : len(steps)] = worksheet.check_steps(
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
    """Returns how often a PRM's first error is the checker's, on wrong and on right rollouts."""
    scores = score_steps(
        prm, params, data["ids"], data["mask"], data["score_positions"], data["step_mask"]
    )
    first = lambda wrong: np.where(wrong.any(1), wrong.argmax(1), -1)  # noqa: E731
    found = first((np.asarray(scores.scores) < threshold) & data["step_mask"])
    true = first((data["labels"] == 0) & data["step_mask"])
    return {
        "first_error_exact": float((found == true)[true >= 0].mean()),
        "no_error_exact": float((found == true)[true < 0].mean()),
    }


def solve_rate(model, params, tokenizer, n: int, count: int = 256) -> float:
    """Returns the share of held-out sheets of `n` sums that one sample each solves."""
    source = worksheet.problems("test", n=n)
    records = [source[i] for i in range(count)]
    prompts = tokenize_sheets(records, tokenizer, 3 * n)
    rollouts = generate(
        model, params, prompts.ids, prompts.mask, jax.random.key(1), group_size=1,
        max_new_tokens=5 * n + 1, eos_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    completions = jax.device_get((rollouts.completion_ids, rollouts.completion_mask))
    texts = decode_completions(tokenizer, *completions)
    solved = [worksheet.verify(r["gold"], text) for r, text in zip(records, texts, strict=True)]
    return sum(solved) / count


def run(out: pathlib.Path, *, seed: int, steps: int, rows: int) -> dict:
    """Makes the three models below `out` and returns the numbers that say what they can do."""
    tokenizer, hard = make_tokenizer(), worksheet.hard_facts(seed)
    model = Transformer(
        TransformerConfig(
            vocab_size=len(VOCAB), embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=4,
            head_dim=32, mlp_dim=192, tie_embeddings=True, max_position=256,
        )
    )  # fmt: skip
    params = model.init(jax.random.key(seed))
    # At the usual 0.02 the look-up of a sum by its label takes three times as long to form.
    params["embed"] *= 10.0
    text = {"rows": rows, "steps": steps, "peak": 3e-3}
    params = train_text(model, params, hard=hard, seed=seed, name="policy", **text)
    copy = functools.partial(jax.tree.map, jnp.copy)  # training donates its params
    text |= {"steps": steps // 4, "peak": 2e-3}
    teacher = train_text(model, copy(params), hard={}, seed=seed + 1, name="teacher", **text)
    data = label_rollouts(model, params, tokenizer, count=max(64 * rows, 512), seed=seed)
    order = np.random.default_rng(seed).permutation(len(data["ids"]))
    part = lambda chosen: {name: value[chosen] for name, value in data.items()}  # noqa: E731
    held_out, train = part(order[: len(order) // 8]), part(order[len(order) // 8 :])
    prm = PRM(model)
    prm_params = {"backbone": copy(teacher), "head": prm.init_head(jax.random.key(seed + 2))}
    prm_params = train_prm(prm, prm_params, train, seed=seed, name="prm", **text)

    stored = jnp.dtype(ml_dtypes.bfloat16)
    cast = functools.partial(jax.tree.map, lambda x: x.astype(stored).astype(jnp.float32))
    params, teacher, prm_params = cast(params), cast(teacher), cast(prm_params)
    shrink = functools.partial(jax.tree.map, lambda x: x.astype(stored))
    save_hf(out / "policy", model, shrink(params), tokenizer)
    save_hf(out / "teacher", model, shrink(teacher), tokenizer)
    save_prm(out / "prm", prm, shrink(prm_params), tokenizer)
    policy, teacher = decoding_layout(model, params), decoding_layout(model, teacher)
    return {
        "policy_pass@1": {f"n={n}": solve_rate(*policy, tokenizer, n) for n in (5, 6, 7)},
        "teacher_pass@1": {f"n={n}": solve_rate(*teacher, tokenizer, n) for n in (5, 6, 7)},
        "prm": first_error_accuracy(prm, prm_params, held_out),
        "params": sum(x.size for x in jax.tree.leaves(params)),
    }


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.pretrain",
        description="Trains the worksheet's base policy, teacher and PRM (8 minutes on 2 cores).",
        epilog="example: python -m scope_jax.pretrain --out /tmp/worksheet_models --seed 0",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="directory for policy/, teacher/ and prm/"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the text and the hard facts"
    )
    parser.add_argument(
        "--steps", type=int, default=2400, help="updates of the policy; a quarter for the others"
    )
    parser.add_argument("--rows", type=int, default=64, help="sheets a batch")
    args = parser.parse_args(argv)
    if args.steps < 8 or args.rows < 8:
        raise InputError("--steps and --rows must be at least 8")
    report = run(args.out, seed=args.seed, steps=args.steps, rows=args.rows)
    text = json.dumps({**report, "seed": args.seed, "steps": args.steps}, indent=2)
    (args.out / "pretrain.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
