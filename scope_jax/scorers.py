"""Scorers: who says how right each reasoning step is.

A scorer is any function  score(requests: ScoreRequests) -> (StepScores, counts).  Scores are numpy
[B, S]; a row that could not be scored has mask False throughout, and `counts` says why:

    prm/alignment_failed    no exact text, or the PRM's tokenizer does not give it back
    prm/too_long            longer than the PRM's context or `max_length`

Such a rollout is left alone: no score is not "no error".
"""

import hashlib
from collections.abc import Callable

import numpy as np

from scope_jax.prm_formats import PRMInput, PRMTexts, pad_inputs
from scope_jax.records import ScoreRequests, StepScores
from scope_jax.steps import step_texts

Scorer = Callable[[ScoreRequests], tuple[StepScores, dict[str, int]]]


def oracle_scorer(check_steps, decode_steps, *, false_alarms=0.0, misses=0.0, seed=0) -> Scorer:
    """The task's exact checker: 1 for right steps, 0 for wrong ones; or one that errs as told.

    Args:
      check_steps: (gold, step texts, finished) -> list of bool, of the task.
      decode_steps: (ids, step_ends, step_mask) -> list of lists of step texts.
      false_alarms, misses: share of the right steps that are called wrong, and of the wrong ones
        that are called right. Which, is a function of the seed and of the text up to there: the
        same step is judged the same each time.
    """

    def judge(gold: str, steps: list[str], finished: bool) -> list[float]:
        verdicts, digest = [], hashlib.sha256(f"{seed}\n{gold}".encode(errors="replace"))
        for text, right in zip(steps, check_steps(gold, steps, finished), strict=True):
            digest.update(text.encode(errors="replace"))
            drawn = int.from_bytes(digest.digest()[:8], "big") / 2**64
            verdicts.append(float(right != (drawn < (false_alarms if right else misses))))
        return verdicts

    def score(requests: ScoreRequests):
        scores = np.ones(requests.step_mask.shape, np.float32)
        texts = decode_steps(requests.completion_ids, requests.step_ends, requests.step_mask)
        for row, steps in enumerate(texts):
            gold, finished = requests.records[row]["gold"], bool(requests.finished[row])
            scores[row, : len(steps)] = judge(gold, steps, finished)
        return StepScores(scores, np.asarray(requests.step_mask)), {}

    return score


def token_scorer(score_fn, *, max_length: int) -> Scorer:
    """A PRM that reads the policy's own tokens: each step at its last one, nothing tokenised again.

    Args:
      score_fn: (ids, mask [B, L], score_positions, step_mask [B, S]) -> StepScores on the host;
        `prm.score_steps` with the PRM bound.
      max_length: of prompt and completion together, in tokens.
    """

    def score(requests: ScoreRequests):
        ids = np.concatenate([requests.prompt_ids, requests.completion_ids], axis=1)
        mask = np.concatenate([requests.prompt_mask, requests.completion_mask], axis=1)
        last_token = requests.prompt_ids.shape[1] + requests.step_ends - 1
        read_at = np.where(requests.step_mask, last_token, 0).astype(np.int32)
        too_long = requests.step_mask.any(1) & (mask.sum(1) > max_length)
        scored = score_fn(ids, mask, read_at, requests.step_mask & ~too_long[:, None])
        return scored, {"prm/alignment_failed": 0, "prm/too_long": int(too_long.sum())}

    return score


def text_scorer(score_fn, layout: PRMTexts, policy_tokenizer, *, max_length: int) -> Scorer:
    """A PRM with its own tokenizer and layout: reads the exact texts of the policy's steps.

    Args:
      score_fn: as `token_scorer`'s.
      layout: of the PRM.
      policy_tokenizer: a transformers tokenizer.
      max_length: L, the static width of what the PRM reads.
    """

    def score(requests: ScoreRequests):
        texts = step_texts(
            policy_tokenizer, requests.completion_ids, requests.completion_mask,
            requests.step_ends, requests.step_mask,
        )  # fmt: skip
        counts = {"prm/alignment_failed": 0, "prm/too_long": 0}
        inputs: list[PRMInput | None] = []
        with_steps = [bool(row.any()) for row in requests.step_mask]
        for record, steps, has_steps in zip(requests.records, texts, with_steps, strict=True):
            item = layout(record["problem"], steps) if has_steps and steps else None
            counts["prm/alignment_failed"] += bool(has_steps and item is None)
            if item is not None and len(item.ids) > max_length:
                counts["prm/too_long"] += 1
                item = None
            inputs.append(item)
        batch = pad_inputs(inputs, width=max_length, num_steps=requests.step_mask.shape[1])
        return score_fn(**batch), counts

    return score
