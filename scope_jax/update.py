"""The policy update: optimizer, loss over a batch, micro-batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.hardware import update_compiler_options
from scope_jax.losses import (
    TokenCounts,
    count_tokens,
    kl_penalty,
    summarize,
    token_logps,
    token_losses,
    token_share,
    token_weights,
)
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.lora import join_frozen, split_frozen
from scope_jax.models.transformer import Transformer
from scope_jax.packing import pack
from scope_jax.records import (
    PAD,
    POLICY,
    TEACHER,
    InputError,
    PackedBatch,
    TrainBatch,
    TrainState,
)
from scope_jax.sharding import batch_shards, own_rows, put_batch, put_parts

IS_CAP = 2.0  # of `correct_for_sampler`'s weights


def make_schedule(
    kind: str, *, learning_rate: float, warmup_steps: int, total_steps: int, end_factor: float
):
    """Returns an optax schedule over optimizer updates: "constant", "linear" or "cosine", after a
    linear warmup.
    """
    rest = max(total_steps - warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, end_factor * learning_rate, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=end_factor),
    }
    if kind not in after:
        raise InputError(f"schedule must be one of {', '.join(after)}, got {kind!r}")
    if not warmup_steps:
        return after[kind]()
    warmup = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after[kind]()], [warmup_steps])


def make_optimizer(
    total_steps: int,
    *,
    learning_rate: float = 1e-6,
    schedule: str = "constant",
    warmup_steps: int = 0,
    end_factor: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    mu_dtype: str = "",
    nu_dtype: str = "",
) -> optax.GradientTransformation:
    """Returns AdamW under a schedule and a clipped gradient norm; steps are optimizer updates.

    Args:
      mu_dtype, nu_dtype: in which the first and second moments are held: "float32", "bfloat16", or
        "" for the params'.
    Raises:
      InputError: an unknown schedule or dtype, or a b2 that nu_dtype cannot hold.
    """
    _check_moments(mu_dtype, nu_dtype, b2)
    rate = make_schedule(
        schedule,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        end_factor=end_factor,
    )
    adamw = optax.chain(
        _standing_still(optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype or None), b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    adamw = _hold_nu(adamw, nu_dtype) if nu_dtype else adamw
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


def _check_moments(mu_dtype: str, nu_dtype: str, b2: float) -> None:
    for name, dtype in (("mu_dtype", mu_dtype), ("nu_dtype", nu_dtype)):
        if dtype not in ("", "float32", "bfloat16"):
            raise InputError(
                f"{name} must be float32, bfloat16 or empty (that of the params), got {dtype!r}"
            )
    # A bfloat16 has eight bits. With b1 = 0.9 the first moment loses little to that. The second is
    # rounded back to what it was unless a step changes it by some 1/256: with b2 = 0.999 it could
    # rise but never fall, and even with b2 = 0.99 squares within 20 to 40 % of it leave no trace.
    if nu_dtype == "bfloat16" and b2 > 0.99:
        raise InputError(
            f"nu_dtype=bfloat16 rounds away a decay of b2={b2}: set b2 to 0.99 or less, or leave "
            "nu_dtype empty"
        )


def _standing_still(adam, b1: float, b2: float, eps: float):
    """Returns Adam whose moments stay what they were, bit for bit, where `finite` is False.

    By coefficients of 0 and 1, not by a choice between old and new moments: of those XLA (on a CPU)
    makes another copy, 2 GB and a third of the time of a 0.5 B model's update.
    """

    def update(updates, state, params=None, *, finite=True, **_):
        del params

        def moment(held, decay, order):
            old, new = jnp.where(finite, decay, 1.0), jnp.where(finite, 1 - decay, 0.0)
            one = lambda g, t: new.astype(g.dtype) * g**order + old.astype(t.dtype) * t  # noqa: E731
            return jax.tree.map(one, updates, held)

        mu, nu = moment(state.mu, b1, 1), moment(state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        hats = (optax.tree.bias_correction(x, b, count) for x, b in ((mu, b1), (nu, b2)))
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *hats)
        mu, nu = optax.tree.cast_like(mu, state.mu), optax.tree.cast_like(nu, state.nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _hold_nu(adamw, dtype: str) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW whose second moment is held in `dtype`; optax has that for the first only."""

    def cast(state):
        adam, *others = state
        return (adam._replace(nu=optax.tree.cast(adam.nu, dtype)), *others)

    def update(updates, state, params=None, **extra):
        updates, state = adamw.update(updates, state, params, **extra)
        return updates, cast(state)

    return optax.GradientTransformationExtraArgs(lambda params: cast(adamw.init(params)), update)


def completion_logps(model, params, batch, *, group_size=1, temperature=1.0, chunk_size=1024):
    """Returns (logps [B, T], entropy [B, T]) of a batch's completions under `params`.

    Args:
      batch: anything with prompt_ids, prompt_mask [B, N] and completion_ids, completion_mask [B,
        T].
      group_size: so many neighbouring rows have one prompt, which a `Transformer` then reads once.
      temperature: of the sampler, so that these are comparable with its log-probs.
    """
    # hidden[s] predicts token s + 1: the completion's predictors start at the prompt's last token.
    # The completion's last token is read for nothing: without it rows would not have the length
    # that a TPU's tiles divide.
    if group_size > 1 and isinstance(model, Transformer):
        hidden = _read_by_group(model, params, batch, group_size)
    else:
        tokens = jnp.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
        mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
        hidden, _ = model(params, tokens, positions=positions_from_mask(mask))
        hidden = hidden[:, batch.prompt_ids.shape[1] - 1 : -1]
    return token_logps(
        hidden, model.unembed(params), batch.completion_ids, temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip


def packed_logps(model, params, batch: PackedBatch, *, temperature=1.0, chunk_size=1024):
    """Returns (logps [R, L], entropy [R, L]) of packed tokens; those of a segment's first token and
    of padding mean nothing.
    """
    hidden, _ = model(params, batch.ids, positions=batch.positions, segments=batch.segments)
    # The short arrays are moved, not the hidden states; the last column's lands on the first token.
    found = token_logps(
        hidden, model.unembed(params), jnp.roll(batch.ids, -1, axis=1), temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip
    return tuple(jnp.roll(x, 1, axis=1) for x in found)


def _logps(model, params, batch, *, group_size, **options):
    if isinstance(batch, PackedBatch):
        return packed_logps(model, params, batch, **options)
    return completion_logps(model, params, batch, group_size=group_size, **options)


def _read_by_group(model, params, batch, group_size: int):
    """Returns the hidden states [B, T, D] that predict the completions; each prompt is read once.

    All prompts first, then all completions, with their prompt's keys and values before their own.
    """
    one_of_group = lambda x: x.reshape(-1, group_size, *x.shape[1:])[:, 0]  # noqa: E731
    prompts, mask = one_of_group(batch.prompt_ids), one_of_group(batch.prompt_mask)
    read, context = model(
        params, prompts, positions=positions_from_mask(mask), cache=model.init_cache(*prompts.shape)
    )
    start = jnp.repeat(mask.sum(-1, dtype=jnp.int32), group_size)[:, None]
    positions = positions_from_mask(batch.completion_mask)
    positions = jnp.where(batch.completion_mask, start + positions, -1)
    hidden, _ = model(params, batch.completion_ids, positions=positions, context=context)
    first = jnp.repeat(read[:, -1:], group_size, axis=0)
    return jnp.concatenate([first, hidden[:, :-1]], axis=1)


def count_batch(batch: TrainBatch | PackedBatch) -> TokenCounts:
    """Returns what the losses and diagnostics of a batch, and of its parts, are divided by."""
    share = batch.share if isinstance(batch, PackedBatch) else None
    return count_tokens(batch.token_source, share)


def batch_loss(
    params,
    model,
    batch: TrainBatch | PackedBatch,
    *,
    counts: TokenCounts | None = None,
    group_size=1,
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.2,
    off_policy="shaped",
    gamma=0.1,
    ratio="token",
    loss_agg="seq-mean-token-sum-norm",
    max_length=None,
    entropy_coef=0.0,
    kl_coef=0.0,
    chunk_size=1024,
):
    """Returns (loss [], diagnostics): policy loss - entropy_coef * entropy + kl_coef * KL.

    Args:
      counts: of the batch that this one is a part of, `count_batch`'s: the parts' losses, gradients
        and diagnostics (but `log_ratio_max`) then add up to the whole's. None: of this one.
      max_length: L_max; default T. Packed rows do not know T: they need it for the default
        `loss_agg`.
    """
    packed = isinstance(batch, PackedBatch)
    if packed and not max_length and loss_agg == "seq-mean-token-sum-norm":
        raise InputError(f"packed rows need max_length with loss_agg={loss_agg}")
    logps, entropy = _logps(
        model, params, batch, group_size=group_size, temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip
    in_loss = batch.token_source != PAD
    counts = counts or count_batch(batch)
    share = batch.share if packed else token_share(in_loss)
    weights = token_weights(share, counts, loss_agg, max_length or logps.shape[1])
    weighed = lambda values: (weights * jnp.where(in_loss, values, 0.0)).sum()  # noqa: E731
    mean = lambda values: jnp.where(in_loss, values, 0.0).sum() / counts.in_loss  # noqa: E731
    losses, by_token = token_losses(
        logps, batch.old_logps, batch.advantages, batch.token_source, clip_low=clip_low,
        clip_high=clip_high, off_policy=off_policy, gamma=gamma, ratio=ratio,
        segments=batch.segments if packed else None,
    )  # fmt: skip
    loss = weighed(losses)
    info = summarize(by_token, batch.token_source, counts)
    info |= {"policy_loss": loss, "entropy": mean(entropy)}
    if entropy_coef:
        loss -= entropy_coef * weighed(entropy)
    if kl_coef:
        if batch.ref_logps is None:
            raise InputError("kl_coef > 0 needs ref_logps in the batch")
        kl = kl_penalty(logps, batch.ref_logps, batch.token_source)
        info["kl"] = mean(kl)
        loss += kl_coef * weighed(kl)
    return loss, info


def init_state(optimizer, params, step: int = 0) -> TrainState:
    """Returns the state of a new run; moments lie on the devices as their params do.

    Of LoRA params only A and B get moments.
    """
    # Committed to where they lie, as the update's results are: else its second call would be
    # compiled again. No copy.
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, params))
    shapes: Any = state_shapes(optimizer, params)
    places = jax.tree.map(lambda x: x.sharding, shapes.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=places)(split_frozen(params)[0])
    step_array = jax.device_put(np.int32(step), shapes.step.sharding)
    return TrainState(params=params, opt_state=opt_state, step=step_array)


def state_shapes(optimizer, params) -> TrainState:
    """Returns the state of a new run as shapes with shardings.

    Args:
      params: arrays, or shapes with shardings.
    """
    trained, _ = split_frozen(params)
    shapes = jax.eval_shape(optimizer.init, trained)
    everywhere = jax.tree.leaves(params)[0].sharding
    if isinstance(everywhere, NamedSharding):
        everywhere = NamedSharding(everywhere.mesh, PartitionSpec())
    places = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        shapes,
        trained,
        transform_non_params=lambda _: everywhere,
    )
    opt_state, step = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (shapes, jax.ShapeDtypeStruct((), np.int32)), (places, everywhere),
    )  # fmt: skip
    return TrainState(params=params, opt_state=opt_state, step=step)


def reference(params):
    """Returns the params of a KL to a run's start: a copy, for an update donates what it trains; of
    LoRA params the base itself, which no update touches.
    """
    return split_frozen(params)[1] or jax.tree.map(jnp.copy, params)


def train_step(
    model, optimizer, state: TrainState, batch: TrainBatch | PackedBatch, **options
) -> tuple[TrainState, dict]:
    """One optimizer update on a batch.

    Args:
      model: see models/transformer.py.
      optimizer: from `make_optimizer`.
      state: donated, but for a LoRA model's base, which stays what and where it is; the new one
        lies where it lay.
      batch: B rows, B a multiple of `micro_batches`; packed ones for so many parts.
      options: `micro_batches` (default 1): gradients are summed over this many parts of the batch,
        to the full batch's gradient whatever the aggregation. Of a packed batch those after the
        last one with a token are not computed. `group_size` (default 1; of a packed batch 1): rows
        of a prompt, see `completion_logps`; a part holds whole groups. The others are
        `batch_loss`'s.
    Returns:
      (new state, dict of [] float32: loss, grad_norm, update_norm, `batch_loss`'s diagnostics,
      update/padding: which share of the positions that were computed is padding, and skipped, []
      int32: 1 where the loss or the gradient's norm is not finite; params and opt_state, its
      schedule's count too, are then what they were, and the norms are reported as they came out;
      moments of another optimizer than `make_optimizer`'s see a gradient of zeros).
    """
    step_fn, state, frozen = _step_for(state, batch, options)
    state, info = step_fn(model, optimizer, state, frozen, batch, **options)
    return dataclasses.replace(state, params=join_frozen(state.params, frozen)), info


def lower_train_step(
    model, optimizer, state: TrainState, batch: TrainBatch | PackedBatch, **options
):
    """Returns `train_step` lowered (`jax.stages.Lowered`), for a state and a batch of arrays or of
    shapes with shardings.
    """
    step_fn, state, frozen = _step_for(state, batch, options)
    return step_fn.lower(model, optimizer, state, frozen, batch, **options)


def _step_for(state: TrainState, batch: TrainBatch | PackedBatch, options):
    """Returns (the jitted update, its state, the params that it only reads)."""
    rows, parts = batch.advantages.shape[0], options.get("micro_batches", 1)
    size = options.get("group_size", 1)
    if size > 1 and isinstance(batch, PackedBatch):
        raise InputError(f"packed rows have no groups: group_size must be 1, got {size}")
    if parts < 1 or rows % (parts * size):
        groups = f" of groups of {size}" if size > 1 else ""
        raise InputError(f"{rows} rows do not divide into {parts} micro-batches{groups}")
    trained, frozen = split_frozen(state.params)
    state = dataclasses.replace(state, params=trained)
    leaves, treedef = jax.tree.flatten(state)
    return _compiled_step(tuple(x.sharding for x in leaves), treedef), state, frozen


@functools.lru_cache(maxsize=8)
def _compiled_step(places, treedef):
    """Returns the jitted update that keeps the state where it is.

    Left to itself XLA chooses the new params' layout, and every program that reads them would be
    compiled again.
    """
    return jax.jit(
        _train_step,
        static_argnames=(
            "model", "optimizer", "micro_batches", "group_size", "temperature", "clip_low",
            "clip_high", "off_policy", "gamma", "ratio", "loss_agg", "max_length", "entropy_coef",
            "kl_coef", "chunk_size",
        ),
        donate_argnames=("state",),
        out_shardings=(jax.tree.unflatten(treedef, places), None),
        compiler_options=update_compiler_options(min(places[0].device_set, key=lambda d: d.id)),
    )  # fmt: skip


def _train_step(
    model, optimizer, state, frozen, batch, *, micro_batches=1, group_size=1, **loss_options
):
    def loss_fn(trained, part):
        return batch_loss(join_frozen(trained, frozen), model, part, **options)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    options = {"counts": count_batch(batch), "group_size": group_size, **loss_options}
    turns = micro_batches
    if micro_batches == 1:
        (loss, info), grads = grad_fn(state.params, batch)
    else:
        parts, turns = _in_parts(batch, micro_batches, group_size)

        def accumulate(i, carry):
            new = grad_fn(state.params, jax.tree.map(lambda x: x[i], parts))
            (loss, info), grads = jax.tree.map(jnp.add, carry, new)
            largest = jnp.maximum(carry[0][1]["log_ratio_max"], new[0][1]["log_ratio_max"])
            return (loss, info | {"log_ratio_max": largest}), grads

        shapes = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (loss, info), grads = jax.lax.fori_loop(0, turns, accumulate, zeros)
    info["update/padding"] = _padding(batch, turns / micro_batches, group_size)
    norms = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    finite = jnp.isfinite(loss) & jnp.isfinite(norms["grad_norm"])
    grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, finite=finite)
    norms["update_norm"] = optax.tree.norm(updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    params = jax.tree.map(keep, optax.apply_updates(state.params, updates), state.params)
    # Counts; moments are the optimizer's, see _standing_still.
    opt_state = jax.tree.map(
        lambda new, old: keep(new, old) if new.ndim == 0 else new, opt_state, state.opt_state
    )
    info |= norms | {"skipped": 1 - finite.astype(jnp.int32)}
    return TrainState(params=params, opt_state=opt_state, step=state.step), info


def groups_stay_whole(by_row, group_size: int, micro_batches: int) -> bool:
    """Returns whether every micro-batch gives every batch shard of the mesh whole groups: else to
    read a prompt once would cut a group, or have several devices read the same one.

    Args:
      by_row: any array [B, ..] of the mini-batch, or its shape with a sharding.
    """
    return by_row.shape[0] % (micro_batches * group_size * batch_shards(by_row)) == 0


def _in_parts(batch, parts: int, group_size: int = 1):
    """Returns (the batch's arrays as [parts, B / parts, ..], how many parts are to be computed).

    Interleaved groups, so that every part still lies on every shard of the batch axis.
    """

    def interleave(x):
        x = x.reshape(-1, parts, group_size, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, -1, *x.shape[3:])

    cut = jax.tree.map(interleave, batch)
    if not isinstance(batch, PackedBatch):
        return cut, parts
    holds_tokens = (cut.positions >= 0).any((1, 2))
    return cut, jnp.where(holds_tokens, jnp.arange(1, parts + 1), 0).max()


def _padding(batch, computed, group_size: int):
    """Returns the share of padding among the positions of a batch, of which a share is computed."""
    if isinstance(batch, PackedBatch):
        real = (batch.positions >= 0).mean()
        return (computed - real) / jnp.maximum(computed, 1e-9)  # of nothing: 0
    prompts, completions = batch.prompt_mask, batch.completion_mask
    real = prompts.sum() / group_size + completions.sum()
    return 1 - real / (prompts.size / group_size + completions.size)


def update_policy(
    model, optimizer, state: TrainState, minis, *, old_logps="sampler",
    is_weights=False, ref_params=None, group_size=1, temperature=1.0, chunk_size=1024, **options,
):  # fmt: skip
    """Takes one optimizer update per mini-batch.

    Args:
      minis: list of mini-batches on the device, packed or not, sampled under the weights of
        `state`.
      old_logps: "sampler" takes pi_old from the batch; "recompute" from one forward of `state`'s
        weights, for POLICY tokens (a teacher's log-probs stay), before the first update; `logp_gap`
        in the diagnostics is then the largest |recomputed - sampler's|.
      is_weights: with "recompute", `correct_for_sampler`: for a sampler that is not quite the
        policy (eight bits, another layout).
      ref_params: of the KL's reference; needed with kl_coef > 0.
      group_size: so many neighbouring rows have one prompt, which is then read once, where
        `groups_stay_whole` and the rows are not packed.
      options: `train_step`'s.
    Returns:
      (new state, list of the updates' diagnostics, on the device).
    """
    if old_logps not in ("sampler", "recompute"):
        raise InputError(f'old_logps must be "sampler" or "recompute", got {old_logps!r}')
    if is_weights and old_logps != "recompute":
        raise InputError('is_weights needs old_logps="recompute": there is nothing to weigh by')
    packed, parts = isinstance(minis[0], PackedBatch), options.get("micro_batches", 1)
    if packed or not groups_stay_whole(minis[0].advantages, group_size, parts):
        group_size = 1
    settings = {
        "group_size": group_size, "temperature": temperature, "chunk_size": chunk_size
    }  # fmt: skip
    fill = functools.partial(fill_logps, model, parts=parts if packed else 1, **settings)
    about_sampler: list[dict] = [{} for _ in minis]
    if old_logps == "recompute":
        of_sampler = [mini.old_logps for mini in minis]
        minis = [fill(state.params, mini, field="old_logps") for mini in minis]
        corrected = [
            correct_for_sampler(mini, logps, weigh=is_weights)
            for mini, logps in zip(minis, of_sampler, strict=True)
        ]
        minis, about_sampler = [list(part) for part in zip(*corrected, strict=True)]
    if ref_params is not None:
        minis = [fill(ref_params, mini, field="ref_logps") for mini in minis]
    infos = []
    for mini, about in zip(minis, about_sampler, strict=True):
        state, info = train_step(model, optimizer, state, mini, **settings, **options)
        infos.append(info | about)
    return state, infos


@functools.partial(jax.jit, static_argnames="weigh")
def correct_for_sampler(
    batch: TrainBatch | PackedBatch, sampler_logps, *, weigh: bool = True
) -> tuple[TrainBatch | PackedBatch, dict]:
    """Weighs a batch's POLICY tokens by how much likelier the policy draws them than its sampler.

    The weight is truncated importance sampling's min(pi_old / pi_sampler, 2) (METHOD section 2, 9;
    https://arxiv.org/abs/1802.01561). It multiplies the token's advantage: a clipped loss is linear
    in it, and so entropy and KL keep their own weight.

    Args:
      batch: its old_logps are pi_old's, recomputed.
      sampler_logps: [B, T] float32, the sampler's own; read at POLICY tokens only.
      weigh: False leaves the advantages and only measures.
    Returns:
      (the batch, {logp_gap: largest |difference| of the log-probs, is_weight: mean weight}).
    """
    policy = batch.token_source == POLICY
    gap = jnp.where(policy, batch.old_logps - sampler_logps, 0.0)
    weight = jnp.minimum(jnp.exp(gap), IS_CAP)
    info = {"logp_gap": jnp.abs(gap).max()}
    if weigh:
        batch = dataclasses.replace(batch, advantages=batch.advantages * weight)
        mean = jnp.where(policy, weight, 0.0).sum() / jnp.maximum(policy.sum(), 1)
        info["is_weight"] = mean
    return batch, info


@functools.partial(
    jax.jit, static_argnames=("model", "parts", "group_size", "temperature", "chunk_size", "field")
)
def fill_logps(
    model, params, batch: TrainBatch | PackedBatch, *, parts=1, group_size=1, temperature,
    chunk_size, field,
):  # fmt: skip
    """Returns the batch with `field` recomputed under `params`; TEACHER tokens keep old_logps.

    Args:
      parts: so many are read one after the other, of a packed batch those after the last one with
        a token not at all: log-probs there are 0.
    """
    options = {"group_size": group_size, "temperature": temperature, "chunk_size": chunk_size}
    if parts == 1:
        logps, _ = _logps(model, params, batch, **options)
    else:
        cut, turns = _in_parts(batch, parts, group_size)

        def read(i, logps):
            part = jax.tree.map(lambda x: x[i], cut)
            return logps.at[i].set(_logps(model, params, part, **options)[0])

        logps = jax.lax.fori_loop(0, turns, read, jnp.zeros(cut.old_logps.shape, jnp.float32))
        by_group = logps.reshape(parts, -1, group_size, logps.shape[-1])
        logps = by_group.swapaxes(0, 1).reshape(batch.old_logps.shape)
    return dataclasses.replace(
        batch, **{field: jnp.where(batch.token_source == TEACHER, batch.old_logps, logps)}
    )


def put_minis(
    batch: TrainBatch, mini_batches: int, mesh, *, packing: bool, micro_batches: int
) -> list:
    """Cuts a step's rollouts into mini-batches on the mesh; `packing` makes them `PackedBatch`es.

    Several processes exchange rows to have the mini-batches of one process. Each then packs its own
    rows of a mini-batch into as many rows: all compute the parts that the fullest one needs.

    Args:
      batch: host arrays of this process's rollouts.
      micro_batches: `train_step`'s, which the packed rows are laid out for.
    """
    minis = put_parts(batch, mini_batches, mesh)
    if not packing:
        return minis
    own = [own_rows(mini, mesh) for mini in minis]
    size = len(own[0].advantages) // micro_batches
    packed = [pack(mini, rows_per_part=size, parts=micro_batches) for mini in own]
    return [put_batch(mini, mesh) for mini in packed]
