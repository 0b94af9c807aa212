r"""Diversity of the rollouts of one prompt, and pass@k (METHOD.md section 6). Pure functions.

A text is split into tokens at whitespace. Texts without a token are left out before anything is
counted, and fewer than two texts have diversity 0: empty completions must not look diverse.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

Profile = list[Counter[tuple[str, ...]]]  # [n - 1]: how often a text holds each n-gram

_SELF_BLEU_WEIGHTS = (0.25, 0.25, 0.25, 0.25)
_SELF_BLEU_EPSILON = 0.1
_TD_WEIGHTS = (0.02, 0.1, 0.15, 0.25, 0.38)  # they sum to 0.9, as given
_TD_CHARACTERS = 1000
# $$..$$, $..$, \(..\), \[..\], but not \$ (money) or \\[2pt] (a line break in a table). $..$ stays
# on its line, so that two prices in different lines do not make a formula.
_FORMULA = re.compile(
    r"(?<!\\)(?:\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\])", re.DOTALL
)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Returns unique n-grams / n-grams, pooled over the texts; 0 where there is no n-gram.

    Li et al., https://arxiv.org/abs/1510.03055. No n-gram spans two texts. ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    counts = Counter()
    for text in texts:
        counts.update(_ngrams(text.split(), n))
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Returns the mean BLEU-4 of a text against all others (1 = copies); 0 for fewer than two.

    Zhu et al., https://arxiv.org/abs/1802.01886. Uniform weights; smoothing method 1 of Chen and
    Cherry, https://aclanthology.org/W14-3346, epsilon 0.1. Under four tokens copies stay below 1.
    """
    token_lists = [text.split() for text in texts]
    profiles = [_profile(tokens, len(_SELF_BLEU_WEIGHTS)) for tokens in token_lists if tokens]
    if len(profiles) < 2:
        return 0.0
    scores = [
        _bleu(own, profiles[:i] + profiles[i + 1 :], _SELF_BLEU_WEIGHTS, _SELF_BLEU_EPSILON)
        for i, own in enumerate(profiles)
    ]
    return math.fsum(scores) / len(scores)  # fsum: the texts' order cannot move the last bit


def textual_diversity(texts: Sequence[str]) -> float:
    """Returns DIVER's TD = mean_i [1 - mean_{j != i} (BLEU(i, j) + BLEU(j, i)) / 2].

    BLEU over 1..5-grams, weights .02 .1 .15 .25 .38, no smoothing, on each text's first 1000
    characters. Without smoothing an order without a match makes BLEU 0, so texts of fewer than five
    tokens count as different even from their copies. Fewer than two texts give 0.
    """
    token_lists = [text[:_TD_CHARACTERS].split() for text in texts]
    profiles = [_profile(tokens, len(_TD_WEIGHTS)) for tokens in token_lists if tokens]
    if len(profiles) < 2:
        return 0.0
    # A mean over i of means over j of a symmetric term: the mean over all ordered pairs.
    alike = [
        _bleu(own, [other], _TD_WEIGHTS)
        for i, own in enumerate(profiles)
        for other in profiles[:i] + profiles[i + 1 :]
    ]
    return 1.0 - math.fsum(alike) / len(alike)


def equation_diversity(texts: Sequence[str]) -> float:
    r"""Returns the mean over rollouts of the share of a rollout's formulas found in no other.

    Formulas are what $..$, $$..$$, \(..\) or \[..\] enclose, compared without whitespace, each
    counted once per rollout. A rollout without any has share 0. Fewer than two texts give 0.
    """
    kept = [text for text in texts if text.split()]
    if len(kept) < 2:
        return 0.0
    formulas = [
        {"".join("".join(groups).split()) for groups in _FORMULA.findall(text)} - {""}
        for text in kept
    ]
    holders = Counter(formula for found in formulas for formula in found)
    shares = [
        sum(holders[formula] == 1 for formula in found) / len(found) if found else 0.0
        for found in formulas
    ]
    return math.fsum(shares) / len(shares)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns 1 - C(n - c, k) / C(n, k): the chance that k of n samples, c right, hold a right one.

    Chen et al., https://arxiv.org/abs/2107.03374.

    Args:
      num_samples: n, at least 1.
      num_correct: c, in 0..n.
      k: in 1..n.
    Raises:
      ValueError: outside these ranges.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be in 1..num_samples = 1..{num_samples}, got {k}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be in 0..num_samples = {num_samples}: {num_correct}")
    total = math.comb(num_samples, k)
    return (total - math.comb(num_samples - num_correct, k)) / total  # exact until the division


def expected_distinct(counts: Sequence[int], m: int) -> float:
    """Returns how many kinds m items hold on average, drawn without putting back: rarefaction.

    Hurlbert, https://doi.org/10.2307/1934145: sum_i 1 - C(n - n_i, m) / C(n, m). Kinds found among
    all n items grow with n, so a policy that is right more often would look more diverse; at a
    fixed m it does not.

    Args:
      counts: n_i, items of each kind; their sum is n.
      m: in 1..n; else ValueError.
    """
    n = sum(counts)
    if not 1 <= m <= n:
        raise ValueError(f"m must be in 1..{n}, the number of items, got {m}")
    total = math.comb(n, m)
    return math.fsum((total - math.comb(n - count, m)) / total for count in counts)


def correct_diversity(
    groups: Sequence[Sequence[str]], solved: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Returns TD and ED among the CORRECT texts of a group, means over the groups with two or more.

    A wrong digit makes texts differ too, so diversity of all texts rewards errors; this one cannot.
    TD is a mean over pairs, so more correct texts do not raise it; ED falls with their number.

    Args:
      groups: texts of each problem; solved: whether each of them is right, of the same shape.
    Returns:
      {"textual_diversity", "equation_diversity"}, without these two where no group has two correct
      texts, and "groups", the number of groups that have.
    """
    right = [
        [text for text, good in zip(*group, strict=True) if good]
        for group in zip(groups, solved, strict=True)
    ]
    right = [texts for texts in right if len(texts) > 1]
    if not right:
        return {"groups": 0.0}
    mean = lambda of: math.fsum(map(of, right)) / len(right)  # noqa: E731
    return {
        "textual_diversity": mean(textual_diversity),
        "equation_diversity": mean(equation_diversity),
        "groups": float(len(right)),
    }


def vendi_score(similarity: np.ndarray) -> float:
    """Returns the effective number of different items, 1 (all equal) to n (nothing in common).

    Friedman and Dieng, https://arxiv.org/abs/2210.02410: exp of the entropy of the eigenvalues of
    similarity / n.

    Args:
      similarity: [n, n] float, symmetric, positive semi-definite, diagonal 1; else ValueError.
    """
    similarity = np.asarray(similarity, np.float64)
    n = len(similarity)
    if not n or similarity.shape != (n, n) or not np.allclose(similarity, similarity.T):
        raise ValueError(f"similarity must be [n, n] and symmetric, got shape {similarity.shape}")
    weights = np.linalg.eigvalsh(similarity / n)
    if weights[0] < -1e-6 or not np.allclose(np.diag(similarity), 1.0):
        raise ValueError("similarity must be positive semi-definite with diagonal 1")
    weights = weights[weights > 1e-12]  # 0 log 0 = 0
    return float(np.exp(-(weights * np.log(weights)).sum()))


def group_diversity(texts: Sequence[str]) -> dict[str, float]:
    """Returns the metrics that are logged each step for one group; more is more diverse."""
    comparable = sum(bool(text.split()) for text in texts) > 1
    return {
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3, 4)},
        "one_minus_self_bleu": 1.0 - self_bleu(texts) if comparable else 0.0,
        "textual_diversity": textual_diversity(texts),
        "equation_diversity": equation_diversity(texts),
    }


def _ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    """Counts the n-grams of one text; empty where the text is shorter than n."""
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _profile(tokens: list[str], max_n: int) -> Profile:
    return [_ngrams(tokens, n) for n in range(1, max_n + 1)]


def _bleu(
    candidate: Profile, references: list[Profile], weights: Sequence[float], epsilon: float = 0.0
) -> float:
    """Returns the sentence BLEU of a non-empty candidate, https://aclanthology.org/P02-1040.

    A match is clipped at its largest count in one reference; the brevity penalty takes the closest
    reference length (on a tie the shorter). An order without a match counts `epsilon` matches; with
    epsilon 0, or without a common word, BLEU is 0. An order of which the candidate has no n-gram is
    no match of one. (nltk.translate.bleu_score's conventions.)
    """
    log_precision = 0.0
    for order, weight in enumerate(weights):
        own = candidate[order]
        theirs = [reference[order] for reference in references]
        matches = sum(
            min(count, max(t.get(gram, 0) for t in theirs)) for gram, count in own.items()
        )
        if not matches and (order == 0 or epsilon == 0.0):
            return 0.0
        log_precision += weight * math.log((matches or epsilon) / max(own.total(), 1))
    length = candidate[0].total()
    lengths = [reference[0].total() for reference in references]
    closest = min(lengths, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1.0 - closest / length) + log_precision)
