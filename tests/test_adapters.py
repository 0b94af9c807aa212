"""Tests that a user's own flax model drives the stages: linen and nnx, each through a few lines.

The two decoders are written as if scope_jax did not exist: no cache, a mask of the caller's. The
blocks between the `adapter` markers are all that it takes, and the README shows exactly those.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from scope_jax import continue_from, generate, score_steps, token_logps
from scope_jax.metrics import CompileCounter
from scope_jax.models.kv_cache import positions_from_mask

VOCAB, WIDTH, CONTEXT, HEADS, LAYERS = 13, 16, 24, 2, 2


class LinenDecoder(nn.Module):
    """Returns [B, L, WIDTH]; logits are that @ the transposed embedding."""

    num_layers: int = LAYERS

    @nn.compact
    def __call__(self, tokens, positions, mask):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        x += nn.Embed(CONTEXT, WIDTH, name="position")(positions)
        for _ in range(self.num_layers):
            x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x += self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NnxDecoder(nnx.Module):
    """Returns [B, L, WIDTH]; logits are that @ the transposed embedding."""

    def __init__(self, rngs, num_layers=LAYERS):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(num_layers)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens, positions, mask):
        x = self.embed(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


# --- adapter: no cache ---
def read_all(decoder, tokens, positions, cache):
    """Reads all tokens so far again; `cache` [B, slots, 2] holds their ids and positions."""
    new = jnp.stack([tokens, positions], axis=-1)  # padding has position -1
    seen = new if cache is None else jnp.concatenate([cache, new], axis=1)[:, tokens.shape[1] :]
    ids, at = seen[..., 0], seen[..., 1]
    mask = (at[:, None, :] >= 0) & (at[:, None, :] <= at[:, :, None])  # [B, reader, read]
    return decoder(ids, at, mask[:, None])[:, -tokens.shape[1] :], seen


# --- end ---


# --- adapter: linen ---
@dataclasses.dataclass(frozen=True)
class LinenModel:
    decoder: LinenDecoder

    def init_cache(self, batch, slots):
        return jnp.full((batch, slots, 2), -1)

    def __call__(self, params, tokens, *, positions, cache=None):
        return read_all(functools.partial(self.decoder.apply, params), tokens, positions, cache)

    def unembed(self, params):
        return params["params"]["embed"]["embedding"].T


# --- end ---


# --- adapter: nnx ---
@dataclasses.dataclass(frozen=True)
class NnxModel:
    graphdef: nnx.GraphDef  # graphdef, params = nnx.split(decoder)

    def init_cache(self, batch, slots):
        return jnp.full((batch, slots, 2), -1)

    def __call__(self, params, tokens, *, positions, cache=None):
        return read_all(nnx.merge(self.graphdef, params), tokens, positions, cache)

    def unembed(self, params):
        return params["embed"]["embedding"][...].T


# --- end ---


# --- adapter: prm ---
@dataclasses.dataclass(frozen=True)
class Judge:
    model: LinenModel | NnxModel

    def __call__(self, params, ids, positions, score_positions):
        hidden, _ = self.model(params["model"], ids, positions=positions)
        scores = jax.nn.sigmoid(hidden @ params["head"])  # [B, L]
        return jnp.take_along_axis(scores, score_positions, axis=1)


# --- end ---


# --- A model, its adapter, and what the tests compare with ----------------------------------------


class Case(NamedTuple):
    model: Any  # the adapter
    params: Any
    hidden_of: Callable  # the user's module itself: (tokens, positions, mask) -> [B, L, WIDTH]
    embedding: np.ndarray  # [VOCAB, WIDTH]

    def hidden(self, tokens):
        """[len(tokens), WIDTH]; the row is filled up on the right, which no earlier token sees."""
        filled = np.zeros((1, CONTEXT), np.int32)
        filled[0, : len(tokens)] = tokens
        causal = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), bool))
        hidden = self.hidden_of(filled, np.arange(CONTEXT, dtype=np.int32)[None], causal)
        return np.asarray(hidden[0, : len(tokens)], np.float64)

    def logits(self, tokens):
        return self.hidden(tokens) @ self.embedding.T


def random_params(shapes):
    """Draws every weight, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        noise = rng.standard_normal(x.shape) * (0.7 if len(x.shape) > 1 else 0.3)
        return jnp.asarray(noise + ("scale" in jax.tree_util.keystr(path)), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_linen():
    decoder = LinenDecoder()
    tokens, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 1, 2, 2), bool)
    params = random_params(jax.eval_shape(decoder.init, jax.random.key(0), tokens, tokens, mask))
    embedding = np.asarray(params["params"]["embed"]["embedding"])
    return Case(
        LinenModel(decoder), params, jax.jit(functools.partial(decoder.apply, params)), embedding
    )


def make_nnx():
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: NnxDecoder(nnx.Rngs(0))))
    params = random_params(shapes)
    decoder = nnx.merge(graphdef, params)
    hidden_of = functools.partial(nnx.jit(NnxDecoder.__call__), decoder)
    return Case(NnxModel(graphdef), params, hidden_of, np.asarray(decoder.embed.embedding[...]))


MAKERS = {"linen": make_linen, "nnx": make_nnx}
EOS, GROUP, LENGTH = 1, 3, 8
PROMPTS = ([5, 3, 8, 2, 11], [7, 4], [9, 2, 6])  # LEFT-padded to 5
PROMPT_MASK = np.arange(5) >= 5 - np.array([len(p) for p in PROMPTS])[:, None]
PROMPT_IDS = np.zeros((3, 5), np.int32)
for row, prompt in enumerate(PROMPTS):
    PROMPT_IDS[row, 5 - len(prompt) :] = prompt


@pytest.fixture(scope="module", params=MAKERS)
def case(request):
    return MAKERS[request.param]()


def sample(case, **options):
    options = {"group_size": GROUP, "max_new_tokens": LENGTH, "eos_ids": EOS, **options}
    key = jax.random.key(0)
    return jax.device_get(
        generate(case.model, case.params, PROMPT_IDS, PROMPT_MASK, key, **options)
    )


def greedy_by_hand(case, prompt, length=LENGTH):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length and tokens[-1] != EOS:
        logits = case.logits(tokens)[-1]
        best, second = np.sort(logits)[[-1, -2]]
        assert best - second > 1e-3, "two tokens are nearly tied: take other weights"
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def written(rollouts):
    rows = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


# --- Generate and token_logps ---------------------------------------------------------------------


def test_sampled_logps_equal_token_logps_of_a_full_forward(case):
    rollouts = sample(case)
    ids = np.concatenate([rollouts.prompt_ids, rollouts.completion_ids], axis=1)
    mask = np.concatenate([rollouts.prompt_mask, rollouts.completion_mask], axis=1)

    @jax.jit
    def forward(params):
        hidden, _ = case.model(params, ids, positions=positions_from_mask(jnp.asarray(mask)))
        hidden = hidden[:, 4:-1]  # 5 columns of prompt; the last of them predicts the first token
        return token_logps(hidden, case.model.unembed(params), rollouts.completion_ids)[0]

    logps = forward(case.params)
    real = rollouts.completion_mask
    np.testing.assert_allclose(np.asarray(logps)[real], rollouts.logps[real], rtol=0, atol=1e-4)
    assert 0 < rollouts.finished.sum() < GROUP * len(PROMPTS)  # rows that end, and rows that do not
    assert len(set(map(tuple, written(rollouts)))) > 5
    assert rollouts.logps[real].std() > 0.5


def test_sampled_logps_equal_the_module_s_own(case):
    rollouts = sample(case)
    for row, completion in enumerate(written(rollouts)):
        prompt = PROMPTS[row // GROUP]
        logits = case.logits(prompt + completion)[len(prompt) - 1 : -1]
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = logps[np.arange(len(completion)), completion]
        got = rollouts.logps[row, : len(completion)]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_greedy_generation_equals_a_python_loop_over_the_module_and_leaks_no_tracer(case):
    with jax.checking_leaks():  # traced here: no other test samples with these options
        rollouts = sample(case, group_size=1, temperature=0.0)
    want = [greedy_by_hand(case, prompt) for prompt in PROMPTS]
    assert written(rollouts) == want
    assert len(set(sum(want, []))) > 3


def test_greedy_continuation_of_a_prefix_equals_a_python_loop_over_the_module(case):
    prefixes, lengths = np.array([[4, 6], [2, 0], [0, 0]], np.int32), np.array([2, 1, 0], np.int32)
    rollouts = continue_from(
        case.model, case.params, PROMPT_IDS, PROMPT_MASK, prefixes, lengths, jax.random.key(0),
        max_new_tokens=4, eos_ids=EOS, temperature=0.0,
    )  # fmt: skip
    contexts = [[*PROMPTS[0], 4, 6], [*PROMPTS[1], 2], PROMPTS[2]]
    want = [greedy_by_hand(case, context, 4) for context in contexts]
    assert written(jax.device_get(rollouts)) == want


def test_gradient_reaches_every_weight(case):
    def loss(params):
        hidden, _ = case.model(
            params, PROMPT_IDS, positions=positions_from_mask(jnp.asarray(PROMPT_MASK))
        )
        return token_logps(hidden[:, 3:-1], case.model.unembed(params), PROMPT_IDS[:, 4:])[0].sum()

    grads = jax.jit(jax.grad(loss))(case.params)
    assert jax.tree.structure(grads) == jax.tree.structure(case.params)
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        if not re.search(r"key.*bias", name):  # a key's bias shifts all scores of a query alike
            assert np.abs(grad).max() > 1e-4, name


# --- Score_steps ----------------------------------------------------------------------------------


def test_step_scores_equal_the_module_s_own(case):
    head = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    params = {"model": case.params, "head": head}
    positions = np.array([[1, 2, 4], [3, 4, 0], [4, 0, 0]])
    step_mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    scored = score_steps(Judge(case.model), params, PROMPT_IDS, PROMPT_MASK, positions, step_mask)
    np.testing.assert_array_equal(scored.mask, step_mask)
    for row, prompt in enumerate(PROMPTS):
        hidden = case.hidden(prompt)
        for step in range(step_mask[row].sum()):
            column = positions[row, step] - (5 - len(prompt))
            want = 1 / (1 + np.exp(-hidden[column] @ head))
            np.testing.assert_allclose(scored.scores[row, step], want, rtol=0, atol=1e-5)


# --- Hashing and tracing --------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_equal_adapters_share_one_compilation(make):
    first, second = make(), make()
    assert first.model is not second.model and first.model == second.model
    assert hash(first.model) == hash(second.model)
    assert Judge(first.model) == Judge(second.model)
    want = sample(first)
    counter = CompileCounter()
    chex.assert_trees_all_equal(sample(second), want)
    assert counter.count == 0
    jax.jit(lambda x: 3 * x + 1)(jnp.float32(2))
    assert counter.count > 0  # the counter does count


def test_adapters_of_different_models_differ():
    two_blocks, one_block = LinenDecoder(num_layers=2), LinenDecoder(num_layers=1)
    assert LinenModel(two_blocks) != LinenModel(one_block)
    graphdefs = [
        nnx.split(nnx.eval_shape(lambda n=n: NnxDecoder(nnx.Rngs(0), num_layers=n)))[0]
        for n in (2, 1)
    ]
    assert NnxModel(graphdefs[0]) != NnxModel(graphdefs[1])


def test_adapters_are_as_short_as_the_readme_says():
    text = pathlib.Path(__file__).read_text()
    blocks = dict(
        re.findall(r"^# --- adapter: ([a-z ]+) ---\n(.*?)^# --- end ---", text, re.M | re.S)
    )
    assert list(blocks) == ["no cache", "linen", "nnx", "prm"]
    for name, block in blocks.items():
        assert len([line for line in block.splitlines() if line.strip()]) <= 10, name


def test_the_readme_shows_exactly_these_adapters():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    source = pathlib.Path(__file__).read_text()
    blocks = re.findall(r"# --- adapter: [a-z ]+ ---\n(.*?)\n+# --- end ---", source, re.DOTALL)
    assert len(blocks) == 4
    assert "\n\n\n".join(blocks) in readme
