"""Teachers: who writes the correction after the policy's own correct prefix.

A teacher is any function  teach(requests: CorrectionRequests, key) -> Continuations.  It never sees
or touches the rows' other tokens; `splicing.splice` joins the two. A continuation that did not stop
by itself is never accepted. Only the hinted policy also takes the policy's current params.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from scope_jax.alignment import MIN_SIMILARITY, align_trace, read_trace
from scope_jax.endpoint import FAILURES, Answer, Wanted
from scope_jax.records import Continuations, CorrectionRequests, InputError
from scope_jax.steps import Splitter, exact_text, survives

Teacher = Callable[[CorrectionRequests, jax.Array], Continuations]
BoundTeacher = Callable[
    [CorrectionRequests, jax.Array, Any], Continuations
]  # (.., policy's params)
NONE_FAILED = {"teacher/alignment_failed": 0}
_PLACE = re.compile(r"\{(problem|answer)\}")


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


def hinted_teacher(
    continue_fn,
    tokenizer,
    render: Callable[[str], str],
    *,
    hint: str,
    policy_eos_id: int,
    prompt_bucket: int,
    eos_ids=None,
) -> BoundTeacher:
    """The policy itself, with the weights of now, which reads the gold answer in its prompt.

    The prefix is the policy's own ids; only the prompt is another one, and only for the teacher.
    What it writes is a teacher's: without the answer it would not have been drawn so. It may speak
    of the hint: only the verifier looks at it. A row whose hinted prompt does not fit is not
    continued, and counted (teacher/prompt_too_long).

    Args:
      continue_fn: (requests with the hinted prompts [C, prompt_bucket], key, params) -> Rollouts,
        as `model_teacher`'s.
      tokenizer: the policy's.
      render: what stands for the problem -> the policy's prompt text.
      hint: stands for the problem: its text with {problem} and {answer}, of the record's gold.
      policy_eos_id, eos_ids: as `model_teacher`'s.
      prompt_bucket: tokens of a hinted prompt.
    Raises:
      InputError: a hint without one of its places, or that the tokenizer cannot write.
    """
    for place in ("{problem}", "{answer}"):
        if place not in hint:
            raise InputError(f"teacher.hint must say where {place} goes, got {hint!r:.60}")
    if not all(survives(tokenizer, text) for text in _PLACE.split(hint)[::2] if text.strip()):
        raise InputError(
            f"the policy's tokenizer cannot write teacher.hint {hint!r:.60}: set another"
        )

    def encode(record: dict) -> list[int]:
        values = {"problem": record["problem"], "answer": str(record["gold"])}
        text = _PLACE.sub(lambda place: values[place[1]], hint)
        return tokenizer.encode(render(text), add_special_tokens=False)

    def teach(requests: CorrectionRequests, key, params) -> Continuations:
        budgets = np.array(requests.budgets)
        prompt_ids = np.zeros((len(budgets), prompt_bucket), np.int32)
        prompt_mask = np.zeros(prompt_ids.shape, bool)
        prompt_mask[:, -1] = True  # filling rows still need a token to start from
        asked = np.flatnonzero(budgets > 0)
        for row in asked:
            prompt = encode(requests.records[row])
            if len(prompt) > prompt_bucket:
                budgets[row] = 0
                continue
            prompt_ids[row, -len(prompt) :], prompt_mask[row, -len(prompt) :] = prompt, True
        hinted = dataclasses.replace(
            requests, prompt_ids=prompt_ids, prompt_mask=prompt_mask, budgets=budgets
        )
        write = model_teacher(
            lambda requests, key: continue_fn(requests, key, params),
            policy_eos_id=policy_eos_id,
            eos_ids=eos_ids,
        )
        counts = {"teacher/prompt_too_long": int((budgets[asked] == 0).sum())}
        return dataclasses.replace(write(hinted, key), counts=NONE_FAILED | counts)

    return teach


# ------------------------------------------------------------------------------ written texts


class _Found(NamedTuple):
    """The text that a row goes on with, or why it has none."""

    text: str = ""
    whole: bool = True  # the solution ends with it
    missing: str = ""  # the name of a count


def dataset_teacher(
    tokenizer,
    *,
    policy_eos_id: int,
    max_new_tokens: int,
    splitter: Splitter = "\n\n",
    one_step: bool = False,
    min_similarity: float = MIN_SIMILARITY,
) -> Teacher:
    """The data set's own worked solution (record["solution"]), from the first step that the prefix
    has not reached; see `alignment.align_trace`.

    A row whose place in its solution is not known (teacher/unmatched), whose prefix has all of it
    (teacher/complete) or that has none (teacher/no_solution) is not continued, and counted.

    Args:
      tokenizer: the policy's.
      policy_eos_id: ends every continuation that ends the solution.
      max_new_tokens: U; a solution that does not fit a row's budget has not stopped.
      splitter: of the policy's steps.
      one_step: write the next step of the solution only.
      min_similarity: of a kept step and the solution's.
    """

    def find(record: dict, prompt: str, prefix: str) -> _Found:
        trace = _read_solution(record, prompt, prefix)
        if not trace:
            return _Found(missing="no_solution")
        steps = align_trace(
            trace, prefix, problem=record.get("problem", ""), splitter=splitter,
            min_similarity=min_similarity,
        )  # fmt: skip
        if not steps:
            return _Found(missing="unmatched" if steps is None else "complete")
        written = steps[:1] if one_step else steps
        return _Found("".join(written), whole=len(written) == len(steps))

    reasons = ("unmatched", "complete", "no_solution")
    return _text_writer(find, reasons, tokenizer, policy_eos_id, max_new_tokens)


def whole_trace_teacher(tokenizer, *, policy_eos_id: int, max_new_tokens: int) -> Teacher:
    """The data set's whole worked solution, whatever the prefix: LUFFY's trace, for rows of which
    nothing is kept (prefix_length 0). A record without one (teacher/no_solution) is not continued.

    Args:
      tokenizer, policy_eos_id, max_new_tokens: as `dataset_teacher`'s.
    """

    def find(record: dict, prompt: str, prefix: str) -> _Found:
        trace = _read_solution(record, prompt, prefix)
        steps = align_trace(trace, "") or []  # all of them, without calculator notes
        return _Found("".join(steps)) if steps else _Found(missing="no_solution")

    return _text_writer(find, ("no_solution",), tokenizer, policy_eos_id, max_new_tokens)


def scripted_teacher(
    continue_solution: Callable[[dict, str], str | None],
    tokenizer,
    *,
    policy_eos_id: int,
    max_new_tokens: int,
) -> Teacher:
    """The task's own expert.

    Args:
      continue_solution: (record, text of the prefix) -> the rest of a solution, None where it knows
        none (teacher/declined).
      tokenizer, policy_eos_id, max_new_tokens: as `dataset_teacher`'s.
    """

    def find(record: dict, prompt: str, prefix: str) -> _Found:
        del prompt
        text = continue_solution(record, prefix)
        return _Found(missing="declined") if text is None else _Found(text)

    return _text_writer(find, ("declined",), tokenizer, policy_eos_id, max_new_tokens)


def _read_solution(record: dict, prompt: str, prefix: str) -> str:
    thinking = prompt.rstrip().endswith("<think>") or prefix.lstrip().startswith("<think>")
    return read_trace(record.get("solution") or "", thinking=thinking).strip()


def _text_writer(
    find: Callable[[dict, str, str], _Found],
    reasons: tuple[str, ...],
    tokenizer,
    policy_eos_id: int,
    max_new_tokens: int,
) -> Teacher:
    """Returns a teacher that writes what `find` says of (record, prompt, prefix)."""

    def teach(requests: CorrectionRequests, key) -> Continuations:
        del key  # a written solution is not random
        shape = (len(requests.records), max_new_tokens)
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        stopped, unaligned = np.zeros(shape[0], bool), np.zeros(shape[0], bool)
        counts = dict.fromkeys(reasons, 0)
        for row in np.flatnonzero(np.asarray(requests.budgets) > 0):
            kept = requests.prefix_ids[row, : requests.prefix_length[row]].tolist()
            prompt = requests.prompt_ids[row][requests.prompt_mask[row]].tolist()
            texts = (tokenizer.decode(prompt), tokenizer.decode(kept))
            found = find(requests.records[row], *texts)
            if found.missing:
                counts[found.missing] += 1
                continue
            tokens = encode_after(tokenizer, kept, found.text)
            if tokens is None:
                unaligned[row] = True
                continue
            tokens += [policy_eos_id] * found.whole
            room = min(int(requests.budgets[row]), max_new_tokens)
            stopped[row] = 0 < len(tokens) <= room
            tokens = tokens[:room]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        counts["alignment_failed"] = int(unaligned.sum())
        counts = {f"teacher/{name}": count for name, count in counts.items()}
        none = np.zeros(shape, np.float32)
        return Continuations(ids, mask, none, stopped, unaligned, counts)

    return teach


# ------------------------------------------------------------------------------ texts and tokens


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
