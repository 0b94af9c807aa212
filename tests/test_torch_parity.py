"""Live parity with transformers + torch (extra `parity`): what we save is what they load.

Without torch these skip, and the goldens that torch made (tests/goldens) stand for it.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax.models.hf import load_hf, save_hf
from scope_jax.prm import load_prm, save_prm, score_steps

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers")

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


def load(auto_class, path, dtype):
    model, report = auto_class.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_with_a_sharded_save(family, tmp_path):
    save_hf(tmp_path, *load_hf(GOLDENS / family), max_shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    golden = np.load(GOLDENS / family / "golden.npz")
    mask = torch.tensor(golden["mask"])
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    ids, logits = torch.tensor(golden["ids"]).long(), []
    for path in (tmp_path, GOLDENS / family):
        model = load(transformers.AutoModelForCausalLM, path, torch.float32)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask.long(), position_ids=positions).logits)
    assert torch.equal(*logits)  # the golden's own may be of another CPU, which rounds otherwise
    assert np.abs(logits[0].numpy() - golden["logits"])[golden["mask"]].max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_bits_in_bfloat16(family, tmp_path):
    save_hf(tmp_path, *load_hf(GOLDENS / family, dtype=jnp.bfloat16), max_shard_bytes=40_000)
    saved = load(transformers.AutoModelForCausalLM, tmp_path, torch.bfloat16).state_dict()
    source = load(transformers.AutoModelForCausalLM, GOLDENS / family, torch.float32).state_dict()
    assert saved.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(saved[name], tensor.to(torch.bfloat16)), name


def test_transformers_scores_like_our_saved_token_classifier(tmp_path):
    prm, params = load_prm(GOLDENS / "prm_linear2")
    save_prm(tmp_path, prm, params)
    model = load(transformers.AutoModelForTokenClassification, tmp_path, torch.float32)
    golden = np.load(GOLDENS / "prm_linear2" / "golden.npz")
    names = ("ids", "mask", "score_positions", "step_mask")
    ours = score_steps(prm, params, *(golden[name] for name in names))
    mask = torch.tensor(golden["mask"])
    with torch.no_grad():
        logits = model(
            torch.tensor(golden["ids"]).long(), attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
        ).logits.softmax(-1)[..., 1].numpy()  # fmt: skip
    theirs = np.take_along_axis(logits, golden["score_positions"], axis=1)
    step_mask = golden["step_mask"]
    assert np.abs(theirs - np.asarray(ours.scores))[step_mask].max() <= 1e-5
