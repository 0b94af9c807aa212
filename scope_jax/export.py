"""Turns a training run's checkpoint into a model directory that transformers and others load.

python -m scope_jax.export --workdir W --out DIR
"""

import argparse
import json
import pathlib
import shutil
import sys

import jax
import numpy as np

from scope_jax.checkpoint import restore_params
from scope_jax.configlib import one_line_errors
from scope_jax.models.hf import (
    config_from_hf,
    config_to_hf,
    load_tokenizer,
    read_config,
    resolve,
    write_checkpoint,
)
from scope_jax.models.transformer import Weight, declare
from scope_jax.records import InputError
from scope_jax.sharding import make_mesh, shardings


def export(workdir, out, *, step: int | None = None, dtype: str | None = None) -> pathlib.Path:
    """Writes a checkpoint's policy as a Hugging Face directory, with the tokenizer it trained with.

    Args:
      workdir: of a training run.
      out: directory to write; new, empty, or a model directory that is replaced.
      step: of the checkpoint (default: the newest).
      dtype: of the written weights (default: the one that the run trained in).
    Returns:
      The directory of the model that the run started from.
    Raises:
      InputError: no workdir, no such checkpoint, an `out` that holds something else.
    """
    path, trained_dtype, mesh_sizes = _read_run(pathlib.Path(workdir))
    source, out = resolve(path), pathlib.Path(out)
    _check_out(out, source)
    tokenizer, _ = load_tokenizer(source)
    source_config = read_config(source)
    model_config = config_from_hf(source_config, source / "config.json")
    declared = declare(model_config)
    shapes = _shapes(declared, np.dtype(dtype or trained_dtype), mesh_sizes)
    params = restore_params(workdir, shapes, step)
    kept = {  # more than the tokenizer's, sometimes: Llama 3 ends in three ways
        key: source_config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if source_config.get(key) is not None
    }
    write_checkpoint(out, declared, params, {**config_to_hf(model_config), **kept}, tokenizer)
    generation = "generation_config.json"
    if (source / generation).exists():
        shutil.copy(source / generation, out / generation)
    return source


def _read_run(workdir: pathlib.Path) -> tuple[str, str, dict[str, int]]:
    """Returns model.path, model.dtype and mesh of a run's config.json."""
    file = workdir / "config.json"
    try:
        config = json.loads(file.read_text())
        return config["model"]["path"], config["model"]["dtype"], dict(config["mesh"])
    except FileNotFoundError:
        raise InputError(
            f"{file} is missing: --workdir must name the folder of a training run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the config of a training run ({error!r}): check --workdir"
        ) from None


def _check_out(out: pathlib.Path, source: pathlib.Path) -> None:
    """Refuses to write over anything but an earlier export."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out} is the model that the run started from; name another")
    if not (out / "config.json").is_file() or "model_type" not in read_config(out):
        raise InputError(f"--out {out} is not empty and no model directory; name another")


def _shapes(declared, dtype: np.dtype, mesh_sizes: dict[str, int]):
    """Returns shapes and places to restore onto: the run's mesh, if this machine has its size."""
    try:
        mesh = make_mesh(**mesh_sizes)
    except InputError:
        mesh = make_mesh()  # of another size, a laptop say: every device holds all
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    return jax.tree.map(
        lambda weight, place: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=place),
        declared,
        shardings(declared, mesh),
        is_leaf=is_weight,
    )


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
    args = parser.parse_args(argv)
    source = export(args.workdir, args.out, step=args.step, dtype=args.dtype)
    size = sum(f.stat().st_size for f in pathlib.Path(args.out).glob("*.safetensors"))
    print(f"wrote {args.out}: {size / 1e6:.1f} MB of weights, tokenizer of {source}")


if __name__ == "__main__":
    sys.exit(main())
