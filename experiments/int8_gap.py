"""How far are rollouts in eight bits from the policy that is trained? One JSON line per setting.

    python experiments/int8_gap.py --config configs/gsm8k_smollm2.py

Samples one training step's rollouts with the layers' weights, the cache, or both in eight bits
(`sample.int8`), recomputes their log-probs by a full forward of the trainer's weights, and prints
the differences over all sampled tokens, and the weights that correct for them (`is_weights`).
"""

import argparse
import json

import jax
import numpy as np

from scope_jax.configlib import load_config
from scope_jax.roles import load_policy
from scope_jax.sampling import decoding_layout, generate
from scope_jax.sharding import put_batch
from scope_jax.update import IS_CAP, completion_logps

SETTINGS = ((), ("weights",), ("cache",), ("weights", "cache"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    policy, params = load_policy(config)
    problems = policy.problems("train")
    prompts = policy.tokenize([problems[i] for i in range(config.data.prompts_per_step)])
    prompts = put_batch((prompts.ids, prompts.mask), policy.mesh)
    options = {k: v for k, v in config.sample.items() if k not in ("stop", "int8")} | policy.ends
    temperature = config.sample.temperature
    score = jax.jit(completion_logps, static_argnums=0, static_argnames="temperature")
    for int8 in SETTINGS:
        layout = decoding_layout(policy.model, params, policy.mesh, int8=int8)
        rollouts = generate(*layout, *prompts, jax.random.key(config.seed), **options)
        trainers, _ = score(policy.model, params, rollouts, temperature=temperature)
        gap = np.asarray(trainers - rollouts.logps)[np.asarray(rollouts.completion_mask)]
        weight = np.minimum(np.exp(gap), IS_CAP)
        line = {
            "model": config.model.path, "int8": int8, "tokens": gap.size,
            "gap_mean": np.abs(gap).mean(), "gap_p99": np.quantile(np.abs(gap), 0.99),
            "gap_max": np.abs(gap).max(), "kl_sampler_trainer": -gap.mean(),
            "is_weight_mean": weight.mean(), "is_weight_deviation": weight.std(),
            "truncated": (np.exp(gap) > IS_CAP).mean(),
        }  # fmt: skip
        rounded = {
            k: float(f"{v:.3g}") if isinstance(v, np.floating) else v for k, v in line.items()
        }
        print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
