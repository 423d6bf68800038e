"""Configs of verbs that take file names in place of a YAML file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from speedstack.support.config import is_yaml, load_config

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_naming_files(config: type[ConfigT], field: str, path: Path | None, overrides: Sequence[str]) -> ConfigT:
    """The config from a YAML file, or with the paths before the first flag in `field`."""
    if path is None or is_yaml(path):
        return load_config(config, path, overrides)
    flags = list(itertools.dropwhile(lambda argument: not argument.startswith("-"), overrides))
    named = [str(path), *overrides[: len(overrides) - len(flags)]]
    return load_config(config, None, [f"--{field}", *named, *flags])
