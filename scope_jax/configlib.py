"""Configs: find and load a config file, apply command-line overrides, shrink for a laptop.

A config file defines `get_config(arg: str = "") -> ConfigDict`; in `--config FILE:n=6,runlocal` the
`arg` is "n=6,runlocal". Overrides are typed by the value they replace, and an unknown key is an
error that names the closest one.
"""

import argparse
import ast
import difflib
import functools
import importlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from scope_jax.methods import METHODS
from scope_jax.records import InputError

_SHIPPED = (
    pathlib.Path(__file__).parent / "configs",
    pathlib.Path(__file__).parent.parent / "configs",
)


def one_line_errors(command: Callable[[list[str] | None], None]):
    """Makes a command return 0, or print the one line of an InputError or OSError and return 2."""

    @functools.wraps(command)
    def run(argv: list[str] | None = None) -> int:
        try:
            command(argv)
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def read_command(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command's arguments; to one that got none it shows what to type, and exits with 2.

    Args:
      parser: of a command; its epilog is an example. Where it knows --config, the shipped configs
        are shown, too, and arguments that it does not know are returned as overrides.
      argv: the arguments; None = the process's own.
    Returns:
      (arguments, overrides).
    """
    argv = sys.argv[1:] if argv is None else argv
    has_config = "--config" in parser.format_usage()
    if not argv:
        shown = [f"{parser.prog}: {parser.description}", str(parser.epilog)]
        if has_config:
            shown[1:1] = [
                f"  --config {name:24}{_about(f)}" for name, f in shipped_configs().items()
            ]
        parser.exit(2, "\n".join([*shown, f"all options: {parser.prog} --help"]) + "\n")
    return parser.parse_known_args(argv) if has_config else (parser.parse_args(argv), [])


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns the package's own config files by the name that --config takes."""
    files = [file for folder in _SHIPPED for file in folder.glob("[a-z]*.py")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def _about(file: pathlib.Path) -> str:
    """Returns the first paragraph of a config's docstring."""
    told = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(told.split("\n\n")[0].split())


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses "n=6,runlocal" into a ConfigDict; a bare name means True, types follow the defaults.

    >>> parse_arg("n=6,runlocal", n=5, runlocal=False).to_dict()
    {'n': 6, 'runlocal': True}
    """
    config = ConfigDict(defaults)
    for part in filter(None, (p.strip() for p in arg.split(","))):
        name, _, text = part.partition("=")
        if name not in defaults:
            raise InputError(
                f"config argument {name!r} is not known{_closest(name, list(defaults))}"
            )
        config[name] = _typed(name, text if "=" in part else "True", defaults[name])
    return config


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns a config of any scale as its `runlocal` form: two steps of the worksheet's policy,
    PRM and teacher, which the package brings, with sizes that divide over up to eight devices.

    Method, loss, LoRA, optimizer, remat and dtypes stay what they are.
    """
    models = "scope_jax/tasks/worksheet_models"
    small: Any = config.copy_and_resolve_references()
    small.total_steps = 2
    small.task = {"module": "scope_jax.tasks.worksheet", "n": 3, "ood_n": 3, "seed": 0}
    small.reward.update(fn="scope_jax.tasks.worksheet:verify", after="")
    small.prompt.update(template="{problem}", chat=False, system="", assistant="")
    small.data.update(prompts_per_step=8, max_prompt_length=16)
    small.model.update(path=f"{models}/policy", rope_theta=0.0, max_position=0)
    small.prm.update(path=f"{models}/prm", format="", reads="policy_tokens", batch_size=0)
    small.teacher.update(kind="model", path=f"{models}/teacher")
    small.mesh.update(data=-1, fsdp=1, model=1, decode_model=0)
    small.sample.update(group_size=2, max_new_tokens=24, slots=0, stop=())
    small.steps.update(splitter="\n", max_steps=5)
    small.learn.update(mini_batches=1, micro_batches=1)
    small.eval.update(
        every=0, problems=8, batch_size=8, group_size=2, max_new_tokens=24, split="test", ood=True
    )
    small.log.update(rollouts_every=1, diversity_every=1)
    return small


def load_config(spec: str, overrides: list[str]) -> ConfigDict:
    """Loads PATH[:arg] and applies "--config.a.b=value" overrides.

    `config.method` names one of METHODS: its changes are applied after the file's values and before
    the command line's.

    Args:
      spec: a config file, or the name of one that the package ships ("worksheet"), with an optional
        ":arg" for its `get_config`. A method's name in it ("worksheet:n=6,scope_plus") is not
        handed on: it sets `config.method`.
      overrides: command-line arguments.
    Raises:
      InputError: no such file, an unknown key, no or two methods, a value of another type.
    """
    path, _, arg = spec.partition(":")
    parts = [part.strip() for part in arg.split(",")]
    methods = [part for part in parts if part in METHODS]
    if len(methods) > 1:
        raise InputError(f"--config {spec} names {len(methods)} methods: {', '.join(methods)}")
    module = _load_module(path)
    config = module.get_config(",".join(part for part in parts if part not in METHODS))
    parsed = dict(_split_override(text) for text in overrides)
    method = config.method = parsed.get("method", methods[-1] if methods else config.method)
    if method not in METHODS:
        raise InputError(f"method {method!r} is not known; one of {', '.join(METHODS)}")
    for key, value in METHODS[method].items():
        override(config, key, value)
    for key, text in parsed.items():
        override(config, key, text, parse=True)
    return config


def override(config: ConfigDict, key: str, value: Any, *, parse: bool = False) -> None:
    """Sets the dotted `key` of a config to a value of the type it has (text, if `parse`)."""
    *parents, leaf = key.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, leaf]):
        if not isinstance(node, ConfigDict) or name not in node:
            known = list(node) if isinstance(node, ConfigDict) else []
            prefix = ".".join([*parents, leaf][:depth])
            where = f"config.{prefix}" if prefix else "config"
            raise InputError(f"config key {key!r}: {where} has no {name!r}{_closest(name, known)}")
        if depth < len(parents):
            node = node[name]
    group = node[leaf]
    if isinstance(group, ConfigDict):
        raise InputError(
            f"config key {key!r} is a group; set one of "
            + ", ".join(f"{key}.{name}" for name in group)
        )
    typed = _typed(key, value, node[leaf]) if parse else value
    with node.ignore_type():  # its own check would refuse None in the place of a number
        node[leaf] = typed


def _typed(key: str, text: str, old: Any) -> Any:
    """Parses text as the type of the value it replaces; "none" switches a float off."""
    if isinstance(old, str):
        return text
    names = {"true": True, "false": False, "none": None}
    try:
        value = names[text.lower()] if text.lower() in names else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise InputError(f"config key {key!r}: {text!r} is not a {type(old).__name__}") from None
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = old is None or type(value) is type(old) or (value is None and isinstance(old, float))
    if not fits:
        raise InputError(f"config key {key!r}: {text!r} is not a {type(old).__name__}")
    return value


def _split_override(text: str) -> tuple[str, str]:
    if not text.startswith("--config.") or "=" not in text:
        raise InputError(
            f"argument {text!r} is not understood; overrides look like "
            "--config.optimizer.learning_rate=1e-4"
        )
    key, _, value = text.removeprefix("--config.").partition("=")
    return key, value


def _closest(name: str, known: list[str]) -> str:
    if match := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"; did you mean {match[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def _load_module(path: str):
    candidates = [pathlib.Path(path)]
    if pathlib.Path(path).suffix != ".py":
        candidates += [folder / f"{path}.py" for folder in _SHIPPED]
    elif path.startswith("configs/"):  # the command of the README, run from anywhere
        candidates += [folder.parent / path for folder in _SHIPPED]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        shipped = ", ".join(shipped_configs())
        raise InputError(f"config file {path} does not exist; shipped configs: {shipped}")
    module_spec = importlib.util.spec_from_file_location(f"scope_jax_config_{file.stem}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{file} defines no get_config(arg)")
    return module


def load_object(reference: str, kind: str) -> Callable:
    """Returns what "package.module:name" names; `kind` says in errors what it was wanted for."""
    module_name, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty module name
        raise InputError(f"{kind} {reference!r}: cannot import {module_name}: {error}") from None
    for part in filter(None, name.split(".")):
        if not hasattr(found, part):
            raise InputError(
                f"{kind} {reference!r}: {module_name} has no {name!r}{_closest(name, dir(found))}"
            )
        found = getattr(found, part)
    return found


def claim_workdir(
    workdir: pathlib.Path, config: ConfigDict | dict, flag: str = "--workdir"
) -> None:
    """Writes config.json into a new workdir, or checks that the one there is of the same run.

    `total_steps`, `log`, `eval`, `checkpoint`, `checks` and `mesh` may differ: they do not change
    what was trained.

    Args:
      flag: the command's, that names the folder.
    Raises:
      InputError: the workdir belongs to another config (the first differing key is named); nothing
      is written then.
    """
    free = ("total_steps", "log", "eval", "checkpoint", "checks", "mesh")
    file = workdir / "config.json"
    new = config if isinstance(config, dict) else json.loads(config.to_json())
    if file.exists():
        old = json.loads(file.read_text())
        here, there = flat_keys(new), flat_keys(old)
        changed = [k for k in here | there if here.get(k) != there.get(k)]
        changed = sorted(k for k in changed if k.split(".")[0] not in free)
        if changed:
            key = changed[0]
            raise InputError(
                f"{workdir} belongs to another config: {key} is {there.get(key)!r} there and "
                f"{here.get(key)!r} here; use another {flag}"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise InputError(f"{flag.lstrip('-')} {workdir} is a file")
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise InputError(
            f"{workdir} holds files but no config.json: not a workdir of scope_jax; "
            f"use another {flag}"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n")


def run_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the config of the training run that a workdir belongs to, from its config.json.

    Raises:
      InputError: the file is missing, or not the config of a training run.
    """
    file = workdir / "config.json"
    try:
        config = json.loads(file.read_text())
        _ = config["model"]["path"], config["model"]["dtype"], dict(config["mesh"])
        return config
    except FileNotFoundError:
        raise InputError(
            f"{file} is missing: --workdir must name the folder of a training run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not the config of a training run ({error!r}): check --workdir"
        ) from None


def lora_options(model: Any) -> dict[str, Any]:
    """Returns the LoRA options in a config's `model`; of a run from before there were any, "off".

    >>> lora_options({"path": "some/model", "lora_rank": 4})
    {'lora_rank': 4}
    """
    return {"lora_rank": 0} | {name: model[name] for name in model if name.startswith("lora_")}


def flat_keys(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} of a nested dict.

    >>> flat_keys({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flat_keys(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
