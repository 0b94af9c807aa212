"""Tests of stop strings: the bytes of tokens, the table against decoded text, rows that stop."""

import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scope_jax.metrics import CompileCounter
from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.records import InputError
from scope_jax.sampling import continue_from, generate
from scope_jax.sharding import make_mesh, put_batch, replicate
from scope_jax.stopping import stop_table, token_bytes
from tests.test_prm_formats import mistral_like
from tests.test_sampling import SUCCESSOR, Bigram, Untouchable
from tests.test_steps import qwen_directory

# --- Bytes of tokens ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen", "smollm2"])
def real_tokenizer(request, tmp_path_factory):
    if request.param == "qwen":
        return AutoTokenizer.from_pretrained(qwen_directory(tmp_path_factory))
    return AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))


TEXTS = [
    "So x ≠ 2.\n\n\tThen </answer> 12,345.67 =  \r\n", "則 ⟹ y 😀🚀 naïve Å e\u0301", 
    "\u00a0\u00ad\x7f",
    " " * 40 + "def f(x):\n" + " " * 8 + "return x", "Привет, мир! שלום עולם 안녕 สวัสดี",
]  # fmt: skip


def test_bytes_of_a_real_tokenizers_tokens_join_to_its_text(real_tokenizer):
    spelt = token_bytes(real_tokenizer)
    assert len(spelt) == len(real_tokenizer)
    for text in TEXTS:
        ids = real_tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(spelt[i] for i in ids)
        assert joined.decode() == real_tokenizer.decode(ids)
    rng = np.random.default_rng(0)
    for _ in range(200):  # most of them are no text; special ones are left out
        ids = [*rng.integers(0, len(spelt), 20).tolist(), real_tokenizer.eos_token_id]
        joined = b"".join(spelt[i] for i in ids).decode(errors="replace")
        assert joined == real_tokenizer.decode(ids, skip_special_tokens=True)
    assert spelt[real_tokenizer.eos_token_id] == b""


def test_a_table_of_a_real_vocabulary_is_built_in_seconds(real_tokenizer):
    size, began = len(real_tokenizer) + 100, time.perf_counter()
    table = stop_table(real_tokenizer, ("</answer>", "\n\nQuestion:"), size)
    assert time.perf_counter() - began < 10  # about 1 on an idle machine
    assert table.shape == (len("</answer>") + len("\n\nQuestion:"), size)  # both begin at ""
    assert table.dtype == np.int32
    assert (table[:, -100:] == np.arange(len(table))[:, None]).all()  # no bytes: the state stays
    for text, at in [("x </answer", False), ("x </answer>.", True), ("\n\n\nQuestion: a", True)]:
        state = 0
        for token in real_tokenizer.encode(text):
            state = table[state, token]
        assert (state == len(table) - 1) == at


def test_sentencepiece_tokens_keep_their_space_and_raw_bytes():
    tokenizer = mistral_like()
    spelt = dict(
        zip(
            tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
            token_bytes(tokenizer),
            strict=True,
        )
    )
    assert spelt["<0x0A>"] == b"\n"
    assert spelt["▁ки"] == " ки".encode()
    assert spelt["<unk>"] == spelt["<s>"] == spelt["</s>"] == b""
    for text in ["a ки", "кb\n1+1? ab\n ки"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(token_bytes(tokenizer)[i] for i in ids).decode()
        assert joined == " " + text and tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("decoder", "tokens", "want"),
    [
        (decoders.Metaspace(), ["▁a", "b▁", "<0x0A>"], [b" a", b"b ", b"<0x0A>"]),
        (decoders.Fuse(), ["ab", "\n", "é"], [b"ab", b"\n", "é".encode()]),
        (decoders.ByteFallback(), ["<0xc3>", "<0xA9>", "▁"], [b"\xc3", b"\xa9", "▁".encode()]),
        # no character of the byte alphabet in " é": an added token's text stands as it is
        (decoders.ByteLevel(), ["Ġa", "Ã", "Ċ", " é"], [b" a", b"\xc3", b"\n", " é".encode()]),
        # of a kind that is not known: what the token shows behind itself
        (decoders.WordPiece(cleanup=False), ["un", "##til", "a"], [b" un", b"til", b" a"]),
    ],
)
def test_decoders_of_many_kinds(decoder, tokens, want):
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoder
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    assert token_bytes(fast) == want
    joined = b"".join(want).decode(errors="replace")
    assert fast.decode(list(range(len(tokens)))).lstrip() == joined.lstrip()


class Words:
    """A tokenizer with the least there is; the ids in `ends` are special and show as <eos>."""

    def __init__(self, words, ends=()):
        self.words, self.all_special_ids = words, list(ends)

    def __len__(self):
        return len(self.words)

    def decode(self, ids):
        return "".join("<eos>" if i in self.all_special_ids else self.words[i] for i in ids)


def test_a_tokenizer_that_only_decodes():
    assert token_bytes(Words(["a", "≠b", "", "?"], ends=[3])) == [b"a", "≠b".encode(), b"", b""]


# --- The table ------------------------------------------------------------------------------------


def pieces():
    """A byte-level tokenizer whose tokens cut characters anywhere; ids 0 and 1 are special."""
    rng = np.random.default_rng(3)
    letters = ["a", "b", "c", "Ċ", "Ã", "©"]  # a b c \n and the two bytes of é
    words = ["".join(rng.choice(letters, rng.integers(1, 6))) for _ in range(60)]
    words = ["<pad>", "<eos>", *dict.fromkeys([*letters, *words])]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


PIECES = pieces()
STRINGS = st.lists(st.text("abc\né", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(stop=STRINGS, ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=12))
def test_table_finds_what_the_decoded_text_holds_and_when(stop, ids):
    table, state = stop_table(PIECES, stop, len(PIECES)), 0
    for n, token in enumerate(ids, start=1):
        state = table[state, token]
        text = PIECES.decode(ids[:n], skip_special_tokens=True)
        assert (state == len(table) - 1) == any(string in text for string in stop), (text, stop)


def test_states_and_moves_of_a_small_table():
    table = stop_table(Words(["xa", "b", "cab!", "<e>"], ends=[3]), ["ab"], 5)
    assert table.tolist() == [[1, 0, 2, 0, 0], [1, 2, 2, 1, 1], [2, 2, 2, 2, 2]]


def test_strings_behind_other_strings_add_no_state():
    words = Words(["a", "b", "c"])
    np.testing.assert_array_equal(
        stop_table(words, ["ab", "abc", "cab", "ab"], 3), stop_table(words, ["ab", "cab"], 3)
    )
    assert len(stop_table(words, ["abcc", "b"], 3)) == 3  # "", "a", found


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("</answer>", "stop must be a sequence of strings, got '</answer>'"),
        (None, "stop must be a sequence of strings, got None"),
        ((), "stop must hold strings, none of them empty"),
        (("a", ""), r"none of them empty, got \('a', ''\)"),
        (("a", 3), r"none of them empty, got \('a', 3\)"),
        (("\ud800",), "is no text"),
        (("a", "<eos>"), "'<eos>' is a special token, .* put its id, 1, among the end ids"),
    ],
)
def test_bad_stop_strings_are_one_clear_line(stop, message):
    with pytest.raises(InputError, match=message) as error:
        stop_table(PIECES, stop, len(PIECES))
    assert "\n" not in str(error.value)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(InputError, match="the tokenizer has 3 ids, the model 2"):
        stop_table(Words(["a", "b", "c"]), ["ab"], 2)


# --- Rows that stop -------------------------------------------------------------------------------

EOS, GROUP, LENGTH = 1, 4, 12
WORDS = Words(["", "", "a", "b", "ab", "ba", "c", "bca", "\n", "cc"], ends=[EOS])
STOP = ("bb", "a\n", "cab")
MODEL = Transformer(
    TransformerConfig(
        vocab_size=13, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        mlp_dim=24,
    )
)  # fmt: skip  # three ids more than the tokenizer
TABLE = stop_table(WORDS, STOP, 13)
PROMPT_IDS = np.array([[0, 2, 3], [4, 5, 3], [0, 0, 9], [8, 6, 3]], np.int32)
PROMPT_MASK = PROMPT_IDS > 0
OPTIONS = {"eos_ids": EOS, "temperature": 1.0}


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(5))


def sample(params, key=1, **options):
    options = {"group_size": GROUP, "max_new_tokens": LENGTH, **OPTIONS, **options}
    key = jax.random.key(key)
    return jax.device_get(generate(MODEL, params, PROMPT_IDS, PROMPT_MASK, key, **options))


def text_of(ids):
    return "".join(WORDS.words[i] for i in ids if i < len(WORDS))


def stopped_at(ids, stop=STOP):
    """Returns how many tokens it takes until a string is there; None if it never is."""
    lengths = range(1, len(ids) + 1)
    return next((n for n in lengths if any(s in text_of(ids[:n]) for s in stop)), None)


def check_stopped(rows, whole, stop=STOP):
    """Rows are those that were sampled without stop strings, up to the token that completes one."""
    ends = []
    for row in range(len(whole.finished)):
        ids = whole.completion_ids[row][whole.completion_mask[row]].tolist()
        end = stopped_at(ids, stop)
        ends.append(end)
        kept = ids[:end]
        n = len(kept)
        assert rows.completion_ids[row].tolist() == kept + [0] * (whole.completion_ids.shape[1] - n)
        assert rows.completion_mask[row].sum() == n and rows.completion_mask[row, :n].all()
        assert rows.finished[row] == (end is not None or ids[-1] == EOS)
        for name in ("logps", "sampling_logps"):
            got, want = getattr(rows, name)[row], getattr(whole, name)[row]
            np.testing.assert_allclose(got[:n], want[:n], rtol=0, atol=1e-5)
            assert not got[n:].any()
    return ends


@pytest.fixture(scope="module")
def whole(params):
    return sample(params)


@pytest.mark.parametrize("options", [{}, {"slots": 8}, {"top_k": 9, "top_p": 0.99}], ids=str)
def test_rows_end_with_the_token_that_completes_a_string(options, params, whole):
    unstopped = whole if set(options) <= {"slots"} else sample(params, **options)
    ends = check_stopped(sample(params, stop_table=TABLE, **options), unstopped)
    assert len(set(ends)) > 3 and None in ends  # what the test rests on


def test_a_table_that_nothing_completes_changes_no_row(params, whole):
    rows = sample(params, stop_table=stop_table(WORDS, ["zz"], 13))
    jax.tree.map(np.testing.assert_array_equal, rows, whole)


def test_columns_that_grow_and_slots_that_shrink_keep_the_state(params, whole, monkeypatch):
    monkeypatch.setattr("scope_jax.sampling.FIRST_COLUMNS", 6)
    ends = check_stopped(sample(params, slots=8, stop_table=TABLE), whole)
    assert len(set(ends)) > 3 and None in ends


def test_mesh_changes_no_row(params, whole):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    prompts = put_batch((PROMPT_IDS, PROMPT_MASK), mesh)
    rows = generate(
        MODEL, replicate(params, mesh), *prompts, jax.random.key(1), group_size=GROUP,
        max_new_tokens=LENGTH, slots=8, stop_table=replicate(TABLE, mesh), **OPTIONS,
    )  # fmt: skip
    ends = check_stopped(jax.device_get(rows), whole)
    assert len(set(ends)) > 3 and None in ends


def test_a_string_that_began_in_the_prompt_or_prefix_does_not_count():
    digits, mask, key = Words([*"0123456789"]), np.ones((2, 1), bool), jax.random.key(0)
    table = stop_table(digits, ["78", "01"], 10)
    options = {"max_new_tokens": 5, "eos_ids": (), "temperature": 0.0, "stop_table": table}
    prompts = np.array([[7], [5]], np.int32), mask
    new = generate(Bigram(), SUCCESSOR, *prompts, key, group_size=1, **options)
    assert new.completion_ids.tolist() == [[8, 9, 0, 1, 0], [6, 7, 8, 0, 0]]
    prefix = np.array([[8, 9, 0], [6, 7, 3]], np.int32), np.array([3, 2], np.int32)
    more = continue_from(Bigram(), SUCCESSOR, *prompts, *prefix, key, **options)
    assert more.completion_ids.tolist() == [[1, 2, 3, 4, 5], [8, 9, 0, 1, 0]]
    assert (new.finished.tolist(), more.finished.tolist()) == ([True, True], [False, True])


def test_models_with_a_cache_of_their_own_stop_too():
    words = Words([*"0123456789"])
    ids, mask = np.array([[5], [8], [6]], np.int32), np.ones((3, 1), bool)
    rows = generate(
        Bigram(), SUCCESSOR, ids, mask, jax.random.key(0), group_size=1, max_new_tokens=4,
        eos_ids=(), temperature=0.0, slots=2, stop_table=stop_table(words, ["78", "012"], 10),
    )  # fmt: skip
    assert rows.completion_ids.tolist() == [[6, 7, 8, 0], [9, 0, 1, 2], [7, 8, 0, 0]]
    assert rows.completion_mask.sum(1).tolist() == [3, 4, 2]
    assert rows.finished.tolist() == [True] * 3


def test_tables_of_one_shape_share_their_programs(params):
    """Tables of TABLE's 6 states have run by now: those of 4 must be compiled, all at once."""
    tables = [stop_table(WORDS, stop, 13) for stop in (["acc"], ["bb\n"], ["cbb"])]
    assert {len(table) for table in tables} == {4}
    compiles, counts = CompileCounter(), []
    for key, table in enumerate(tables):
        sample(params, key=key, slots=8, stop_table=table)
        counts.append(compiles.count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_ids": (10,)}, r"eos_ids must lie in 0 \.\. 9, got \(10,\)"),
        ({"eos_ids": (3, -1)}, r"eos_ids must lie in 0 \.\. 9, got \(3, -1\)"),
        ({"eos_ids": 2**40}, r"eos_ids must lie in 0 \.\. 9"),
        ({"stop_table": TABLE}, r"stop_table must be int32 \[states, 10\], got int32 \(6, 13\)"),
        ({"stop_table": TABLE[0, :10]}, r"got int32 \(10,\)"),
        ({"stop_table": TABLE[:1, :10]}, r"got int32 \(1, 10\)"),
        ({"stop_table": TABLE[:, :10].astype(float)}, r"got float64 \(6, 10\)"),
        ({"stop_table": "</answer>"}, r"got str \(\)"),
    ],
)
def test_bad_end_ids_and_tables_are_refused_before_anything_compiles(options, message):
    ids, mask, key = np.full((2, 3), 5, np.int32), np.ones((2, 3), bool), jax.random.key(0)
    options = {"eos_ids": (), "max_new_tokens": 4, **options}
    with pytest.raises(InputError, match=message):
        generate(Untouchable(), SUCCESSOR, ids, mask, key, group_size=1, **options)
    with pytest.raises(InputError, match=message):
        lengths = np.array([1, 2])
        continue_from(Untouchable(), SUCCESSOR, ids, mask, ids, lengths, key, **options)
