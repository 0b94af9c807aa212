"""Train a process reward model on step labels.

    python -m scope_jax.train_prm --model DIR --data steps.jsonl --labels trl --workdir W
    python -m scope_jax.train_prm --model DIR --data gsm8k.jsonl --labels mc --workdir W

Any head on any backbone. Labels: PRM800K, Math-Shepherd, TRL's stepwise layout, or Monte-Carlo
labels made here (rollouts of a policy from every prefix, see monte_carlo.py). Every step that has a
label is a two-way classification at the token where its score will be read.

A workdir holds config.json, metrics.jsonl, checkpoints/, labels.jsonl (with --labels mc) and, at
the end, prm/: a Hugging Face directory for `prm.path`, `evaluate --prm` and `load_prm`.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scope_jax import checkpoint
from scope_jax.calibration import process_bench, threshold_sweep
from scope_jax.configlib import claim_workdir, load_object, one_line_errors, read_command
from scope_jax.metrics import Writer
from scope_jax.models.hf import load_hf, load_tokenizer
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import blocks_of
from scope_jax.monte_carlo import label_problems
from scope_jax.prm import (
    HEADS,
    PRM,
    all_right,
    find_pair_ids,
    last_linear,
    last_tokens,
    save_prm,
    score_solutions,
)
from scope_jax.prm_formats import STEP_TOKENS, PRMFormat, PRMTexts, pad_inputs
from scope_jax.records import InputError
from scope_jax.sharding import make_mesh, put_batch, replicate
from scope_jax.step_labels import class_balance, read_step_labels, split
from scope_jax.tasks.math_problems import read_problems
from scope_jax.update import init_state, make_optimizer

LABELS = ("trl", "prm800k", "math_shepherd", "mc")


def make_prm(
    path, *, head: str, format: str, step_token: str, layers: int, train_layers: int, reads: int,
    seed: int, mesh, dtype,
):  # fmt: skip
    """Returns (PRM, params, tokenizer): a fresh head on a language model.

    Args:
      layers: keep so many of the backbone's first layers (0 = all).
      train_layers: of them, how many of the last are to be trained (checked here only).
      reads: last tokens of a step that its score is read at.
      format, step_token: "" = the head's own.
    """
    layout = PRMFormat(format or HEADS[head], step_token)
    tokenizer, _ = load_tokenizer(path)
    PRMTexts(tokenizer, layout, path)  # a missing step token is known before the weights load
    model, params = load_hf(path, mesh=mesh, dtype=dtype)
    if layers > model.config.num_layers or layers < 0:
        raise InputError(f"--layers {layers}: {path} has {model.config.num_layers} layers")
    kept = layers or model.config.num_layers
    if not 0 <= train_layers < kept:
        raise InputError(
            f"--train-layers {train_layers}: 0 (everything) to {kept - 1} of the {kept} layers kept"
        )
    if layers:
        model = dataclasses.replace(
            model, config=dataclasses.replace(model.config, num_layers=layers)
        )
        params["layers"] = jax.tree.map(lambda x: x[:layers], params["layers"])
    pair_ids = find_pair_ids(tokenizer) if head == "lm_pair_at_token" else None
    prm = PRM(model, head, layout, pair_ids, reads)
    if head != "lm_pair_at_token":
        params.pop("unembed", None)
    fresh = prm.init_head(jax.random.key(seed))
    if fresh:  # every score starts at 0.5: a random map of large features would first be unlearnt
        last = last_linear(fresh)
        last["w"] = jnp.zeros_like(last["w"])
    fresh = jax.tree.map(lambda x: x.astype(dtype), replicate(fresh, mesh))
    return prm, {"backbone": params, "head": fresh}, tokenizer


def fit_head(prm, params, batches: list, mesh):
    """Returns a head whose last linear map is fitted to the backbone as it is: probe, then tune.

    A head from zero sends the backbone gradients of no use until it has found its direction, and it
    finds it slowly, for the hidden states of a language model lie close to one common vector; here
    they are centred and scaled (https://arxiv.org/abs/2202.10054 on probing first).
    lm_pair_at_token has no weights of its own.

    Args:
      batches: of `make_batch`.
    """
    if not params["head"]:
        return params["head"]
    features, found = jax.jit(prm.features), []
    for batch in batches:
        ids, mask, at = put_batch((batch["ids"], batch["mask"], batch["score_positions"]), mesh)
        positions = positions_from_mask(mask)
        x = jax.device_get(features(params, ids, positions, at))
        real = jax.device_get(last_tokens(positions, at, prm.reads)[1])
        steps = batch["step_mask"]
        found.append((x.reshape(*real.shape, -1)[steps], real[steps], batch["labels"][steps]))
    x, real, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    weight, bias = fit_logistic(x, real, labels)
    last = last_linear(params["head"])
    w, b = (np.zeros(last[name].shape, np.float32) for name in ("w", "b"))
    w[:, -1], b[-1] = weight, bias  # the logit of "correct", or the only one
    fitted = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), {"w": w, "b": b}, last
    )
    return {**params["head"], "out": fitted} if "out" in params["head"] else fitted


def fit_logistic(x, real, labels, *, ridge: float = 0.01, steps: int = 300):
    """Returns (weights [D], bias) under which a step's tokens give its label, see `all_right`.

    Args:
      x: [steps, reads, D]; real: [steps, reads] bool; labels: [steps] in {0, 1}.
      ridge: on the squared norm of the weights of centred and scaled features.
      steps: of Adam on all examples at once.
    """
    mean, scale = x[real].mean(0), x[real].std(0) + 1e-6
    z, real, labels = jax.device_put(((x - mean) / scale, real, labels.astype(np.float32)))

    def loss(params):
        odds = all_right(z @ params["w"] + params["b"], real)
        fit = optax.sigmoid_binary_cross_entropy(odds, labels).mean()
        return fit + ridge * jnp.sum(params["w"] ** 2)

    optimizer = optax.adam(0.02)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    # All tokens right with the labels' mean is where a step's tokens share its odds evenly.
    share = float(np.clip(labels.mean(), 1e-3, 1 - 1e-3)) ** (1 / real.shape[1])
    start = {"w": jnp.zeros(x.shape[-1]), "b": jnp.float32(np.log(share / (1 - share)))}
    (params, _), _ = jax.jit(
        lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    )(start)
    weight = np.asarray(params["w"]) / scale
    return weight, float(params["b"] - weight @ mean)


def freeze(params, train_layers: int) -> tuple[Any, Any]:
    """Splits params into (trained, frozen): the embedding and all but the last layers are frozen.

    The backward pass ends at the first trained layer, and frozen weights have no optimizer state.

    Args:
      train_layers: last layers of the backbone to train with the head; 0 = everything is trained.
    """
    if not train_layers:
        return params, {}
    backbone = dict(params["backbone"])
    (layers,), embed = blocks_of(backbone.pop("layers")), backbone.pop("embed")
    lower = jax.tree.map(lambda x: x[:-train_layers], layers)
    upper = jax.tree.map(lambda x: x[-train_layers:], layers)
    trained = {**params, "backbone": {**backbone, "layers": upper}}
    return trained, {"embed": embed, "layers": lower}


def join(trained, frozen, *, stacked: bool = False):
    """Undoes `freeze`; the layers stay two blocks unless they are to be stacked (a copy)."""
    if not frozen:
        return trained
    layers = (frozen["layers"], trained["backbone"]["layers"])
    if stacked:
        layers = jax.tree.map(lambda *blocks: jnp.concatenate(blocks), *layers)
    return {**trained, "backbone": {**frozen, **trained["backbone"], "layers": layers}}


def lay_out(prm, tokenizer, records, max_length: int) -> tuple[list, dict[str, int]]:
    """Returns [(PRMInput, labels)] of the records that fit, and how many did not and why."""
    layout = PRMTexts(tokenizer, prm.format)
    examples, dropped = [], {"too_long": 0, "alignment_failed": 0}
    for record in records:
        item = layout(record["problem"], record["steps"])
        if item is None:
            dropped["alignment_failed"] += 1
        elif len(item.ids) > min(max_length, prm.max_position):
            dropped["too_long"] += 1
        else:
            examples.append((item, record["labels"]))
    return examples, dropped


def epoch_batches(lengths: np.ndarray, rows: int, seed: int, epoch: int) -> np.ndarray:
    """Returns [batches, rows] indices of an epoch: random batches of neighbours in length.

    A function of (seed, epoch), so that a resumed run needs no iterator state. The examples that do
    not fill a last batch wait for the next epoch's order.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = 32 * rows  # sorted within, so that a batch is padded little but drawn from anywhere
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in pools])
    batches = order[: len(order) // rows * rows].reshape(-1, rows)
    return batches[rng.permutation(len(batches))]


def make_batch(examples: list) -> dict[str, np.ndarray]:
    """Returns `pad_inputs` of a batch with labels [B, S] int32; unlabelled steps are masked out."""
    inputs = [item for item, _ in examples]
    width = -(-max(len(item.ids) for item in inputs) // 32) * 32
    num_steps = -(-max(len(item.reads) for item in inputs) // 16) * 16
    batch = pad_inputs(inputs, width=width, num_steps=num_steps)
    batch["labels"] = np.zeros(batch["step_mask"].shape, np.int32)
    for row, (_, labels) in enumerate(examples):
        batch["labels"][row, : len(labels)] = [label or 0 for label in labels]
        batch["step_mask"][row, : len(labels)] &= [label is not None for label in labels]
    return batch


def prm_loss(trained, frozen, prm, batch):
    """Returns (mean cross entropy over labelled steps, their accuracy)."""
    params = join(trained, frozen)
    positions = positions_from_mask(batch["mask"])
    logits = prm.logits(params, batch["ids"], positions, batch["score_positions"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    right = (logits[..., 1] > logits[..., 0]) == (batch["labels"] == 1)
    count = jnp.maximum(batch["step_mask"].sum(), 1)
    mean = lambda x: jnp.where(batch["step_mask"], x, 0.0).sum() / count  # noqa: E731
    return mean(losses), mean(right.astype(jnp.float32))


def make_update(prm, optimizer, state):
    """Returns the jitted (state, frozen, batch) -> (state, metrics); states stay where they are."""

    def update(state, frozen, batch):
        (loss, accuracy), grads = jax.value_and_grad(prm_loss, has_aux=True)(
            state.params, frozen, prm, batch
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(state, params=params, opt_state=opt_state, step=state.step + 1)
        metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}
        return new, metrics

    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(places, None))


def evaluate_steps(prm, params, tokenizer, records, *, rows: int, max_length: int) -> dict:
    """Returns step accuracy, balanced accuracy and first-error F1 (best threshold) on records.

    Records whose first error is not known (an unlabelled step before it) count in the step numbers
    only.
    """
    problems, steps = [r["problem"] for r in records], [r["steps"] for r in records]
    scores = score_solutions(
        prm, params, tokenizer, problems, steps, batch_size=rows, max_length=max_length
    )
    pairs = [
        (score, label)
        for found, record in zip(scores, records, strict=True)
        if found is not None
        for score, label in zip(found, record["labels"], strict=True)
        if label is not None
    ]
    if not pairs:
        return {"eval/solutions": 0.0}
    score, label = np.array(pairs).T
    right = (score >= 0.5) == (label == 1)
    per_class = [right[label == value].mean() for value in (0, 1) if (label == value).any()]
    results = {
        "eval/solutions": float(len(records)),
        "eval/step_accuracy": float(right.mean()),
        "eval/balanced_accuracy": float(np.mean(per_class)),
    }
    known = [(s, first_label(r["labels"])) for s, r in zip(scores, records, strict=True)]
    known = [(s, label) for s, label in known if label is not None]
    if known:
        found, labels = zip(*known, strict=True)
        best = threshold_sweep(list(found), list(labels))["best"]
        at = process_bench(list(found), list(labels), best["threshold"])
        results |= {"eval/first_error_f1": at["f1"], "eval/threshold": best["threshold"]}
    return results


def first_label(labels) -> int | None:
    """Returns the first wrong step; -1 = none; None where a label before it is missing."""
    for i, label in enumerate(labels):
        if label is None:
            return None
        if label == 0:
            return i
    return -1


def get_records(args) -> list[dict]:
    """Returns the labelled solutions that the command names; makes Monte-Carlo ones first."""
    if args.labels != "mc":
        return read_step_labels(args.data, args.labels)
    made = args.workdir / "labels.jsonl"
    if not made.exists():
        label_problems(
            args.policy or args.model, args.data, made, problems=args.problems, tries=args.tries,
            samples=args.samples, max_new_tokens=args.max_new_tokens, splitter=args.splitter,
            seed=args.seed, reward_fn=load_object(args.reward, "--reward"), stop=args.stop,
        )  # fmt: skip
    return read_step_labels(made, "trl")


def describe(args, prm, params, train, held_out, dropped) -> str:
    """Returns the lines that a run prints first: model, class balance, what was left out."""
    millions = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    device = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    lines = [f"{args.head} ({prm.format.name}) on {args.model}: {millions:.1f} M params, {device}"]
    for name, part in {"train": train, "held out": held_out}.items():
        balance = class_balance(part)
        lines.append(
            f"{name:9} {balance['solutions']} solutions ({balance['share_with_error']:.1%} with an "
            f"error), {balance['steps_labelled']} labelled steps ({balance['share_wrong']:.1%} "
            "wrong)"
        )
    if any(dropped.values()):
        lines.append("left out  " + ", ".join(f"{count} {why}" for why, count in dropped.items()))
    return "\n".join(lines)


def train_prm(args: argparse.Namespace) -> dict[str, float]:
    """Trains, evaluates on held-out problems, exports; returns the last evaluation."""
    mesh = make_mesh(fsdp=args.fsdp)
    if args.rows % mesh.size:
        raise InputError(f"--rows {args.rows} does not divide over {mesh.size} devices")
    prm, params, tokenizer = make_prm(
        args.model, head=args.head, format=args.format, step_token=args.step_token,
        layers=args.layers, train_layers=args.train_layers, reads=args.reads,
        seed=args.seed, mesh=mesh, dtype=jnp.float32,
    )  # fmt: skip
    options = {name: value for name, value in vars(args).items() if name != "workdir"}
    claim = functools.partial(claim_workdir, args.workdir, {"command": "train_prm", **options})
    if args.labels == "mc":  # labels are kept in the workdir; other bad data leave none
        read_problems(args.data)
        claim()
    train, held_out = split(get_records(args), args.held_out, args.seed)
    examples, dropped = lay_out(prm, tokenizer, train, args.max_length)
    if len(examples) < args.rows:
        raise InputError(
            f"{args.data}: {len(examples)} solutions to train on do not fill --rows {args.rows} "
            f"(left out: {dropped})"
        )
    claim()
    optimizer = make_optimizer(
        args.total_steps, learning_rate=args.learning_rate, schedule="cosine",
        warmup_steps=args.total_steps // 20, end_factor=0.1,
    )  # fmt: skip
    lengths = np.array([len(item.ids) for item, _ in examples])
    manager = checkpoint.open_checkpoints(args.workdir, clear=True)
    if args.probe and manager.latest_step() is None:
        first = epoch_batches(lengths, args.rows, args.seed, 0)[: -(-args.probe // args.rows)]
        batches = [make_batch([examples[i] for i in rows]) for rows in first]
        params["head"] = fit_head(prm, params, batches, mesh)
    trained, frozen = freeze(params, args.train_layers)
    state, start = init_state(optimizer, trained), 0
    if (restored := checkpoint.restore(manager, state)) is not None:
        state, start = restored[0], int(restored[0].step)
    if start >= args.total_steps and (args.workdir / "prm").exists():
        raise InputError(f"{args.workdir} has done {start} updates: raise --total-steps to go on")
    writer = Writer(args.workdir, start)
    writer.say(describe(args, prm, params, train, held_out, dropped))
    del params, trained  # the state owns them now; the update donates it
    update, results = make_update(prm, optimizer, state), {}
    log, per_epoch, began = [], len(examples) // args.rows, time.perf_counter()
    for step in range(start, args.total_steps):
        batches = epoch_batches(lengths, args.rows, args.seed, step // per_epoch)
        batch = make_batch([examples[i] for i in batches[step % per_epoch]])
        state, metrics = update(state, frozen, put_batch(batch, mesh))
        log.append(metrics)
        done, last = step + 1, step + 1 == args.total_steps
        if last or done % 20 == 0:
            say_progress(writer, done, args.total_steps, log, began)
            log, began = [], time.perf_counter()
        if last or done % args.checkpoint_every == 0:
            checkpoint.save(manager, done, state, {"step": done})
        if last or done % args.eval_every == 0:
            part = held_out[: args.eval_solutions]
            results = evaluate_steps(
                prm, join(state.params, frozen), tokenizer, part, rows=args.rows,
                max_length=args.max_length,
            )  # fmt: skip
            writer.write(done, results)
            writer.say("held out  " + "  ".join(f"{k[5:]} {v:.3f}" for k, v in results.items()))
            began = time.perf_counter()
    checkpoint.settle(manager)
    manager.close()
    params = join(state.params, frozen, stacked=True)
    save_prm(args.workdir / "prm", prm, params, tokenizer)
    writer.say(f"the PRM is in {args.workdir / 'prm'}")
    return results


def say_progress(writer: Writer, done: int, total: int, log: list, began: float) -> None:
    """Writes and prints the mean of the metrics since the last line, which was at `began`."""
    fetched = jax.device_get(log)  # waits for the updates, which only then can be timed
    row = {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}
    row["seconds/step"] = (time.perf_counter() - began) / len(log)
    writer.write(done, row)
    writer.say(
        f"step {done:6}/{total}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}  "
        f"{row['seconds/step']:.2f} s/step"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.train_prm",
        description="Trains a process reward model on step labels.",
        epilog="example: python -m scope_jax.train_prm --model /tmp/smollm2 --data steps.jsonl "
        "--labels trl --workdir /tmp/prm --layers 12 --total-steps 500",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="backbone: Hugging Face directory or hub id")
    add("--data", required=True, help="label file, or problems with answers for --labels mc")
    add("--labels", required=True, choices=LABELS, help="layout of --data, or mc to make them")
    add("--workdir", required=True, type=pathlib.Path, help="new or to go on with")
    add("--head", default="linear2_at_sep", choices=tuple(HEADS))
    add("--format", default="", choices=("", *STEP_TOKENS), help="text layout; the head's own")
    add("--step-token", default="", help="where steps are read; the format's own")
    add("--layers", type=int, default=0, help="first layers of the backbone to keep, 0 = all")
    add("--train-layers", type=int, default=0, help="last layers of them to train, 0 = everything")
    add("--reads", type=int, default=1, help="last tokens of a step that its score is read at")
    add("--probe", type=int, default=0, help="solutions to fit the fresh head to first, 0 = none")
    add("--total-steps", type=int, default=1000, help="updates; raise it to go on")
    add("--rows", type=int, default=16, help="solutions an update")
    add("--max-length", type=int, default=1024, help="tokens; longer solutions are left out")
    add("--learning-rate", type=float, default=2e-5)
    add("--held-out", type=float, default=0.05, help="share of the problems to evaluate on")
    add("--eval-solutions", type=int, default=256, help="held-out solutions to score")
    add("--eval-every", type=int, default=200, help="updates")
    add("--checkpoint-every", type=int, default=200, help="updates")
    add("--fsdp", type=int, default=1, help="devices that weights are split over")
    add("--seed", type=int, default=0)
    mc = parser.add_argument_group("Monte-Carlo labels (--labels mc)")
    mc.add_argument("--policy", help="who writes and continues solutions; --model")
    mc.add_argument("--problems", type=int, default=256, help="problems of --data to use")
    mc.add_argument("--samples", type=int, default=4, help="solutions per problem")
    mc.add_argument("--tries", type=int, default=4, help="continuations per step")
    mc.add_argument("--max-new-tokens", type=int, default=256)
    mc.add_argument("--stop", nargs="+", default=[], help="strings that end a solution")
    mc.add_argument("--reward", default="scope_jax.rewards:verify", help="module:function")
    mc.add_argument("--splitter", default="\n", help="between steps, as in steps.splitter")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args, _ = read_command(make_parser(), argv)
    for name in ("rows", "reads", "total_steps", "max_length", "eval_every", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.held_out < 1:
        raise InputError("--held-out is a share: 0 <= share < 1")
    print(json.dumps(train_prm(args)))


if __name__ == "__main__":
    sys.exit(main())
