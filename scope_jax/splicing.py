"""Join the policy's own correct prefix and a continuation, token for token.

    completion     p p p p p w w w E      prefix_length 5      (w: from the wrong step on)
    continuation   c c c E
    spliced        p p p p p c c c E      source  1 1 1 1 1 2 2 2 2

The prefix keeps its ids, so its log-probs and the context they were sampled under stay exactly
true.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from scope_jax.records import PAD, POLICY, TEACHER, InputError

INSERT = ("replace_source", "append", "replace_random_wrong")


def splice(
    completion_ids,
    completion_mask,
    prefix_length,
    continuation_ids,
    continuation_mask,
    *,
    pad_id,
    token_source=None,
    continuation_source=TEACHER,
):
    """Replaces everything after each row's prefix by its continuation.

    Args:
      completion_ids: [B, T] int32.
      completion_mask: [B, T] bool, right-padded.
      prefix_length: [B] int32, tokens kept.
      continuation_ids: [B, U] int32.
      continuation_mask: [B, U] bool; its True tokens are appended in order.
      pad_id: id after the end.
      token_source: [B, T] int8 of the completion (default: POLICY on every masked token).
      continuation_source: who wrote the continuation, a scalar or [B, U].
    Returns:
      (ids [B, T] int32, mask [B, T] bool, token_source [B, T] int8, overflowed [B] bool: cut at T).
    """
    if token_source is None:
        token_source = jnp.where(completion_mask, POLICY, PAD)
    ids, mask, overflowed = splice_values(
        completion_ids,
        completion_mask,
        prefix_length,
        continuation_ids,
        continuation_mask,
        fill=pad_id,
    )
    continuation_source = jnp.broadcast_to(
        jnp.asarray(continuation_source, jnp.int8), continuation_ids.shape
    )
    source, _, _ = splice_values(
        token_source,
        completion_mask,
        prefix_length,
        continuation_source,
        continuation_mask,
        fill=PAD,
    )
    return ids.astype(jnp.int32), mask, source.astype(jnp.int8), overflowed


def splice_values(values, mask, prefix_length, continuation_values, continuation_mask, *, fill):
    """Splices any per-token arrays (log-probs, say) with the same indices as `splice`.

    Args:
      values, mask: [B, T]; continuation_values, continuation_mask: [B, U]; prefix_length: [B].
      fill: value after the end.
    Returns:
      (spliced [B, T], mask [B, T] bool, overflowed [B] bool).
    """
    chex.assert_rank(
        [values, mask, prefix_length, continuation_values, continuation_mask], [2, 2, 1, 2, 2]
    )
    chex.assert_equal_shape([values, mask])
    chex.assert_equal_shape([continuation_values, continuation_mask])
    values, length = jnp.asarray(values), values.shape[1]  # numpy's int64 becomes JAX's int32
    kept = mask & (jnp.arange(length)[None, :] < prefix_length[:, None])
    joined = jnp.concatenate(
        [values, continuation_values.astype(values.dtype)], axis=1
    )  # [B, T + U]
    real = jnp.concatenate([kept, continuation_mask], axis=1)
    order = jnp.argsort(~real, axis=1, stable=True)[:, :length]  # real tokens first, in order
    spliced_mask = jnp.take_along_axis(real, order, axis=1)
    spliced = jnp.where(
        spliced_mask, jnp.take_along_axis(joined, order, axis=1), jnp.asarray(fill, values.dtype)
    )
    return spliced, spliced_mask, real.sum(-1) > length


@functools.partial(jax.jit, static_argnames="pad_id")
def splice_rollouts(
    ids, mask, logps, prefix_length, new_ids, new_mask, new_logps, new_source=None, *, pad_id
):
    """Splices ids, sources and log-probs of a batch in one program.

    Args:
      new_source: [B, U] int8, who wrote each new token; None: the teacher.
    Returns:
      (ids, mask, token_source, logps, overflowed) as `splice` and `splice_values`.
    """
    logps, _, _ = splice_values(logps, mask, prefix_length, new_logps, new_mask, fill=0.0)
    ids, mask, source, overflowed = splice(
        ids, mask, prefix_length, new_ids, new_mask, pad_id=pad_id,
        continuation_source=TEACHER if new_source is None else new_source,
    )  # fmt: skip
    return ids, mask, source, logps, overflowed


def insert_rows(rows, corrected, *, targets, accepted, group_size, insert):
    """Puts the accepted corrections into their groups (numpy, on the host).

    Args:
      rows: dict of [B, ...] arrays, row-major by prompt.
      corrected: dict of [C, ...] arrays under the same names, C / (B / group_size) of them per
        group.
      targets: [C] int32, the row that each correction replaces.
      accepted: [C] bool; the others change nothing.
      group_size: G.
      insert: "append": each group gets C / P more slots, empty ones with row_mask False; else
        corrections replace their targets.
    Returns:
      dict of [B, ...] arrays, or [B + C, ...] with "append"; plus "row_mask", bool, False on empty
      slots.
    """
    if insert not in INSERT:
        raise InputError(f"insert must be one of {', '.join(INSERT)}, got {insert!r}")
    accepted = np.asarray(accepted)
    if insert != "append":
        out = {name: np.array(value) for name, value in rows.items()}
        for name, value in out.items():
            value[np.asarray(targets)[accepted]] = np.asarray(corrected[name])[accepted]
        return {**out, "row_mask": np.ones(len(out["rewards"]), bool)}
    by_group = lambda x, n: np.asarray(x).reshape(-1, n, *np.shape(x)[1:])  # noqa: E731
    slots = len(targets) * group_size // len(rows["rewards"])
    rows = {**rows, "row_mask": np.ones(len(rows["rewards"]), bool)}
    corrected = {**corrected, "row_mask": accepted}
    joined = {
        k: np.concatenate([by_group(rows[k], group_size), by_group(corrected[k], slots)], axis=1)
        for k in rows
    }
    return {k: v.reshape(-1, *v.shape[2:]) for k, v in joined.items()}
