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
}  # fmt: skip
