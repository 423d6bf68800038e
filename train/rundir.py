"""The directory of a run: what it was started with, and what it left.

    <run.out>/<run.name>/  config.yaml  inputs.json  env.json  metrics.jsonl  checkpoints/  export/

A run directory belongs to one configuration and to the weights and the text it started from. Starting the same again
resumes it, or returns its result if it has finished; what would give other numbers is refused.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from pathlib import Path

import torch

from speedstack.eval.environment import package_versions
from speedstack.train.checkpoint import write_atomically
from speedstack.train.config import JobConfig, dump_config, identity, read_config

_PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "safetensors", "tokenizers")
# What a run leaves once training has started.
_PROGRESS = ("metrics.jsonl", "checkpoints", "export")


def open_run_directory(config: JobConfig, device: torch.device, inputs: dict[str, str]) -> Path:
    """Create the run directory of `config`, or check that the existing one is its own.

    `inputs` are digests of the weights the run starts from, by what they are.

    Raises:
        ValueError: the directory belongs to another configuration or other inputs; the message names what differs.
        OSError: it cannot be written.
    """
    directory = config.run_directory
    stored_path = directory / "config.yaml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A job that failed before it wrote a line, for want of a model say, does not bind the next one.
        if stored_path.is_file() and any((directory / name).exists() for name in _PROGRESS):
            _check_same(config, stored_path)
            inputs = _check_inputs(inputs, directory / "inputs.json") | inputs
        write_atomically(stored_path, dump_config(config))
        write_atomically(directory / "inputs.json", json.dumps(inputs, indent=2) + "\n")
        write_atomically(directory / "env.json", json.dumps(environment(device), indent=2) + "\n")
    except OSError as error:
        raise OSError(
            f"cannot write run directory {directory}: {error.strerror or error}; choose another run.out"
        ) from error
    return directory


def add_inputs(directory: Path, inputs: dict[str, str]) -> None:
    """Add to the inputs of the run in `directory`, before its first step, or check that they are those of then.

    A run that began without noting them goes on without: what it has read is not known any more.

    Raises ValueError and OSError as `open_run_directory`.
    """
    path = directory / "inputs.json"
    has_begun = any((directory / name).exists() for name in _PROGRESS)
    stored = json.loads(path.read_text(encoding="utf-8"))
    if has_begun:
        _check_inputs({name: digest for name, digest in inputs.items() if name in stored}, path)
    elif inputs:
        write_atomically(path, json.dumps(stored | inputs, indent=2) + "\n")


def environment(device: torch.device) -> dict[str, object]:
    """What a result may depend on besides the configuration: versions, machine, threads, command."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "num_threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def _check_same(config: JobConfig, stored_path: Path) -> None:
    try:
        stored = identity(read_config(type(config), stored_path))
    except ValueError as error:
        raise ValueError(f"{stored_path.parent} belongs to another run ({error}): choose another run.name") from error
    current = identity(config)
    different = [f"{key} was {stored[key]}, is {current[key]}" for key in current if stored.get(key) != current[key]]
    if different:
        raise ValueError(
            f"{stored_path.parent} holds a run with another configuration ({'; '.join(different)}): "
            "choose another run.name, or delete the directory"
        )


def _check_inputs(inputs: dict[str, str], stored_path: Path) -> dict[str, str]:
    """The stored inputs, of which these are some."""
    way_out = f"choose another run.name or delete {stored_path.parent}"
    if not stored_path.is_file():
        if inputs:
            warnings.warn(
                f"{stored_path} is missing: cannot tell whether the {next(iter(inputs))} of this run has changed since",
                stacklevel=2,
            )
        return {}
    try:
        stored = json.loads(stored_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{stored_path} is corrupt ({error}): {way_out}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{stored_path} is corrupt (no JSON object): {way_out}")
    changed = [name for name, digest in inputs.items() if stored.get(name) != digest]
    if changed:
        raise ValueError(f"the {changed[0]} of this run has changed since it was started: {way_out}")
    return stored
