"""Process reward models: a probability that each reasoning step is correct.

A PRM here is any hashable callable

    prm(params, ids [B, L], positions [B, L], score_positions [B, S]) -> [B, S] float32 in [0, 1]

`PRM` is the one for language-model backbones: one forward over problem and steps, a head read at
one token of each step. The heads are those of the published models (METHOD.md section 4):

    mlp2_at_token         Qwen2.5-Math-PRM      score.0, ReLU, score.2; softmax, [1]
    linear2_at_sep        TRL's PRMTrainer      score; softmax, [1]
    value_sigmoid_at_sep  Skywork-o1-Open-PRM   v_head.summary; sigmoid
    lm_pair_at_token      Math-Shepherd, RLHFlow: the language model's own logits of two tokens

Each gives two logits (wrong, correct) whose softmax is the score, so one loss trains them all.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from scope_jax.hardware import update_compiler_options
from scope_jax.models.hf import (
    Tensors,
    config_from_hf,
    config_to_hf,
    load_tokenizer,
    load_tree,
    read_config,
    resolve,
    write_checkpoint,
)
from scope_jax.models.kv_cache import positions_from_mask
from scope_jax.models.transformer import Transformer, Weight, declare, init_params
from scope_jax.prm_formats import PRMFormat, PRMInput, PRMTexts, pad_inputs
from scope_jax.records import InputError, StepScores

_BATCH_TOKENS = 8192  # of `score_solutions`' forwards, unless one solution is longer

# head -> the layout of text that its published models were trained on
HEADS = {
    "mlp2_at_token": "qwen_math",
    "linear2_at_sep": "trl",
    "value_sigmoid_at_sep": "skywork",
    "lm_pair_at_token": "math_shepherd",
}


def declare_head(head: str, embed_dim: int) -> dict[str, Any]:
    """Returns the declarations of a head's weights, under their published names."""
    d = embed_dim

    def linear(name, inputs, outputs):
        return {
            "w": Weight((inputs, outputs), (None, None), "normal", f"{name}.weight", 1),
            "b": Weight((outputs,), (None,), "zeros", f"{name}.bias"),
        }

    if head == "mlp2_at_token":
        return {"hidden": linear("score.0", d, d), "out": linear("score.2", d, 2)}
    if head == "linear2_at_sep":
        return linear("score", d, 2)
    if head == "value_sigmoid_at_sep":
        return linear("v_head.summary", d, 1)
    if head == "lm_pair_at_token":
        return {}
    raise InputError(f"PRM head {head!r} is not known; known: {', '.join(HEADS)}")


@dataclasses.dataclass(frozen=True)
class PRM:
    """A head on a language model. Params: {"backbone": ..., "head": ...}."""

    backbone: Any  # a Transformer, or anything with its protocol
    head: str = "linear2_at_sep"
    format: PRMFormat = PRMFormat("trl")  # the layout of its texts; nothing here computes with it
    pair_ids: tuple[int, int] | None = None  # lm_pair_at_token: ids of (good, bad)
    reads: int = 1  # last tokens of a step that its score is read at; the published models': 1

    def declare(self):
        config = self.backbone.config
        if self.head != "lm_pair_at_token":  # every other head leaves the LM's unread
            config = dataclasses.replace(config, tie_embeddings=True)
        return {"backbone": declare(config), "head": declare_head(self.head, config.embed_dim)}

    def init_head(self, key: jax.Array):
        return init_params(declare_head(self.head, self.backbone.config.embed_dim), key)

    def features(self, params, ids, positions, score_positions):
        """Returns what the head's last linear map reads, [B, S * reads, features] float32.

        Of lm_pair_at_token: the hidden state, in the backbone's dtype.
        """
        hidden, _ = self.backbone(params["backbone"], ids, positions=positions)
        at, _ = last_tokens(positions, score_positions, self.reads)
        read = jnp.take_along_axis(hidden, at[:, :, None], axis=1)
        if self.head == "lm_pair_at_token":
            return read
        read = read.astype(jnp.float32)
        if self.head == "mlp2_at_token":
            return jax.nn.relu(_linear(read, params["head"]["hidden"]))
        return read

    def logits(self, params, ids, positions, score_positions):
        """Returns [B, S, 2] float32 logits of (wrong, correct)."""
        read = self.features(params, ids, positions, score_positions)
        if self.head == "lm_pair_at_token":
            assert self.pair_ids is not None, "lm_pair_at_token needs pair_ids"
            bad_good = jnp.array(self.pair_ids[::-1])
            unembed = self.backbone.unembed(params["backbone"])[:, bad_good]  # [D, 2]
            weights = unembed.astype(read.dtype)
            out = jnp.matmul(read, weights, preferred_element_type=jnp.float32)
        else:
            out = _linear(read, last_linear(params["head"]))
        if self.head == "value_sigmoid_at_sep":  # sigmoid(v) is the softmax of (0, v)
            out = jnp.concatenate([jnp.zeros_like(out), out], axis=-1)
        if self.reads == 1:
            return out
        _, real = last_tokens(positions, score_positions, self.reads)
        odds = (out[..., 1] - out[..., 0]).reshape(real.shape)
        pooled = all_right(odds, real)
        return jnp.stack([jnp.zeros_like(pooled), pooled], axis=-1)

    def __call__(self, params, ids, positions, score_positions):
        return jax.nn.softmax(self.logits(params, ids, positions, score_positions), axis=-1)[..., 1]

    @property
    def max_position(self) -> int:
        return self.backbone.config.max_position


def last_tokens(positions, score_positions, reads: int):
    """Returns the columns of each step's `reads` last tokens, the last one first.

    A step ends where the one before it is read; of the first step only that is known, so that the
    last words of the problem count as its own if it is shorter than `reads`.

    Args:
      positions: [B, L] int32, -1 on padding.
      score_positions: [B, S] int32, column of each step's last token.
    Returns:
      (columns [B, S * reads] int32, [B, S, reads] bool: False on tokens of the step before and on
      padding).
    """
    before = jnp.pad(score_positions, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    at = score_positions[:, :, None] - jnp.arange(reads)[None, None, :]
    real = (at > before[:, :, None]) | (jnp.arange(reads) == 0)[None, None, :]
    columns = jnp.maximum(at, 0).reshape(len(score_positions), -1)
    padding = jnp.take_along_axis(positions, columns, axis=1).reshape(real.shape) < 0
    return columns, real & ~padding


def all_right(odds, real):
    """Returns the log-odds [..] that no token is wrong, given each token's own [.., R].

    P(step right) is the product of its tokens' (a noisy-or of errors): a wrong number shows where
    it is written, not at the separator behind it, and one wrong token makes a step wrong.
    """
    log_right = jnp.where(real, jax.nn.log_sigmoid(odds), 0.0).sum(-1)
    log_right = jnp.minimum(log_right, -1e-7)  # log(1 - 1) has no gradient
    return log_right - jnp.log(-jnp.expm1(log_right))


def last_linear(head):
    """Returns the {"w", "b"} of a head that gives its logits."""
    return head.get("out", head)


def _linear(x, weights):
    return x @ weights["w"].astype(jnp.float32) + weights["b"].astype(jnp.float32)[None, None]


def score_steps(prm, params, ids, mask, score_positions, step_mask) -> StepScores:
    """Scores every reasoning step of every row in one forward (jitted).

    Args:
      prm, params: see the module's docstring.
      ids, mask: [B, L] problem and steps; padding may stand anywhere.
      score_positions: [B, S] int32, column (of L) of the token at which each step is read.
      step_mask: [B, S] bool.
    Returns:
      StepScores. A row longer than the PRM's context, or with a score that is not finite, has mask
      False throughout: no score is not "no error", so such a row is never a candidate for repair.
    """
    inputs = (params, ids, mask, score_positions, step_mask)
    return _scorer_for(inputs)(prm, *inputs)


def lower_score_steps(prm, params, ids, mask, score_positions, step_mask):
    """Returns `score_steps` lowered (`jax.stages.Lowered`), for arrays or shapes with shardings."""
    inputs = (params, ids, mask, score_positions, step_mask)
    return _scorer_for(inputs).lower(prm, *inputs)


def _scorer_for(inputs):
    """Returns the jitted `_score_steps` for the devices that hold the params, the first inputs."""
    leaves = jax.tree.leaves(inputs)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return _compiled_scorer(None)  # inside of another jit, which alone may have options
    places = [x.sharding for x in leaves if getattr(x, "sharding", None) is not None]
    return _compiled_scorer(min(places[0].device_set, key=lambda d: d.id) if places else None)


@functools.cache
def _compiled_scorer(device):
    """A forward over whole sharded weights is the update's: XLA needs the same options for it."""
    options = update_compiler_options(device) if device is not None else {}
    return jax.jit(_score_steps, static_argnames=("prm",), compiler_options=options)


def _score_steps(prm, params, ids, mask, score_positions, step_mask) -> StepScores:
    scores = prm(params, ids, positions_from_mask(mask), jnp.where(step_mask, score_positions, 0))
    fits = mask.sum(-1) <= getattr(prm, "max_position", mask.shape[1])
    readable = fits & jnp.where(step_mask, jnp.isfinite(scores), True).all(-1)  # [B]
    step_mask = step_mask & readable[:, None]
    return StepScores(scores=jnp.where(step_mask, scores, 0.0).astype(jnp.float32), mask=step_mask)


def score_solutions(
    prm,
    params,
    tokenizer,
    problems: Sequence[str],
    steps: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray | None]:
    """Scores solutions given as text, e.g. of a file.

    Args:
      prm, params, tokenizer: of one PRM directory.
      problems: N texts; steps: N lists of step texts.
      batch_size: solutions a forward, fewer where they are long; they are sorted by length, so that
        little is padded.
      max_length: tokens of the longest solution that is scored (default: the PRM's context).
      progress: called with the number of solutions scored so far.
    Returns:
      Per solution [its steps] float32, or None where it is too long or cannot be laid out exactly.
    """
    layout = PRMTexts(tokenizer, prm.format)
    limit = min(max_length or prm.max_position, prm.max_position)
    inputs = [layout(problem, texts) for problem, texts in zip(problems, steps, strict=True)]
    fitting = [(i, item) for i, item in enumerate(inputs) if item and len(item.ids) <= limit]
    fitting.sort(key=lambda pair: len(pair[1].ids))
    results: list[np.ndarray | None] = [None] * len(inputs)
    done = 0
    while done < len(fitting):
        longest = len(fitting[min(done + batch_size, len(fitting)) - 1][1].ids)
        size = max(1, min(batch_size, _BATCH_TOKENS // longest))  # attention scores are size * n**2
        rows = fitting[done : done + size]
        width = -(-len(rows[-1][1].ids) // 64) * 64  # few shapes, few compilations
        num_steps = -(-max(len(item.reads) for _, item in rows) // 16) * 16
        filling: list[PRMInput | None] = [None] * (size - len(rows))
        padded = pad_inputs([item for _, item in rows] + filling, width=width, num_steps=num_steps)
        scored = jax.device_get(score_steps(prm, params, **jax.device_put(padded)))
        for row, (i, _) in enumerate(rows):
            real = scored.mask[row]
            results[i] = scored.scores[row][real] if real.any() else None
        done += len(rows)
        if progress is not None:
            progress(done)
    return results


def load_prm(path, *, format: str | None = None, mesh=None, rules=None, dtype=None):
    """Loads a PRM directory: a backbone's checkpoint with the head's tensors.

    Head and layout come from what `save_prm` wrote into config.json, else from the published
    models' architectures, tensor names and directory names.

    Args:
      path: directory or hub id.
      format: the layout of its texts, where nothing in the directory says it: "qwen_math", "trl",
        "skywork", "math_shepherd" or "rlhflow".
      mesh, rules, dtype: as in `load_hf`.
    Returns:
      (PRM, params).
    Raises:
      InputError: as `load_hf`, or a directory that holds no known head.
    """
    directory = resolve(path)
    hf_config = read_config(directory)
    config, tensors = config_from_hf(hf_config, directory / "config.json"), Tensors(directory)
    told = _told(hf_config, tensors.names(), str(path), format, directory)
    head, layout = told["head"], PRMFormat(told["format"], told.get("step_token", ""))
    pair_ids = None
    if head == "lm_pair_at_token":
        pair_ids = told.get("pair_ids") or find_pair_ids(load_tokenizer(directory)[0])
        pair_ids = _checked_pair(pair_ids, config.vocab_size, directory)
    prm = PRM(Transformer(config), head, layout, pair_ids, reads=told.get("reads", 1))
    params = load_tree(prm.declare(), tensors, mesh=mesh, rules=rules, dtype=dtype)
    config = dataclasses.replace(config, dtype=str(params["backbone"]["embed"].dtype))
    return dataclasses.replace(prm, backbone=Transformer(config)), params


def _told(hf_config, names: set[str], path: str, format: str | None, directory) -> dict[str, Any]:
    """Returns {"head", "format", ..} from the first thing that tells them."""
    told = hf_config.get("scope_jax_prm")
    architectures = hf_config.get("architectures")
    architecture = " ".join(map(str, architectures)) if isinstance(architectures, list) else ""
    name = f"{path} {hf_config.get('_name_or_path', '')}".lower()
    known = re.search(r"math.?shepherd|rlhflow|llama-?3\.1-8b-prm", name)
    if told is not None:
        texts = [told.get(key, "") for key in ("head", "format", "step_token")] if told else []
        if not texts or not all(isinstance(text, str) for text in texts) or not all(texts[:2]):
            raise InputError(
                f'{directory}/config.json: "scope_jax_prm" must be an object with the texts "head" '
                f'and "format" (and "step_token"), got {told!r}'
            )
        declare_head(told["head"], 1)  # refuses an unknown one
        reads = told.get("reads", 1)
        if not isinstance(reads, int) or reads < 1:
            raise InputError(
                f'{directory}/config.json: "reads" of "scope_jax_prm" must be a whole number of '
                f"tokens from 1 on, got {reads!r}"
            )
    elif "ForProcessRewardModel" in architecture or "score.0.weight" in names:
        told = {"head": "mlp2_at_token", "format": "qwen_math"}
    elif "ForTokenClassification" in architecture or "score.weight" in names:
        told = {"head": "linear2_at_sep", "format": "trl"}
    elif any(tensor.startswith("v_head.") for tensor in names):
        told = {"head": "value_sigmoid_at_sep", "format": "skywork"}
    elif known or format in ("math_shepherd", "rlhflow"):
        shepherd = known is not None and "shepherd" in known[0]
        told = {"head": "lm_pair_at_token", "format": "math_shepherd" if shepherd else "rlhflow"}
    else:
        raise InputError(
            f"{directory} holds no known PRM head: no score or v_head tensors, and its name is not "
            'that of a known language-model PRM; give format="math_shepherd" or "rlhflow"'
        )
    return {**told, "format": format} if format else told


def _checked_pair(pair_ids, vocab_size: int, directory) -> tuple[int, int]:
    pair = list(pair_ids) if isinstance(pair_ids, list | tuple) else []
    whole = all(isinstance(i, int) and 0 <= i < vocab_size for i in pair)
    if not whole or len(pair) != 2 or pair[0] == pair[1]:
        raise InputError(
            f"{directory}: pair_ids must be two different ids (good, bad) of its vocabulary of "
            f"{vocab_size}, got {pair_ids}"
        )
    return pair[0], pair[1]


def find_pair_ids(tokenizer) -> tuple[int, int]:
    """Returns the ids of the good and the bad verdict, "+" and "-", in a tokenizer.

    In Math-Shepherd's (SentencePiece) these are 648 and 387, with the space before them.
    """
    good, bad = (tokenizer.encode(sign, add_special_tokens=False)[-1] for sign in "+-")
    return good, bad


def save_prm(path, prm: PRM, params, tokenizer=None) -> None:
    """Writes a directory that `load_prm` loads, in the published layout of its head."""
    told = {"head": prm.head, **dataclasses.asdict(prm.format)}
    told["format"] = told.pop("name")
    if prm.pair_ids is not None:
        told["pair_ids"] = list(prm.pair_ids)
    if prm.reads != 1:
        told["reads"] = prm.reads
    config = {**config_to_hf(prm.backbone.config), "scope_jax_prm": told}
    named = {"linear2_at_sep": "ForTokenClassification", "mlp2_at_token": "ForProcessRewardModel"}
    if prm.head in named:  # transformers and TRL load the first as a token classifier
        causal = config["architectures"][0]
        config["architectures"] = [causal.replace("ForCausalLM", named[prm.head])]
        config["id2label"] = {"0": "wrong", "1": "correct"}
    write_checkpoint(path, prm.declare(), params, config, tokenizer)
