"""Tests of the scorers: scores land on the policy's own steps, and what has none is left alone."""

import json

import jax
import numpy as np
import pytest
from test_prm_formats import MARKS, MERGES, byte_tokenizer
from test_train import gsm8k_options, language_model, run, training_rows  # noqa: F401, a fixture

from scope_jax.models.transformer import Transformer, TransformerConfig
from scope_jax.prm import PRM, save_prm
from scope_jax.prm_formats import PRMFormat, PRMTexts
from scope_jax.records import ScoreRequests, StepScores
from scope_jax.scorers import (
    Window,
    filling,
    join_windows,
    oracle_scorer,
    text_scorer,
    token_scorer,
    windows_of,
)
from scope_jax.steps import segment_steps

POLICY = byte_tokenizer(first=("<pad>", "<eos>"))
OTHER = byte_tokenizer(MERGES, MARKS, first=("<pad>", "<eos>", "<filling>"), bos="<bos>")
EOS = POLICY.eos_token_id


def ids_of(text: str) -> list[int]:
    return POLICY.encode(text, add_special_tokens=False)


BAD_BYTE = POLICY.convert_tokens_to_ids("ÿ")  # how byte-level BPE writes 0xff


def requests(completions, *, splitter="\n") -> ScoreRequests:
    """Requests of rows of ids, with the prompt "p?" LEFT-padded to 4 and T = the longest."""
    length = max(map(len, completions))
    ids = np.full((len(completions), length), 0, np.int32)
    mask = np.arange(length) < np.array([len(row) for row in completions])[:, None]
    for row, completion in enumerate(completions):
        ids[row, : len(completion)] = completion
    step_ends, step_mask = segment_steps(POLICY, ids, mask, splitter)
    rows = len(completions)
    return ScoreRequests(
        prompt_ids=np.tile(np.array([0, 0, *ids_of("p?")], np.int32), (rows, 1)),
        prompt_mask=np.tile(np.array([False, False, True, True]), (rows, 1)),
        completion_ids=ids, completion_mask=mask, finished=mask.any(1),
        step_ends=step_ends, step_mask=step_mask,
        records=tuple({"problem": "p?", "gold": f"gold {row}"} for row in range(rows)),
    )  # fmt: skip


class ReadsIds:
    """A score_fn: a step's score is the id `back` columns before its read position."""

    def __init__(self, back):
        self.back, self.calls = back, []

    def __call__(self, ids, mask, score_positions, step_mask):
        self.calls.append((ids, mask, score_positions, step_mask))
        scores = np.take_along_axis(ids, np.maximum(score_positions - self.back, 0), axis=1)
        return StepScores(np.where(step_mask, scores, 0).astype(np.float32), step_mask)


# --- token_scorer ---------------------------------------------------------------------------------


def test_token_scorer_reads_each_step_at_its_last_token_behind_the_prompt():
    given = requests([ids_of("ab\ncd\ne"), ids_of("xyz"), []])
    score_fn = ReadsIds(back=0)
    scored, counts = token_scorer(score_fn, max_length=100)(given)
    newline, e, z = ids_of("\n")[0], ids_of("e")[0], ids_of("z")[0]
    assert scored.scores.tolist() == [[newline, newline, e], [z, 0, 0], [0, 0, 0]]
    assert scored.mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    ids, mask, positions, _ = score_fn.calls[0]
    assert positions.tolist() == [[4 + 3 - 1, 4 + 6 - 1, 4 + 7 - 1], [4 + 3 - 1, 0, 0], [0] * 3]
    assert positions.dtype == np.int32
    assert ids[0].tolist() == [0, 0, *ids_of("p?"), *ids_of("ab\ncd\ne")]
    assert mask.sum(1).tolist() == [2 + 7, 2 + 3, 2 + 0]
    assert counts == {"prm/alignment_failed": 0, "prm/too_long": 0}


def test_token_scorer_leaves_rows_beyond_the_context_alone_and_counts_them():
    given = requests([ids_of("a\nbcd"), ids_of("a\nbc"), [], ids_of("a\nbcde")])  # 5 4 0 6
    score = token_scorer(ReadsIds(back=0), max_length=2 + 4)
    scored, counts = score(given)
    assert scored.mask.tolist() == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert counts == {"prm/alignment_failed": 0, "prm/too_long": 2}  # the empty row is none


# --- text_scorer ----------------------------------------------------------------------------------


def test_text_scorer_scores_land_on_the_policys_steps_and_every_other_row_is_left_alone():
    rows = {
        "fine": ids_of("ax\nby\n"),
        "fine, ended": [*ids_of("a.\n\ncd\nez"), EOS],
        "not UTF-8": [*ids_of("a\nb"), BAD_BYTE, *ids_of("\n")],
        "cut inside a character": ids_of("\U0001f600")[:3],
        "too long": ids_of("long " * 9),
        "no steps": [],
        "special inside": [*ids_of("a\n"), EOS, *ids_of("b")],
        "spells the PRM's mark": ids_of("a\n<extra_0>"),
        "only the end": [EOS],
    }
    layout = PRMTexts(OTHER, PRMFormat("trl"), "prm")
    score_fn = ReadsIds(back=1)  # behind the separator: the last letter of the step
    scored, counts = text_scorer(score_fn, layout, POLICY, max_length=20)(
        requests(list(rows.values()))
    )
    x, y, dot, d, z = (OTHER.convert_tokens_to_ids(letter) for letter in "xy.dz")
    want = dict.fromkeys(rows, [0, 0, 0])
    want |= {"fine": [x, y, 0], "fine, ended": [dot, d, z]}
    assert dict(zip(rows, scored.scores.tolist(), strict=True)) == want
    assert scored.mask.tolist() == [[score > 0 for score in row] for row in want.values()]
    # "only the end" has one step without text
    assert counts == {"prm/alignment_failed": 5, "prm/too_long": 1}
    ids, mask, _, step_mask = score_fn.calls[0]
    assert ids.shape == mask.shape == (9, 20) and step_mask.shape == (9, 3)
    assert mask.any(1).tolist() == [True, True] + [False] * 7
    assert OTHER.decode(ids[0][mask[0]]) == "<bos>p?ax\nby\n"


def test_text_scorer_agrees_with_token_scorer_where_the_tokenizers_agree():
    """The last letters of random steps, by both routes."""
    rng = np.random.default_rng(0)
    texts = [
        "\n".join("".join(rng.choice(list("abcdef"), 3)) for _ in range(rng.integers(1, 5)))
        for _ in range(20)
    ]
    given = requests([[*ids_of(text), EOS] for text in texts])
    layout = PRMTexts(POLICY, PRMFormat("trl"), "prm")
    by_text, _ = text_scorer(ReadsIds(back=1), layout, POLICY, max_length=64)(given)
    by_token, _ = token_scorer(ReadsIds(back=1), max_length=64)(given)
    np.testing.assert_array_equal(by_text.mask, by_token.mask)
    np.testing.assert_array_equal(by_text.scores, by_token.scores)
    assert by_text.mask.sum() == sum(text.count("\n") + 1 for text in texts)


# --- windows --------------------------------------------------------------------------------------


def windows_twin(fixed, lengths, window):
    """The rule in words: try every start and end."""
    found, first = [], 0
    room = window - fixed
    if not lengths or any(length > room for length in lengths):
        return []
    while first < len(lengths):
        most = min(room // 2, room - lengths[first])
        start = min(s for s in range(first + 1) if sum(lengths[s:first]) <= most)
        end = max(e for e in range(first + 1, len(lengths) + 1) if sum(lengths[start:e]) <= room)
        found.append((start, first, end))
        first = end
    return found


def test_windows_are_those_of_the_rule_written_out():
    # 10 tokens beside the 20 of the problem; half of the room is 5.
    assert windows_of(20, [3] * 10, 30) == [(0, 0, 3), (2, 3, 5), (4, 5, 7), (6, 7, 9), (8, 9, 10)]
    assert windows_of(20, [5, 5, 5, 5], 30) == [(0, 0, 2), (1, 2, 3), (2, 3, 4)]
    assert windows_of(20, [5, 5, 9, 1], 30) == [(0, 0, 2), (2, 2, 4)]  # 5 + 9 > 10: no context
    assert windows_of(20, [5, 11, 5], 30) == windows_of(20, [], 30) == []
    assert windows_of(40, [1], 30) == []
    # K steps of one token: the first window scores 2r, each further one r of them.
    room, steps = 8, 50
    assert len(windows_of(0, [1] * steps, room)) == 1 + -(-(steps - room) // (room // 2))


def test_windows_agree_with_their_plain_twin_and_score_each_step_once():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(0, 12, rng.integers(1, 20)).tolist()
        fixed, window = int(rng.integers(0, 10)), int(rng.integers(8, 60))
        found = windows_of(fixed, lengths, window)
        assert found == windows_twin(fixed, lengths, window)
        if found:
            scored = [step for _, first, end in found for step in range(first, end)]
            assert scored == list(range(len(lengths)))
            assert all(fixed + sum(lengths[start:end]) <= window for start, _, end in found)
        else:
            assert max(lengths) > window - fixed


class CountsTokens(ReadsIds):
    """A score is read as by ReadsIds; how many rows hold a step is `read`."""

    @property
    def read(self):
        return sum(int(step_mask.any(1).sum()) for *_, step_mask in self.calls)


def scorers_of(kind, score_fn, **options):
    if kind == "token":
        return token_scorer(score_fn, **options)
    return text_scorer(score_fn, PRMTexts(POLICY, PRMFormat("trl"), "prm"), POLICY, **options)


def random_requests(rng, rows=12, most=9):
    texts = [
        "\n".join("".join(rng.choice(list("abcdef"), 3)) for _ in range(rng.integers(1, most)))
        for _ in range(rows)
    ]
    return requests([[*ids_of(text), EOS] for text in texts]), texts


@pytest.mark.parametrize("kind", ["token", "text"])
def test_windows_change_nothing_where_every_text_fits(kind):
    given, _ = random_requests(np.random.default_rng(1))
    plain, windowed = ReadsIds(back=1), ReadsIds(back=1)
    want, counts = scorers_of(kind, plain, max_length=64)(given)
    got, windows = scorers_of(kind, windowed, max_length=64, window=64)(given)
    jax.tree.map(np.testing.assert_array_equal, plain.calls, windowed.calls)  # the very same call
    jax.tree.map(np.testing.assert_array_equal, want, got)
    assert windows == counts | {"prm/windows": 0}


@pytest.mark.parametrize("kind", ["token", "text"])
def test_a_text_in_windows_gets_the_scores_of_the_whole_text(kind):
    """A score here is the step's own last letter, so that it must not depend on the windows."""
    given, texts = random_requests(np.random.default_rng(2), most=14)
    whole, _ = scorers_of(kind, ReadsIds(back=1), max_length=64)(given)
    score_fn = CountsTokens(back=1)
    got, counts = scorers_of(kind, score_fn, max_length=18, window=18, block=4)(given)
    jax.tree.map(np.testing.assert_array_equal, whole, got)
    # "p?" is 2 tokens, a step 4 with its separator (its end token); windows of 2 + 16.
    steps = [text.count("\n") + 1 for text in texts]
    expected = sum(len(windows_twin(2, [4] * n, 18)) for n in steps if 2 + 4 * n > 18)
    assert counts == {"prm/alignment_failed": 0, "prm/too_long": 0, "prm/windows": expected}
    assert expected > 24
    assert score_fn.read == 12 + expected - sum(2 + 4 * n > 18 for n in steps)
    (call,) = score_fn.calls
    assert len(call[0]) % 4 == 0 and call[1].sum(1).max() <= 18


@pytest.mark.parametrize("kind", ["token", "text"])
def test_a_step_longer_than_a_window_leaves_its_rollout_unscored(kind):
    given = requests([ids_of("ab\n" + "c" * 20 + "\nde"), ids_of("ab\ncd"), ids_of("x" * 30)])
    got, counts = scorers_of(kind, ReadsIds(back=0), max_length=12, window=12)(given)
    assert counts == {"prm/alignment_failed": 0, "prm/too_long": 2, "prm/windows": 0}
    assert got.mask.tolist() == [[False] * 3, [True, True, False], [False] * 3]


def test_a_rollout_with_one_window_that_could_not_be_scored_is_not_scored():
    scores = np.arange(12, dtype=np.float32).reshape(4, 3) / 12
    mask = np.array([[True, True, False], [True] * 3, [True] * 3, [False] * 3])
    further = [(0, Window(1, 2, 3)), (1, Window(2, 3, 3))]  # rows 2 and 3; step 2 of row 0
    got = join_windows(StepScores(scores, mask), 2, further)
    assert got.scores.tolist() == [[scores[0, 0], scores[0, 1], scores[2, 1]], scores[1].tolist()]
    mask[2] = False
    got = join_windows(StepScores(scores, mask), 2, further)
    assert got.mask.tolist() == [[False] * 3, [True] * 3] and not got.scores[0].any()


def test_further_windows_come_in_whole_forwards():
    assert filling(0, 8, 4, int) == 0
    assert [filling(n, 8, 4, int) for n in (1, 4, 5)] == [3, 0, 3]
    assert filling(5, 8, 0, int) == filling(5, 8, 16, int) == 3
    assert filling(1, 8, 4, lambda _: 9) == 11  # another process has nine


# --- oracle_scorer --------------------------------------------------------------------------------


def test_oracle_scorer_asks_the_tasks_checker_with_gold_and_finished():
    asked = []

    def check_steps(gold, steps, finished):
        asked.append((gold, steps, finished))
        return ["x" not in step for step in steps]

    def decode_steps(ids, ends, mask):
        rows = []
        for row, row_ends, real in zip(ids, ends, mask, strict=True):
            bounds = [0, *row_ends[real]]
            rows.append([POLICY.decode(row[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)])
        return rows

    given = requests([ids_of("a\nx\nb"), [], ids_of("xa")])
    scored, counts = oracle_scorer(check_steps, decode_steps)(given)
    assert asked == [
        ("gold 0", ["a\n", "x\n", "b"], True), ("gold 1", [], False), ("gold 2", ["xa"], True),
    ]  # fmt: skip
    assert scored.scores.tolist() == [[1, 0, 1], [1, 1, 1], [0, 1, 1]]
    np.testing.assert_array_equal(scored.mask, given.step_mask)
    assert counts == {}


# --- In the loop ----------------------------------------------------------------------------------


def tiny_model(vocab_size: int, **options) -> Transformer:
    sizes = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    return Transformer(TransformerConfig(vocab_size=vocab_size, mlp_dim=32, **sizes, **options))


@pytest.fixture(scope="module")
def other_prm(tmp_path_factory):
    """A random PRM whose tokenizer is not the policy's."""
    path = tmp_path_factory.mktemp("prm") / "prm"
    prm = PRM(tiny_model(len(OTHER)), "linear2_at_sep", PRMFormat("trl"))
    key = jax.random.key(0)
    backbone = prm.backbone.init(jax.random.fold_in(key, 0))
    backbone.pop("unembed", None)
    head = prm.init_head(jax.random.fold_in(key, 1))
    save_prm(path, prm, {"backbone": backbone, "head": head}, OTHER)
    return path


def test_training_counts_what_a_prm_with_another_tokenizer_cannot_read(
    tmp_path,
    language_model,  # noqa: F811
    other_prm,
):
    options = gsm8k_options(language_model, f"--config.prm.path={other_prm}")
    run(tmp_path / "run", *options, config="gsm8k_smollm2:runlocal")
    steps = training_rows(tmp_path / "run")
    assert len(steps) == 2
    for row in steps:  # 8 problems x 2 rollouts of random bytes: few are UTF-8
        assert 0 < row["prm/alignment_failed"] <= 16 and row["prm/too_long"] == 0
        assert np.isfinite(row["loss"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["prm"]["reads"] == "text"


def test_a_checker_that_errs_does_so_as_often_as_told_and_the_same_each_time():
    right = [[f"a{i}\n", f"b{i}\n"] for i in range(2000)]
    check = lambda gold, steps, finished: [True, False]  # noqa: E731, ARG005
    decode = lambda ids, ends, mask: right  # noqa: E731, ARG005
    rows = np.zeros((2000, 2), np.int32)
    asked = ScoreRequests(
        rows, rows > 0, rows, rows >= 0, rows[:, 0] == 0, rows, np.ones((2000, 2), bool),
        records=tuple({"gold": "g"} for _ in right),
    )  # fmt: skip
    options = {"false_alarms": 0.2, "misses": 0.3}
    scores = oracle_scorer(check, decode, **options)(asked)[0].scores
    # Of 2,000 draws the share's standard deviation is 0.010: four of them.
    assert abs((scores[:, 0] == 0).mean() - 0.2) < 0.04
    assert abs((scores[:, 1] == 1).mean() - 0.3) < 0.04
    again = oracle_scorer(check, decode, **options)(asked)[0].scores
    other = oracle_scorer(check, decode, seed=1, **options)(asked)[0].scores
    np.testing.assert_array_equal(scores, again)
    assert (scores != other).any()
    exact = oracle_scorer(check, decode)(asked)[0].scores
    assert (exact == [1, 0]).all()
