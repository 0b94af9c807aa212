"""What a run would need on a TPU, before one is rented: memory, time and what to change.

    python -m scope_jax.plan --config qwen2_5_math_7b --topology v5p:2x2x2

Every program of a training step is compiled for the topology, on any machine (no accelerator; the
`aot` extra brings libtpu). Memory is the compiler's own figure, plus the arrays that lie there
beside a program's arguments (the optimizer's while it decodes). Time is its estimate of each
operation's cycles, loops counted, attention kernels by formula, transfers by bytes and links
(hlo.py): an estimate, and no measurement. Where something does not fit, the knobs are tried in
turn, and the first setting that does is named.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from scope_jax.configlib import load_config, lora_options, one_line_errors, read_command
from scope_jax.hardware import GIB, Chip, topology_devices
from scope_jax.hlo import Estimate, estimate, parse
from scope_jax.models.flops import causal_pairs, forward_flops
from scope_jax.models.hf import config_from_hf, read_config, resolve
from scope_jax.models.lora import make_lora
from scope_jax.models.published import PUBLISHED, share_tokenizer
from scope_jax.models.transformer import Transformer, TransformerConfig, declare
from scope_jax.prm import PRM
from scope_jax.programs import (
    abstract_batch,
    abstract_params,
    compile_with_text,
    decode_programs,
    memory,
    on_device,
    score_program,
    update_programs,
)
from scope_jax.records import InputError
from scope_jax.roles import (
    BUCKET_FACTOR,
    check_options,
    compute_dtype,
    group_slots,
    reads_scores,
    trained_config,
)
from scope_jax.sharding import DECODING, make_meshes
from scope_jax.update import groups_stay_whole, make_optimizer, state_shapes


def read_model(path: str) -> TransformerConfig:
    """Returns the shape of a model: of a directory, or of a published one by its hub id."""
    if path in PUBLISHED:
        return config_from_hf(PUBLISHED[path], path)
    directory = resolve(path)
    return config_from_hf(read_config(directory), directory / "config.json")


@dataclasses.dataclass
class Program:
    """One program of a step. Times and operations are of one call, memory of one chip."""

    lower: Any  # () -> jax.stages.Lowered
    flops: float  # of the model, on all chips: nothing computed twice counts
    resident: int = 0  # bytes beside its arguments
    calls: float = 1  # in a training step
    hbm: int = 0  # bytes while it runs, `resident` included
    fits: bool = False
    cost: Estimate | None = None  # None where it does not compile
    compile_seconds: float = 0.0


def compile_program(program: Program, chip: Chip, coords) -> Program:
    """Compiles a program and reads its memory and time; returns it, filled in."""
    began = time.perf_counter()
    lowered = program.lower()
    try:
        compiled, text = compile_with_text(lowered)
    except Exception as error:  # XLA says only in the message what kind it is
        used = re.search(r"(?:Used |temporaries \()([\d.]+)([GMK])\b", str(error))
        if used is None:
            raise
        unit = {"G": GIB, "M": 2**20, "K": 2**10}[used[2]]
        program.hbm = int(float(used[1]) * unit) + program.resident
        program.compile_seconds = time.perf_counter() - began
        return program
    program.cost = estimate(parse(text), chip, coords)
    program.hbm = memory(compiled) + program.resident
    program.fits = program.hbm <= chip.hbm
    program.compile_seconds = time.perf_counter() - began
    return program


# ------------------------------------------------------------------------------ a run's programs


@dataclasses.dataclass
class Models:
    """The models of a run as shapes, and what lies on a chip between its programs."""

    policy: Transformer
    state: Any  # TrainState
    optimizer: Any
    prm: PRM | None
    prm_params: Any
    teacher: TransformerConfig | None
    resident: dict[str, int]  # bytes on a chip: "state", "prm", "teacher"


def read_models(config: ConfigDict, mesh, decode_mesh) -> Models:
    """Returns the models that a config names, sharded as a run shards them."""
    shape = trained_config(read_model(config.model.path), config.model)
    policy = Transformer(dataclasses.replace(shape, lora=make_lora(**lora_options(config.model))))
    longest = config.data.max_prompt_length + config.sample.max_new_tokens
    if longest > policy.config.max_position:
        raise InputError(
            f"prompt + completion may take {longest} tokens, {config.model.path} was made for "
            f"{policy.config.max_position}: set --config.model.max_position (and rope_theta)"
        )
    params = abstract_params(declare(policy.config), mesh, config.model.dtype)
    optimizer = make_optimizer(config.total_steps * config.learn.mini_batches, **config.optimizer)
    state = state_shapes(optimizer, params)
    resident = {"state": on_device(state)}
    if config.loss.kl_coef:
        resident["reference"] = on_device(params)
    dtype, prm, prm_params, teacher = compute_dtype(config), None, None, None
    if reads_scores(config) and config.locate.locator != "oracle":
        read = read_model(config.prm.path) if config.prm.path else shape
        head = "mlp2_at_token" if config.prm.path else "linear2_at_sep"
        prm = PRM(Transformer(dataclasses.replace(read, dtype=dtype)), head)
        prm_params = abstract_params(prm.declare(), mesh, dtype)
        resident["prm"] = on_device(prm_params)
    if config.correct.n_correct and config.teacher.kind == "model":
        teacher = dataclasses.replace(read_model(config.teacher.path), dtype=dtype)
        on_chip = abstract_params(declare(teacher), decode_mesh, dtype, DECODING)
        resident["teacher"] = on_device(on_chip)
    return Models(policy, state, optimizer, prm, prm_params, teacher, resident)


def beside(models: Models, *own: str) -> int:
    """Returns the bytes on a chip of all that is resident, but for a program's own arguments."""
    return sum(size for name, size in models.resident.items() if name not in own)


def sampling(config: ConfigDict, models: Models, mesh, tokens: float) -> dict[str, Program]:
    """Returns the programs that sample the rollouts.

    Args:
      tokens: of a completion, on average.
    """
    prompts, group = config.data.prompts_per_step, config.sample.group_size
    width, columns = config.data.max_prompt_length, config.sample.max_new_tokens
    slots = min(config.sample.slots or prompts * group, prompts * group)
    base = dataclasses.replace(models.policy.config, lora=None)  # merged while it samples
    lowered, sizes = decode_programs(
        base, mesh, prompts=prompts, group=group, width=width, columns=columns,
        slots=slots, int8=tuple(config.sample.int8),
    )  # fmt: skip
    return decoding(base, lowered, sizes, beside(models), width=width,
                    columns=columns, contexts=prompts, rows=prompts * group, slots=slots,
                    tokens=tokens)  # fmt: skip


def teaching(config: ConfigDict, models: Models, mesh, tokens: float) -> dict[str, Program]:
    """Returns the programs with which a teacher model continues the cut rollouts."""
    if models.teacher is None:
        return {}
    each = config.correct.n_correct if config.correct.n_correct > 0 else config.sample.group_size
    rows, columns = config.data.prompts_per_step * each, config.sample.max_new_tokens
    width = config.data.max_prompt_length + columns
    if not share_tokenizer(config.model.path, config.teacher.path):
        width *= BUCKET_FACTOR
    lowered, sizes = decode_programs(
        models.teacher, mesh, prompts=rows, group=1, width=width, columns=columns
    )
    programs = decoding(
        models.teacher, lowered, sizes, beside(models, "teacher"), width=width, columns=columns,
        contexts=rows, rows=rows, slots=rows, tokens=tokens,
    )  # fmt: skip
    return {f"teacher_{name}": program for name, program in programs.items()}


def decoding(
    config: TransformerConfig, lowered, sizes, resident: int, *, width, columns, contexts, rows,
    slots, tokens,
) -> dict[str, Program]:  # fmt: skip
    chunk = sizes["chunk"]
    read = forward_flops(
        config, tokens=chunk * width, pairs=chunk * causal_pairs(width), logits=chunk
    )
    seen = width + columns  # of the longest row's last token
    step = forward_flops(config, tokens=slots, pairs=slots * seen, logits=slots)
    return {
        # The cache of the completions is there already while prompts are read.
        "prefill": Program(
            lowered["prefill"], read, resident + sizes["kv"], calls=-(-contexts // chunk)
        ),
        "decode": Program(lowered["segment"], step, resident, calls=rows / slots * tokens),
        "grow": Program(lowered["move"], 0.0, resident + sizes["weights"] + sizes["prompts_kv"]),
    }


def scoring(config: ConfigDict, models: Models, mesh, tokens: float) -> dict[str, Program]:
    """Returns the program that scores the rollouts' steps.

    Args:
      tokens: of a completion, on average; the problem is taken to be as long as it may get.
    """
    if models.prm is None:
        return {}
    rows = config.data.prompts_per_step * config.sample.group_size
    batch, length = config.prm.batch_size or rows, config.prm.max_length
    if config.prm.reads == "policy_tokens" or not config.prm.path:
        length = config.data.max_prompt_length + config.sample.max_new_tokens
    length = min(length, models.prm.max_position)
    whole = config.data.max_prompt_length + tokens
    if config.prm.window and whole > length:  # a further window scores half of its room
        window = min(config.prm.window, length)
        room = max(1, window - config.data.max_prompt_length)
        rows *= 1 + math.ceil(max(0, whole - window) / (room / 2))
    lower = score_program(
        models.prm, models.prm_params, mesh, rows=batch, length=length,
        steps=config.steps.max_steps,
    )  # fmt: skip
    flops = forward_flops(
        models.prm.backbone.config, tokens=batch * length, pairs=batch * causal_pairs(length),
        logits=0,
    )  # fmt: skip
    return {"score": Program(lower, flops, beside(models, "prm"), calls=-(-rows // batch))}


def updating(config: ConfigDict, models: Models, mesh) -> dict[str, Program]:
    """Returns the programs of an update, of rows as long as they may get."""
    slots = group_slots(config)
    rows = config.data.prompts_per_step * slots // config.learn.mini_batches
    width, length = config.data.max_prompt_length, config.sample.max_new_tokens
    options = {**config.learn, **config.loss, "temperature": config.sample.temperature}
    minis = options.pop("mini_batches")
    for name in ("is_weights", "packing"):
        options.pop(name, None)
    batch = abstract_batch(mesh, rows=rows, width=width, length=length)
    whole = groups_stay_whole(batch.advantages, slots, options["micro_batches"])
    group = slots if whole else 1
    if config.loss.kl_coef:
        batch = dataclasses.replace(batch, ref_logps=batch.old_logps)
    lowered = update_programs(
        models.policy, models.optimizer, models.state, batch, group_size=group, max_length=length,
        **options,
    )  # fmt: skip
    prompts = rows // group
    pairs = prompts * causal_pairs(width) + rows * causal_pairs(length, width)
    flops = forward_flops(
        models.policy.config, tokens=prompts * width + rows * length, pairs=pairs,
        logits=rows * length,
    )  # fmt: skip
    factor = {"update": 3.0, "recompute": 1.0}
    opt_state = on_device(models.state.opt_state)
    held = {"update": beside(models, "state"), "recompute": beside(models, "state") + opt_state}
    return {
        name: Program(lower, factor[name] * flops, held[name], calls=minis)
        for name, lower in lowered.items()
    }


# ------------------------------------------------------------------------------ knobs


def smaller_slots(config: ConfigDict, shards: int):
    """Yields configs with fewer and fewer rows in flight, and what was changed."""
    rows = config.data.prompts_per_step * config.sample.group_size
    slots = config.sample.slots or rows
    while slots % (2 * shards) == 0 and slots > shards:
        slots //= 2
        yield changed(config, {"sample.slots": slots})


def leaner_updates(config: ConfigDict, shards: int):
    """Yields configs whose updates store less: more micro-batches, then more computed again."""
    rows = config.data.prompts_per_step * config.sample.group_size // config.learn.mini_batches
    parts = config.learn.micro_batches
    while rows % (2 * parts * shards) == 0:
        parts *= 2
        yield changed(config, {"learn.micro_batches": parts})
    kept = ("none", "products", "attention", "full")
    for remat in kept[kept.index(config.model.remat) + 1 :]:
        yield changed(config, {"learn.micro_batches": parts, "model.remat": remat})


def smaller_scoring(config: ConfigDict, shards: int):
    """Yields configs whose PRM reads fewer rows at a time."""
    rows = config.data.prompts_per_step * config.sample.group_size
    size = config.prm.batch_size or rows
    while size % (2 * shards) == 0:
        size //= 2
        yield changed(config, {"prm.batch_size": size})


def changed(config: ConfigDict, values: dict[str, Any]) -> tuple[ConfigDict, dict[str, Any]]:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(values)
    return config, values


def fit(build, knobs, config: ConfigDict, chip: Chip, coords, say):
    """Compiles the programs of a stage; where they do not fit, tries the knobs in turn.

    Args:
      build: config -> {name: Program}.
      knobs: config -> (config, what was changed), ..
    Returns:
      ({name: Program}, what had to be changed, {} where nothing; the programs as configured).
    """

    def compiled(config):
        done = {}
        for name, program in build(config).items():
            say(f"compiling {name}")
            done[name] = compile_program(program, chip, coords)
            if not program.fits:  # the others do not matter then
                return done, False
        return done, True

    first, fits = compiled(config)
    if fits:
        return first, {}, first
    for leaner, values in knobs(config):
        programs, fits = compiled(leaner)
        if fits:
            return programs, values, first
    return first, {}, first


# ------------------------------------------------------------------------------ the plan


def plan(config: ConfigDict, topology: str, *, tokens: float | None = None, say=print) -> dict:
    """Returns what a run needs on a topology, see the module's docstring.

    Args:
      config: of a run.
      topology: "v5p:2x2x2", say.
      tokens: of a completion, on average, for the time of sampling and teaching (default: all are
        as long as they may get).
      say: gets a line for each program that is being compiled.
    Returns:
      {"topology", "chips", "chip_hbm_gib", "fits", "change", "programs": {name: {..}}, "step":
      {..}}; seconds are estimates.
    Raises:
      InputError: an unknown topology, or a config that does not go together with it.
    """
    began = time.perf_counter()
    chip, devices = topology_devices(topology)
    mesh, decode_mesh = make_meshes(**config.mesh, devices=devices)
    check_options(config, mesh)
    coords = [device.coords for device in mesh.devices.flat]  # in the order of the programs'
    models = read_models(config, mesh, decode_mesh)
    tokens = float(tokens or config.sample.max_new_tokens)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    decode_shards = decode_mesh.shape["data"] * decode_mesh.shape["fsdp"]

    def update_stage(config):
        policy = dataclasses.replace(
            models.policy,
            config=dataclasses.replace(models.policy.config, remat=config.model.remat),
        )
        return updating(config, dataclasses.replace(models, policy=policy), mesh)

    stages = {
        "sample": (
            lambda c: sampling(c, models, decode_mesh, tokens),
            lambda c: smaller_slots(c, decode_shards),
        ),
        "score": (lambda c: scoring(c, models, mesh, tokens), lambda c: smaller_scoring(c, shards)),
        "teach": (lambda c: teaching(c, models, decode_mesh, tokens), lambda _: ()),
        "update": (update_stage, lambda c: leaner_updates(c, shards)),
    }
    by_stage, changes, seconds, asked, hopeless = {}, {}, {}, {}, False
    # The update first: XLA refuses soonest what it needs most. After a stage that no knob makes fit
    # the others are compiled as configured only.
    for stage in ("update", "sample", "score", "teach"):
        build, knobs = stages[stage]
        found, values, first = fit(
            build, (lambda _: ()) if hopeless else knobs, config, chip, coords, say
        )
        by_stage[stage] = found
        changes |= values
        asked |= {name: p.hbm for name, p in first.items() if values}
        fits = all(p.fits for p in found.values())
        hopeless |= not fits
        seconds[stage] = sum(p.calls * p.cost.seconds for p in found.values()) if fits else None
    programs = {name: p for stage in stages for name, p in by_stage[stage].items()}
    rows = config.data.prompts_per_step * config.sample.group_size
    total = None if None in seconds.values() else sum(s or 0.0 for s in seconds.values())
    sharded = sum(models.resident.values())
    worst = max(programs.values(), key=lambda p: p.hbm)
    return {
        "topology": topology,
        "chips": len(devices),
        "chip_hbm_gib": round(chip.hbm / GIB, 2),
        "mesh": dict(mesh.shape),
        "decode_mesh": dict(decode_mesh.shape),
        "fits": all(p.fits for p in programs.values()),
        "change": changes,
        "asked_hbm_gib": {name: round(hbm / GIB, 2) for name, hbm in asked.items()},
        "resident_gib": {k: round(v / GIB, 2) for k, v in models.resident.items()},
        # What does not fit is taken to shrink with the chips, but for what a program itself needs.
        "chips_needed": chips_needed(len(devices), worst.hbm, sharded, chip.hbm),
        "programs": {name: row(p, chip, len(devices)) for name, p in programs.items()},
        "step": {
            "seconds": total,
            **{f"{stage}_seconds": value for stage, value in seconds.items()},
            "completion_tokens": rows * tokens,
            "tokens_per_second": rows * tokens / total if total else None,
        },
        "plan_seconds": round(time.perf_counter() - began, 1),
    }


def chips_needed(chips: int, hbm: float, resident: float, capacity: float) -> int | None:
    """Returns how many chips would hold what `chips` of them need `hbm` bytes each for; None where
    the part that does not shrink with their number is more than a chip has.

    >>> chips_needed(8, 40, 30, 25), chips_needed(8, 20, 10, 25), chips_needed(8, 60, 10, 25)
    (16, 8, None)
    """
    fixed = hbm - resident
    if hbm <= capacity:
        return chips
    if fixed >= capacity:
        return None
    return -(-int(chips * resident) // int(capacity - fixed))


def row(p: Program, chip: Chip, chips: int) -> dict[str, Any]:
    """Returns a program's line of the plan."""

    def mfu(seconds: float) -> float | None:
        return round(p.flops / (seconds * chips * chip.flops), 4) if seconds and p.flops else None

    cost = p.cost
    return {
        "hbm_gib": round(p.hbm / GIB, 4),
        "resident_gib": round(p.resident / GIB, 4),
        "fits": p.fits,
        "flops": p.flops,
        "calls": p.calls,
        "seconds": cost and round(cost.seconds, 6),
        "seconds_compute": cost and round(cost.compute, 6),
        "mfu": cost and mfu(cost.seconds),
        "mfu_compute": cost and mfu(cost.compute),
        "collective_gib": cost and round(cost.sent / GIB, 3),
        "compile_seconds": round(p.compile_seconds, 1),
    }


def show(report: dict, console: Console) -> None:
    """Prints a plan."""
    mesh = ", ".join(f"{k}={v}" for k, v in report["mesh"].items())
    decode = ", ".join(f"{k}={v}" for k, v in report["decode_mesh"].items())
    console.print(
        f"{report['topology']}: {report['chips']} chips of {report['chip_hbm_gib']} GiB, "
        f"mesh {mesh}; decoding {decode}"
    )
    resident = ", ".join(f"{name} {gib} GiB" for name, gib in report["resident_gib"].items())
    console.print(f"on every chip between programs: {resident}")
    table = Table()
    for name in ("program", "GiB", "fits", "Tflop", "calls", "s a call", "MFU", "compute only",
                 "GiB received", "compiled"):  # fmt: skip
        table.add_column(name, justify="left" if name == "program" else "right", no_wrap=True)
    form = lambda x, text: "-" if x is None else format(x, text)  # noqa: E731
    for name, p in report["programs"].items():
        table.add_row(
            name, f"{p['hbm_gib']:.1f}", "yes" if p["fits"] else "NO", f"{p['flops'] / 1e12:,.0f}",
            f"{p['calls']:,.0f}", form(p["seconds"], ".4f"), form(p["mfu"], ".1%"),
            form(p["mfu_compute"], ".1%"), form(p["collective_gib"], ",.2f"),
            f"{p['compile_seconds']:.0f} s",
        )  # fmt: skip
    console.print(table)
    step = report["step"]
    if step["seconds"]:
        stages = {s: step[f"{s}_seconds"] for s in ("sample", "score", "teach", "update")}
        parts = ", ".join(
            f"{stage} {seconds:,.0f} s ({seconds / step['seconds']:.0%})"
            for stage, seconds in stages.items()
        )
        console.print(f"a training step, estimated: {step['seconds']:,.0f} s = {parts}")
        console.print(
            f"{step['completion_tokens']:,.0f} completion tokens, "
            f"{step['tokens_per_second']:,.0f} a second"
        )


def verdict(report: dict) -> str:
    """Returns the line that says whether it fits, and what to do where it does not."""
    change = " ".join(f"--config.{key}={value}" for key, value in report["change"].items())
    if report["fits"] and not change:
        return f"FITS on {report['topology']} (planned in {report['plan_seconds']:.0f} s)"
    if report["fits"]:
        as_asked = ", ".join(f"{n} {gib} GiB" for n, gib in report["asked_hbm_gib"].items() if gib)
        return (
            f"FITS on {report['topology']} with {change} (as configured: {as_asked}; planned in "
            f"{report['plan_seconds']:.0f} s)"
        )
    over = [name for name, p in report["programs"].items() if not p["fits"]]
    chips = report["chips_needed"]
    advice = (
        f"about {chips} chips would hold it: take a larger topology and split over fsdp"
        if chips
        else "split over more of mesh.model (or mesh.decode_model), or shorten the rows"
    )
    return f"DOES NOT FIT on {report['topology']}: {', '.join(over)}; {advice}"


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.plan",
        description="Compiles every program of a training step for a TPU topology, without a TPU, "
        "and says what fits, how long a step would take and what to change.",
        epilog="example: python -m scope_jax.plan --config qwen2_5_math_7b --topology v5p:2x2x2",
    )
    parser.add_argument("--config", required=True, help="file or shipped name, with :arg if any")
    parser.add_argument("--topology", required=True, help="v5e:2x4, v5p:2x2x2, v6e:4x4, ..")
    parser.add_argument("--tokens", type=float, help="of a completion, on average (the longest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args, overrides = read_command(parser, argv)
    # Before JAX looks for devices: it plans for others than the machine has.
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu looks for the machine's metadata otherwise
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    config = load_config(args.config, overrides)
    console = Console(stderr=args.json, highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)  # of a pipe, which has none
    with console.status("") as status:
        report = plan(config, args.topology, tokens=args.tokens, say=status.update)
    if args.json:
        print(json.dumps(report))
    else:
        show(report, console)
    if not report["fits"]:
        raise InputError(verdict(report))
    console.print(verdict(report))


if __name__ == "__main__":
    sys.exit(main())
