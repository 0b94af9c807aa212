"""The policy update: optimizer, loss over a batch, micro-batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from scope_jax.hardware import update_compiler_options
from scope_jax.losses import aggregate, kl_penalty, loss_denominator, policy_loss, token_logps
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.lora import join_frozen, split_frozen
from scope_jax.models.transformer import Transformer
from scope_jax.records import PAD, POLICY, TEACHER, InputError, TrainBatch, TrainState

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
    adamw = optax.adamw(
        rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mu_dtype=mu_dtype or None
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


def _hold_nu(adamw: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Returns AdamW whose second moment is held in `dtype`; optax has that for the first only."""

    def cast(state):
        adam, *others = state
        return (adam._replace(nu=optax.tree.cast(adam.nu, dtype)), *others)

    def update(updates, state, params=None):
        updates, state = adamw.update(updates, state, params)
        return updates, cast(state)

    return optax.GradientTransformation(lambda params: cast(adamw.init(params)), update)


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


def batch_loss(
    params,
    model,
    batch: TrainBatch,
    *,
    group_size=1,
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.2,
    off_policy="shaped",
    gamma=0.1,
    loss_agg="seq-mean-token-sum-norm",
    max_length=None,
    entropy_coef=0.0,
    kl_coef=0.0,
    chunk_size=1024,
):
    """Returns (loss [], diagnostics): policy loss - entropy_coef * entropy + kl_coef * KL."""
    logps, entropy = completion_logps(
        model, params, batch, group_size=group_size, temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip
    max_length = max_length or logps.shape[1]
    in_loss = batch.token_source != PAD
    loss, info = policy_loss(
        logps,
        batch.old_logps,
        batch.advantages,
        batch.token_source,
        clip_low=clip_low,
        clip_high=clip_high,
        off_policy=off_policy,
        gamma=gamma,
        loss_agg=loss_agg,
        max_length=max_length,
    )
    info["policy_loss"] = loss
    info["entropy"] = jnp.where(in_loss, entropy, 0.0).sum() / jnp.maximum(in_loss.sum(), 1)
    if entropy_coef:
        loss -= entropy_coef * aggregate(entropy, in_loss, loss_agg, max_length)
    if kl_coef:
        if batch.ref_logps is None:
            raise InputError("kl_coef > 0 needs ref_logps in the batch")
        kl = kl_penalty(logps, batch.ref_logps, batch.token_source)
        info["kl"] = jnp.where(in_loss, kl, 0.0).sum() / jnp.maximum(in_loss.sum(), 1)
        loss += kl_coef * aggregate(kl, in_loss, loss_agg, max_length)
    return loss, info


def init_state(optimizer, params, step: int = 0) -> TrainState:
    """Returns the state of a new run; moments lie on the devices as their params do.

    Of LoRA params only A and B get moments.
    """
    # Committed to where they lie, as the update's results are: else its second call would be
    # compiled again. No copy.
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, params))
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
    opt_state = jax.jit(optimizer.init, out_shardings=places)(trained)
    return TrainState(
        params=params, opt_state=opt_state, step=jax.device_put(np.int32(step), everywhere)
    )


def reference(params):
    """Returns the params of a KL to a run's start: a copy, for an update donates what it trains; of
    LoRA params the base itself, which no update touches.
    """
    return split_frozen(params)[1] or jax.tree.map(jnp.copy, params)


def train_step(
    model, optimizer, state: TrainState, batch: TrainBatch, **options
) -> tuple[TrainState, dict]:
    """One optimizer update on a batch.

    Args:
      model: see models/transformer.py.
      optimizer: from `make_optimizer`.
      state: donated, but for a LoRA model's base, which stays what and where it is; the new one
        lies where it lay.
      batch: B rows, B a multiple of `micro_batches`.
      options: `micro_batches` (default 1): gradients are summed over this many parts of the batch,
        each weighted by its share of the loss denominator, so the sum is the full batch's gradient
        whatever the aggregation. `group_size` (default 1): rows of a prompt, see
        `completion_logps`; a part holds whole groups. The others are `batch_loss`'s.
    Returns:
      (new state, dict of [] float32: loss, grad_norm, update_norm and `batch_loss`'s diagnostics).
    """
    step_fn, state, frozen = _step_for(state, batch, options)
    state, info = step_fn(model, optimizer, state, frozen, batch, **options)
    return dataclasses.replace(state, params=join_frozen(state.params, frozen)), info


def lower_train_step(model, optimizer, state: TrainState, batch: TrainBatch, **options):
    """Returns `train_step` lowered (`jax.stages.Lowered`), for a state and a batch of arrays or of
    shapes with shardings.
    """
    step_fn, state, frozen = _step_for(state, batch, options)
    return step_fn.lower(model, optimizer, state, frozen, batch, **options)


def _step_for(state: TrainState, batch: TrainBatch, options):
    """Returns (the jitted update, its state, the params that it only reads)."""
    rows, parts = batch.advantages.shape[0], options.get("micro_batches", 1)
    size = options.get("group_size", 1)
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
            "clip_high", "off_policy", "gamma", "loss_agg", "max_length", "entropy_coef", "kl_coef",
            "chunk_size",
        ),
        donate_argnames=("state",),
        out_shardings=(jax.tree.unflatten(treedef, places), None),
        compiler_options=update_compiler_options(min(places[0].device_set, key=lambda d: d.id)),
    )  # fmt: skip


def _train_step(
    model, optimizer, state, frozen, batch, *, micro_batches=1, group_size=1,
    loss_agg="seq-mean-token-sum-norm", **loss_options,
):  # fmt: skip
    def loss_fn(trained, *args, **options):
        return batch_loss(join_frozen(trained, frozen), *args, **options)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    options = {"group_size": group_size, "loss_agg": loss_agg, **loss_options}
    if micro_batches == 1:
        (loss, info), grads = grad_fn(state.params, model, batch, **options)
    else:
        # Interleaved groups, so that every part still lies on every shard of the batch axis.
        def interleave(x):
            parts = x.reshape(-1, micro_batches, group_size, *x.shape[1:]).swapaxes(0, 1)
            return parts.reshape(micro_batches, -1, *x.shape[1:])

        parts = jax.tree.map(interleave, batch)
        total = loss_denominator(batch.token_source != PAD, loss_agg)

        def accumulate(carry, part):
            mask = part.token_source != PAD
            share = jnp.where(mask.any(), loss_denominator(mask, loss_agg), 0.0) / total
            (loss, info), grads = grad_fn(state.params, model, part, **options)
            summed = jax.tree.map(
                lambda total, new: total + share * new, carry, (grads, loss, info)
            )
            largest = jnp.maximum(carry[2]["log_ratio_max"], info["log_ratio_max"])
            return (*summed[:2], summed[2] | {"log_ratio_max": largest}), None

        shapes = jax.eval_shape(
            lambda: grad_fn(state.params, model, jax.tree.map(lambda x: x[0], parts), **options)
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[1], *shapes[0]))
        (grads, loss, info), _ = jax.lax.scan(accumulate, zeros, parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
    }
    return TrainState(params=params, opt_state=opt_state, step=state.step), {**info, **norms}


def groups_stay_whole(by_row, group_size: int, micro_batches: int) -> bool:
    """Returns whether every micro-batch gives every batch shard of the mesh whole groups: else to
    read a prompt once would cut a group, or have several devices read the same one.

    Args:
      by_row: any array [B, ..] of the mini-batch, or its shape with a sharding.
    """
    rows, sharding = by_row.shape[0], by_row.sharding
    shards = rows // sharding.shard_shape(by_row.shape)[0]
    return rows % (micro_batches * group_size * shards) == 0


def update_policy(
    model, optimizer, state: TrainState, minis: list[TrainBatch], *, old_logps="sampler",
    is_weights=False, ref_params=None, group_size=1, temperature=1.0, chunk_size=1024, **options,
):  # fmt: skip
    """Takes one optimizer update per mini-batch.

    Args:
      minis: mini-batches on the device, sampled under the weights of `state`.
      old_logps: "sampler" takes pi_old from the batch; "recompute" from one forward of `state`'s
        weights, for POLICY tokens (a teacher's log-probs stay), before the first update; `logp_gap`
        in the diagnostics is then the largest |recomputed - sampler's|.
      is_weights: with "recompute", `correct_for_sampler`: for a sampler that is not quite the
        policy (eight bits, another layout).
      ref_params: of the KL's reference; needed with kl_coef > 0.
      group_size: so many neighbouring rows have one prompt, which is then read once, where
        `groups_stay_whole`.
      options: `train_step`'s.
    Returns:
      (new state, list of the updates' diagnostics, on the device).
    """
    if old_logps not in ("sampler", "recompute"):
        raise InputError(f'old_logps must be "sampler" or "recompute", got {old_logps!r}')
    if is_weights and old_logps != "recompute":
        raise InputError('is_weights needs old_logps="recompute": there is nothing to weigh by')
    if not groups_stay_whole(minis[0].advantages, group_size, options.get("micro_batches", 1)):
        group_size = 1
    settings = {
        "group_size": group_size, "temperature": temperature, "chunk_size": chunk_size
    }  # fmt: skip
    about_sampler: list[dict] = [{} for _ in minis]
    if old_logps == "recompute":
        of_sampler = [mini.old_logps for mini in minis]
        minis = [
            fill_logps(model, state.params, mini, field="old_logps", **settings) for mini in minis
        ]
        corrected = [
            correct_for_sampler(mini, logps, weigh=is_weights)
            for mini, logps in zip(minis, of_sampler, strict=True)
        ]
        minis, about_sampler = [list(part) for part in zip(*corrected, strict=True)]
    if ref_params is not None:
        minis = [
            fill_logps(model, ref_params, mini, field="ref_logps", **settings) for mini in minis
        ]
    infos = []
    for mini, about in zip(minis, about_sampler, strict=True):
        state, info = train_step(model, optimizer, state, mini, **settings, **options)
        infos.append(info | about)
    return state, infos


@functools.partial(jax.jit, static_argnames="weigh")
def correct_for_sampler(
    batch: TrainBatch, sampler_logps, *, weigh: bool = True
) -> tuple[TrainBatch, dict]:
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
    jax.jit, static_argnames=("model", "group_size", "temperature", "chunk_size", "field")
)
def fill_logps(
    model, params, batch: TrainBatch, *, group_size=1, temperature, chunk_size, field
) -> TrainBatch:
    """Returns the batch with `field` recomputed under `params`; TEACHER tokens keep old_logps."""
    logps, _ = completion_logps(
        model, params, batch, group_size=group_size, temperature=temperature,
        chunk_size=chunk_size,
    )  # fmt: skip
    return dataclasses.replace(
        batch, **{field: jnp.where(batch.token_source == TEACHER, batch.old_logps, logps)}
    )
