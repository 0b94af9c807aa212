"""Makes tests/goldens/{llama,qwen2,qwen3,llama3,mistral}: tiny random checkpoints, and what PyTorch
computes with them.

    python3.11 -m venv /tmp/torchvenv
    /tmp/torchvenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    /tmp/torchvenv/bin/python tests/goldens/make_hf_goldens.py

golden.npz holds, all float32 on the CPU, with eager attention:

    ids, mask    [3, 10]       a LEFT-padded batch; rows of 10, 7 and 1 tokens
    logits       [3, 10, V]    of the whole batch; padding's are written as 0
    greedy         [3, 8]      `model.generate`'s greedy continuation (with its KV cache)
    greedy_logits  [3, 8, V]   that chose them, one decode step each
    margin       []            smallest gap between the best and the second logit on that way
"""

import pathlib

LENGTHS, WIDTH, NEW_TOKENS = (10, 7, 1), 10, 8
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def randomise(model, generator):
    """Draws every parameter anew: norms and biases at their initial 1 and 0 would hide mistakes."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)


def outputs(model, generator) -> dict:
    """Returns the arrays of golden.npz."""
    import torch

    ids = torch.randint(0, SMALL["vocab_size"], (len(LENGTHS), WIDTH), generator=generator)
    mask = torch.arange(WIDTH)[None] >= WIDTH - torch.tensor(LENGTHS)[:, None]
    ids = torch.where(mask, ids, 0)
    with torch.no_grad():
        logits = model(
            ids, attention_mask=mask.long(), position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)
        ).logits
        written = model.generate(
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=NEW_TOKENS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    greedy_logits = torch.stack(written.logits, dim=1)
    best = greedy_logits.topk(2, dim=-1).values
    return {
        "ids": ids.int().numpy(),
        "mask": mask.numpy(),
        "logits": torch.where(mask[..., None], logits, 0.0).numpy(),
        "greedy": written.sequences[:, WIDTH:].int().numpy(),
        "greedy_logits": greedy_logits.numpy(),
        "margin": (best[..., 0] - best[..., 1]).min().numpy(),
    }


def models() -> dict:
    """Returns {family: (class, config)}; between them, every feature is once on and once off."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    # Of four frequencies, 1 turns 50 / (2 pi) = 8 times in the original context and stays, 0.32
    # turns 2.5 times and lies between, 0.1 and 0.03 turn less than once and get 8 times slower.
    llama3_rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 50,
    }  # fmt: skip
    plain = {"rope_type": "default"}
    return {
        "llama": (
            LlamaForCausalLM,
            LlamaConfig(**SMALL, tie_word_embeddings=True, rope_theta=1e4, rms_norm_eps=1e-5),
        ),
        "qwen2": (
            Qwen2ForCausalLM,
            Qwen2Config(**SMALL, tie_word_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-6),
        ),
        "qwen3": (
            Qwen3ForCausalLM,
            Qwen3Config(
                **SMALL, tie_word_embeddings=True, head_dim=16,
                rope_parameters={**plain, "rope_theta": 1e6},
            ),
        ),
        "llama3": (
            LlamaForCausalLM,
            LlamaConfig(
                **{**SMALL, "num_key_value_heads": 4}, tie_word_embeddings=False,
                rope_parameters=llama3_rope, rms_norm_eps=1e-5,
            ),
        ),
        "mistral": (
            MistralForCausalLM,
            MistralConfig(
                **SMALL, sliding_window=4, rope_parameters={**plain, "rope_theta": 1e4},
                rms_norm_eps=1e-5,
            ),
        ),
    }  # fmt: skip


def main():
    import numpy as np
    import torch

    for seed, (family, (model_class, config)) in enumerate(models().items()):
        generator = torch.Generator().manual_seed(seed)
        model = model_class(config).eval()
        randomise(model, generator)
        golden = outputs(model, generator)
        assert golden["margin"] > 2e-3, "two tokens are nearly tied: take another seed"
        directory = pathlib.Path(__file__).parent / family
        model.save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(directory / "golden.npz", **golden)
        print(family, {k: v.shape for k, v in golden.items()}, "margin", golden["margin"])


if __name__ == "__main__":
    main()
