"""Tests of the benchmarks: the peers' work from the same seed, one run of each, the table."""

import hashlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from scope_jax.models.hf import save_hf
from scope_jax.models.transformer import Transformer, TransformerConfig

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "one_layer"
    model = Transformer(
        TransformerConfig(
            vocab_size=32, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
            mlp_dim=16, qkv_bias=True,
        )
    )  # fmt: skip
    save_hf(path, model, model.init(jax.random.key(0)))
    return path


@pytest.fixture
def bench(monkeypatch):
    """Imports a file of experiments/ as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return __import__


def test_work_is_the_peers(bench, model_dir):
    peer_work = bench("peer_work")
    sizes = ["--P", "3", "--G", "2", "--prompt-len", "5", "--new-tokens", "48", "--seed", "4"]
    args = peer_work.parse("", new_tokens=64, argv=["--model-dir", str(model_dir), *sizes])
    assert (args.vocab, args.slots, args.len_median) == (32, 6, 8.0)
    rng = np.random.default_rng(4)  # the order of draws in ../shared/peers
    prompts = rng.integers(10, 32, (3, 5))
    tail = np.clip(np.rint(rng.lognormal(np.log(8), 1.0, 6)), 8, 48).astype(np.int64)
    for workload, lengths in (("W1", np.full(6, 48, np.int64)), ("W4", tail)):
        work = peer_work.make_work(args, workload)
        np.testing.assert_array_equal(work["prompts"], prompts)
        np.testing.assert_array_equal(work["lengths"], lengths)
        both = lengths.tobytes() + prompts.tobytes()  # in the order of their names
        assert peer_work.work_hash(work) == hashlib.sha1(both).hexdigest()[:12]


def test_work_of_an_update_is_the_peers(bench, model_dir):
    peer_work = bench("peer_work")
    sizes = ["--P", "3", "--B", "4", "--prompt-len", "5", "--new-tokens", "6", "--seed", "4"]
    args = peer_work.parse("", new_tokens=64, argv=["--model-dir", str(model_dir), *sizes])
    rng = np.random.default_rng(4)  # the order of draws in ../shared/peers: prompts of P rows first
    rng.integers(10, 32, (3, 5))
    want = {"prompts": rng.integers(10, 32, (4, 5)), "completions": rng.integers(10, 32, (4, 6))}
    want["advantages"] = rng.standard_normal(4).astype(np.float32)
    want["old_logp"] = (-np.log(32) + 0.1 * rng.standard_normal((4, 6))).astype(np.float32)
    work = peer_work.make_work(args, "W2")
    assert work.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(work[name], value)
        assert work[name].dtype == value.dtype


@pytest.mark.parametrize("script", ["bench_decode.py", "bench_long_tail.py"])
def test_a_benchmark_prints_one_line_of_json(script, model_dir):
    sizes = "--P 2 --G 2 --prompt-len 4 --new-tokens 9 --slots 2 --reps 2 --check".split()
    line = [sys.executable, str(EXPERIMENTS / script), "--model-dir", str(model_dir), *sizes]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["tokens"] == 4 * 9 if script == "bench_decode.py" else 4 * 8 <= row["tokens"] <= 36
    assert len(row["seconds_all"]) == 2 and row["compiled_while_timed"] == 0
    seconds = row["tokens"] / row["tokens_per_s"]
    assert seconds == pytest.approx(row["seconds"], abs=6e-5)  # it is printed to 1e-4
    assert row["check"]["max_abs_logp_diff"] < 1e-5
    assert row["ttft_s"] > 0 and row["peak_rss_mb"] > 50


def row(name, tokens_per_s, work_hash="a"):
    times = {"tokens_per_s": tokens_per_s, "ttft_s": 0.5, "peak_rss_mb": 1234.5}
    return {"case": "W1 tiny", "name": name, "work_hash": work_hash, **times}


@pytest.mark.parametrize("script", ["bench_update.py", "bench_rl_step.py"])
def test_a_benchmark_of_updates_prints_one_line_of_json(script, model_dir):
    sizes = "--P 2 --G 2 --B 4 --micro 2 --prompt-len 4 --new-tokens 9 --reps 2".split()
    line = [sys.executable, str(EXPERIMENTS / script), "--model-dir", str(model_dir), *sizes]
    line += ["--remat", "attention"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["tokens"] == 4 * (4 + 9 if script == "bench_update.py" else 9)
    assert (row["micro"], row["remat"], row["compiled_while_timed"]) == (2, "attention", 0)
    assert row["programs_compiled"] > 0
    assert len(row["seconds_all"]) == 2
    if script == "bench_update.py":
        first, last = row["check"]["first_loss"], row["check"]["last_loss"]
        assert first != last  # the weights moved
    else:
        assert row["check"]["logp_gap"] < 1e-4  # of the sampler's log-probs, under the same weights


def test_benchmark_of_packing_times_both_on_the_same_rollouts(model_dir):
    sizes = "--B 16 --G 2 --micro 2 --prompt-len 4 --new-tokens 24 --reps 2 --lr 0 --pack".split()
    line = [sys.executable, str(EXPERIMENTS / "bench_update.py"), "--model-dir", str(model_dir)]
    done = subprocess.run(line + sizes, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["padding"]["packed"] < row["padding"]["unpacked"] < 1
    assert row["check"]["packed"] == pytest.approx(row["check"]["unpacked"], abs=1e-5)
    assert row["unpacked_over_packed"] > 0 and len(row["seconds_all"]) == 2


def test_table_divides_by_the_mean_of_both_of_our_runs(bench):
    table = bench("bench_peers").table
    rows = [row("scope_jax", 300.0), row("Tunix", 50.0), row("scope_jax again", 200.0)]
    lines = table(rows).splitlines()
    assert lines[2] == "| W1 tiny | scope_jax | 300 |  | 0.50 | 1,234 |"
    assert lines[3] == "| W1 tiny | Tunix | 50 | 5.00x | 0.50 | 1,234 |"
    with pytest.raises(SystemExit, match="W1 tiny: the inputs differ"):
        table([*rows, row("torch loop", 60.0, work_hash="b")])
