"""Teachers: who writes the correction after the policy's own correct prefix.

A teacher is any function  teach(requests: CorrectionRequests, key) -> Continuations.  It never sees
or touches the rows' other tokens; `splicing.splice` joins the two. A continuation that did not stop
by itself is never accepted.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

from scope_jax.records import Continuations, CorrectionRequests

Teacher = Callable[[CorrectionRequests, jax.Array], Continuations]
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes: 48/2 = <<48/2=24>>24
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def model_teacher(continue_fn, *, policy_eos_id: int, max_new_tokens: int) -> Teacher:
    """A second language model with the policy's tokenizer.

    Args:
      continue_fn: (requests, key, buffer_length) -> Rollouts of the continuations;
        `sampling.continue_from` with the teacher's model, params and end tokens bound.
      policy_eos_id: takes the place of the teacher's own end token.
      max_new_tokens: U.
    """

    def teach(requests: CorrectionRequests, key) -> Continuations:
        written = jax.device_get(continue_fn(requests, key, max_new_tokens))
        ids, mask = np.array(written.completion_ids), written.completion_mask
        last = np.maximum(mask.sum(-1) - 1, 0)
        rows = np.flatnonzero(written.finished)
        ids[rows, last[rows]] = policy_eos_id
        return Continuations(ids=ids, mask=mask, logps=written.logps, stopped=written.finished)

    return teach


def dataset_teacher(tokenizer, *, policy_eos_id: int, max_new_tokens: int) -> Teacher:
    """The data set's own worked solution (record["solution"]), from the first line that the prefix
    has not reached.

    Args:
      tokenizer: the policy's.
      policy_eos_id: ends every continuation.
      max_new_tokens: U; a solution that does not fit a row's budget has not stopped.
    """

    def teach(requests: CorrectionRequests, key) -> Continuations:
        del key  # a written solution is not random
        shape = (len(requests.records), max_new_tokens)
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        stopped = np.zeros(shape[0], bool)
        for row, record in enumerate(requests.records):
            prefix = tokenizer.decode(
                requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
            )
            text = remaining_solution(record.get("solution") or "", prefix)
            tokens = tokenizer.encode(text, add_special_tokens=False) if text else []
            room = min(int(requests.budgets[row]), max_new_tokens)
            stopped[row] = bool(tokens) and len(tokens) < room
            tokens = [*tokens[: room - 1], policy_eos_id] if stopped[row] else tokens[:room]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return Continuations(ids=ids, mask=mask, logps=np.zeros(shape, np.float32), stopped=stopped)

    return teach


def remaining_solution(solution: str, prefix: str) -> str:
    """Returns the lines of a worked solution after those whose results the prefix already has.

    A line's result is its last number. The leading lines whose results ALL stand in the prefix, in
    order and as whole numbers (1,500 is 1500, not 500), are left out; the final "#### answer" line
    always stays.

    >>> remaining_solution("48/2 = <<48/2=24>>24.\\n48+24 = <<48+24=72>>72.", "24 in May")
    '48+24 = 72.'
    """
    lines, done = _CALCULATOR.sub("", solution).strip().split("\n"), 0
    reached = iter(_numbers(prefix))
    for line in lines[:-1]:
        results = _numbers(line)[-1:]
        if not results or results[0] not in reached:  # `in` reads on from the number found last
            break
        done += 1
    return "\n".join(lines[done:])


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]
