r"""Reasoning-step segmentation on token offsets (METHOD.md section 2, point 3). numpy, on the host.

Shapes: B completions, T completion tokens, S steps, n tokens of one completion (its mask's sum).

Separators are found in the TEXT, cuts are made between TOKENS, and a token may hold a separator and
its neighbours. So each token needs the character offset up to which the text is complete with it:

    tokens     ["So", " x", "=2", ".\n\n", "Then", " \xe2\x89", "\xa0", "<|im_end|>"]
    text        So x=2.\n\nThen ≠<|im_end|>
    completed     2     4     6        9      13            14      15            25
    step_ends                          4                                           8    (tokens)

A token that stops inside a UTF-8 character leaves it to the token that holds its last byte.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Splitter = str | re.Pattern[str] | Callable[[str], Iterable[int]]
Decode = Callable[[list[int]], str]
Find = Callable[[str], list[int]]

# "Step 3:", "**Step 3.**", "## step 3". Group 1 is the heading; its indent stays on the left.
_HEADING = re.compile(r"^[ \t]*((?:[#>*_-][#>*_ \t-]*)?step[ \t]+\d+)", re.IGNORECASE | re.M)
# The text of a single last token that is taken for an end token: <|im_end|>, </s>, <eos>, [EOS].
_END_TOKEN = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")
_REPLACEMENT = "\ufffd"  # what decoders show for bytes that are not (yet) a character


def segment_steps(
    tokenizer: Any,
    completion_ids: Any,
    completion_mask: Any,
    splitter: Splitter = "\n\n",
    *,
    max_steps: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Cuts each completion into reasoning steps, at token boundaries.

    The steps of a row partition its masked ids. A literal separator belongs to the step on its
    left: the step ends with the token that completes a maximal run of separators, even when that
    token also holds the next step's first letters (".\n\nA"). A run of a whitespace separator takes
    in all of the separator's characters that follow ("\n\n\n" is one run for "\n\n"). Every other
    splitter cuts BEFORE the token in which its match begins. A piece of whitespace only joins the
    step before it (a leading one, the step after); so does a last piece that is only an end token.

    Args:
      tokenizer: anything with `decode(list of int) -> str`, the only thing used of it. End tokens
        may decode to text or to "".
      completion_ids: [B, T] int.
      completion_mask: [B, T] bool, True on the first n tokens of a row.
      splitter: a literal separator; "Step k" (numbered headings at line starts, any case, markdown
        marks allowed before them); a regex, given compiled, as "re:PATTERN", or as a string that
        holds a backslash (strings are compiled with re.MULTILINE); or a callable, text -> character
        offsets at which a step begins.
      max_steps: static S; surplus steps of a row merge into its last one. Default: the largest
        number of steps in the batch.
    Returns:
      step_ends [B, S] int32, exclusive token offsets, 0 where padded, and step_mask [B, S] bool,
      with S >= 1. A row without tokens has no step, any other row has at least one.
    Raises:
      ValueError: wrong shapes, a mask with a hole (names the row), max_steps < 1, a bad splitter.
    """
    ids, mask = np.asarray(completion_ids), np.asarray(completion_mask).astype(bool)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(f"ids and mask must both be [B, T], got {ids.shape} and {mask.shape}")
    holes = np.flatnonzero((mask[:, 1:] & ~mask[:, :-1]).any(axis=1))
    if holes.size:
        raise ValueError(f"completion_mask of row {holes[0]} is not True first, then False")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")

    find, cut_before = _parse_splitter(splitter)
    own_text = _own_text(tokenizer.decode)  # shared by the rows: one look per distinct token
    rows = [
        _row_ends(tokenizer.decode, row[row_mask].tolist(), find, cut_before, own_text)
        for row, row_mask in zip(ids, mask, strict=True)
    ]
    num_steps = max_steps or max([1, *map(len, rows)])
    step_ends = np.zeros((len(rows), num_steps), np.int32)
    step_mask = np.zeros((len(rows), num_steps), bool)
    for i, ends in enumerate(rows):
        kept = ends if len(ends) <= num_steps else [*ends[: num_steps - 1], ends[-1]]
        step_ends[i, : len(kept)] = kept
        step_mask[i, : len(kept)] = True
    return step_ends, step_mask


def step_texts(
    tokenizer: Any, completion_ids: Any, completion_mask: Any, step_ends: Any, step_mask: Any
) -> list[list[str] | None]:
    """Returns the exact text of every reasoning step, for readers with another tokenizer.

    Args:
      tokenizer: a transformers tokenizer.
      completion_ids, completion_mask: [B, T].
      step_ends, step_mask: [B, S] from `segment_steps`.
    Returns:
      Per row the texts of its steps, which add up to the text of the completion, its end tokens
      left out. None where there is no exact text: bytes that are no UTF-8, a cut inside a
      character, or a special token before the end. A row without steps gives [].
    """
    special = special_ids(tokenizer)
    return [
        _exact_pieces(tokenizer.decode, _body(row[keep], special), ends[real].tolist(), special)
        for row, keep, ends, real in zip(
            *map(np.asarray, (completion_ids, completion_mask, step_ends, step_mask)), strict=True
        )
    ]  # fmt: skip


def token_texts(tokenizer: Any, rows: list[list[int]]) -> list[list[str]]:
    """Returns the part of decode(ids) that each token adds, for every row of ids.

    A row's parts add up to its text; a character of several tokens belongs to the one that
    completes it. For showing: see `_token_offsets` for what SentencePiece credits to a neighbour.
    """
    own_text, texts = _own_text(tokenizer.decode), []
    for ids in rows:
        text = tokenizer.decode(ids) if ids else ""
        completed, _ = _token_offsets(tokenizer.decode, ids, text, own_text)
        cuts = [0, *completed[:-1].tolist(), len(text)]
        texts.append([text[a:b] for a, b in itertools.pairwise(cuts)] if ids else [])
    return texts


def exact_text(tokenizer: Any, ids: list[int]) -> str | None:
    """Returns the text of tokens; None for bytes that are no UTF-8, or with a special token."""
    pieces = _exact_pieces(tokenizer.decode, ids, [len(ids)], special_ids(tokenizer))
    return None if pieces is None else pieces[0]


def survives(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer gives a text back, and takes no part of it for one of its own marks.

    A model that writes "<|im_end|>" in plain letters must not end its turn in another's eyes.
    """
    if _REPLACEMENT in text or any(mark in text for mark in _marks(tokenizer)):
        return False
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def special_ids(tokenizer: Any) -> set[int]:
    """Returns all special ids; `all_special_ids` has only those that an attribute names."""
    named = getattr(tokenizer, "all_special_ids", ())
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*named, *(i for i, token in added.items() if token.special)}


def _marks(tokenizer: Any) -> set[str]:
    """Returns the texts that a tokenizer turns into one id wherever they stand."""
    added = map(str, getattr(tokenizer, "added_tokens_decoder", {}).values())
    return {mark for mark in (*tokenizer.all_special_tokens, *added) if mark.strip()}


def _body(ids: np.ndarray, special: set[int]) -> list[int]:
    """Returns a completion without the end tokens that it closes with."""
    length = len(ids)
    while length and int(ids[length - 1]) in special:
        length -= 1
    return ids[:length].tolist()


def _exact_pieces(
    decode: Decode, ids: list[int], ends: list[int], special: set[int]
) -> list[str] | None:
    if special.intersection(ids):
        return None
    text = decode(ids) if ids else ""
    if _REPLACEMENT in text:
        return None
    bounds = [min(end, len(ids)) for end in [0, *ends]]
    pieces = [decode(ids[a:b]) if b > a else "" for a, b in itertools.pairwise(bounds)]
    if "".join(pieces) == text:
        return pieces
    # SentencePiece drops the space of a text's first token: compare whole prefixes instead.
    shown = [decode(ids[:bound]) if bound else "" for bound in bounds]
    if not all(text.startswith(prefix) for prefix in shown):
        return None
    return [text[len(a) : len(b)] for a, b in itertools.pairwise(shown)]


def _parse_splitter(splitter: Splitter) -> tuple[Find, bool]:
    """Returns (find, cut_before); find(text): where runs end or, with cut_before, steps begin."""
    if splitter == "Step k":
        return lambda text: [match.start(1) for match in _HEADING.finditer(text)], True
    if isinstance(splitter, str) and not splitter.replace("\\n", ""):
        # What a shell makes of --config.splitter='\n\n'. As a regex it would cut on the wrong side.
        raise ValueError(f"splitter {splitter!r}: give real newlines, not backslashes or nothing")
    if isinstance(splitter, str) and not (splitter.startswith("re:") or "\\" in splitter):
        one = re.escape(splitter)
        run = re.compile(f"{one}[{one}]*" if splitter.isspace() else f"(?:{one})+")
        return lambda text: [match.end() for match in run.finditer(text)], False
    if isinstance(splitter, str | re.Pattern):
        is_string = isinstance(splitter, str)
        regex = re.compile(splitter.removeprefix("re:"), re.M) if is_string else splitter
        return lambda text: [match.start() for match in regex.finditer(text)], True
    if callable(splitter):
        return lambda text: list(splitter(text)), True
    raise ValueError(f"a splitter is a string, a regex or a callable, got {splitter!r}")


def _row_ends(
    decode: Decode, ids: list[int], find: Find, cut_before: bool, own_text: Callable
) -> list[int]:
    """Returns the exclusive step ends of one completion, the last one len(ids); [] if empty."""
    n = len(ids)
    text = decode(ids) if n else ""
    offsets = find(text) if n else []
    if not offsets:
        return [n] if n else []
    if min(offsets) < 0 or max(offsets) > len(text):
        raise ValueError(f"the splitter gave an offset outside 0..{len(text)}: {offsets}")
    completed, begun = _token_offsets(decode, ids, text, own_text)
    if cut_before:
        cuts = np.searchsorted(begun, offsets, side="right")
    else:
        cuts = np.searchsorted(completed, offsets, side="left") + 1

    last_token = text[completed[-2] :] if n > 1 else ""
    body = len(text) - (len(last_token) if _END_TOKEN.fullmatch(last_token) else 0)
    ends: list[int] = []
    start = 0  # character at which the open piece begins
    for cut in [*np.unique(cuts[(cuts > 0) & (cuts < n)]).tolist(), n]:
        stop = int(completed[cut - 1])
        blank = not text[start : min(stop, body)].strip()
        if blank and not ends:
            continue  # leading whitespace stays open: it joins the step after it
        if blank:
            ends[-1] = cut
        else:
            ends.append(cut)
        start = stop
    return ends or [n]


def _own_text(decode: Decode) -> Callable[[int], str | None]:
    """Returns a cached function: token -> its part of a text, None if that hangs on neighbours."""
    cache: dict[int, str | None] = {}

    def look(token: int) -> str | None:
        if token not in cache:
            # Seen behind itself, because SentencePiece strips the space of a text's first token.
            alone, twice = decode([token]), decode([token, token])
            cache[token] = None if _REPLACEMENT in alone else twice[len(alone) :]
        return cache[token]

    return look


def _token_offsets(
    decode: Decode, ids: list[int], text: str, own_text: Callable[[int], str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Finds how much of `text` = decode(ids) is there after each token.

    completed[i] is the length of what decode(ids[: i + 1]) and the text have in common, without
    those n decodes: a token whose own text comes next is taken at its word; elsewhere (split UTF-8,
    stripped spaces) a window grows, as in streaming detokenizers, until it shows what the text has
    and the next token adds to it just what that token shows alone. Exact for byte-level tokenizers;
    SentencePiece may credit leading spaces, or raw bytes that are no UTF-8, to a neighbour.

    Returns:
      completed [n] int, non-decreasing, and begun [n] int, which adds the character that token i
      leaves unfinished.
    """
    n = len(ids)
    completed, unfinished = np.zeros(n, np.int64), np.zeros(n, bool)
    offset = i = 0
    while i < n:
        own = own_text(ids[i])
        if own is not None and text.startswith(own, offset):
            offset += len(own)
            completed[i] = offset
            i += 1
            continue
        shown, stop = decode([ids[i]]), i + 1
        while True:  # the window is ids[i:stop]
            known = len(os.path.commonprefix([shown, text[offset : offset + len(shown)]]))
            completed[stop - 1] = offset + known
            unfinished[stop - 1] = known < len(shown)
            if stop == n:
                break
            longer = decode(ids[i : stop + 1])
            alone = own_text(ids[stop])
            alone = decode([ids[stop]]) if alone is None else alone
            # A token without text proves nothing: what follows it may still finish a character.
            if known == len(shown) and alone and longer == shown + alone:
                break
            shown, stop = longer, stop + 1
        offset, i = int(completed[stop - 1]), stop
    completed = np.maximum.accumulate(completed)
    begun = np.minimum(np.maximum.accumulate(completed + unfinished), len(text))
    return completed, begun
