"""What every result is made of: records, documents, the environment, spreads.

A file is one JSON document with `kind` and `schema_version`; readers refuse other versions. Units are in the names. NaN
and infinity are refused: JSON has neither.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speedstack.support.files import write_atomically

SCHEMA_VERSION: Literal[1] = 1
# Half the width of a normal 95 % interval in standard errors.
Z95 = 1.96


class Record(BaseModel):
    """Immutable; no unknown fields, finite numbers; numpy and torch scalars become Python numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Document(Record):
    """A result that is a file."""

    schema_version: Literal[1] = SCHEMA_VERSION

    def save(self, path: str | Path) -> Path:
        """Write as JSON, atomically; returns the path. Raises OSError as the file system does."""
        return write_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and validate. Raises ValueError, one line, for a missing file, broken JSON or another schema version."""
        return cls.check(read_json(path), path)

    @classmethod
    def check(cls, content: Any, path: str | Path) -> Self:
        """`content`, read from `path`, as a document. Raises ValueError as `load`."""
        kind = cls.model_fields["kind"].default
        if not isinstance(content, dict) or content.get("kind") != kind:
            found = content.get("kind", "none") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} holds no {kind} result (its kind: {found})")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema version {content.get('schema_version')}, this release reads version "
                f"{SCHEMA_VERSION}: measure again, or read it with the release that wrote it"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path} does not fit the {kind} schema: {place}: {first['msg']}") from error


def read_json(path: str | Path) -> Any:
    """Content of a JSON file. Raises ValueError, one line, if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no result file at {path}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an integer or a nesting without end
        raise ValueError(f"{path} is not a JSON file: {error}") from error


class Environment(Record):
    """The machine and software of a measurement; `command` is None for a caller in Python.

    `thread_settings` are environment variables for threads: OMP_WAIT_POLICY=PASSIVE slows the CPU kernels several
    times.
    """

    machine: str
    operating_system: str
    cpu_model: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    gpus: tuple[str, ...]
    python: str
    packages: dict[str, str]
    git_sha: str | None
    command: str | None = None
    thread_settings: dict[str, str] = Field(default={})


class Spread(Record):
    """Median, quartiles and extremes of a repeated measurement."""

    median: float
    q1: float
    q3: float
    minimum: float
    maximum: float
    num_repeats: int


class Unavailable(Record):
    """A peer that could not run."""

    name: str
    reason: str


def to_plain(value: object) -> Any:
    """`value` as plain JSON types: numpy and torch values included, other objects as str()."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return str(value)
