"""Configs: pydantic models made of sections, read from YAML files and flags.

A config is `defaults < YAML file < command-line flags`. pydantic validates, tyro turns the models into flags, and the
resolved config is saved with its results. Left out on purpose: interpolation, includes and environment variables,
because a config should be readable without running it.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from speedstack.support.config_errors import describe_validation_error, dotted_keys, nearest_key, validation_error

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class Section(BaseModel):
    """Base of every config and its sections: immutable; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def validated(config_type: type[ConfigT], values: Any, where: str = "") -> ConfigT:
    """The config made of `values`. Raises ValueError, one line that begins with `where`, if they do not fit."""
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}{describe_validation_error(error, config_type)}") from error


def replaced(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """A validated copy with some fields changed, by dotted name. Raises ValueError for unknown fields or bad values."""
    raw = config.model_dump()
    for name, value in values.items():
        *sections, field = name.split(".")
        place: Any = raw
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or field not in place:
            raise ValueError(f"a {getattr(config, 'kind', type(config).__name__)} config has no field {name}")
        place[field] = value
    return validated(type(config), raw)


def read_config(config_type: type[ConfigT], path: Path | None) -> ConfigT:
    """Defaults overlaid with the YAML file at `path`. Raises ValueError naming the file and the key."""
    if path is None:
        return config_type()
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected sections such as 'run:', found {type(data).__name__}")
    if "kind" in config_type.model_fields:
        kind = config_type.model_fields["kind"].default
        if data.get("kind", kind) != kind:
            raise ValueError(f"{path} is a config of kind {data['kind']!r}, not {kind!r}")
    # Over the type's defaults, not each section's, so that a file may name one field of a section.
    return validated(config_type, _overlay(config_type().model_dump(), data), f"{path}: ")


def load_config(config_type: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Any verb's config: defaults, then the YAML file, then flags `--section.key value`.

    Raises ValueError as `read_config` and for flags that do not fit; SystemExit from tyro for `--help` (code 0) and for
    a value of another type (code 2), with its reason printed.
    """
    default = read_config(config_type, path)
    known = dotted_keys(config_type)
    for argument in overrides:
        key = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and key not in {"help", *known, *(_negated(name) for name in known)}:
            raise ValueError(f"unknown flag '{argument.partition('=')[0]}'{nearest_key(key, config_type, prefix='--')}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = tyro.cli(config_type, default=default, args=list(overrides), prog="speedstack")
    except SystemExit as stop:
        # tyro frames pydantic's message, which speaks of Python types.
        if (refused := validation_error(stop)) is not None:
            raise ValueError(describe_validation_error(refused, config_type)) from refused
        sys.stderr.write(printed.getvalue())
        raise
    sys.stderr.write(printed.getvalue())
    # tyro assembles the sections; the validators across sections have to see the result.
    return validated(config_type, config.model_dump())


def load_config_of(
    config_type: type[ConfigT], directory_key: str, path: Path | None, overrides: Sequence[str] = ()
) -> ConfigT:
    """`load_config` for a verb that takes a directory in place of the YAML file, as `directory_key`."""
    if path is not None and not is_yaml(path):
        return load_config(config_type, None, [f"--{directory_key}", str(path), *overrides])
    return load_config(config_type, path, overrides)


def is_yaml(path: Path) -> bool:
    """Whether a path names a config, by its suffix."""
    return path.suffix in (".yaml", ".yml")


def dump_config(config: BaseModel) -> str:
    """The whole config as YAML; reading it gives an equal config, and dumping that the same bytes."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat_config(config: BaseModel) -> dict[str, Any]:
    """Every field by dotted name, of plain JSON types."""
    return _flat(config, config.model_dump(mode="json"), "")


def _flat(section: BaseModel, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        below = getattr(section, key)
        flat |= _flat(below, value, f"{prefix}{key}.") if isinstance(below, BaseModel) else {f"{prefix}{key}": value}
    return flat


def _overlay(base: dict[str, Any], top: dict[Any, Any]) -> dict[Any, Any]:
    """`base` with the values of `top`, section by section."""
    merged: dict[Any, Any] = dict(base)
    for key, value in top.items():
        below = base.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _negated(key: str) -> str:
    """tyro's spelling of a boolean's second flag, `section.no_key`."""
    section, dot, leaf = key.rpartition(".")
    return f"{section}{dot}no_{leaf}"
