"""Configs of verbs whose files may be named one after the other instead of in a YAML file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from speedstack.eval.config import VerbConfig

VerbConfigT = TypeVar("VerbConfigT", bound=VerbConfig)


def load_naming_files(
    config: type[VerbConfigT], field: str, path: Path | None, overrides: Sequence[str]
) -> VerbConfigT:
    """The config from a YAML file, or with the paths before the first flag in `field`."""
    from speedstack.train.config.recipes import load_config

    if path is None or is_yaml(path):
        return load_config(config, path, overrides)
    flags = list(itertools.dropwhile(lambda argument: not argument.startswith("-"), overrides))
    named = [str(path), *overrides[: len(overrides) - len(flags)]]
    return load_config(config, None, [f"--{field}", *named, *flags])


def is_yaml(path: Path) -> bool:
    """Whether a path names a config."""
    return path.suffix in (".yaml", ".yml")
