"""The directory of a run: what it was started with, and what it left.

    <run.out>/<run.name>/  config.yaml  inputs.json  env.json  metrics.jsonl  checkpoints/  export/

Once a training step is on record, the directory belongs to its configuration, weights and text. The same command then
resumes it or returns its result; a command that would give other numbers is refused. A job that failed before its first
step leaves its text and features to the next one; `set_aside` moves those that do not fit.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speedstack.eval.results.environment import package_versions
from speedstack.eval.results.metrics import read_metrics
from speedstack.support.config import dump_config, flat_config, read_config
from speedstack.support.files import write_atomically
from speedstack.train.config.recipes import JobConfig, identity

_PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "safetensors", "tokenizers")


def open_run_directory(config: JobConfig, device: torch.device, inputs: dict[str, str]) -> Path:
    """Create the run directory of `config`, or check that the existing one belongs to it.

    `inputs` maps names to digests of the weights the run starts from. Raises ValueError naming what differs, OSError if
    the directory cannot be written.
    """
    directory = config.run_directory
    stored_path = directory / "config.yaml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A job that failed before its first step, for want of a model say, does not bind the next one.
        if stored_path.is_file() and has_begun(directory):
            stored = _check_same(config, stored_path)
            inputs = _check_inputs(inputs, directory / "inputs.json") | inputs
            if (directory / "export").exists():
                _warn_of_unused(config, stored, directory)
                return directory
        write_atomically(stored_path, dump_config(config))
        write_atomically(directory / "inputs.json", json.dumps(inputs, indent=2) + "\n")
        write_atomically(directory / "env.json", json.dumps(environment(device), indent=2) + "\n")
    except OSError as error:
        raise OSError(
            f"cannot write run directory {directory}: {error.strerror or error}; choose another run.out"
        ) from error
    return directory


def has_begun(directory: Path) -> bool:
    """Whether training left an export, a checkpoint or a step on record."""
    return (
        (directory / "export").exists()
        or any((directory / "checkpoints").glob("step-*"))
        or any(line["kind"] == "train" for line in read_metrics(directory))
    )


def set_aside(path: Path, what: str) -> None:
    """Rename a directory that does not fit the run, with a warning: its contents may have taken long."""
    aside = next(
        place for number in itertools.count(1) if not (place := path.with_name(f"{path.name}-{number}")).exists()
    )
    os.replace(path, aside)
    warnings.warn(
        f"{path} holds {what} of another configuration, which has not trained: moved to {aside}", stacklevel=2
    )


def add_inputs(directory: Path, inputs: dict[str, str]) -> None:
    """Add inputs before the run's first step; afterwards check them against the recorded ones.

    A run that did not record an input goes on without it. Raises ValueError and OSError as `open_run_directory`.
    """
    path = directory / "inputs.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    if has_begun(directory):
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


def _check_same(config: JobConfig, stored_path: Path) -> JobConfig:
    """The stored configuration. Raises ValueError if a setting that affects training differs."""
    try:
        stored = read_config(type(config), stored_path)
    except ValueError as error:
        raise ValueError(f"{stored_path.parent} belongs to another run ({error}): choose another run.name") from error
    if different := _differences(identity(stored), identity(config)):
        raise ValueError(
            f"{stored_path.parent} holds a run with another configuration ({'; '.join(different)}): "
            "choose another run.name, or delete the directory"
        )
    return stored


def _warn_of_unused(config: JobConfig, stored: JobConfig, directory: Path) -> None:
    """Warn about changed settings that a finished run ignores."""
    if different := _differences(flat_config(stored), flat_config(config), without=("run.name", "run.out")):
        warnings.warn(f"{directory} has finished, without what is new: {'; '.join(different)}", stacklevel=2)


def _differences(stored: dict[str, Any], current: dict[str, Any], without: Sequence[str] = ()) -> list[str]:
    different = [key for key in current if key not in without and stored.get(key) != current[key]]
    return [f"{key} was {stored.get(key)}, is {current[key]}" for key in different]


def _check_inputs(inputs: dict[str, str], stored_path: Path) -> dict[str, str]:
    """The stored inputs. Raises ValueError if one of `inputs` differs."""
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
