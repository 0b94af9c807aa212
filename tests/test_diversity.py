"""Tests of the group metrics: arithmetic by hand, nltk's numbers, invariances."""

import itertools
import math

import numpy as np
import pytest

from scope_jax.diversity import (
    correct_diversity,
    distinct_n,
    equation_diversity,
    expected_distinct,
    group_diversity,
    pass_at_k,
    self_bleu,
    textual_diversity,
    vendi_score,
)

DUCKS = [
    "She sells 9 eggs a day , so she makes 9 * 2 = 18 dollars a day .",
    "She has 16 - 3 - 4 = 9 eggs left , so she makes 9 * 2 = 18 dollars every day .",
    "There are 16 eggs . She eats 3 and bakes with 4 . She sells 9 eggs a day for 18 dollars .",
]
COPIES = ["so she makes 18 dollars"] * 3


def close(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


# --- distinct-n -----------------------------------------------------------------------------------


def test_distinct_n_pools_the_texts():
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab: none from text to text
    assert distinct_n(["a b a", "a b"], 3) == 1
    assert distinct_n(["a  b\n a", "a\tb"], 1) == 2 / 5  # any whitespace separates tokens


def test_distinct_n_without_ngrams_is_zero():
    assert distinct_n(["a b", "", "c"], 3) == 0.0
    assert distinct_n([], 1) == 0.0


def test_distinct_n_below_one_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        distinct_n(["a"], 0)


# --- self-BLEU ------------------------------------------------------------------------------------


def test_self_bleu_by_hand():
    # Both texts match the other in 4 of 5 words, 3 of 4, 2 of 3 and 1 of 2 n-grams.
    want = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert self_bleu(["a b c d e", "a b c d f"]) == close(want)


def test_self_bleu_counts_a_tenth_of_a_match_where_there_is_none():
    want = (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)
    assert self_bleu(["a b c d", "a b x d"]) == close(want)


def test_self_bleu_without_a_common_word_is_zero():
    assert self_bleu(["a b c d", "e f g h"]) == 0.0


def test_self_bleu_punishes_only_the_shorter_text():
    short = math.exp(1 - 6 / 4)
    long = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert self_bleu(["a b c d", "a b c d e f"]) == close((short + long) / 2)


def test_self_bleu_takes_the_closest_reference_length_and_on_a_tie_the_shorter():
    four, five, eight = "a b c d", "a b c d e", "a b c d e f g h"
    shares = (5 / 8 * 4 / 7 * 3 / 6 * 2 / 5) ** (1 / 4)
    want = (math.exp(1 - 5 / 4) + 1 + shares) / 3  # 4 against 5; 5 against 4; 8 against 5
    assert self_bleu([four, five, eight]) == close(want)
    # 4 lies between 3 and 5: no penalty. "a b c" has no 4-gram (0.1 of 1) and 3 against 4.
    three = math.exp(1 - 4 / 3) * (1 * 1 * 1 * 0.1) ** (1 / 4)
    want = (three + 1 + (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)) / 3
    assert self_bleu(["a b c", "a b c d", "a b c d x"]) == close(want)


def test_self_bleu_clips_at_the_largest_count_in_one_text():
    # "a" stands once in either other text, so one of the two counts; 3 words, 2 bigrams, 1 trigram.
    first = (3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 4)
    second = (3 / 4 * 2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 4)  # a, b, c
    third = (1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)  # a
    want = (first + second + third) / 3
    assert self_bleu(["a a b c", "a b c d", "a x y z"]) == close(want)


def test_self_bleu_equals_nltk():
    # from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu   (nltk 3.10.4)
    # t, smooth = [x.split() for x in texts], SmoothingFunction(epsilon=0.1).method1
    # sum(sentence_bleu(t[:i] + t[i+1:], t[i], smoothing_function=smooth) for i in range(len(t)))
    #   / len(t)
    assert self_bleu(DUCKS) == close(0.4373173378268791)
    assert self_bleu(DUCKS[:2]) == close(0.4338939375068897)
    assert self_bleu(["a b c", "a b c"]) == close(0.5623413251903491)
    texts = ["the cat sat", "the cat sat on the mat", "a cat sat on a mat today"]
    assert self_bleu(texts) == close(0.21276659021419175)


def test_copies_have_self_bleu_one():
    assert self_bleu(COPIES) == 1.0
    assert self_bleu([*DUCKS, *DUCKS]) == close(1.0)


# --- DIVER's textual diversity --------------------------------------------------------------------


def test_textual_diversity_by_hand():
    bleu = (5 / 6) ** 0.02 * (4 / 5) ** 0.1 * (3 / 4) ** 0.15 * (2 / 3) ** 0.25 * (1 / 2) ** 0.38
    assert textual_diversity(["a b c d e f", "a b c d e g"]) == close(1 - bleu)
    # A third text without a common 5-gram has BLEU 0 with both: pairs 1-2, 1-3, 2-3.
    texts = ["a b c d e f", "a b c d e g", "a b c d x y"]
    assert textual_diversity(texts) == close(1 - (bleu + 0 + 0) / 3)


def test_textual_diversity_averages_both_directions():
    short = math.exp(1 - 6 / 5)
    long = (5 / 6) ** 0.02 * (4 / 5) ** 0.1 * (3 / 4) ** 0.15 * (2 / 3) ** 0.25 * (1 / 2) ** 0.38
    assert textual_diversity(["a b c d e", "a b c d e f"]) == close(1 - (short + long) / 2)


def test_textual_diversity_equals_nltk():
    # b = lambda i, j: sentence_bleu([t[j]], t[i], weights=(.02, .1, .15, .25, .38))  (nltk 3.10.4)
    # sum(1 - sum((b(i, j) + b(j, i)) / 2 for j in range(n) if j != i) / (n - 1)
    #     for i in range(n)) / n          with t = [x[:1000].split() for x in texts], n = len(t)
    assert textual_diversity(DUCKS) == close(0.8154120016287599)
    assert textual_diversity(DUCKS[:2]) == close(0.6231923910577304)
    assert textual_diversity(["a b c", "a b c"]) == 1.0  # no 5-gram, no smoothing: BLEU 0


def test_copies_have_textual_diversity_zero_and_strangers_one():
    assert textual_diversity(COPIES) == 0.0
    assert textual_diversity(["a b c d e", "f g h i j"]) == 1.0


def test_textual_diversity_reads_the_first_thousand_characters():
    same = "ab cd " * 166 + "abc "
    assert len(same) == 1000
    assert textual_diversity([same + "one", same + "two three"]) == 0.0
    assert textual_diversity([same[1:] + "one", same[1:] + "two three"]) > 0.0


# --- Equations ------------------------------------------------------------------------------------


def test_equation_diversity_by_hand():
    # Shares: 1 of 2 (b), 1 of 3 (c, not a, not d), 0 of 1.
    texts = ["$a$ and $b$", r"\(a\), \[c\] and $$d$$", "so $d$"]
    assert equation_diversity(texts) == close((1 / 2 + 1 / 3 + 0) / 3)


def test_formulas_are_compared_without_whitespace_and_delimiters():
    assert equation_diversity(["$x+1=2$", "\\[ x + 1\n= 2 \\]"]) == 0.0
    assert equation_diversity(["$x+1=2$", "$$\nx + 1\n= 2\n$$"]) == 0.0
    assert equation_diversity(["$x+1=2$", "$x+1=3$"]) == 1.0


def test_formula_counts_once_per_rollout():
    assert equation_diversity(["$a$ $a$ $b$", "$b$"]) == close((1 / 2 + 0) / 2)


def test_rollout_without_formula_has_share_zero():
    assert equation_diversity(["$a$", "plain words"]) == 1 / 2
    assert equation_diversity(["no", "formula"]) == 0.0


def test_money_and_line_breaks_are_no_formulas():
    assert equation_diversity([r"costs \$5 or \$6", r"a \\[2pt] b \]"]) == 0.0
    assert equation_diversity(["costs $5\nand then $6", "$x$"]) == 1 / 2


# --- All of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [self_bleu, textual_diversity, equation_diversity])
def test_fewer_than_two_texts_with_words_give_zero(metric):
    assert metric([]) == 0.0
    assert metric(["so $a$ is b and c"]) == 0.0
    assert metric(["so $a$ is b and c", "", " \n"]) == 0.0


@pytest.mark.parametrize("metric", [self_bleu, textual_diversity, equation_diversity])
def test_empty_texts_change_nothing(metric):
    texts = ["so $a$ and $c$ is b and c and d", "so $b$ and $c$ is b and c and d too"]
    assert metric(["", texts[0], " \n", texts[1]]) == metric(texts)
    assert 0 < metric(texts) < 1  # so that a zero in the mean would show


def test_order_of_the_texts_changes_nothing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        texts = [" ".join(rng.choice(["$a$", "$b$", "c", "d"], 20)) + f" ${i}$" for i in range(7)]
        want = group_diversity(texts)
        assert 0 < min(want.values())
        for _ in range(5):
            assert group_diversity([texts[i] for i in rng.permutation(7)]) == want  # to the bit


def test_group_diversity_names_and_values():
    texts = [*DUCKS, "$9*2=18$ , so $18$ dollars a day", "$9*2=18$"]
    assert group_diversity(["", *texts]) == {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "distinct_3": distinct_n(texts, 3),
        "distinct_4": distinct_n(texts, 4),
        "one_minus_self_bleu": 1 - self_bleu(texts),
        "textual_diversity": textual_diversity(texts),
        "equation_diversity": 1 / 2 / 5,
    }


def test_group_of_one_or_none_is_not_diverse():
    assert set(group_diversity(["", ""]).values()) == {0.0}
    one = group_diversity(["$a$ b c d e", ""])
    assert one["one_minus_self_bleu"] == one["textual_diversity"] == one["equation_diversity"] == 0


def test_a_rewritten_copy_makes_a_group_more_diverse():
    before, after = group_diversity(COPIES), group_diversity([*COPIES[:2], DUCKS[0]])
    for name in set(before) - {"equation_diversity"}:
        assert after[name] > before[name], name


# --- pass@k and Vendi -----------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    assert pass_at_k(8, 3, 1) == 3 / 8
    assert pass_at_k(8, 3, 2) == close(1 - (5 * 4 / 2) / (8 * 7 / 2))
    assert pass_at_k(8, 0, 8) == 0.0
    assert pass_at_k(8, 1, 8) == 1.0
    assert pass_at_k(8, 7, 2) == 1.0  # only one wrong sample: two cannot both be wrong


def test_pass_at_k_counts_subsets():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == close(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_large_samples_does_not_overflow():
    assert pass_at_k(10_000, 5_000, 1) == 0.5
    assert pass_at_k(np.int64(4000), np.int64(1), 2000) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 5), "got 5"),
        ((4, 2, 0), "got 0"),
        ((4, 2, -1), "got -1"),
        ((0, 0, 1), "k must be"),
        ((-1, 0, -1), "k must be"),
        ((4, 5, 1), "num_correct"),
        ((4, -1, 1), "num_correct"),
    ],
)
def test_pass_at_k_outside_its_ranges_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def test_vendi_score_counts_the_different_items():
    assert vendi_score(np.ones((4, 4))) == close(1)
    assert vendi_score(np.eye(5)) == close(5)
    assert vendi_score(np.kron(np.eye(2), np.ones((3, 3)))) == close(2)
    # The eigenvalues of [[1, s], [s, 1]] / 2 are (1 + s) / 2 and (1 - s) / 2: here 3/4 and 1/4.
    want = math.exp(-(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4)))
    assert vendi_score(np.array([[1, 0.5], [0.5, 1]])) == close(want)


@pytest.mark.parametrize(
    "similarity",
    [np.ones((2, 3)), np.zeros((0, 0)), [[1, 0.5], [0.1, 1]], 2 * np.eye(2), [[1, 2], [2, 1]]],
)
def test_vendi_score_of_what_is_no_similarity_is_an_error(similarity):
    with pytest.raises(ValueError, match="similarity must be"):
        vendi_score(np.array(similarity))


# --- among correct texts --------------------------------------------------------------------------


def test_expected_distinct_is_rarefaction():
    # 2 of {a, a, b}: aa, ab, ab -> (1 + 2 + 2) / 3
    assert expected_distinct([2, 1], 2) == close(5 / 3)
    assert expected_distinct([2, 1], 1) == close(1)
    assert expected_distinct([2, 1], 3) == close(2)
    assert expected_distinct([1, 1, 1, 1], 3) == close(3)


def test_expected_distinct_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(1, 4, rng.integers(1, 4)).tolist()
        items = [kind for kind, count in enumerate(counts) for _ in range(count)]
        for m in range(1, len(items) + 1):
            draws = [len(set(draw)) for draw in itertools.combinations(items, m)]
            assert expected_distinct(counts, m) == close(sum(draws) / len(draws))


def test_more_items_of_the_same_mixture_are_not_more_distinct():
    # all kinds found grow from 2 to 4 here, two draws out of ever more items do not
    assert expected_distinct([5, 5], 2) < expected_distinct([1, 1], 2)


@pytest.mark.parametrize("m", [0, 4])
def test_expected_distinct_refuses_more_items_than_there_are(m):
    with pytest.raises(ValueError, match="1..3"):
        expected_distinct([2, 1], m)


def test_errors_do_not_count_as_diversity():
    copies, wrong = COPIES[0], [f"so she makes {x} dollars" for x in range(5)]
    groups, solved = [[copies, copies, *wrong]], [[True, True] + [False] * 5]
    assert textual_diversity(groups[0]) > 0.5
    assert correct_diversity(groups, solved)["textual_diversity"] == close(0)


def test_correct_diversity_is_over_groups_with_two_correct_texts():
    groups = [DUCKS, COPIES, DUCKS, DUCKS]
    solved = [[True] * 3, [True] * 3, [True, False, False], [False] * 3]
    expected = (textual_diversity(DUCKS) + 0) / 2
    found = correct_diversity(groups, solved)
    assert found == {"textual_diversity": close(expected), "equation_diversity": 0, "groups": 2}
    assert correct_diversity(groups[2:], solved[2:]) == {"groups": 0}
