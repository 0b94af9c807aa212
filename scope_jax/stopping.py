"""Stop strings: a table that tells the sampler, on the device, when a row's text holds one.

The automaton of the strings (Aho-Corasick) reads bytes. A state is the longest end of the text so
far that some stop string begins with; the last state means "found" and is never left. A token is
several bytes, so the table holds where each token leads from each state:

    stop "ab"            state 0 ""     state 1 "a"     state 2 found
    token "xa"                 1              1               2
    token "b"                  0              2               2
    token "cab!"               2              2               2
    token <eos>                0              1               2      no bytes: the state stays

The table takes 4 * states * V bytes: "</answer>" has 10 states, 6 MB for a vocabulary of 152k.
numpy, on the host. V vocabulary entries.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from scope_jax.records import InputError
from scope_jax.steps import special_ids

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback


def stop_table(tokenizer: Any, stop: Sequence[str], vocab_size: int) -> np.ndarray:
    """Returns the state after each token from each state: what `generate` takes as `stop_table`.

    Args:
      tokenizer: see `token_bytes`.
      stop: strings that end a row; "\\n" is a newline, nothing is a pattern.
      vocab_size: V, of the MODEL: ids beyond the tokenizer's have no bytes.
    Returns:
      [states, V] int32. State 0 is the start, the last one is "found".
    Raises:
      InputError: no string, an empty one, no text, one that is a special token (an end token is
        known by its id), or a tokenizer with more ids than V.
    """
    strings = encode_stop(stop)
    tokens = token_bytes(tokenizer)
    marks = {tokenizer.decode([i]): i for i in special_ids(tokenizer)}
    for text in stop:
        if text in marks:
            raise InputError(
                f"stop string {text!r} is a special token, which has no text: put its id, "
                f"{marks[text]}, among the end ids"
            )
    if len(tokens) > vocab_size:
        raise InputError(f"the tokenizer has {len(tokens)} ids, the model {vocab_size}")
    return _walk(_automaton(strings), tokens, vocab_size)


def row_ends(tokenizer: Any, eos_ids, stop: Sequence[str], vocab_size: int) -> dict[str, Any]:
    """Returns eos_ids, stop_table (None where `stop` is empty) and pad_id of `generate`.

    What stands behind a row's end is the tokenizer's padding, or its first end token.
    """
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    table = stop_table(tokenizer, stop, vocab_size) if stop else None
    return {"eos_ids": eos_ids, "stop_table": table, "pad_id": pad_id}


def encode_stop(stop: Sequence[str]) -> list[bytes]:
    """Returns the UTF-8 of stop strings; InputError as `stop_table`."""
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise InputError(f"stop must be a sequence of strings, got {stop!r}")
    if not stop or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"stop must hold strings, none of them empty, got {stop!r}")
    try:
        return [text.encode() for text in stop]
    except UnicodeEncodeError as error:
        raise InputError(f"stop string {error.object!r} is no text: {error.reason}") from None


def _automaton(strings: list[bytes]) -> np.ndarray:
    """Returns the state after each byte from each state, [states, 256]."""
    beginnings = {text[:n] for text in strings for n in range(len(text))}
    # Sorted to the last byte: a set's order is another one in every process, and so on every host.
    ordered = sorted(beginnings, key=lambda text: (len(text), text))
    # Behind a string that was found nothing is read on.
    reached = [b for b in ordered if not any(text in b for text in strings)]
    number, found = {b: i for i, b in enumerate(reached)}, len(reached)
    moves = np.zeros((found + 1, 256), np.int32)
    moves[found] = found
    for state, begun in enumerate(reached):
        for byte in set(b"".join(strings)):
            text = begun + bytes([byte])
            if text.endswith(tuple(strings)):
                moves[state, byte] = found
            else:
                ends = (text[n:] for n in range(len(text) + 1))
                moves[state, byte] = next(number[end] for end in ends if end in number)
    return moves


def _walk(moves: np.ndarray, tokens: list[bytes], vocab_size: int) -> np.ndarray:
    """Reads all tokens at once from all states, byte by byte, the longest token first."""
    lengths = np.zeros(vocab_size, np.int64)
    lengths[: len(tokens)] = [len(token) for token in tokens]
    text = np.frombuffer(b"".join(tokens), np.uint8)
    order = np.argsort(-lengths, kind="stable")
    begins = (np.cumsum(lengths) - lengths)[order]
    states = np.repeat(np.arange(len(moves), dtype=np.int32)[:, None], vocab_size, axis=1)
    for n in range(lengths.max(initial=0)):
        longer = int((lengths > n).sum())
        byte = text[begins[:longer] + n]
        states[:, :longer] = moves[states[:, :longer], byte]
    table = np.empty_like(states)
    table[:, order] = states
    return table


# ------------------------------------------------------------------------------ bytes of tokens


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Returns the bytes that each id adds to a text, from id 0 to the tokenizer's last.

    b"" for special tokens (texts are decoded without them) and for ids that are not in use. The
    space of SentencePiece's "▁a" counts, though `decode` leaves it out at the start of a text.

    Args:
      tokenizer: of transformers, byte-level BPE or SentencePiece (with byte fallback). Any other is
        asked for the text of each token by `decode(ids) -> str` and `len`; bytes that are no whole
        character are then lost.
    """
    special = special_ids(tokenizer)
    if (spell := _speller(tokenizer)) is None:
        return [b"" if i in special else _shown(tokenizer, i) for i in range(len(tokenizer))]
    vocab = tokenizer.get_vocab()
    tokens = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i not in special:
            tokens[i] = spell(token)
    return tokens


def _shown(tokenizer: Any, token: int) -> bytes:
    # Seen behind itself, because some decoders strip the space of a text's first token.
    alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    return twice[len(alone) :].encode()


def _speller(tokenizer: Any):
    """Returns a function, vocabulary entry -> bytes, as the tokenizer's decoder makes them; None
    where the decoder is of a kind that is not known here.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    steps = json.loads(decoder.__getstate__())
    steps = steps["decoders"] if steps["type"] == "Sequence" else [steps]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _spell_byte_level
    # What comes behind "Fuse" strips the whole text.
    steps = steps[: kinds.index("Fuse")] if "Fuse" in kinds else steps
    spaces, raw_bytes = [], False
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            spaces.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Metaspace":
            spaces.append((step["replacement"], " "))
        elif step["type"] == "ByteFallback":
            raw_bytes = True
        else:
            return None

    def spell(token: str) -> bytes:
        if raw_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for mark, space in spaces:
            token = token.replace(mark, space)
        return token.encode()

    return spell


def _byte_characters() -> dict[str, int]:
    """Returns the characters that GPT-2 writes for bytes: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]
    return dict(zip(shown, [*printable, *others], strict=True))


_BYTE_OF = _byte_characters()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token, whose text stands as it is
        return token.encode()
