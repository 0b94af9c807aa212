"""Tests of the teacher with another tokenizer: exact text there, exact text back."""

import jax
import numpy as np
from test_prm_formats import byte_tokenizer, mistral_like
from test_train import run, training_rows

from scope_jax.models.hf import save_hf
from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.records import CorrectionRequests, Rollouts
from scope_jax.teachers import text_teacher

NEWLINES = [("Ċ", "Ċ"), ("a", "b")]  # "\n\n" and "ab" are one policy token each
POLICY = byte_tokenizer(NEWLINES, ("<|im_end|>",))
TEACHER = byte_tokenizer((), ("<|user|>",), first=("<pad>", "<filling>", "<filling2>", "<eos>"))
EOS, TEACHER_EOS = POLICY.eos_token_id, TEACHER.eos_token_id
U, PROMPT_BUCKET, PREFIX_BUCKET = 12, 10, 16


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


class Script:
    """A teacher model that writes given ids; keeps what it was asked."""

    def __init__(self, *rows):
        self.rows = rows  # (ids, finished)

    def __call__(self, prompt_ids, prompt_mask, prefix_ids, prefix_length, budgets, key):
        self.asked = (prompt_ids, prompt_mask, prefix_ids, prefix_length, budgets, key)
        ids, mask = np.full((len(self.rows), 24), 99, np.int32), np.zeros((len(self.rows), 24))
        for row, (new, _) in enumerate(self.rows):
            ids[row, : len(new)], mask[row, : len(new)] = new, 1
        none = np.zeros(mask.shape, np.float32)
        return Rollouts(
            prompt_ids=None, prompt_mask=None, completion_ids=jax.device_put(ids),
            completion_mask=jax.device_put(mask.astype(bool)), token_source=none, logps=none,
            sampling_logps=none, finished=np.array([done for _, done in self.rows]),
        )  # fmt: skip


def ended(text: str, tokenizer=TEACHER):
    return [*encode(tokenizer, text), tokenizer.eos_token_id], True


def teach(script, prefixes, budgets=None, policy=POLICY, teacher=TEACHER, problem="p", **options):
    """Runs the teacher on rows of prefixes, texts or policy ids; what lies behind is not read."""
    prefixes = [encode(policy, p) if isinstance(p, str) else list(p) for p in prefixes]
    prefix_ids = np.full((len(prefixes), 20), 7, np.int32)
    for row, ids in enumerate(prefixes):
        prefix_ids[row, : len(ids)] = ids
    budgets = [U] * len(prefixes) if budgets is None else budgets
    given = CorrectionRequests(
        prompt_ids=np.ones((len(prefixes), 3), np.int32),
        prompt_mask=np.ones((len(prefixes), 3), bool),
        prefix_ids=prefix_ids, prefix_length=np.array(list(map(len, prefixes)), np.int32),
        budgets=np.array(budgets, np.int32), records=({"problem": problem},) * len(prefixes),
    )  # fmt: skip
    before = given.budgets.copy()
    write = text_teacher(
        script, policy, teacher, lambda problem: f"Q: {problem}?", max_new_tokens=U,
        policy_eos_id=policy.eos_token_id, prompt_bucket=PROMPT_BUCKET, prefix_bucket=PREFIX_BUCKET,
        **options,
    )  # fmt: skip
    written = write(given, jax.random.key(3))
    assert written.ids.shape == written.mask.shape == written.logps.shape == (len(prefixes), U)
    assert (np.sort(~written.mask, axis=1) == ~written.mask).all()
    assert not written.ids[~written.mask].any() and not written.logps.any()
    assert not (written.stopped & written.unaligned).any()
    assert (written.mask.sum(1) <= before).all()
    np.testing.assert_array_equal(given.budgets, before)  # the caller's own array
    rows = [ids[mask].tolist() for ids, mask in zip(written.ids, written.mask, strict=True)]
    return prefixes, rows, written


# --- What the teacher reads -----------------------------------------------------------------------


def test_teacher_reads_its_own_tokens_of_problem_and_prefix():
    script = Script(ended("c"), ended("c"))
    teach(script, ["ab\n\n則", ""], budgets=[5, 12])
    prompt_ids, prompt_mask, prefix_ids, prefix_length, budgets, key = script.asked
    prompt, prefix = encode(TEACHER, "Q: p?"), encode(TEACHER, "ab\n\n則")
    assert len(prefix) == 2 + 2 + 3  # bytes; the policy has 5 tokens
    assert prompt_ids.shape == prompt_mask.shape == (2, PROMPT_BUCKET)
    assert prompt_ids[0, -len(prompt) :].tolist() == prompt
    assert prompt_mask[0].tolist() == [False] * (PROMPT_BUCKET - 5) + [True] * 5
    assert prefix_ids.shape == (2, PREFIX_BUCKET) and prefix_length.tolist() == [7, 0]
    assert prefix_ids[0, :7].tolist() == prefix
    assert budgets.tolist() == [5, 12]
    assert jax.random.key_data(key).tolist() == jax.random.key_data(jax.random.key(3)).tolist()


def test_prefix_without_exact_text_is_unaligned_and_has_no_budget():
    bad_byte, eos = POLICY.convert_tokens_to_ids("ÿ"), POLICY.eos_token_id
    rows = {
        "not UTF-8": [*encode(POLICY, "a"), bad_byte],
        "inside a character": encode(POLICY, "\U0001f600")[:2],
        "special inside": [*encode(POLICY, "a"), eos, *encode(POLICY, "b")],
        "teacher's special": "a<|user|>",
        "too long": "123456789012345é",  # 16 policy characters, 17 teacher bytes
        "fine": "a",
    }
    script = Script(*[ended("b")] * len(rows))
    _, written, out = teach(script, rows.values())
    assert out.unaligned.tolist() == [True] * 5 + [False]
    assert script.asked[4].tolist() == [0] * 5 + [U]
    assert script.asked[1].any(1).all()  # a row without a prompt would be refused by the sampler
    assert written == [[]] * 5 + [[*encode(POLICY, "b"), EOS]]
    assert out.stopped.tolist() == [False] * 5 + [True]


def test_prompt_beyond_its_bucket_is_unaligned():
    _, written, out = teach(Script(ended("b")), ["a"], problem="12345678")
    assert out.unaligned.tolist() == [True] and written == [[]]


def test_filling_rows_stay_empty_and_are_no_failure():
    bad = [POLICY.convert_tokens_to_ids("ÿ")]
    script = Script(ended("b"), ended("b"), ended("b"))
    _, written, out = teach(script, ["a", bad, ""], budgets=[0, 0, 4])
    assert written == [[], [], [*encode(POLICY, "b"), EOS]]
    assert out.unaligned.tolist() == [False] * 3 and out.stopped.tolist() == [False, False, True]
    assert script.asked[4].tolist() == [0, 0, 4]
    assert script.asked[1].any(1).all() and script.asked[3].tolist() == [0, 0, 0]


# --- What comes back ------------------------------------------------------------------------------


def test_continuation_comes_back_as_policy_tokens_and_the_policys_end():
    _, rows, out = teach(Script(ended("ab\n\nc")), ["x"])
    assert rows == [[*encode(POLICY, "ab\n\nc"), EOS]] and len(rows[0]) == 3 + 1
    assert out.stopped.tolist() == [True] and out.unaligned.tolist() == [False]


def test_spliced_tokens_spell_the_prefix_and_what_the_teacher_wrote():
    rng, texts = np.random.default_rng(0), []
    for _ in range(40):
        prefix, added = ("".join(rng.choice(list("ab\n 則é"), rng.integers(0, 5))) for _ in "12")
        texts.append((prefix, added))
    prefixes, rows, out = teach(Script(*(ended(new) for _, new in texts)), [t for t, _ in texts])
    for (prefix, added), start, row, stopped in zip(
        texts, prefixes, rows, out.stopped, strict=True
    ):
        if len(encode(POLICY, added)) < U:
            assert stopped and row[-1] == EOS
            assert POLICY.decode(start + row[:-1]) == prefix + added
    assert out.stopped.sum() >= 35


def test_teacher_that_ends_at_once_leaves_the_policys_end_alone():
    _, rows, out = teach(Script(ended("")), ["ab"])
    assert rows == [[EOS]] and out.stopped.all() and not out.unaligned.any()


def test_continuation_inside_a_character_is_unaligned_and_not_stopped():
    cut = [*encode(TEACHER, "b則")[:-1], TEACHER_EOS]
    _, _, out = teach(Script((cut, True)), ["a"])
    assert out.unaligned.tolist() == [True] and out.stopped.tolist() == [False]


def test_policy_special_in_plain_letters_is_unaligned_and_not_stopped():
    letters = encode(TEACHER, "<|im_end|>")
    assert len(letters) == 10  # no mark of the teacher's
    for text in ("<|im_end|>", "b <|im_end|> c", "<eos>", "<pad>"):
        plain = [i for letter in text for i in encode(TEACHER, letter)]
        _, _, out = teach(Script(([*plain, TEACHER_EOS], True)), ["a"])
        assert out.unaligned.tolist() == [True] and out.stopped.tolist() == [False], text


def test_continuation_and_its_end_must_fit_the_budget():
    rows, budgets = [ended("xyz")] * 4, [4, 3, 2, 1]
    _, written, out = teach(Script(*rows), ["a"] * 4, budgets)
    xyz = encode(POLICY, "xyz")
    assert written == [[*xyz, EOS], xyz, xyz[:2], xyz[:1]]
    assert out.stopped.tolist() == [True, False, False, False]
    assert not out.unaligned.any()  # an exact text, only too long


def test_text_that_a_stop_string_ended_gets_no_end_token():
    stopped, xyz = (encode(TEACHER, "xyz"), True), encode(POLICY, "xyz")
    rows, budgets = [stopped, stopped, ended("xyz"), ended("xyz")], [3, 2, 4, 3]
    _, written, out = teach(Script(*rows), ["a"] * 4, budgets, eos_ids=(TEACHER_EOS,))
    assert written == [xyz, xyz[:2], [*xyz, EOS], xyz]
    assert out.stopped.tolist() == [True, False, True, False]


def test_unfinished_continuation_is_not_stopped_and_no_failure():
    cut = encode(TEACHER, "b則")[:-1]
    _, rows, out = teach(Script((encode(TEACHER, "bc"), False), (cut, False)), ["a", "a"])
    assert not out.stopped.any() and not out.unaligned.any()
    assert rows == [[], []]  # it is rejected anyway


def test_special_token_inside_what_the_teacher_wrote_is_unaligned():
    user = TEACHER.convert_tokens_to_ids("<|user|>")
    new = [*encode(TEACHER, "b"), user, *encode(TEACHER, "c"), TEACHER_EOS]
    _, _, out = teach(Script((new, True)), ["a"])
    assert out.unaligned.tolist() == [True] and out.stopped.tolist() == [False]


def test_every_end_token_of_the_teacher_ends_its_text():
    # Llama 3.1 ends with any of three, and its tokenizer names one of them
    teacher = byte_tokenizer(first=("<pad>", "<filling>", "<eos>"))
    teacher.backend_tokenizer.add_special_tokens(["<|eom|>"])
    end = teacher.convert_tokens_to_ids("<|eom|>")
    assert end not in teacher.all_special_ids and end >= 259
    _, rows, out = teach(Script(([*encode(teacher, "b"), end], True)), ["a"], teacher=teacher)
    if not out.unaligned[0]:  # refusing it would be a loss, but no fault
        assert rows == [[*encode(POLICY, "b"), EOS]]


def test_special_token_at_the_end_of_a_prefix_is_unaligned():
    mark = POLICY.convert_tokens_to_ids("<|im_end|>")
    _, _, out = teach(Script(ended("b")), [[*encode(POLICY, "a"), mark]])
    assert out.unaligned.tolist() == [True]


def test_sentencepiece_policy_gets_no_space_between_prefix_and_continuation():
    policy = mistral_like()
    prefixes, rows, out = teach(Script(ended("+b")), ["1+1"], policy=policy)
    if out.stopped[0]:  # unaligned would be right as well
        assert policy.decode(prefixes[0] + rows[0][:-1]) == "1+1+b"


# --- In the loop ----------------------------------------------------------------------------------


def test_worksheet_trains_with_a_teacher_of_another_tokenizer(tmp_path):
    teacher = byte_tokenizer()
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = Transformer(
        TransformerConfig(vocab_size=len(teacher), mlp_dim=32, max_position=512, **sizes)
    )
    save_hf(tmp_path / "teacher", model, model.init(jax.random.key(0)), teacher)
    options = (f"--config.teacher.path={tmp_path / 'teacher'}", "--config.eval.ood=False")
    run(tmp_path / "run", *options, config="worksheet:n=3,runlocal")
    steps = training_rows(tmp_path / "run")
    assert len(steps) == 2 and all(np.isfinite(row["loss"]) for row in steps)
    for row in steps:
        assert row["corrections/made"] > 0 == row["corrections/accepted"]  # a random teacher
        assert 0 <= row["teacher/alignment_failed"] <= row["corrections/made"]
    assert "prm/alignment_failed" in steps[0]
