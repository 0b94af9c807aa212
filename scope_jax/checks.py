from collections.abc import Sequence

import numpy as np

from scope_jax.records import InputError

SPIKE_WINDOW = 50


class BrokenPromise(RuntimeError):
    pass


def is_spike(value, earlier, *, factor, window):
    e = [x for x in earlier if x is not None and np.isfinite(x)][-window:]
    return len(e) >= window // 2 and factor > 0 and value > factor * float(np.median(e))


def find_non_finite(rows):
    return [
        n
        for n in ("rewards", "logps")
        if not np.isfinite(rows[n] if n == "rewards" else rows[n][rows["mask"]]).all()
    ]


def check_splices(rows, fixed, chosen, kept, accepted):
    pass


def check_groups(before, after, solved_at, group_size):
    pass


def dump_batch(path, rows, reason):
    pass


def gradient_spike(
    measured: dict, recent: Sequence[dict], *, spike_factor: float = 10.0, **_
) -> int:
    """Returns 1 where a step's "grad_norm" is a spike among those of recent steps, else 0."""
    norm, earlier = measured.get("grad_norm", 0.0), [row.get("grad_norm") for row in recent]
    known = [x for x in earlier if x is not None]
    return int(spike_factor > 0 and is_spike(norm, known, factor=spike_factor, window=SPIKE_WINDOW))


def stop_if_broken(
    measured: dict,
    recent: Sequence[dict],
    *,
    max_skipped: int = 0,
    max_logp_gap: float = 0.0,
    max_recompiles: int = 0,
    **_,
) -> None:
    """Ends a run of which a check says that it trains no longer what it should.

    Args:
      measured: a step's metrics: "skipped", "logp_gap", "recompiles".
      recent: {"step", "skipped"} of the last steps, this one included.
      max_skipped: steps in a row with an update that was skipped; 0 = any number, as below.
      max_logp_gap: largest |difference| of a token's log-prob between sampler and trainer.
      max_recompiles: XLA compilations after the first step.
    Raises:
      InputError: one of them is passed.
    """
    in_a_row = 0
    for row in reversed(recent):
        if not row.get("skipped"):
            break
        in_a_row += 1
    if 0 < max_skipped <= in_a_row:
        raise InputError(
            f"the updates of {in_a_row} steps in a row were not finite (the last: step "
            f"{recent[-1]['step']}; their batches are in the workdir's non_finite/): lower the "
            "learning rate, or go on from an earlier checkpoint (checks.max_skipped)"
        )
    if 0 < max_logp_gap < measured.get("logp_gap", 0.0):
        raise InputError(
            f"sampler and trainer differ by {measured['logp_gap']:.3g} in a token's log-prob; "
            f"checks.max_logp_gap is {max_logp_gap}"
        )
    if 0 < max_recompiles < measured["recompiles"]:
        raise InputError(
            f"{measured['recompiles']} programs were compiled after the first step; "
            f"checks.max_recompiles is {max_recompiles}"
        )
