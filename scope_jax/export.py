"""Turns a training run's checkpoint into a model directory that transformers and others load.

python -m scope_jax.export --workdir W --out DIR              (of a LoRA run: merged)
python -m scope_jax.export --workdir W --out DIR --adapter    (a LoRA run's A and B alone, for PEFT)
"""

import argparse
import dataclasses
import functools
import pathlib
import shutil
import sys

import jax
import numpy as np

from scope_jax.checkpoint import restore_params
from scope_jax.configlib import lora_options, one_line_errors, read_command, run_config
from scope_jax.models.hf import (
    config_from_hf,
    config_to_hf,
    load_tokenizer,
    read_config,
    resolve,
    save_adapter,
    write_checkpoint,
)
from scope_jax.models.lora import make_lora, merge
from scope_jax.models.transformer import Transformer, Weight, declare
from scope_jax.records import InputError
from scope_jax.sharding import make_mesh, make_meshes, shardings


def export(
    workdir, out, *, step: int | None = None, dtype: str | None = None, adapter: bool = False
) -> pathlib.Path:
    """Writes a checkpoint's policy as a Hugging Face directory, with the tokenizer it trained with.

    Args:
      workdir: of a training run.
      out: directory to write; new, empty, or a model directory that is replaced.
      step: of the checkpoint (default: the newest).
      dtype: of the written weights (default: the one that the run trained in).
      adapter: of a LoRA run, write A and B alone, as PEFT reads them onto the base model; `out` may
        then be such a directory. Else LoRA is merged into the weights.
    Returns:
      The directory of the model that the run started from.
    Raises:
      InputError: no workdir, no such checkpoint, an `out` that holds something else, an adapter of
        a run without LoRA.
    """
    run = run_config(pathlib.Path(workdir))
    path, trained_dtype = run["model"]["path"], run["model"]["dtype"]
    source, out, lora = resolve(path), pathlib.Path(out), make_lora(**lora_options(run["model"]))
    if adapter and lora is None:
        raise InputError(f"{workdir} is a run without LoRA (model.lora_rank=0): no --adapter of it")
    _check_out(out, source, adapter)
    tokenizer, _ = load_tokenizer(source)
    source_config = read_config(source)
    model_config = config_from_hf(source_config, source / "config.json")
    for name in ("rope_theta", "max_position"):  # as the run stretched them
        if value := run["model"].get(name):
            model_config = dataclasses.replace(model_config, **{name: value})
    model = Transformer(dataclasses.replace(model_config, lora=lora))
    # Rounded once: as it is read, or where there is something to merge, then.
    stored = trained_dtype if lora else dtype or trained_dtype
    shapes = _shapes(declare(model.config), np.dtype(stored), dict(run["mesh"]))
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype or x.dtype))
    if adapter:
        params = restore_params(workdir, {"lora": shapes["lora"]}, step)
        save_adapter(out, model, cast(params["lora"]), path)
        return source
    model, params = merge(model, restore_params(workdir, shapes, step), dtype)
    kept = {  # more than the tokenizer's, sometimes: Llama 3 ends in three ways
        key: source_config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if source_config.get(key) is not None
    }
    hf_config = {**config_to_hf(model.config), **kept}
    write_checkpoint(out, declare(model.config), cast(params), hf_config, tokenizer)
    generation = "generation_config.json"
    if (source / generation).exists():
        shutil.copy(source / generation, out / generation)
    return source


def _check_out(out: pathlib.Path, source: pathlib.Path, adapter: bool) -> None:
    """Refuses to write over anything but an earlier export of the same kind."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the model that the run started from; name another")
    if adapter and not (out / "adapter_config.json").is_file():
        raise InputError(f"--out {out} is not empty and no adapter's directory; name another")
    if not adapter and not ((out / "config.json").is_file() and "model_type" in read_config(out)):
        raise InputError(f"--out {out} is not empty and no model directory; name another")


def _shapes(declared, dtype: np.dtype, mesh_sizes: dict[str, int]):
    """Returns shapes and places to restore onto: the run's mesh, if this machine has its size."""
    try:
        mesh, _ = make_meshes(**mesh_sizes)
    except InputError:
        mesh = make_mesh()  # of another size, a laptop say: every device holds all
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    shapes = jax.tree.map(
        lambda weight, place: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=place),
        declared,
        shardings(declared, mesh),
        is_leaf=is_weight,
    )
    if "lora" in shapes:  # whatever the base is held in
        shapes["lora"] = jax.tree.map(lambda x: x.update(dtype=np.float32), shapes["lora"])
    return shapes


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scope_jax.export",
        description="Writes a training run's checkpoint as a Hugging Face model directory.",
        epilog="example: python -m scope_jax.export --workdir /tmp/run --out /tmp/run_model "
        "--dtype bfloat16",
    )
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the written weights (default: the run's)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a LoRA run: write its A and B alone, as PEFT reads them (default: merged)",
    )
    args, _ = read_command(parser, argv)
    source = export(args.workdir, args.out, step=args.step, dtype=args.dtype, adapter=args.adapter)
    size = sum(f.stat().st_size for f in pathlib.Path(args.out).glob("*.safetensors"))
    told = f"an adapter of {source}" if args.adapter else f"tokenizer of {source}"
    print(f"wrote {args.out}: {size / 1e6:.1f} MB of weights, {told}")


if __name__ == "__main__":
    sys.exit(main())
