"""Every option of the method with its default, and what each rival changes.

The defaults are SCOPE's as METHOD reads the paper; options whose value is our choice, not the
paper's, are listed in experiments/ASSUMPTIONS.md. A config file starts from `default_config()` and
states what it changes.
"""

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """Returns the config that every config file starts from. Lengths are in tokens."""
    return ConfigDict(
        {
            "method": "scope",  # a key of METHODS
            "seed": 0,
            "total_steps": 500,  # may be raised to continue a finished run
            # Where problems and rewards come from
            "task": {"module": ""},  # with problems(split, **the other keys); see scope_jax/tasks
            "reward": {
                # "package.module:function", (gold: str, completion: str) -> bool or float
                "fn": "",
                "solved_at": 1.0,  # a reward below it is a wrong rollout
                # "</think>": only what stands behind its last occurrence is read, without it the
                # reward is 0; "" = the whole completion
                "after": "",
            },
            # assistant: text that opens the assistant's turn, "<think>\n"
            "prompt": {"template": "{problem}", "chat": True, "system": "", "assistant": ""},
            "data": {"prompts_per_step": 128, "max_prompt_length": 1024},
            # Models
            "model": {
                "path": "",
                "dtype": "float32",  # of the weights that are trained
                # of the computation, of the sampler's weights, PRM and teacher; "" = dtype
                "compute_dtype": "",
                "remat": "none",  # | "products" | "attention" | "full": stores less and less
                # in place of the checkpoint's (Qwen2.5-Math made longer: 40000.0, 16384); 0 = its
                "rope_theta": 0.0,
                "max_position": 0,
                # 0 = all weights are trained; else they stay as they are, and each target of every
                # layer gets lora_alpha / lora_rank * A B, which is
                "lora_rank": 0,
                "lora_alpha": 16.0,
                "lora_targets": ("q", "k", "v", "o", "gate", "up", "down"),
            },
            "prm": {
                "path": "",  # "" = a random head on the base policy (a smoke test, not a PRM)
                "format": "",  # layout of its texts, where its directory does not say it
                # "text": the steps' texts in the PRM's own layout and tokenizer | "policy_tokens":
                # prompt and completion as sampled, each step read at its last token
                "reads": "text",
                "max_length": 4096,  # longer texts are left unscored, and counted
                # not 0: they are read in overlapping windows of so many tokens (scorers.py)
                "window": 0,
                "batch_size": 0,  # rows in one forward; 0 = all
            },
            "teacher": {
                # "model" | "dataset" (the problem's own worked solution, aligned by step) |
                # "endpoint" (a server that continues text, as vLLM and SGLang are) |
                # "hinted_policy" (the policy itself, which is told the answer) | "scripted" (the
                # task's own expert)
                "kind": "model",
                # of a model; of an endpoint: the directory of its tokenizer, "" = the policy's,
                # whose chat template then writes the prompts
                "path": "",
                "temperature": 1.0,
                "top_p": 1.0,
                # of a hinted policy: goes into prompt.template where the problem went
                "hint": "{problem}\n\nThe final answer is {answer}. Write the whole solution that "
                "leads to it, step by step, without saying that the answer was known.",
                # of an endpoint: http://HOST:PORT/v1, and the model's name there
                "url": "",
                "model": "",
                "api_key_env": "SCOPE_JAX_TEACHER_KEY",  # NAME of the variable that holds the key
                "timeout_seconds": 120.0,  # of one exchange
                "retries": 3,
                "concurrency": 64,  # exchanges at a time, of all processes
                # budgets of a step; tokens of all processes and attempts, 0 = no limit
                "tokens_per_step": 0,
                "seconds_per_step": 600.0,
            },
            # decode_model: "model" of the mesh that samples, on the same devices; 0 = the same
            "mesh": {"data": -1, "fsdp": 1, "model": 1, "decode_model": 0},
            # Rollouts
            "sample": {
                "group_size": 8,
                "max_new_tokens": 8192,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "slots": 0,  # rows decoded at a time, the others wait; 0 = all
                # strings, ("</answer>",), that end a rollout beside the end token, and are kept;
                # of teacher and evaluation too
                "stop": (),
                # "weights", "cache": held in eight bits while sampling (not in evaluation); set
                # learn.old_logps=recompute and learn.is_weights=True with it
                "int8": (),
            },
            # Groups without signal (all right or all wrong) are sampled anew, of other problems, in
            # so many further batches at most; what is left over of these is thrown away (DAPO)
            "refill": {
                "rounds": 0,
                "all_wrong": "refill",  # | "repair": such a group stays, and is sent to repair
            },
            # Where a rollout went wrong, and which are repaired
            "steps": {"splitter": "\n\n", "max_steps": 64},
            "locate": {"locator": "prm", "tau": 0.5, "on_no_error": "skip"},
            # Continuations that the policy samples from behind each step, of locator="monte_carlo"
            "monte_carlo": {"tries": 4},
            # How often the checker of locator="oracle" calls a right step wrong, a wrong one right
            "oracle": {"false_alarms": 0.0, "misses": 0.0},
            "select": {
                "select": "wrong",
                "require_finished": True,
                "trigger": "always",
                "trigger_accuracy": 0.5,  # of trigger="acc_below"
                "min_prefix_steps": 1,
                "min_prefix_ratio": 0.0,
            },
            "correct": {
                "n_correct": 1,  # repairs per group; 0 = none, -1 = every candidate
                "attempts": 1,
                # "suffix": the teacher finishes the solution | "step": it writes one step, then the
                # policy goes on, and is corrected again, `max_rounds` times at most
                "scope": "suffix",
                "max_rounds": 4,
                # "whole_trace": where nothing of a group could be repaired, a wrong rollout gives
                # way to the problem's whole worked solution, as in LUFFY
                "fallback": "none",
                "accept": "verified_correct",  # | "prm_ok" | "any"
                "insert": "replace_source",  # | "append" | "replace_random_wrong"
                # with replacement and the group baseline: an all-right group teaches nothing
                "keep_last_wrong": True,
            },
            # The share of a step's groups that may be repaired goes in a line from `share` to
            # `share_end` over the first `over_steps` steps; 0 = it stays
            "teacher_budget": {"share": 1.0, "share_end": 1.0, "over_steps": 0},
            # What is learnt
            "returns": {
                # what a rollout is worth: "outcome", its reward | "prm_blend" | "prm_returns" |
                # "vppo"; see credit.token_returns
                "kind": "outcome",
                "prm_weight": 0.5,
                "prefix_reward": 0.5,  # of "vppo"
                "overlong_share": 0.0,  # the last share of max_new_tokens costs up to 1
            },
            "advantages": {"scale": "none", "baseline": "group"},
            "credit": {
                "w_policy": 1.0,  # of rollouts that no teacher had a hand in
                "w_prefix": 1.0,
                "w_correction": 1.0,
                "salvage_only": False,
                "prefix_in_loss": True,
            },
            "loss": {
                "clip_low": 0.2,  # none = not clipped
                "clip_high": 0.2,
                "ratio": "token",  # | "sequence": one ratio for all of a rollout's policy tokens
                "off_policy": "shaped",
                "gamma": 0.1,
                "loss_agg": "seq-mean-token-sum-norm",
                "entropy_coef": 0.001,
                "kl_coef": 0.0,
                "chunk_size": 1024,  # positions whose logits exist at once
            },
            "learn": {
                "mini_batches": 2,  # optimizer updates per training step
                "micro_batches": 1,  # parts that a mini-batch's gradient is summed over
                # rollouts of unequal length share rows; saves whole micro-batches, so have several
                "packing": False,
                # | "recompute": one forward of the trainer before the updates
                "old_logps": "sampler",
                # with "recompute": a policy token's advantage times min(pi_old / sampler's, 2)
                "is_weights": False,
            },
            "optimizer": {
                "learning_rate": 1e-6,
                "schedule": "constant",  # | "linear" | "cosine"
                "warmup_steps": 0,  # in optimizer updates
                "end_factor": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "max_grad_norm": 1.0,
                # "float32" | "bfloat16" | "" = the params'; what bfloat16 costs: update.py
                "mu_dtype": "",  # of the first moments
                "nu_dtype": "",  # of the second ones
            },
            # What is written down
            "eval": {
                "every": 0,  # steps; 0 = before and after the run only
                "problems": 128,
                "batch_size": 128,
                "group_size": 8,
                "max_new_tokens": 8192,
                "temperature": 1.0,
                "split": "test",  # | "valid": to choose by, so that "test" stays unseen
                "ood": True,
                "greedy": False,  # one completion at temperature 0 as well
                "diversity": False,  # among the correct completions of a problem
            },
            "checkpoint": {
                "every": 50,  # steps
                "keep": 2,  # of the newest
                "keep_every": 0,  # those of steps that it divides stay for good; 0 = none
                # after SIGTERM, for the step to end and be saved (Google Cloud gives 30)
                "grace_seconds": 25.0,
            },
            # What ends a run with the reason; 0 = it is only counted
            "checks": {
                "max_skipped": 3,  # steps in a row whose update was not finite
                "max_logp_gap": 0.0,  # of sampler and trainer, where it is measured
                "max_recompiles": 0,  # after the first step
                "spike_factor": 10.0,  # gradient norm over its running median: flagged
            },
            # "package.module:function", called with (step, metrics) after each step, on every host;
            # what it returns, a dict or None, is logged with the step's metrics
            "hooks": {"after_step": ""},
            "log": {
                "rollout_groups": 2,
                "rollouts_every": 10,
                "diversity_every": 10,
                "tracker": "",  # beside TensorBoard: "wandb" | "trackio", if it is installed
                "profile_from": 0,  # the first step of a jax.profiler trace in W/profile; 0 = none
                "profile_steps": 3,  # so many steps from there on
            },
        }
    )


# What each method changes; applied after the config file and before the command line.
NO_REPAIR = {"correct.n_correct": 0}
# One rollout of each group gives way to a whole teacher trace, whatever its reward.
WHOLE_TRACE = {
    "locate.locator": "zero",
    "select.select": "any",
    "select.require_finished": False,
    "select.min_prefix_steps": 0,
    "correct.keep_last_wrong": False,
}
METHODS = {
    "scope": {},
    # Ours, from the miniature experiment (experiments/miniature): three repairs stand beside their
    # group and in no baseline, and a teacher's tokens are learnt by their likelihood.
    "scope_plus": {
        "correct.n_correct": 3,
        "correct.insert": "append",
        "advantages.baseline": "on_policy",
        "loss.off_policy": "sft",
    },
    "scope_step": {"correct.scope": "step"},
    # SCOPE's ablations: another cut; "zero" replaces a wrong rollout by a whole trace.
    "scope_random": {"locate.locator": "random"},
    "scope_random_correct": {"locate.locator": "random_correct"},
    "scope_zero": {"locate.locator": "zero", "select.min_prefix_steps": 0},
    "scope_oracle": {"locate.locator": "oracle"},
    "scope_monte_carlo": {"locate.locator": "monte_carlo"},
    "scope_noisy": {
        "locate.locator": "oracle",
        "oracle.false_alarms": 0.2,
        "oracle.misses": 0.3,
    },
    # On-policy
    "dr_grpo": NO_REPAIR,
    "grpo": NO_REPAIR | {"advantages.scale": "std", "loss.loss_agg": "seq-mean-token-mean"},
    "dapo": NO_REPAIR
    | {
        "advantages.scale": "std",
        "loss.loss_agg": "token-mean",
        "loss.clip_high": 0.28,
        "loss.entropy_coef": 0.0,
        "returns.overlong_share": 0.2,
        "refill.rounds": 3,
    },
    "gspo": NO_REPAIR
    | {
        "advantages.scale": "std",
        "loss.loss_agg": "seq-mean-token-mean",
        "loss.ratio": "sequence",
        "loss.clip_low": 3e-4,
        "loss.clip_high": 4e-4,
    },
    # A process reward model's word as reward
    "prm_blend": NO_REPAIR | {"returns.kind": "prm_blend"},
    "prm_returns": NO_REPAIR | {"returns.kind": "prm_returns"},
    "vppo": NO_REPAIR | {"returns.kind": "vppo"},
    # Whole teacher traces
    "luffy": WHOLE_TRACE | {"loss.clip_low": None, "loss.clip_high": None},
    # A trace beside each group, learnt by its likelihood; it is in no baseline.
    "rl_sft": WHOLE_TRACE
    | {
        "correct.insert": "append",
        "loss.off_policy": "sft",
        "advantages.baseline": "on_policy",
    },
    "sft": WHOLE_TRACE
    | {
        "correct.insert": "append",
        "loss.off_policy": "sft",
        "advantages.baseline": "on_policy",
        "credit.w_policy": 0.0,
        "loss.entropy_coef": 0.0,
    },
}
