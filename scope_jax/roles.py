"""Who takes part in a run: policy, process reward model and teacher, loaded from a config."""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from scope_jax.configlib import load_object, lora_options
from scope_jax.credit import RETURNS
from scope_jax.data import (
    decode_steps,
    render_prompt,
    tokenize_prompts,
)
from scope_jax.endpoint import Endpoint, open_cache, read_api_key
from scope_jax.hosts import all_hosts
from scope_jax.locate import LOCATORS, SELECT, TRIGGERS
from scope_jax.losses import LOSS_AGGREGATIONS, OFF_POLICY, RATIOS
from scope_jax.models.hf import load_hf, load_tokenizer
from scope_jax.models.lora import make_lora, merge
from scope_jax.models.transformer import REMAT, TransformerConfig, declare, init_lora
from scope_jax.prm import PRM, load_prm, score_steps
from scope_jax.prm_formats import PRMTexts
from scope_jax.records import (
    InputError,
    Prompts,
)
from scope_jax.rewards import score_completions
from scope_jax.sampling import INT8, continue_from, decoding_layout
from scope_jax.scorers import Scorer, oracle_scorer, text_scorer, token_scorer
from scope_jax.sharding import (
    DECODING,
    make_meshes,
    own_rows,
    put_batch,
    replicate,
    shardings,
)
from scope_jax.splicing import INSERT
from scope_jax.stopping import encode_stop, row_ends
from scope_jax.teachers import (
    Teacher,
    count_tokens,
    dataset_teacher,
    endpoint_teacher,
    model_teacher,
    text_teacher,
)

# Room for a prompt or prefix in a teacher's tokens, as a multiple of its room in the policy's.
BUCKET_FACTOR = 2


class Policy(NamedTuple):
    """A model with all that turns its tokens into text and rewards. Params travel apart: training
    moves them.
    """

    mesh: jax.sharding.Mesh
    decode_mesh: jax.sharding.Mesh  # the same devices, as they sample
    model: Any
    tokenizer: Any
    ends: dict[str, Any]  # of `generate`: what ends a row, and what stands behind the end
    tokenize: Callable[[Any], Prompts]  # records -> their prompts, rendered and in one bucket
    problems: Callable[[str], Any]  # split -> random-access source of records
    rewards: Callable[..., np.ndarray]  # (golds, completions) -> what each is worth, float32
    check_steps: Any  # the task's exact step checker, if it has one

    @property
    def pad_id(self) -> int:
        return self.ends["pad_id"]


def load_policy(config: ConfigDict) -> tuple[Policy, Any]:
    """Returns (Policy, params) of a config: mesh, model, tokenizer, task and reward."""
    mesh, decode_mesh = make_meshes(**config.mesh)
    check_options(config, mesh)  # what costs nothing to check goes before the weights
    problems = load_object(f"{config.task.module}:problems", "task.module")
    check_steps = getattr(importlib.import_module(config.task.module), "check_steps", None)
    if config.locate.locator == "oracle" and check_steps is None:
        raise InputError(f'locate.locator="oracle" needs check_steps in {config.task.module}')
    reward_fn = load_object(config.reward.fn, "reward.fn")
    tokenizer, eos_ids = load_tokenizer(config.model.path)
    if config.prompt.chat and not tokenizer.chat_template:
        raise InputError(
            f"{config.model.path} has no chat template: set --config.prompt.chat=False"
        )
    model, params = load_hf(config.model.path, mesh=mesh, dtype=config.model.dtype)
    model, params = _add_lora(config, model, params, mesh)
    model = dataclasses.replace(model, config=trained_config(model.config, config.model))
    longest = config.data.max_prompt_length + max(
        config.sample.max_new_tokens, config.eval.max_new_tokens
    )
    if longest > model.config.max_position:
        raise InputError(
            f"prompt + completion may take {longest} tokens, {config.model.path} was made for "
            f"{model.config.max_position}: lower data.max_prompt_length, sample.max_new_tokens or "
            "eval.max_new_tokens"
        )
    ends = row_ends(tokenizer, eos_ids, config.sample.stop, model.config.vocab_size)
    ends["stop_table"] = replicate(ends["stop_table"], decode_mesh)
    policy = Policy(
        mesh=mesh,
        decode_mesh=decode_mesh,
        model=model,
        tokenizer=tokenizer,
        ends=ends,
        tokenize=functools.partial(
            tokenize_prompts,
            tokenizer=tokenizer,
            render=functools.partial(render_prompt, tokenizer, **config.prompt),
            max_prompt_length=config.data.max_prompt_length,
            pad_id=ends["pad_id"],
        ),
        problems=functools.partial(
            problems, **{name: value for name, value in config.task.items() if name != "module"}
        ),
        rewards=functools.partial(score_texts, reward_fn, after=config.reward.after),
        check_steps=check_steps,
    )
    return policy, params


def score_texts(reward_fn, golds: Sequence[str], texts: Sequence[str], *, after: str) -> np.ndarray:
    """Returns the rewards [B] float32 of B completions; see `rewards.score_completions`."""
    return np.asarray(score_completions(reward_fn, golds, texts, after=after), np.float32)


def compute_dtype(config: ConfigDict) -> str:
    """Returns the dtype that the models of a run compute in."""
    return config.model.compute_dtype or config.model.dtype


def trained_config(read: TransformerConfig, options: ConfigDict) -> TransformerConfig:
    """Returns the config of a checkpoint as the config's `model` changes it."""
    return dataclasses.replace(
        read,
        remat=options.remat,
        dtype=options.compute_dtype or options.dtype,
        rope_theta=options.rope_theta or read.rope_theta,
        max_position=options.max_position or read.max_position,
    )


def _add_lora(config: ConfigDict, model, params, mesh):
    """Returns (model, params) with A and B beside the weights, where the config asks for LoRA."""
    if (lora := make_lora(**lora_options(config.model))) is None:
        return model, params
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, lora=lora))
    places = shardings(declare(model.config)["lora"], mesh)
    init = jax.jit(init_lora, static_argnums=0, out_shardings=places)
    # Steps count from 1: the keys of "step 0" are free.
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return model, {**params, "lora": init(model.config, key)}


def group_slots(config: ConfigDict) -> int:
    """Returns the rows that an update reads of a group, empty ones of insert="append" included."""
    size = config.sample.group_size
    appended = config.correct.n_correct if config.correct.insert == "append" else 0
    return size + (size if appended < 0 else appended)


def check_options(config: ConfigDict, mesh) -> None:
    """Raises InputError for option names that nothing knows, and for sizes that do not divide."""
    for group, key, known in (
        ("model", "remat", REMAT),
        ("locate", "locator", LOCATORS),
        ("select", "select", SELECT),
        ("select", "trigger", TRIGGERS),
        ("correct", "insert", INSERT),
        ("correct", "accept", ("verified_correct", "prm_ok", "any")),
        ("correct", "scope", ("suffix", "step")),
        ("prm", "reads", ("text", "policy_tokens")),
        ("returns", "kind", RETURNS),
        ("loss", "ratio", RATIOS),
        ("loss", "off_policy", OFF_POLICY),
        ("loss", "loss_agg", LOSS_AGGREGATIONS),
    ):
        options: Any = config[group]
        if options[key] not in known:
            raise InputError(f"{group}.{key}={options[key]!r} is none of {', '.join(known)}")
    make_lora(**lora_options(config.model))
    if config.sample.stop:
        encode_stop(config.sample.stop)
    if unknown := set(config.sample.int8) - set(INT8):
        raise InputError(f"sample.int8 must be some of {', '.join(INT8)}, got {sorted(unknown)}")
    if config.learn.is_weights and config.learn.old_logps != "recompute":
        raise InputError(
            "learn.is_weights needs learn.old_logps=recompute: what would it weigh by?"
        )
    if not 0 <= config.prm.window <= config.prm.max_length:
        raise InputError(
            f"prm.window={config.prm.window} must lie between 0 (off) and prm.max_length="
            f"{config.prm.max_length}"
        )
    if config.advantages.scale != "none" and config.returns.kind in ("prm_returns", "vppo"):
        raise InputError(
            f'returns.kind="{config.returns.kind}" differs from token to token and needs '
            "advantages.scale=none"
        )
    if config.locate.locator == "monte_carlo" and jax.process_count() > 1:
        raise InputError(
            'locate.locator="monte_carlo" runs in one process: they would wait in vain'
        )
    if config.learn.packing and config.learn.micro_batches == 1:
        raise InputError(
            "learn.packing saves whole micro-batches: set learn.micro_batches above 1 with it"
        )
    rows = config.data.prompts_per_step * group_slots(config)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = config.learn.mini_batches * config.learn.micro_batches
    over_mesh = f"the {shards} batch shards of the mesh {dict(mesh.shape)}"
    for name, size in {
        "data.prompts_per_step": config.data.prompts_per_step,
        "eval.batch_size": config.eval.batch_size,
    }.items():
        if size % shards:
            raise InputError(f"{name}={size} does not divide over {over_mesh}")
    if rows % (parts * shards):
        raise InputError(
            f"{rows} rollouts a step (data.prompts_per_step x slots of a group) do not divide into "
            f"learn.mini_batches x learn.micro_batches = {parts} parts over {over_mesh}"
        )


def describe(config: ConfigDict, policy: Policy, params, start: int) -> str:
    """Returns the lines that a run prints first."""
    millions = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    size = f"{millions:.2f} M parameters"
    if config.model.lora_rank:
        trained = sum(x.size for x in jax.tree.leaves(params["lora"])) / 1e6
        size += f", of which LoRA trains {trained:.2f} M"
    mesh = ", ".join(f"{axis}={size}" for axis, size in policy.mesh.shape.items())
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = [
        f"{config.method} on {config.task.module.rsplit('.', 1)[-1]}: policy {config.model.path} "
        f"({size}), "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s){hosts}, mesh {mesh}",
        f"{config.data.prompts_per_step} prompts x {config.sample.group_size} rollouts a step, "
        f"steps {start + 1} to {config.total_steps}, seed {config.seed}",
    ]
    if config.correct.n_correct:
        teacher = {
            "model": config.teacher.path,
            "dataset": "the data set's worked solutions",
            "endpoint": f"{config.teacher.model} at {config.teacher.url}",
        }[config.teacher.kind]
        lines.append(
            f"locator {config.locate.locator}, tau {config.locate.tau}; teacher: {teacher}"
        )
    if reads_scores(config) and config.locate.locator != "oracle":
        untrained = (
            "a RANDOM head on the policy's backbone: its scores mean nothing; "
            "set prm.path to a trained PRM"
        )
        lines.append(f"PRM: {config.prm.path or untrained}")
    return "\n".join(lines)


def reads_scores(config: ConfigDict) -> bool:
    """Returns whether a run needs scores of its steps, by a PRM or, with "oracle", the checker."""
    locates = config.locate.locator in ("prm", "oracle", "random_correct")
    locates |= config.select.select == "wrong_or_low_prm" or config.correct.accept == "prm_ok"
    return config.returns.kind != "outcome" or (config.correct.n_correct != 0 and locates)


def load_scorer(config: ConfigDict, policy: Policy, params) -> Scorer | None:
    """Returns the function that scores reasoning steps, or None where nothing reads its scores.

    Without `prm.path` the PRM is a random head on a copy of the policy: good for a smoke test, and
    said so.
    """
    if not reads_scores(config):
        return None
    if config.locate.locator == "oracle":
        decode = functools.partial(decode_steps, policy.tokenizer)
        return oracle_scorer(policy.check_steps, decode, seed=config.seed, **config.oracle)
    options = config.prm
    if options.path:
        tokenizer, _ = load_tokenizer(options.path)
        prm, prm_params = load_prm(
            options.path,
            format=options.format or None,
            mesh=policy.mesh,
            dtype=compute_dtype(config),
        )
    else:
        model, weights = merge(policy.model, params)
        tokenizer, prm = policy.tokenizer, PRM(model)
        head = replicate(prm.init_head(jax.random.key(config.seed)), policy.mesh)
        backbone = {name: x for name, x in weights.items() if name != "unembed"}
        prm_params = {"backbone": jax.tree.map(jnp.copy, backbone), "head": head}

    # `ids` are this process's rows, and batch_size is of all processes'.
    block = max(1, options.batch_size // jax.process_count()) if options.batch_size else 0
    windows = {"block": block, "most": lambda count: max(all_hosts(count))}

    def score_fn(ids, mask, score_positions, step_mask):
        size, parts = block or len(ids), []
        for start in range(0, len(ids), size):
            columns = (x[start : start + size] for x in (ids, mask, score_positions, step_mask))
            columns = put_batch(tuple(columns), policy.mesh)
            parts.append(own_rows(score_steps(prm, prm_params, *columns), policy.mesh))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    if options.path and options.reads == "text":
        layout = PRMTexts(tokenizer, prm.format, options.path)
        limit = min(options.max_length, prm.max_position)
        windows["window"] = min(options.window, limit)
        return text_scorer(score_fn, layout, policy.tokenizer, max_length=limit, **windows)
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise InputError(
            f"PRM {options.path} has another tokenizer than policy {config.model.path}, so it "
            "cannot read the policy's tokens: set --config.prm.reads=text"
        )
    limit = prm.max_position
    windows["window"] = min(options.window, limit)
    return token_scorer(score_fn, max_length=limit, **windows)


def load_teacher(
    config: ConfigDict, policy: Policy, workdir: pathlib.Path | None = None
) -> Teacher | None:
    """Returns the function that continues cut rollouts, or None where nothing is repaired.

    Args:
      workdir: where an endpoint's answers are kept for a resume; None = they are not.
    """
    end = {
        "policy_eos_id": policy.tokenizer.eos_token_id,
        "max_new_tokens": config.sample.max_new_tokens,
    }
    if config.correct.n_correct == 0:
        return None
    if config.teacher.kind == "dataset":
        return dataset_teacher(policy.tokenizer, **end)
    if config.teacher.kind == "endpoint":
        return load_endpoint(config, policy, workdir)
    if config.teacher.kind != "model":
        raise InputError(
            f'teacher.kind must be "model", "dataset" or "endpoint", got {config.teacher.kind!r}'
        )
    model, params = load_hf(
        config.teacher.path, mesh=policy.decode_mesh, rules=DECODING, dtype=compute_dtype(config)
    )
    model, params = decoding_layout(model, params, policy.decode_mesh)
    tokenizer, eos_ids = load_tokenizer(config.teacher.path)
    ends = row_ends(tokenizer, eos_ids, teacher_stop(config), model.config.vocab_size)
    sampling = {
        **ends,
        "stop_table": replicate(ends["stop_table"], policy.decode_mesh),
        "temperature": config.teacher.temperature,
        "top_p": config.teacher.top_p,
    }

    def continue_ids(prompt_ids, prompt_mask, prefix_ids, prefix_length, budgets, key):
        prompts = put_batch((prompt_ids, prompt_mask), policy.decode_mesh)
        *prefixes, budgets = put_batch((prefix_ids, prefix_length, budgets), policy.decode_mesh)
        written = continue_from(
            model, params, *prompts, *prefixes, key=key, max_new_tokens=budgets,
            buffer_length=config.sample.max_new_tokens, **sampling,
        )  # fmt: skip
        return own_rows(written, policy.decode_mesh)

    if tokenizer.get_vocab() == policy.tokenizer.get_vocab():
        return model_teacher(
            lambda r, key: continue_ids(
                r.prompt_ids, r.prompt_mask, r.prefix_ids, r.prefix_length, r.budgets, key
            ),
            policy_eos_id=end["policy_eos_id"],
            eos_ids=eos_ids,
        )
    prompt_bucket = BUCKET_FACTOR * config.data.max_prompt_length
    prefix_bucket = BUCKET_FACTOR * config.sample.max_new_tokens
    longest = prompt_bucket + prefix_bucket + config.sample.max_new_tokens
    if longest > model.config.max_position:
        raise InputError(
            f"teacher {config.teacher.path} has another tokenizer than the policy and may read "
            f"{longest} tokens; it was made for {model.config.max_position}: lower "
            "data.max_prompt_length or sample.max_new_tokens"
        )
    return text_teacher(
        continue_ids, policy.tokenizer, tokenizer,
        functools.partial(render_prompt, tokenizer, **config.prompt),
        prompt_bucket=prompt_bucket, prefix_bucket=prefix_bucket, eos_ids=eos_ids, **end,
    )  # fmt: skip


def teacher_stop(config: ConfigDict) -> tuple[str, ...]:
    """Returns the strings that end what a teacher writes: by steps, a literal separator too."""
    splitter, stop = config.steps.splitter, tuple(config.sample.stop)
    literal = isinstance(splitter, str) and not splitter.strip()
    return (*stop, splitter) if config.correct.scope == "step" and literal else stop


def load_endpoint(config: ConfigDict, policy: Policy, workdir: pathlib.Path | None) -> Teacher:
    """Returns the teacher behind a server. Nothing is sent or written yet."""
    options, processes = config.teacher, jax.process_count()
    for name, least in {
        "timeout_seconds": 0.001, "retries": 0, "concurrency": 1, "tokens_per_step": 0,
        "seconds_per_step": 0.001,
    }.items():  # fmt: skip
        if options[name] is None or not options[name] >= least:
            raise InputError(f"teacher.{name} must be at least {least}, got {options[name]}")
    if not options.model:
        raise InputError("teacher.model must name the endpoint's model")
    tokenizer = load_tokenizer(options.path)[0] if options.path else policy.tokenizer
    if config.prompt.chat and not tokenizer.chat_template:
        raise InputError(f"{options.path} has no chat template: set --config.prompt.chat=False")
    calls = max(1, config.correct.attempts)  # a step's, one after the other
    ask = Endpoint(
        options.url,
        options.model,
        functools.partial(count_tokens, policy.tokenizer),
        api_key=read_api_key(options.api_key_env),
        temperature=options.temperature,
        top_p=options.top_p,
        timeout_seconds=options.timeout_seconds,
        retries=options.retries,
        concurrency=max(1, options.concurrency // processes),
        tokens=options.tokens_per_step // (processes * calls) if options.tokens_per_step else None,
        seconds=options.seconds_per_step / calls,
        cache=open_cache(workdir, jax.process_index()) if workdir else None,
    )
    return endpoint_teacher(
        ask, policy.tokenizer, functools.partial(render_prompt, tokenizer, **config.prompt),
        policy_eos_id=policy.tokenizer.eos_token_id, max_new_tokens=config.sample.max_new_tokens,
        teacher_tokenizer=tokenizer, stop=teacher_stop(config),
    )  # fmt: skip
