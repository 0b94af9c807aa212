"""Teachers: who writes the correction after the policy's own correct prefix.

A teacher is any function  teach(requests: CorrectionRequests, key) -> Continuations.  It never sees
or touches the rows' other tokens; `splicing.splice` joins the two. A continuation that did not stop
by itself is never accepted.
"""

import re
from collections.abc import Callable

import jax
import numpy as np

from scope_jax.endpoint import FAILURES, Answer, Wanted
from scope_jax.records import Continuations, CorrectionRequests
from scope_jax.steps import exact_text, survives

Teacher = Callable[[CorrectionRequests, jax.Array], Continuations]
NONE_FAILED = {"teacher/alignment_failed": 0}
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's notes: 48/2 = <<48/2=24>>24
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def model_teacher(continue_fn, *, policy_eos_id: int, eos_ids=None) -> Teacher:
    """A second language model with the policy's tokenizer.

    Args:
      continue_fn: (requests, key) -> Rollouts of the continuations, at most U tokens;
        `sampling.continue_from` with the teacher's model, params and end tokens bound.
      policy_eos_id: takes the place of the teacher's own end token.
      eos_ids: the teacher's. A row that ended otherwise, by a stop string, keeps its last token.
        Default: every row that ended did so by an end token.
    """

    def teach(requests: CorrectionRequests, key) -> Continuations:
        written = jax.device_get(continue_fn(requests, key))
        ids, mask = np.array(written.completion_ids), written.completion_mask
        last = np.maximum(mask.sum(-1) - 1, 0)
        rows = np.flatnonzero(written.finished)
        if eos_ids is not None:
            rows = rows[np.isin(ids[rows, last[rows]], eos_ids)]
        ids[rows, last[rows]] = policy_eos_id
        return Continuations(ids, mask, written.logps, stopped=written.finished, counts=NONE_FAILED)

    return teach


def text_teacher(
    continue_fn,
    tokenizer,
    teacher_tokenizer,
    render: Callable[[str], str],
    *,
    policy_eos_id: int,
    max_new_tokens: int,
    prompt_bucket: int,
    prefix_bucket: int,
    eos_ids=None,
) -> Teacher:
    """A second language model with another tokenizer: it reads and writes exact text.

    The policy's prefix keeps its ids; only what the teacher adds is tokenised, for the policy. A
    prefix that is no exact text in the teacher's tokens, or a continuation that is none in the
    policy's, is not stopped and marked in `unaligned`. What a teacher left unfinished is not
    carried over: it is rejected anyway.

    Args:
      continue_fn: (prompt_ids, prompt_mask [C, prompt_bucket], prefix_ids [C, prefix_bucket],
        prefix_length, budgets [C], key) -> Rollouts of the continuations, in teacher tokens.
      tokenizer: the policy's; teacher_tokenizer: the teacher's.
      render: problem -> the teacher's prompt text.
      policy_eos_id: ends every continuation that the teacher ended by a token of its own.
      max_new_tokens: U.
      prompt_bucket, prefix_bucket: teacher tokens; a longer prompt or prefix is not aligned.
      eos_ids: as `model_teacher`'s.
    """

    def encode(record, prefix: str | None) -> tuple[list[int], list[int]] | None:
        if prefix is None or not survives(teacher_tokenizer, prefix):
            return None
        texts = (render(record["problem"]), prefix)
        prompt, ids = (teacher_tokenizer.encode(t, add_special_tokens=False) for t in texts)
        fits = 0 < len(prompt) <= prompt_bucket and len(ids) <= prefix_bucket
        return (prompt, ids) if fits else None

    def carry_back(kept: list[int], context: list[int], new: list[int]) -> list[int] | None:
        prefix, text = exact_text(tokenizer, kept), exact_text(teacher_tokenizer, context + new)
        if prefix is None or text is None or not text.startswith(prefix):
            return None
        return encode_after(tokenizer, kept, text[len(prefix) :])

    def teach(requests: CorrectionRequests, key) -> Continuations:
        rows = len(requests.records)
        prompt_ids = np.zeros((rows, prompt_bucket), np.int32)
        prompt_mask = np.zeros((rows, prompt_bucket), bool)
        prompt_mask[:, -1] = True  # filling rows still need a token to start from
        prefix_ids, lengths = np.zeros((rows, prefix_bucket), np.int32), np.zeros(rows, np.int32)
        budgets, unaligned = np.array(requests.budgets), np.zeros(rows, bool)
        for row in np.flatnonzero(budgets > 0):
            kept = requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
            encoded = encode(requests.records[row], exact_text(tokenizer, kept))
            if encoded is None:
                unaligned[row], budgets[row] = True, 0
                continue
            prompt, prefix = encoded
            prompt_ids[row, -len(prompt) :], prompt_mask[row, -len(prompt) :] = prompt, True
            prefix_ids[row, : len(prefix)], lengths[row] = prefix, len(prefix)
        written = jax.device_get(
            continue_fn(prompt_ids, prompt_mask, prefix_ids, lengths, budgets, key)
        )
        shape, stopped = (rows, max_new_tokens), np.zeros(rows, bool)
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row in np.flatnonzero(written.finished & (budgets > 0)):
            context = prefix_ids[row, : lengths[row]].tolist()
            kept = requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
            new = written.completion_ids[row][written.completion_mask[row]].tolist()
            end = [policy_eos_id] if eos_ids is None or new[-1] in eos_ids else []
            new = new[: len(new) - len(end)]  # without the teacher's own end token
            tokens = carry_back(kept, context, new)
            if tokens is None:
                unaligned[row] = True
                continue
            stopped[row] = len(tokens) + len(end) <= budgets[row]
            tokens = [*tokens, *end] if stopped[row] else tokens[: budgets[row]]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        counts = {"teacher/alignment_failed": int(unaligned.sum())}
        return Continuations(ids, mask, np.zeros(shape, np.float32), stopped, unaligned, counts)

    return teach


def endpoint_teacher(
    ask: Callable[[list[Wanted], str], list[Answer]],
    tokenizer,
    render: Callable[[str], str],
    *,
    policy_eos_id: int,
    max_new_tokens: int,
    teacher_tokenizer=None,
    stop: tuple[str, ...] = (),
) -> Teacher:
    """A language model behind a server that continues text (endpoint.py).

    As with `text_teacher` the policy's prefix keeps its ids, and only what the server adds is
    tokenised. `Continuations.counts` says what became of the rows with a budget, each being one of
    finished, unfinished, alignment_failed and endpoint.FAILURES.

    Args:
      ask: an `endpoint.Endpoint`.
      tokenizer: the policy's.
      render: problem -> the teacher's prompt text.
      policy_eos_id: ends every continuation that no stop string ended.
      max_new_tokens: U.
      teacher_tokenizer: the server's, where it is at hand: a prefix with its marks is not sent.
      stop: strings that end a continuation, and are kept; the server is not told.
    """

    def request(requests: CorrectionRequests, row: int) -> Wanted | None:
        kept = requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
        prefix = exact_text(tokenizer, kept)
        if prefix is None or not survives(teacher_tokenizer or tokenizer, prefix):
            return None
        text = render(requests.records[row]["problem"]) + prefix
        return Wanted(row, text, min(int(requests.budgets[row]), max_new_tokens))

    def policy_tokens(kept: list[int], answer: Answer) -> tuple[list[int] | None, bool]:
        """Returns (tokens with their end or None, whether the answer ended by itself)."""
        text, end = answer.text or "", [policy_eos_id] if answer.stopped else []
        marks = [place + len(mark) for mark in stop if (place := text.find(mark)) >= 0]
        if marks:
            text, end = text[: min(marks)], []
        tokens = encode_after(tokenizer, kept, text) if is_unicode(text) else None
        ended = answer.stopped or bool(marks)
        return None if tokens is None else [*tokens, *end], ended

    def teach(requests: CorrectionRequests, key) -> Continuations:
        shape = (len(requests.records), max_new_tokens)
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        stopped, unaligned = np.zeros(shape[0], bool), np.zeros(shape[0], bool)
        asked = np.flatnonzero(np.asarray(requests.budgets) > 0).tolist()
        wanted = {row: request(requests, row) for row in asked}
        step = np.asarray(jax.device_get(jax.random.key_data(key))).astype(">u4").tobytes().hex()
        answers = ask([w for w in wanted.values() if w is not None], step)
        names = ("requests", "cached", "tokens_charged", "finished", "unfinished")
        names += ("alignment_failed", *FAILURES)
        counts: dict[str, int] = dict.fromkeys(names, 0)
        counts["requests"] = len(asked)
        for w, answer in zip(filter(None, wanted.values()), answers, strict=True):
            counts["cached"] += answer.cached
            counts["tokens_charged"] += answer.tokens
            if answer.failure:
                counts[answer.failure] += 1
                continue
            kept = requests.prefix_ids[w.row, : requests.prefix_length[w.row]].tolist()
            tokens, ended = policy_tokens(kept, answer)
            if tokens is None:
                unaligned[w.row] = True
                continue
            stopped[w.row] = ended and 0 < len(tokens) <= w.max_tokens
            counts["finished" if stopped[w.row] else "unfinished"] += 1
            tokens = tokens[: w.max_tokens]
            ids[w.row, : len(tokens)], mask[w.row, : len(tokens)] = tokens, True
        unaligned[[row for row, w in wanted.items() if w is None]] = True
        counts["alignment_failed"] = int(unaligned.sum())
        counts = {f"teacher/{name}": count for name, count in counts.items()}
        none = np.zeros(shape, np.float32)
        return Continuations(ids, mask, none, stopped, unaligned, counts)

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
            kept = requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
            prefix = tokenizer.decode(kept)
            text = remaining_solution(record.get("solution") or "", prefix)
            tokens = encode_after(tokenizer, kept, text) or []
            room = min(int(requests.budgets[row]), max_new_tokens)
            stopped[row] = bool(tokens) and len(tokens) < room
            tokens = [*tokens[: room - 1], policy_eos_id] if stopped[row] else tokens[:room]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        none = np.zeros(shape, np.float32)
        return Continuations(ids, mask, none, stopped=stopped, counts=NONE_FAILED)

    return teach


def encode_after(tokenizer, prefix_ids: list[int], text: str) -> list[int] | None:
    """Returns the tokens of a text that go on behind other tokens; None where none show it exactly.

    SentencePiece writes a space before whatever it encodes: behind a prefix it would be a new one.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False) if text else []
    shown = tokenizer.decode([*prefix_ids, *tokens])
    exact = survives(tokenizer, text) and shown == tokenizer.decode(prefix_ids) + text
    return tokens if exact else None


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can say and tokenizers cannot read."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def count_tokens(tokenizer, text: str) -> int:
    """Returns the tokens of a text as a tokenizer sees it, whatever stands in it."""
    return len(tokenizer.encode(text.encode(errors="replace").decode(), add_special_tokens=False))


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


def whole_trace_teacher(tokenizer, *, policy_eos_id: int, max_new_tokens: int) -> Teacher:
    """temporary"""
    return dataset_teacher(tokenizer, policy_eos_id=policy_eos_id, max_new_tokens=max_new_tokens)
