"""How many floating-point operations a `Transformer` needs: what utilisation is measured by.

Multiplications and additions of the linear maps and of attention, two for each pair of numbers;
norms, softmax and rotations are not counted, nor is anything that is computed twice to save memory.
Source: the appendix of https://arxiv.org/abs/2204.02311 (PaLM), with causal attention counted once.
"""

import math

from scope_jax.models.transformer import TransformerConfig, Weight, declare


def layer_weights(config: TransformerConfig) -> int:
    """Returns the numbers in the linear maps of all layers."""
    layers = declare(config)["layers"]
    maps = [layers[name]["w"] for name in "qkv"] + [layers[n] for n in ("o", "gate", "up", "down")]
    assert all(isinstance(weight, Weight) for weight in maps)
    return sum(math.prod(weight.shape) for weight in maps)


def forward_flops(config: TransformerConfig, *, tokens: float, pairs: float, logits: float):
    """Returns the operations of reading tokens.

    Args:
      tokens: read, padding not counted.
      pairs: of a query with a key that it sees, summed over the tokens; see `causal_pairs`.
      logits: positions that the unembedding is computed for.

    >>> from scope_jax.models.transformer import TransformerConfig
    >>> tiny = TransformerConfig(10, 4, 1, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=3)
    >>> forward_flops(tiny, tokens=1, pairs=1, logits=1) == 2 * (4 * (4 + 2 + 2 + 4) + 36 + 8 + 40)
    True
    """
    c = config
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * pairs
    return 2.0 * (layer_weights(c) * tokens + attention + c.embed_dim * c.vocab_size * logits)


def causal_pairs(new, before=0):
    """Returns the pairs of `new` tokens with those up to themselves, `before` earlier ones too.

    >>> causal_pairs(3), causal_pairs(2, before=5)
    (6.0, 13.0)
    """
    return new * (new + 1) / 2.0 + new * before


def update_flops(config: TransformerConfig, prompts, completions, *, group_size: int = 1):
    """Returns the operations of a gradient over rollouts: three times those of reading them.

    Args:
      prompts: [B / group_size] lengths of the prompts that are read; completions: [B] lengths, with
        `group_size` rows after each prompt.
    """
    rows = completions.reshape(-1, group_size)
    pairs = causal_pairs(prompts).sum() + causal_pairs(rows, prompts[:, None]).sum()
    tokens = prompts.sum() + completions.sum()
    return 3.0 * forward_flops(config, tokens=tokens, pairs=pairs, logits=completions.sum())
