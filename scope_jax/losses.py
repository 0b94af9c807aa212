"""What a batch teaches: token log-probs, the policy loss and its aggregation.

Pure functions of arrays. Shapes as in records.py. The formulas are METHOD's: clipped ratio (PPO,
https://arxiv.org/abs/1707.06347) on tokens that the sampling policy wrote, LUFFY's shaped
probability (https://arxiv.org/abs/2504.14945) on tokens that a teacher wrote, Dr.GRPO's aggregation
(https://arxiv.org/abs/2503.20783) by default.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scope_jax.records import PAD, POLICY, TEACHER, InputError
from scope_jax.sharding import batch_axes

LOSS_AGGREGATIONS = ("seq-mean-token-sum-norm", "seq-mean-token-mean", "token-mean")
RATIOS = ("token", "sequence")
OFF_POLICY = ("shaped", "linear", "teacher_prob", "sft")


def token_logps(hidden, unembed, targets, *, temperature=1.0, chunk_size=1024):
    """Returns each target token's log-prob and each position's entropy, chunk by chunk.

    Each chunk's logits are computed again in the backward pass, so that forward and backward hold a
    [chunk_size, V] array and never one of [B, T, V]. Differentiable in `hidden` and `unembed`.

    Args:
      hidden: [B, T, D]; hidden[:, t] predicts targets[:, t].
      unembed: [D, V]; logits = hidden @ unembed / temperature.
      targets: [B, T] int32.
      temperature: of the distribution.
      chunk_size: positions (of the B * T, of each batch shard of a mesh) at a time.
    Returns:
      (logps [B, T] float32, entropy [B, T] float32 in nats).
    """
    chex.assert_rank([hidden, unembed, targets], [3, 2, 2])
    chex.assert_equal_shape_prefix([hidden, targets], 2)
    mesh, rows = batch_axes(hidden)
    # Of the unembedding's D rows a device holds some; it fetches the others once, not once a chunk.
    split = "fsdp" if "fsdp" in rows and unembed.shape[0] % mesh.shape["fsdp"] == 0 else None
    by_row, part = PartitionSpec(rows or None), PartitionSpec(split)
    options = {"temperature": temperature, "chunk_size": chunk_size}

    def on_shards(fn, out_specs):  # every device reads its own rows
        def run(hidden, unembed, *by_token):
            unembed = unembed.astype(hidden.dtype)
            if split:
                unembed = jax.lax.all_gather(unembed, split, axis=0, tiled=True)
            return fn(hidden, unembed, *by_token)

        def mapped(hidden, unembed, *by_token):
            specs = (by_row, part, *[by_row] * len(by_token))
            return jax.shard_map(
                run, mesh=mesh, in_specs=specs, out_specs=out_specs, axis_names=set(rows),
                check_vma=False,
            )(hidden, unembed, *by_token)  # fmt: skip

        return mapped if rows else run

    @jax.custom_vjp
    def read(hidden, unembed):
        return on_shards(functools.partial(_read, **options), by_row)(hidden, unembed, targets)

    def forward(hidden, unembed):
        logps, entropy = read(hidden, unembed)
        return (logps, entropy), (hidden, unembed, entropy)

    def backward(saved, gradients):
        hidden, unembed, entropy = saved

        def gradient(*inputs):
            of_hidden, of_unembed = _gradient_of_read(*inputs, **options)
            if others := [axis for axis in rows if axis != split]:
                of_unembed = jax.lax.psum(of_unembed, others)
            if split:
                of_unembed = jax.lax.psum_scatter(of_unembed, split, tiled=True)
            return of_hidden, of_unembed.astype(unembed.dtype)

        run = on_shards(gradient, (by_row, part))
        return run(hidden, unembed, targets, entropy, *gradients)

    read.defvjp(forward, backward)
    return read(hidden, unembed)


def _read(hidden, unembed, targets, *, temperature, chunk_size):
    """Returns (logps [B, T], entropy [B, T]); hidden and unembed have one dtype."""

    def one_chunk(x):
        logps = _log_probs(x[0], unembed, temperature)
        picked = jnp.take_along_axis(logps, x[1][:, None], axis=-1)[:, 0]
        return picked, -jnp.sum(jnp.exp(logps) * logps, axis=-1)

    chunks = [_in_chunks(x, chunk_size) for x in (hidden, targets)]
    logps, entropy = _map(one_chunk, chunks)
    return tuple(x.reshape(-1)[: targets.size].reshape(targets.shape) for x in (logps, entropy))


def _gradient_of_read(
    hidden, unembed, targets, entropy, of_logps, of_entropy, *, temperature, chunk_size
):
    """d logp / d logit = onehot - p; d entropy / d logit = -p (log p + entropy).

    Returns:
      (of hidden [B, T, D] in its dtype, of unembed [D, V] float32).
    """

    def one_chunk(of_unembed, x):
        hidden, targets, entropy, of_logp, of_entropy = x
        logps = _log_probs(hidden, unembed, temperature)
        hit = targets[:, None] == jnp.arange(logps.shape[1])[None, :]
        scale = of_logp + of_entropy * entropy
        of_logits = jnp.exp(logps) * (scale[:, None] + of_entropy[:, None] * logps)
        of_logits = jnp.where(hit, of_logp[:, None], 0.0) - of_logits
        of_logits = (of_logits / temperature).astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        of_unembed += product("cd,cv->dv", hidden, of_logits)
        return of_unembed, of_logits @ unembed.T

    by_token = (hidden, targets, entropy, of_logps, of_entropy)
    chunks = tuple(_in_chunks(x, chunk_size) for x in by_token)
    start = jnp.zeros(unembed.shape, jnp.float32)
    of_unembed, of_hidden = jax.lax.scan(one_chunk, start, chunks, unroll=len(chunks[0]) == 1)
    of_hidden = of_hidden.reshape(-1, hidden.shape[-1])[: targets.size]
    return of_hidden.reshape(hidden.shape), of_unembed


def _log_probs(hidden, unembed, temperature):
    """Returns [chunk, V] float32."""
    logits = (hidden @ unembed).astype(jnp.float32)
    return jax.nn.log_softmax(logits / temperature, axis=-1)


def _in_chunks(x, chunk_size: int):
    """[B, T, ..] -> [chunks, chunk, ..], padded with zeros."""
    flat = x.reshape(-1, *x.shape[2:])
    chunk = min(chunk_size, len(flat))
    flat = jnp.pad(flat, [(0, -len(flat) % chunk)] + [(0, 0)] * (flat.ndim - 1))
    return flat.reshape(-1, chunk, *flat.shape[1:])


def _map(fn, chunks):
    """`jax.lax.map`, without a loop around a single chunk."""
    if len(chunks[0]) == 1:
        return fn([x[0] for x in chunks])
    return jax.lax.map(fn, chunks)


def shape_off_policy(prob, gamma=0.1):
    """Returns LUFFY's f(p) = p / (p + gamma), which keeps a gradient on unlikely tokens.

    The weight on grad log p is gamma * p / (p + gamma)^2: 0.25 at p = 0.1, 0.0826446 at p = 1 and
    at p = 0.01.

    >>> shape_off_policy(0.1)
    0.5
    """
    return prob / (prob + gamma)


def loss_denominator(mask, loss_agg):
    """Returns what `aggregate` divides by: the rows with a token in the loss, or such tokens."""
    rows = mask.any(-1).sum()
    return jnp.maximum(mask.sum() if loss_agg == "token-mean" else rows, 1).astype(jnp.float32)


def _check_aggregation(loss_agg) -> None:
    if loss_agg not in LOSS_AGGREGATIONS:
        raise InputError(
            f"loss_agg must be one of {', '.join(LOSS_AGGREGATIONS)}, got {loss_agg!r}"
        )


def aggregate(values, mask, loss_agg, max_length):
    """Reduces per-token values to a scalar.

    Args:
      values: [B, T] float32; not read where the mask is False.
      mask: [B, T] bool, tokens in the loss. Rows without one count in no mean.
      loss_agg: "seq-mean-token-sum-norm" (Dr.GRPO: sum over tokens / max_length, mean over rows),
        "seq-mean-token-mean" (GRPO), "token-mean" (DAPO: one mean over all tokens).
      max_length: L_max of Dr.GRPO, a constant.
    Returns:
      [] float32.
    """
    _check_aggregation(loss_agg)
    sums = jnp.where(mask, values, 0.0).sum(-1)  # [B]
    if loss_agg == "seq-mean-token-sum-norm":
        sums = sums / max_length
    elif loss_agg == "seq-mean-token-mean":
        sums = sums / jnp.maximum(mask.sum(-1), 1)
    return sums.sum() / loss_denominator(mask, loss_agg)


def policy_loss(
    logps,
    old_logps,
    advantages,
    token_source,
    *,
    clip_low=0.2,
    clip_high=0.2,
    off_policy="shaped",
    gamma=0.1,
    ratio="token",
    loss_agg="seq-mean-token-sum-norm",
    max_length=None,
):
    """The loss whose gradient moves the policy: each token by who wrote it.

    POLICY tokens: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) with rho = exp(logps -
    old_logps). TEACHER tokens, p = exp(logps), never clipped:
      "shaped" -f(p) A | "linear" -p A | "teacher_prob" -min(max(rho, 0), 2) A | "sft" -log p.

    Args:
      logps: [B, T] float32, of the weights being trained.
      old_logps: [B, T] float32, of the weights that sampled. Not read at PAD; not read at TEACHER
        unless off_policy="teacher_prob", where they are the teacher's own.
      advantages: [B] or [B, T] float32.
      token_source: [B, T] int8; PAD tokens are in no sum and no denominator.
      clip_low, clip_high: None = that side is not clipped.
      off_policy, gamma: treatment of TEACHER tokens.
      ratio: "token"; "sequence" is GSPO's (https://arxiv.org/abs/2507.18071, eq. 7): rho of all
        POLICY tokens of a row is the exponential of the mean of logps - old_logps over them.
      loss_agg, max_length: see `aggregate`; max_length defaults to T.
    Returns:
      ([] float32, dict of [] float32 diagnostics).
    """
    losses, by_token = token_losses(
        logps, old_logps, advantages, token_source, clip_low=clip_low, clip_high=clip_high,
        off_policy=off_policy, gamma=gamma, ratio=ratio,
    )  # fmt: skip
    loss = aggregate(losses, token_source != PAD, loss_agg, max_length or logps.shape[1])
    return loss, summarize(by_token, token_source, count_tokens(token_source))


def token_losses(
    logps, old_logps, advantages, token_source, *, clip_low, clip_high, off_policy, gamma,
    ratio="token", segments=None,
):  # fmt: skip
    """Returns `policy_loss`'s terms: the loss of each token, and what `summarize` reads.

    Args: see `policy_loss`; and
      segments: [B, T] int32, which rollout of its row a token belongs to, negative on padding;
        None: a row is a rollout.
    Returns:
      ([B, T] float32, finite and without meaning at PAD where the advantage there is finite; dict
      of [B, T]).
    """
    for name, value, known in (("off_policy", off_policy, OFF_POLICY), ("ratio", ratio, RATIOS)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    chex.assert_rank([logps, old_logps, token_source], 2)
    chex.assert_equal_shape([logps, old_logps, token_source])
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], logps.shape)
    policy, teacher = token_source == POLICY, token_source == TEACHER
    mask = token_source != PAD
    reads_old = mask if off_policy == "teacher_prob" else policy
    # Double where: the operands are made safe BEFORE exp, else an unread -inf or NaN still poisons
    # the gradient.
    safe_logps = jnp.where(mask, logps, 0.0)
    log_ratio = jnp.where(reads_old, safe_logps - jnp.where(reads_old, old_logps, 0.0), 0.0)
    of_token = log_ratio
    if ratio == "sequence":
        log_ratio = jnp.where(policy, _sequence_mean(log_ratio, policy, segments), log_ratio)
    rho = jnp.exp(jnp.minimum(log_ratio, 80.0))  # finite: 0 * inf is NaN in the backward pass
    clipped = jnp.clip(
        rho,
        None if clip_low is None else 1.0 - clip_low,
        None if clip_high is None else 1.0 + clip_high,
    )
    on_policy_loss = -jnp.minimum(rho * advantages, clipped * advantages)
    prob = jnp.exp(jnp.where(teacher, safe_logps, 0.0))
    if off_policy == "shaped":
        teacher_loss = -shape_off_policy(prob, gamma) * advantages
    elif off_policy == "linear":
        teacher_loss = -prob * advantages
    elif off_policy == "teacher_prob":
        teacher_loss = -jnp.clip(rho, 0.0, 2.0) * advantages
    else:
        teacher_loss = -jnp.where(teacher, safe_logps, 0.0)
    cut = clipped * advantages < rho * advantages
    by_token = {"ratio": rho, "log_ratio": log_ratio, "cut": cut, "prob": prob}
    by_token["gap"] = jnp.abs(of_token)  # of the token itself, whatever the ratio is taken over
    return jnp.where(teacher, teacher_loss, on_policy_loss), by_token


def _sequence_mean(values, where, segments):
    """Returns [B, T]: the mean of values over the True tokens of each token's own rollout."""
    values, where = jnp.where(where, values, 0.0), where.astype(jnp.float32)
    if segments is None:
        total, count = (x.sum(-1, keepdims=True) for x in (values, where))
        return total / jnp.maximum(count, 1)
    of_row = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=x.shape[0]))
    safe = jnp.where(segments < 0, segments.shape[1], segments)  # out of range: in no sum
    total, count = of_row(values, safe), of_row(where, safe)
    mean = total / jnp.maximum(count, 1)
    return jnp.take_along_axis(mean, jnp.maximum(segments, 0), axis=1)


class TokenCounts(NamedTuple):
    """What means over tokens and rollouts divide by, [] float32 each and at least 1."""

    rollouts: jax.Array  # with a token in the loss
    in_loss: jax.Array  # tokens
    policy: jax.Array
    teacher: jax.Array


def token_share(mask):
    """Returns 1 / (tokens in the loss of a token's row), [B, T] float32, 0 where the mask of tokens
    in the loss is False: a row with any adds up to 1.
    """
    return mask / jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(jnp.float32)


def count_tokens(token_source, share=None) -> TokenCounts:
    """Counts a batch's tokens by who wrote them, and its rollouts.

    Args:
      token_source: [B, T] int8.
      share: [B, T] float32, `token_share`'s, of packed rows that of their rollouts; None: a row is
        a rollout.
    """
    in_loss = token_source != PAD
    # Whole numbers in every row: a sum over millions of shares would be off by more than one.
    rollouts = in_loss.any(-1).sum() if share is None else jnp.round(share.sum(-1)).sum()
    sources = (token_source == POLICY).sum(), (token_source == TEACHER).sum()
    counts = rollouts, in_loss.sum(), *sources
    return TokenCounts(*(jnp.maximum(count, 1).astype(jnp.float32) for count in counts))


def token_weights(share, counts: TokenCounts, loss_agg, max_length):
    """Returns the weight of each token, so that `aggregate` is the sum of weight * value.

    Args:
      share: [B, T] float32, see `token_share`; of a part of a batch, or of all of it.
      counts: of the whole batch: the parts' sums then add up to its loss.
      loss_agg, max_length: see `aggregate`.
    Returns:
      [B, T] float32, 0 where a token is in no loss.
    """
    _check_aggregation(loss_agg)
    in_loss = (share > 0).astype(jnp.float32)
    if loss_agg == "seq-mean-token-sum-norm":
        return in_loss / (max_length * counts.rollouts)
    if loss_agg == "seq-mean-token-mean":
        return share / counts.rollouts
    return in_loss / counts.in_loss


def summarize(by_token, token_source, counts: TokenCounts):
    """Returns the diagnostics of `policy_loss`, dict of [] float32.

    Args:
      by_token: from `token_losses`.
      token_source: [B, T] int8.
      counts: what the means divide by. Those of a whole batch make a part's diagnostics its share,
        to be added up (of `log_ratio_max`: to take the largest).
    """
    policy, teacher = token_source == POLICY, token_source == TEACHER
    total = lambda where, x: jnp.where(where, x, 0.0).sum()  # noqa: E731
    ratio, log_ratio = by_token["ratio"], by_token["log_ratio"]
    return {
        "ratio_mean": total(policy, ratio) / counts.policy,
        # Before the first update of a step this is the sampler against the trainer.
        "log_ratio_max": jnp.max(jnp.where(policy, by_token["gap"], 0.0)),
        "clip_fraction": total(policy, by_token["cut"]) / counts.policy,
        "approx_kl": total(policy, ratio - 1.0 - log_ratio) / counts.policy,
        "teacher_prob_mean": total(teacher, by_token["prob"]) / counts.teacher,
        "teacher_token_share": total(teacher, 1.0) / counts.in_loss,
    }


def kl_penalty(logps, ref_logps, token_source):
    """Returns the k3 estimate of KL(policy || reference) per token, 0 off POLICY tokens.

    Source: http://joschu.net/blog/kl-approx.html

    Args:
      logps, ref_logps: [B, T] float32.
      token_source: [B, T] int8.
    Returns:
      [B, T] float32, >= 0.
    """
    policy = token_source == POLICY
    gap = jnp.where(policy, ref_logps, 0.0) - jnp.where(policy, logps, 0.0)
    return jnp.expm1(gap) - gap  # exp(gap) - 1 - gap loses all digits of a small gap
