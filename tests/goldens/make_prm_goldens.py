"""Makes tests/goldens/prm_*: a tiny random process reward model per head, and PyTorch's scores.

    python3.11 -m venv /tmp/torchvenv
    /tmp/torchvenv/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    /tmp/torchvenv/bin/python tests/goldens/make_prm_goldens.py

The tensors carry the names of the published checkpoints:

    prm_mlp2       Qwen/Qwen2.5-Math-PRM-7B: two-layer classifier; an unused lm_head is in the file
    prm_linear2    TRL's PRMTrainer: token classification, label 1 is "correct"
    prm_value      Skywork-o1-Open-PRM: sigmoid of a value head; an unused lm_head is in the file
    prm_pair       peiyi9979/math-shepherd-mistral-7b-prm: two logits of the language model
    prm_pair_tied  the same on a Llama whose lm_head is its embedding

golden.npz holds, computed in float32 on the CPU with eager attention:

    ids, mask                   [4, 14]  a LEFT-padded batch; rows of 14, 9, 4 and 11 tokens
    score_positions, step_mask  [4, 5]   columns at which 5, 3, 1 and 4 steps are read
    scores                      [4, 5]   probability that the step is correct; 0 where masked out

In prm_mlp2 one real step of row 1 has a probability that underflows to exactly 0.0.
"""

import pathlib

WIDTH, LENGTHS = 14, (14, 9, 4, 11)
STEP_ENDS = ((2, 5, 6, 10, 13), (1, 6, 8), (3,), (2, 3, 7, 10))  # token within the row, padding cut
PLAIN_TOKENS, SEPARATOR, GOOD, BAD = 60, 60, 61, 62  # ids under 60 are the text
UNDERFLOW = (1, 1)  # row and step whose probability is exactly 0.0 in prm_mlp2
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


def make_batch(generator) -> dict:
    """Returns ids, mask, score_positions and step_mask; the separator stands where steps end."""
    import torch

    steps = max(map(len, STEP_ENDS))
    ids = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
    mask = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    positions = torch.zeros(len(LENGTHS), steps, dtype=torch.long)
    step_mask = torch.zeros(len(LENGTHS), steps, dtype=torch.bool)
    for row, (length, ends) in enumerate(zip(LENGTHS, STEP_ENDS, strict=True)):
        columns = WIDTH - length + torch.tensor(ends)
        ids[row, -length:] = torch.randint(0, PLAIN_TOKENS, (length,), generator=generator)
        ids[row, columns] = SEPARATOR
        mask[row, -length:] = True
        positions[row, : len(ends)] = columns
        step_mask[row, : len(ends)] = True
    return {"ids": ids, "mask": mask, "score_positions": positions, "step_mask": step_mask}


def random_tensors(shapes: dict, generator) -> dict:
    """Draws every tensor; norms and biases at their initial 1 and 0 would hide mistakes."""
    import torch

    noise = {name: 0.3 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + x if "norm" in name else x for name, x in noise.items()}


def run(model, ids, mask):
    """Returns the outputs of a transformers model on left-padded rows."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True)


# --- The four published computations, each [B, L]: the score at every token -----------------------


def mlp2(model, head, ids, mask):
    hidden = run(model, ids, mask).hidden_states[-1]  # after the final norm
    inner = (hidden @ head["score.0.weight"].T + head["score.0.bias"]).relu()
    logits = inner @ head["score.2.weight"].T + head["score.2.bias"]
    return logits.float().softmax(-1)[..., 1]


def linear2(model, head, ids, mask):
    hidden = run(model, ids, mask).hidden_states[-1]
    return (hidden @ head["score.weight"].T + head["score.bias"]).float().softmax(-1)[..., 1]


def value(model, head, ids, mask):
    hidden = run(model, ids, mask).hidden_states[-1]
    value = hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]
    return value.float().squeeze(-1).sigmoid()


def pair(model, head, ids, mask):
    del head  # the language model's own
    return run(model, ids, mask).logits[..., [GOOD, BAD]].float().softmax(-1)[..., 0]


# --- Checks of the twins themselves ---------------------------------------------------------------


def plant_underflow(model, head, batch) -> None:
    """Gives score.0 a unit that fires at one step only, and score.2 a weight of 400 against it.

    The other steps keep their moderate logits, so that their scores stay well conditioned.
    """
    row, step = UNDERFLOW
    hidden = run(model, batch["ids"], batch["mask"]).hidden_states[-1]
    target = hidden[row, batch["score_positions"][row, step]]
    direction = target / target.norm()
    reach = hidden @ direction  # [B, L]
    others = batch["mask"].clone()
    others[row, batch["score_positions"][row, step]] = False
    border, top = reach[others].max(), target.norm()
    assert border < 0.9 * top, "another token lies too close: take another seed"
    head["score.0.weight"][0] = direction
    head["score.0.bias"][0] = -(border + top) / 2
    head["score.2.weight"][:, 0] = 400 / (top - border) * head["score.2.weight"].new_tensor([1, -1])


def check_model_card(probabilities, batch) -> None:
    """The model card of Qwen2.5-Math-PRM reads scores by `!= 0`; shows which rows it can read."""
    is_separator = (batch["ids"] == SEPARATOR) & batch["mask"]
    both = probabilities.new_zeros(*probabilities.shape, 2)
    both[..., 0], both[..., 1] = 1 - probabilities, probabilities
    for row, sample in enumerate(both * is_separator[..., None]):
        kept = sample[sample != 0]
        ends = batch["score_positions"][row, batch["step_mask"][row]]
        if row == UNDERFLOW[0]:
            assert kept.numel() == 2 * len(ends) - 1, "the card's reading should break here"
        else:
            assert kept.view(-1, 2)[:, 1].equal(probabilities[row, ends])


def check_alone(twin, model, head, batch, probabilities) -> None:
    """A row without its padding must have the scores that it has in the batch."""
    for row, length in enumerate(LENGTHS):
        alone = twin(
            model, head, batch["ids"][row : row + 1, -length:], batch["mask"][row, -length:][None]
        )
        assert (alone[0] - probabilities[row, -length:]).abs().max() < 1e-5


def check_token_classification(backbone, head, batch, probabilities) -> None:
    """TRL's models are transformers' own Qwen2ForTokenClassification: a second reference."""
    from transformers import Qwen2Config, Qwen2ForTokenClassification

    config = Qwen2Config(**SMALL, **QWEN2, num_labels=2)
    model = Qwen2ForTokenClassification(config).eval()
    keys = model.load_state_dict({**backbone, **head}, strict=False)
    assert not keys.missing_keys and set(keys.unexpected_keys) <= {"lm_head.weight"}
    theirs = run(model, batch["ids"], batch["mask"]).logits.softmax(-1)[..., 1]
    assert (theirs - probabilities)[batch["mask"]].abs().max() < 1e-6


# --- The checkpoints ------------------------------------------------------------------------------

QWEN2 = {"tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
TWINS = {
    "prm_mlp2": mlp2, "prm_linear2": linear2, "prm_value": value,
    "prm_pair": pair, "prm_pair_tied": pair,
}  # fmt: skip


def make_model(name):
    """Returns (transformers causal LM, shapes of the head's tensors)."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

    width = SMALL["hidden_size"]
    head_shapes = {
        "prm_mlp2": {
            "score.0.weight": (width, width), "score.0.bias": (width,),
            "score.2.weight": (2, width), "score.2.bias": (2,),
        },
        "prm_linear2": {"score.weight": (2, width), "score.bias": (2,)},
        "prm_value": {"v_head.summary.weight": (1, width), "v_head.summary.bias": (1,)},
    }  # fmt: skip
    if name == "prm_pair":  # the window is wider than every row, as in the published model
        config = MistralConfig(**SMALL, tie_word_embeddings=False, sliding_window=64)
    elif name == "prm_pair_tied":
        config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    else:
        config = Qwen2Config(**SMALL, **QWEN2)
    config.architectures = [
        {
            "prm_mlp2": "Qwen2ForProcessRewardModel",
            "prm_linear2": "Qwen2ForTokenClassification",
            "prm_value": "Qwen2ForCausalLM",
            "prm_pair": "MistralForCausalLM",
            "prm_pair_tied": "LlamaForCausalLM",
        }[name]
    ]
    if name.startswith("prm_pair"):
        config.scope_jax_prm = {
            "head": "lm_pair_at_token", "format": "math_shepherd", "pair_ids": [GOOD, BAD],
        }  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval(), head_shapes.get(name, {})


def make_golden(name, seed):
    """Returns (config, tensors of model.safetensors, arrays of golden.npz)."""
    import torch

    twin, generator = TWINS[name], torch.Generator().manual_seed(seed)
    batch = make_batch(generator)
    model, head_shapes = make_model(name)
    backbone = random_tensors({n: p.shape for n, p in model.named_parameters()}, generator)
    keys = model.load_state_dict(backbone, strict=False)
    assert set(keys.missing_keys) <= {"lm_head.weight"} and not keys.unexpected_keys
    head = random_tensors(head_shapes, generator)
    if name == "prm_mlp2":
        plant_underflow(model, head, batch)
    probabilities = twin(model, head, batch["ids"], batch["mask"])
    check_alone(twin, model, head, batch, probabilities)
    if name == "prm_mlp2":
        check_model_card(probabilities, batch)
    if name == "prm_linear2":
        del backbone["lm_head.weight"]  # token classifiers have none
        check_token_classification(backbone, head, batch, probabilities)

    real, scores = batch["step_mask"], probabilities.gather(1, batch["score_positions"])
    middle = (scores[real] > 0.05) & (scores[real] < 0.95)
    assert middle.sum() >= 5 and scores[real][middle].std() > 0.1, "dull scores: take another seed"
    assert bool(scores[UNDERFLOW] == 0) == (name == "prm_mlp2")
    golden = {
        "ids": batch["ids"].int().numpy(),
        "mask": batch["mask"].numpy(),
        "score_positions": batch["score_positions"].int().numpy(),
        "step_mask": real.numpy(),
        "scores": torch.where(real, scores, 0.0).numpy(),
    }
    return model.config, {**backbone, **head}, golden


def main():
    import numpy as np
    import torch
    from safetensors.torch import save_file

    torch.set_grad_enabled(False)
    for seed, name in enumerate(TWINS):
        config, tensors, golden = make_golden(name, seed)
        directory = pathlib.Path(__file__).parent / name
        config.save_pretrained(directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        np.savez_compressed(directory / "golden.npz", **golden)
        size = sum(file.stat().st_size for file in directory.iterdir())
        assert size < 100_000, f"{name} has {size} bytes"
        print(name, size, "bytes\n", golden["scores"].round(4))


if __name__ == "__main__":
    main()
