"""Shapes of published models, so that a run can be planned before a weight is fetched.

The numbers are those of the models' own config.json files.
"""

from typing import Any

_QWEN_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_1_5B = {
    **_QWEN_7B, "vocab_size": 151936, "hidden_size": 1536, "num_attention_heads": 12,
    "num_key_value_heads": 2, "intermediate_size": 8960, "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3_0_6B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

# Hub id -> the part of config.json that the forward reads
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Math-7B": {**_QWEN_7B, "max_position_embeddings": 4096},
    "Qwen/Qwen2.5-Math-7B-Instruct": {**_QWEN_7B, "max_position_embeddings": 4096},
    "Qwen/Qwen2.5-Math-PRM-7B": {
        **_QWEN_7B, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "architectures": ["Qwen2ForProcessRewardModel"],
    },
    "Qwen/Qwen2.5-Math-1.5B": {**_QWEN_1_5B, "max_position_embeddings": 4096},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {**_QWEN_7B, "max_position_embeddings": 131072},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        **_QWEN_1_5B, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B": {**_QWEN_1_5B, "max_position_embeddings": 4096},
    "Qwen/Qwen3-0.6B": _QWEN3_0_6B,
    "Qwen/Qwen3-1.7B": {**_QWEN3_0_6B, "hidden_size": 2048, "intermediate_size": 6144},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data": _LLAMA_8B,
    "nvidia/OpenMath2-Llama3.1-8B": _LLAMA_8B,
}  # fmt: skip

# Models whose tokenizer is not that of the family of their shape
_OWN_TOKENIZER = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
}  # fmt: skip


def share_tokenizer(one: str, other: str) -> bool:
    """Whether two models read the same tokens, as far as the published ones among them tell.

    >>> share_tokenizer("Qwen/Qwen2.5-Math-7B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    False
    """
    if not {one, other} <= set(PUBLISHED):
        return True
    family = PUBLISHED[one]["model_type"] == PUBLISHED[other]["model_type"]
    return family and (one in _OWN_TOKENIZER) == (other in _OWN_TOKENIZER)
