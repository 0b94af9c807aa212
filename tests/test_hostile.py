"""The verifier and the data readers under tests/hostile.py's corpora, and under random text."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

import scope_jax.rewards as rewards
from scope_jax.rewards import verifier_stats, verify_batch
from tests import hostile

# --- Completions ----------------------------------------------------------------------------------


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def test_every_hostile_completion_gets_the_right_verdict_and_the_pool_works_on(tmp_path):
    mark = tmp_path / "was_here"
    golds, texts, expected = zip(*hostile.completions(str(mark)), strict=True)
    assert len(set(texts)) >= 300 and 300 < sum(expected) < len(expected) - 300
    before, start = verifier_stats(), time.monotonic()
    verdicts = verify_batch(golds, texts, num_workers=2, timeout=2.0)
    seconds = time.monotonic() - start
    pairs = zip(golds, texts, expected, verdicts, strict=True)
    assert [(g, t[:99], right) for g, t, right, found in pairs if found is not right] == []
    assert not mark.exists()
    assert verifier_stats().timeouts - before.timeouts > 10  # the corpus does reach the limit
    assert seconds < 300  # a hang limit: each pair alone has two seconds
    assert all(worker.process.poll() is None for worker in rewards._POOL)
    ordinary = [(r"\frac{1}{2}", r"\frac12", True), (r"\sqrt{12}", r"2\sqrt{3}", True)]
    ordinary += [(r"\sqrt{12}", r"3\sqrt{2}", False), ("72", "72.0", True), ("72", "73", False)]
    golds, answers, expected = zip(*ordinary, strict=True)
    assert verify_batch(golds, [boxed(answer) for answer in answers]) == list(expected)


ANYTHING = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates, too
PIECES = st.sampled_from([*hostile.BROKEN, *hostile.PROTOCOL, *hostile.UNSEEN, "5", "x", " ", "\n"])
TEXTS = st.lists(st.one_of(ANYTHING, PIECES), max_size=8).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_any_text_gets_a_verdict(texts):
    completions = [*texts, *map(boxed, texts)]
    verdicts = verify_batch([r"\frac{\pi}{11}"] * len(completions), completions, timeout=2.0)
    assert verdicts == [False] * len(completions)
    assert all(verify_batch(["7"] * len(texts), [text + "\n\\boxed{7}" for text in texts]))
