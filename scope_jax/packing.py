"""Packs rollouts of unequal length into rows, so that their padding is not computed.

Host arrays, numpy. Shapes: B, N, T as in records.py; R rows of L = N + T tokens.

    rollouts [B, N + T]                       rows [R, L]
    . p p a a a . . .                         p p p b b b b b b       segment 0
    p p p b b b b b b          ->             p p a a a p c c .       segments 0 and 1, padding -1
    . . p c c . . . .                         . . . . . . . . .       nothing

The update's micro-batches (its parts) are filled one after the other, and those left empty are not
computed: what is saved comes in whole parts. Shapes stay, so lengths that change compile nothing.
A prompt is read once a rollout, not once a group.
"""

import numpy as np

from scope_jax.records import PAD, InputError, PackedBatch, TrainBatch


def first_fit(lengths, capacity: int) -> list[list[int]]:
    """Places rollouts into rows, first-fit decreasing: the longest first, each into the first row
    with room for it; equally long ones in their order.

    Takes at most 11/9 of the fewest possible rows, and 2/3 of a row more
    (https://doi.org/10.1007/978-3-540-74450-4_1).

    Args:
      lengths: [B] int, tokens of each rollout.
      capacity: tokens of a row.
    Returns:
      The rollouts' numbers in each row.
    Raises:
      InputError: a rollout longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.max(initial=0) > capacity:
        raise InputError(f"a rollout of {lengths.max()} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    room = np.full(len(lengths), capacity)
    for i in np.argsort(-lengths, kind="stable"):
        row = int(np.argmax(room >= lengths[i]))  # an empty one at the latest
        if row == len(rows):
            rows.append([])
        rows[row].append(int(i))
        room[row] -= lengths[i]
    return rows


def pack(batch: TrainBatch, *, rows_per_part: int, parts: int, pad_id: int = 0) -> PackedBatch:
    """Packs a mini-batch's rollouts, or those of one process, into rows.

    Row k of the packing is one of part k // rows_per_part and stands at index k % rows_per_part *
    parts + k // rows_per_part: there `train_step` looks for it, and every part lies on all batch
    shards of a mesh. Rollouts without a token in the loss are left out.

    Args:
      batch: host arrays; with advantages [B, T].
      rows_per_part, parts: of the result; R = parts * rows_per_part. B rows are always enough.
      pad_id: of ids on padding.
    Raises:
      InputError: too few rows, or a rollout without a prompt.
    """
    rollouts, length = len(batch.prompt_ids), batch.prompt_ids.shape[1]
    in_loss = np.asarray(batch.token_source) != PAD  # [B, T]
    kept = np.flatnonzero(in_loss.any(1))
    if not np.asarray(batch.prompt_mask)[kept].any(1).all():
        raise InputError("a rollout without a prompt token cannot be packed: nothing predicts it")
    real = np.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)  # [B, L]
    shape = (parts * rows_per_part, real.shape[1])
    rows = first_fit(real[kept].sum(1), shape[1])
    if len(rows) > shape[0]:
        raise InputError(f"{len(rows)} rows of rollouts do not fit {parts} x {rows_per_part} rows")

    taken = np.full(shape, -1)  # which token of [B * L] stands there
    positions, segments = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    for k, row in enumerate(rows):
        index, start = k % rows_per_part * parts + k // rows_per_part, 0
        for number, rollout in enumerate(kept[row]):
            tokens = np.flatnonzero(real[rollout])
            span = slice(start, start + len(tokens))
            taken[index, span] = rollout * shape[1] + tokens
            positions[index, span] = np.arange(len(tokens))
            segments[index, span] = number
            start += len(tokens)

    def placed(of_completions, of_prompts=None, fill=0):
        x = np.asarray(of_completions)
        if of_prompts is None:
            of_prompts = np.full((rollouts, length), fill, x.dtype)
        flat = np.concatenate([of_prompts, x], axis=1).reshape(-1)
        return np.where(taken >= 0, flat[taken], x.dtype.type(fill))

    def of_loss(x):
        return placed(np.where(in_loss, x, 0).astype(np.float32))

    return PackedBatch(
        ids=placed(batch.completion_ids, batch.prompt_ids, pad_id),
        positions=positions,
        segments=segments,
        token_source=placed(batch.token_source, fill=PAD),
        old_logps=of_loss(batch.old_logps),
        advantages=of_loss(batch.advantages),
        share=of_loss(1 / np.maximum(in_loss.sum(1, keepdims=True), 1)),
        ref_logps=None if batch.ref_logps is None else of_loss(batch.ref_logps),
    )
