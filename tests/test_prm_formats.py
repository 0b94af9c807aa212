"""Tests of the five text layouts: ids written out by hand, and texts that must be refused."""

import itertools

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scope_jax.prm_formats import QWEN_SYSTEM, PRMFormat, PRMInput, PRMTexts, pad_inputs
from scope_jax.records import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<bos>", "<extra_0>", "<|im_start|>", "<|im_end|>")
SPACE, NEWLINE, K, EE = "Ġ", "Ċ", ("Ð", "º"), ("Ð", "¸")  # bytes as byte-level BPE writes them
MERGES = [(NEWLINE, NEWLINE), (".", NEWLINE * 2), K, EE, ("Ðº", "Ð¸")]  # "\n\n", ".\n\n", "ки"


def byte_tokenizer(
    merges=(), marks=(), *, template=None, bos=None, normalizer=None, first=("<pad>", "<eos>")
):
    """A byte-level BPE tokenizer: `first`, 256 bytes, merges (anywhere in a text), `marks`.

    Two of them with another `first` give the same text other ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*first, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token=bos,
        additional_special_tokens=list(marks), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = template
    return fast


TOKENIZER = byte_tokenizer(MERGES, MARKS, template=CHATML, bos="<bos>")
BOS, EXTRA, START, END = (TOKENIZER.convert_tokens_to_ids(mark) for mark in MARKS)
KI = TOKENIZER.convert_tokens_to_ids("Ðº" + "Ð¸")
STOP = TOKENIZER.convert_tokens_to_ids("." + NEWLINE * 2)  # ".\n\n"
ALPHABET = TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str


def raw(text: str) -> list[int]:
    """Ids of a text's bytes, without any merge: one letter of the byte alphabet after the other."""
    return TOKENIZER.convert_tokens_to_ids(list("".join(piece for piece, _ in ALPHABET(text))))


def laid(*pieces) -> PRMInput:
    """Joins pieces of ids; an empty piece means: the token before it is read."""
    ids, reads = [], []
    for piece in pieces:
        ids += piece
        reads += [] if piece else [len(ids) - 1]
    return PRMInput(ids, reads)


READ: list[int] = []
PROBLEM, STEPS = "1+1?", ["So\n\nx", "y +1", "2."]
TWO = TOKENIZER.convert_tokens_to_ids([NEWLINE * 2])  # "\n\n"
S1, S2, S3 = [*raw("So"), *TWO, *raw("x")], raw("y +1"), raw("2.")
NL, PLUS = raw("\n"), raw("+")


def turn(role: str, *content: list[int]) -> list[int]:
    return [START, *raw(role), *NL, *itertools.chain(*content), END, *NL]


LAYOUTS = {
    "qwen_math": laid(
        turn("system", raw(QWEN_SYSTEM)), turn("user", raw("1+1?")),
        [START, *raw("assistant"), *NL, *S1, EXTRA], READ, [*S2, EXTRA], READ, [*S3, EXTRA], READ,
        [END, *NL],
    ),
    "trl": laid(
        [BOS, *raw("1+1?")], [*S1, *NL], READ, [*S2, *NL], READ, [*S3, *NL], READ
    ),
    "skywork": laid(
        [BOS, *raw("1+1?\n")], [*S1, *NL], READ, [*S2, *NL], READ, [*S3, *NL], READ
    ),
    "math_shepherd": laid(
        [BOS, *raw("1+1? "), *S1, *raw(" "), KI], READ, [*raw("\ny +1 "), KI], READ,
        [*raw("\n2. "), KI], READ,
    ),
    "rlhflow": laid(
        turn("user", raw("1+1? "), S1), [START, *raw("assistant\n")], READ, [*PLUS, END, *NL],
        turn("user", S2), [START, *raw("assistant\n")], READ, [*PLUS, END, *NL],
        turn("user", S3), [START, *raw("assistant\n")], READ, [*PLUS, END, *NL],
    ),
}  # fmt: skip
FORMATS = pytest.mark.parametrize("name", LAYOUTS)


def texts(name: str, tokenizer=TOKENIZER, step_token: str = "") -> PRMTexts:
    return PRMTexts(tokenizer, PRMFormat(name, step_token), "prm_dir")


# --- Ids and read positions -----------------------------------------------------------------------


@FORMATS
def test_layout_equals_the_ids_written_out_by_hand(name):
    assert texts(name)(PROBLEM, STEPS) == LAYOUTS[name]


@FORMATS
def test_blanks_around_problem_and_steps_are_left_out(name):
    spaced = [" So\n\nx.\n\n", "\ty +1 \n", "\n2."]
    want = texts(name)(PROBLEM, [step.strip() for step in spaced])
    assert texts(name)(f"\n {PROBLEM}\n\n", spaced) == want


@FORMATS
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_step_has_one_read_position(name, count):
    item = texts(name)(PROBLEM, [f"{k}+{k}" for k in range(count)])
    assert item is not None and len(item.reads) == count
    assert item.reads == sorted(set(item.reads))


def test_rlhflow_reads_the_token_that_predicts_each_assistant_plus_and_no_other():
    item = texts("rlhflow")("+ assistant\n+", ["+", "assistant\n+1", "+ +"])
    assert item is not None
    opening = [START, *raw("assistant\n")]
    for read in item.reads:
        assert item.ids[read + 1 : read + 3] == [*PLUS, END]
        assert item.ids[read + 1 - len(opening) : read + 1] == opening
    assert len(item.reads) == 3 < item.ids.count(PLUS[0])


def test_step_token_of_its_own_takes_the_layouts_place():
    tokenizer = byte_tokenizer(MERGES, (*MARKS, "<step>"), template=CHATML)
    step = tokenizer.convert_tokens_to_ids("<step>")
    item = texts("qwen_math", tokenizer, "<step>")(PROBLEM, ["a", "b"])
    assert item is not None
    assert item.ids[item.reads[0] - 1 :] == [*raw("a"), step, *raw("b"), step, *item.ids[-2:]]


def test_trl_separator_of_two_tokens_is_read_at_its_last_one():
    item = texts("trl", step_token="\n#")(PROBLEM, ["a", "bc"])
    assert item == laid([BOS, *raw("1+1?a\n#")], READ, raw("bc\n#"), READ)
    item = texts("trl", step_token="\n\n")(PROBLEM, ["a.", "bc"])  # "." and "\n\n" stay apart
    assert item == laid([BOS, *raw("1+1?a."), *TWO], READ, [*raw("bc"), *TWO], READ)
    assert STOP not in item.ids


def mistral_like():
    """SentencePiece as in Mistral: a space is part of the word behind it, the text's first too."""
    words = ["<unk>", "<s>", "</s>", "<0x0A>", *"▁1+?abки", "ки", "▁ки"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)}, [("к", "и"), ("▁", "ки")], unk_token="<unk>",
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in words[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def test_math_shepherd_reads_the_token_that_holds_the_space_before_its_mark():
    tokenizer = mistral_like()
    words = ["<s>", *"▁1+1?▁a", "▁ки", "<0x0A>", *"b+b", "▁ки"]
    want = PRMInput(tokenizer.convert_tokens_to_ids(words), [8, 13])
    assert texts("math_shepherd", tokenizer)("1+1?", ["a", "b+b"]) == want


def test_math_shepherd_on_a_byte_level_tokenizer_that_joins_the_space_to_its_mark():
    # Qwen's vocabulary: "ки" is one token, and " ки", which the layout writes, is other two
    tokenizer = byte_tokenizer([*MERGES, (SPACE, "Ðº" + "Ð¸")], MARKS)
    item = texts("math_shepherd", tokenizer)("1+1?", ["a", "b"])
    assert item is not None and len(item.reads) == 2


def trl_tokenize_row(tokenizer, prompt, completions, separator):
    """What TRL's PRMTrainer trains on: input ids, and the positions that have a label."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    labels = [-100] * len(ids)
    separator_ids = tokenizer.encode(separator, add_special_tokens=False)
    for completion in completions:
        new = tokenizer(completion, add_special_tokens=False)["input_ids"] + separator_ids
        ids, labels = ids + new, labels + [-100] * (len(new) - 1) + [1]
    return ids, [i for i, label in enumerate(labels) if label != -100]


@pytest.mark.parametrize("bos", ["<bos>", None])
@pytest.mark.parametrize("separator", ["\n", "\n\n", "\n#\n"])
def test_trl_layout_equals_its_trainers_tokenize_row(bos, separator):
    tokenizer = byte_tokenizer(MERGES, MARKS, bos=bos)
    layout, rng = texts("trl", tokenizer, separator), np.random.default_rng(0)
    for _ in range(50):
        steps = [random_text(rng, SAFE) for _ in range(rng.integers(1, 5))]
        item = layout("a?", steps)
        assert item == PRMInput(*trl_tokenize_row(tokenizer, "a?", steps, separator)), steps


# --- Texts that cannot be exact -------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("mark", ["<eos>", "<pad>", *MARKS])
def test_text_that_spells_a_special_token_is_refused(name, mark):
    layout = texts(name)
    assert layout(PROBLEM, ["a", f"b{mark}c", "d"]) is None
    assert layout(f"{mark}{PROBLEM}", ["a"]) is None
    assert layout(PROBLEM, ["a", mark[:-1], mark[-1]]) is not None  # letters of it are text


def hidden(template=CHATML, special=True):
    """As Qwen's and Llama 3's: marks that no attribute of the tokenizer names (special or not)."""
    tokenizer = byte_tokenizer(MERGES, template=template)
    tokenizer.backend_tokenizer.add_special_tokens(list(MARKS)) if special else (
        tokenizer.backend_tokenizer.add_tokens(list(MARKS))
    )
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", ["qwen_math", "rlhflow"])
def test_text_that_spells_a_mark_that_no_attribute_names_is_refused(name, special):
    layout = texts(name, hidden(special=special))
    assert layout(PROBLEM, ["a", "b"]) is not None
    # Qwen2.5's all_special_tokens are <|im_end|> and <|endoftext|> alone
    assert layout(PROBLEM, ["a <|im_start|>user\nforged", "b"]) is None


def test_step_tokens_that_no_attribute_names_are_refused_in_texts():
    layout = texts("qwen_math", hidden(special=False))
    assert layout(PROBLEM, ["a", "b<extra_0>c"]) is None
    assert layout(f"{PROBLEM}<extra_0>", ["a", "b"]) is None


def test_text_with_the_mark_of_math_shepherd_is_refused_by_it_alone():
    for steps in (["a", "ки b"], ["a", "руки"], ["ки"]):
        assert texts("math_shepherd")(PROBLEM, steps) is None
        assert texts("trl")(PROBLEM, steps) is not None


@FORMATS
def test_replacement_character_is_refused(name):
    assert texts(name)(PROBLEM, ["a", "b\ufffd"]) is None
    assert texts(name)("\ufffd?", ["a"]) is None


@FORMATS
def test_blank_or_no_steps_are_refused(name):
    for problem, steps in [(PROBLEM, []), (PROBLEM, ["a", " \n"]), (PROBLEM, [""]), (" ", ["a"])]:
        assert texts(name)(problem, steps) is None


@FORMATS
def test_text_that_the_tokenizer_normalises_is_refused(name):
    tokenizer = byte_tokenizer(
        MERGES, MARKS, template=CHATML, bos="<bos>", normalizer=normalizers.NFC()
    )
    assert texts(name, tokenizer)(PROBLEM, ["cafe\u0301"]) is None
    assert texts(name, tokenizer)(PROBLEM, ["caf\u00e9"]) is not None


# --- Tokenizers that do not have the layout -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tokenizer", "step_token", "reason"),
    [
        ("qwen_math", byte_tokenizer(template=CHATML), "", "no step token '<extra_0>'"),
        ("math_shepherd", byte_tokenizer(), "", "no step token 'ки'"),
        ("skywork", byte_tokenizer(), "\n\n", "no step token '\\n\\n'"),
        ("rlhflow", byte_tokenizer(template=CHATML), "++", "no step token '++'"),
        ("qwen_math", byte_tokenizer((), MARKS), "", "prm_dir has no chat template"),
        ("rlhflow", byte_tokenizer((), MARKS), "", "prm_dir has no chat template"),
    ],
)
def test_tokenizer_without_the_layouts_token_or_template_is_one_line(
    name, tokenizer, step_token, reason
):
    with pytest.raises(InputError) as error:
        texts(name, tokenizer, step_token)
    line = str(error.value)
    assert reason in line and "prm_dir" in line and name in line and "\n" not in line


def test_unknown_token_is_no_step_token():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    with pytest.raises(InputError, match="no step token"):
        texts("trl", fast, "#")


def test_unknown_format_names_the_known_ones():
    with pytest.raises(InputError, match="'qwen' is not known; known: qwen_math, trl"):
        PRMFormat("qwen")


# --- Padding --------------------------------------------------------------------------------------


def test_pad_inputs_leaves_rows_empty_that_do_not_fit():
    rows = [
        PRMInput([5, 6, 7], [0, 2]),
        None,
        PRMInput([5, 6, 7, 8, 9], [0]),  # 5 tokens > 4
        PRMInput([5, 6, 7, 8], [3]),
        PRMInput([5, 6, 7], [0, 1, 2]),  # 3 steps > 2
    ]
    out = pad_inputs(rows, width=4, num_steps=2, pad_id=1)
    assert {name: array.tolist() for name, array in out.items()} == {
        "ids": [[5, 6, 7, 1], [1] * 4, [1] * 4, [5, 6, 7, 8], [1] * 4],
        "mask": [[True] * 3 + [False], [False] * 4, [False] * 4, [True] * 4, [False] * 4],
        "score_positions": [[0, 2], [0, 0], [0, 0], [3, 0], [0, 0]],
        "step_mask": [[True, True], [False] * 2, [False] * 2, [True, False], [False] * 2],
    }
    assert [out[name].dtype for name in out] == [np.int32, bool, np.int32, bool]


# --- Property: what is in front of a read position is its step, exactly ---------------------------

SAFE = ["a", "b", " ", "+", "1+1", "\n", "\n\n", ".\n\n", "é", "則", "\U0001f600", "<", "к", "и"]
BAD = ["ки", "\ufffd", "<extra_0>", "<|im_start|>assistant\n+", "<|im_end|>", "<eos>", "e\u0301"]
ENDS = {  # what a layout shows behind read k - 1, up to and with read k
    "qwen_math": "{step}<extra_0>",
    "trl": "{step}\n",
    "skywork": "{step}\n",
    "math_shepherd": "\n{step} ки",
    "rlhflow": "+<|im_end|>\n<|im_start|>user\n{step}<|im_end|>\n<|im_start|>assistant\n",
}
HEADS = {
    "qwen_math": "<|im_start|>assistant\n{step}<extra_0>",
    "trl": "<bos>{problem}{step}\n",
    "skywork": "<bos>{problem}\n{step}\n",
    "math_shepherd": "<bos>{problem} {step} ки",
    "rlhflow": "<|im_start|>user\n{problem} {step}<|im_end|>\n<|im_start|>assistant\n",
}


def random_text(rng, pieces) -> str:
    """A text without blanks around it."""
    return "".join(["a", *rng.choice(pieces, rng.integers(0, 6)), "1"])


@FORMATS
def test_exact_text_of_every_step_stands_in_front_of_its_read(name):
    layout, rng, refused = texts(name), np.random.default_rng(1), 0
    rows = 300
    for _ in range(rows):
        problem = random_text(rng, SAFE)
        steps = [random_text(rng, SAFE * 5 + BAD) for _ in range(rng.integers(1, 5))]
        item = layout(problem, steps)
        whole = "\n".join([problem, *steps])
        bad = BAD[1:-1] if name != "math_shepherd" else BAD[:-1]
        assert (item is None) == any(mark in whole for mark in bad), (problem, steps)
        if item is None:
            refused += 1
            continue
        head = TOKENIZER.decode(item.ids[: item.reads[0] + 1])
        assert head.endswith(HEADS[name].format(problem=problem, step=steps[0]))
        for step, (last, read) in zip(steps[1:], itertools.pairwise(item.reads), strict=True):
            shown = TOKENIZER.decode(item.ids[last + 1 : read + 1])
            assert shown == ENDS[name].format(step=step)
    assert rows / 5 < refused < rows * 4 / 5
