"""Dynamic sampling (DAPO, https://arxiv.org/abs/2503.14476, section 3.2): groups whose rollouts are
all right or all wrong teach nothing, and give way to groups of other problems.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scope_jax.hosts import all_hosts

Rows = dict[str, np.ndarray]


def has_signal(rewards, group_size: int) -> np.ndarray:
    """Returns which groups [P] bool hold unequal rewards [P * group_size]."""
    groups = np.asarray(rewards).reshape(-1, group_size)
    return (groups != groups[:, :1]).any(1)


def refill_groups(
    draw: Callable[[Any], tuple],
    keys: Sequence,
    records: Sequence,
    rows: Rows,
    measured: dict,
    keep_below: float | None = None,
) -> tuple[Sequence, Rows, dict]:
    """Replaces groups without signal by groups with signal of further batches.

    Another batch is drawn only while a group of any process lacks signal. A process's groups are
    replaced by its own new ones, in their order; those that find none stay.

    Args:
      draw: key -> (P records, rows of their P * G rollouts, metrics), P and G as in `rows`.
      keys: one for each further batch; none: nothing changes.
      records: P problems; rows: "rewards" [P * G] and others [P * G, ..], row-major by problem.
      measured: of these rows; they stay those of the first batch, which is no choice of ours.
      keep_below: groups all of whose rewards are below it stay: a repair may give them signal.
    Returns:
      (records, rows, metrics: with "refill/batches" drawn and "refill/groups" replaced, and all
      tokens sampled in "policy_tokens").
    """
    if not len(keys):
        return records, rows, measured
    records, rows = list(records), {name: np.array(x) for name, x in rows.items()}
    size, batches, groups, tokens = len(rows["rewards"]) // len(records), 0, 0, 0
    for key in keys:
        lacking = ~has_signal(rows["rewards"], size)
        if keep_below is not None:
            lacking &= (rows["rewards"] >= keep_below).reshape(-1, size).any(1)
        lacking = np.flatnonzero(lacking)
        if not any(all_hosts(len(lacking))):
            break
        new_records, new, _ = draw(key)
        new = {name: np.asarray(x) for name, x in new.items()}
        batches, tokens = batches + 1, tokens + int(new["mask"].sum())
        found = np.flatnonzero(has_signal(new["rewards"], size))
        for old, fresh in zip(lacking.tolist(), found.tolist(), strict=False):
            records[old] = new_records[fresh]
            for name in rows.keys() - {"record"}:  # that one counts groups, and so stays
                to, of = (slice(group * size, (group + 1) * size) for group in (old, fresh))
                rows[name][to] = new[name][of]
            groups += 1
    counts = {"refill/batches": batches, "refill/groups": groups}
    return records, rows, measured | counts | {"policy_tokens": measured["policy_tokens"] + tokens}
