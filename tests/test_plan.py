"""Plans: what is counted by hand here is what the command says; bad input is one line."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scope_jax import plan
from scope_jax.configlib import load_config
from scope_jax.hardware import CHIPS, GIB, peak_flops, topology_devices, update_compiler_options
from scope_jax.metrics import utilisation
from scope_jax.models.flops import causal_pairs, forward_flops, update_flops
from scope_jax.models.published import PUBLISHED
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.records import InputError

WORKSHEET = "worksheet:n=3,runlocal"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is absent, so nothing can be compiled for a TPU: pip install 'scope_jax[aot]'",
)
TINY = TransformerConfig(
    vocab_size=11, embed_dim=8, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10
)


def test_flops_of_a_forward_are_those_of_its_products():
    """Counted by XLA itself on a forward without a scan: causal attention is computed in full."""
    config, length = dataclasses.replace(TINY, num_layers=1), 5
    model = Transformer(config)
    params = model.init(jax.random.key(0))

    def logits(params, tokens, positions):
        hidden, _ = model(params, tokens, positions=positions)
        return hidden @ model.unembed(params)

    tokens = jnp.zeros((1, length), jnp.int32)
    text = str(jax.make_jaxpr(logits)(params, tokens, jnp.arange(length)[None]))
    products = text.count("dot_general[")
    assert products == 7 + 2 + 1  # linear maps, scores and mixing, logits
    by_hand = 2 * length * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 10)  # q, k and v, o, the MLP
    by_hand += 2 * 2 * 4 * 6 * length * length + 2 * length * 8 * 11
    counted = forward_flops(config, tokens=length, pairs=length * length, logits=length)
    assert counted == by_hand


def test_flops_of_an_update_read_each_prompt_once():
    prompts, completions = np.array([3, 5]), np.array([2, 4, 1, 0])
    pairs = 3 * 4 / 2 + 5 * 6 / 2  # the prompts
    pairs += (2 * 3 / 2 + 2 * 3) + (4 * 5 / 2 + 4 * 3) + (1 + 5) + 0
    tokens = 3 + 5 + 2 + 4 + 1
    expected = 3 * forward_flops(TINY, tokens=tokens, pairs=pairs, logits=2 + 4 + 1)
    assert update_flops(TINY, prompts, completions, group_size=2) == pytest.approx(expected)
    alone = np.array([3, 3, 5, 5])
    assert update_flops(TINY, alone, completions) > expected
    assert causal_pairs(4) == 1 + 2 + 3 + 4


def test_utilisation_is_flops_over_seconds_and_peak():
    rows = {
        "record": np.array([0, 0]), "prompt_mask": np.array([[False, True, True]] * 2),
        "mask": np.array([[True, True], [True, False]]),
    }  # fmt: skip
    seconds = {"seconds/update": 2.0, "seconds/sample": 0.5}
    found = utilisation(Transformer(TINY), rows, rows, seconds)
    flops = update_flops(TINY, np.array([2]), np.array([2, 1]), group_size=2)
    peak = peak_flops() * jax.local_device_count()
    assert found["mfu/update"] == pytest.approx(flops / 2.0 / peak)
    assert found["mfu/sample"] == pytest.approx(flops / 3 / 0.5 / peak)
    assert utilisation(lambda: None, rows, rows, seconds) == {}


def test_published_shapes_have_the_models_sizes():
    size = lambda name: sum(  # noqa: E731
        int(np.prod(w.shape))
        for w in jax.tree.leaves(
            declare(plan.read_model(name)), is_leaf=lambda x: hasattr(x, "axes")
        )
    )
    assert size("Qwen/Qwen2.5-Math-7B") == 7_615_616_512  # as its safetensors index says
    assert size("Qwen/Qwen2.5-Math-1.5B") == 1_543_714_304
    assert all("/" in name for name in PUBLISHED)


def test_a_cpu_has_no_compiler_options_and_a_measured_peak():
    assert update_compiler_options(jax.devices()[0]) == {}
    assert peak_flops() > 1e8


@pytest.mark.parametrize(
    "topology, says",
    [("v9z:2x2", "v5e, v5p, v6e"), ("h100", "v5p:2x2x2"), ("v5p:3x5x7", "v5p:2x2x1")],
)
def test_an_unknown_topology_is_one_line_with_a_near_one(topology, says):
    if topology.startswith("v5p"):
        pytest.importorskip("libtpu")
    with pytest.raises(InputError, match=says) as error:
        topology_devices(topology)
    assert "\n" not in str(error.value)


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = plan.main([*args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@needs_libtpu
def test_the_plan_of_a_small_run(capsys):
    code, out, _ = run(capsys, "--config", WORKSHEET, "--topology", "v5e:2x4", "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["topology"], report["chips"]) == ("v5e:2x4", 8)
    assert report["fits"] and report["change"] == {}
    sampled = {"prefill", "decode", "grow"}
    assert set(report["programs"]) == sampled | {"score", "update"} | {
        f"teacher_{name}" for name in sampled
    }
    needed = {"hbm_gib", "fits", "flops", "seconds", "mfu", "collective_gib", "compile_seconds"}
    for name, program in report["programs"].items():
        assert needed <= set(program), name
        assert 0 < program["hbm_gib"] < 1 and program["seconds"] > 0, name
    step = report["step"]
    stages = ("sample", "score", "teach", "update")
    assert step["seconds"] == pytest.approx(sum(step[f"{stage}_seconds"] for stage in stages))
    config = load_config(WORKSHEET, [])
    rows = config.data.prompts_per_step * config.sample.group_size
    assert report["programs"]["decode"]["calls"] == config.sample.max_new_tokens
    assert step["completion_tokens"] == rows * config.sample.max_new_tokens
    assert report["programs"]["update"]["calls"] == config.learn.mini_batches


@needs_libtpu
def test_lora_has_a_small_state_in_the_plan_too(capsys):
    args = ("--config", WORKSHEET, "--topology", "v5e:2x4", "--json")
    states = []
    for rank in (0, 4):
        _, out, _ = run(capsys, *args, f"--config.model.lora_rank={rank}")
        states.append(json.loads(out)["programs"]["update"]["hbm_gib"])
    assert states[1] < states[0]  # no moments of the base


@needs_libtpu
def test_the_plan_is_printed_for_people(capsys):
    code, out, _ = run(capsys, "--config", WORKSHEET, "--topology", "v5e:2x4")
    assert code == 0
    assert "FITS on v5e:2x4" in out.splitlines()[-1]
    assert "decode" in out and "update" in out and "a training step" in out


@needs_libtpu
@pytest.mark.parametrize(
    "override, says",
    [
        ("--config.mesh.fsdp=3", "mesh"),
        ("--config.mesh.decode_model=3", "mesh.decode_model=3"),
        ("--config.mesh.model=8", "divide over model=8"),
        ("--config.sample.max_new_tokens=100000", "100015 tokens"),
    ],
)
def test_a_config_that_does_not_go_with_the_topology_is_one_line(capsys, override, says):
    code, out, err = run(capsys, "--config", WORKSHEET, "--topology", "v5e:2x4", override)
    assert code == 2 and out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert says in line


@needs_libtpu
def test_knobs_are_tried_where_something_does_not_fit(capsys, monkeypatch):
    """A chip so small that the update fits only in parts: the plan finds in how many."""
    _, out, _ = run(capsys, "--config", WORKSHEET, "--topology", "v5e:2x4", "--json")
    whole = json.loads(out)["programs"]
    most = max(p["hbm_gib"] for n, p in whole.items() if n != "update")
    assert whole["update"]["hbm_gib"] > most  # else the chip below fits all or nothing
    between = (whole["update"]["hbm_gib"] + most) / 2
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], hbm=between * GIB))
    _, out, _ = run(capsys, "--config", WORKSHEET, "--topology", "v5e:2x4", "--json")
    report = json.loads(out)
    assert report["change"] or not report["fits"]
    if report["fits"]:
        assert set(report["change"]) <= {"learn.micro_batches", "model.remat"}
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], hbm=1000.0))
    code, out, err = run(capsys, "--config", WORKSHEET, "--topology", "v5e:2x4")
    assert code == 2 and "update" in out  # the numbers are shown all the same
    assert "error: DOES NOT FIT on v5e:2x4: prefill" in err.splitlines()[-1]


def test_the_knobs():
    options = ["--config.learn.micro_batches=8", "--config.sample.slots=0"]
    config = load_config("qwen2_5_math_7b:fsdp=16", options)
    slots = [values for _, values in plan.smaller_slots(config, 4)]
    assert slots[:3] == [{"sample.slots": 512}, {"sample.slots": 256}, {"sample.slots": 128}]
    leaner = [values for _, values in plan.leaner_updates(config, 16)]
    assert leaner == [
        {"learn.micro_batches": 16},
        {"learn.micro_batches": 32},
        {"learn.micro_batches": 32, "model.remat": "attention"},
        {"learn.micro_batches": 32, "model.remat": "full"},
    ]
    leanest = list(plan.leaner_updates(config, 16))[-1][0]
    assert (leanest.learn.micro_batches, leanest.model.remat) == (32, "full")
