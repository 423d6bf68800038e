"""A user's folder of lm-eval tasks: its names and a digest.

lm-eval silently takes the first of two tasks of one name and skips files that are not YAML; both are refused here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from speedstack.support.digests import files_sha256

_IGNORED = frozenset({"__pycache__", ".ipynb_checkpoints"})


class _Loader(yaml.SafeLoader):
    """YAML loader that does not resolve functions (`!function module.name`)."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


@dataclass(frozen=True)
class OwnTasks:
    """Names of `tasks` and `groups`. `sha256` is of all files below `directory`, helpers and data included."""

    directory: Path
    tasks: frozenset[str]
    groups: frozenset[str]
    sha256: str

    @property
    def names(self) -> frozenset[str]:
        """Names of tasks and groups."""
        return self.tasks | self.groups


def read_own_tasks(directory: Path) -> OwnTasks:
    """The tasks in `directory`. Raises ValueError if it is missing, empty, unreadable or has a duplicate name."""
    if not directory.is_dir():
        raise ValueError(f"no folder of tasks at {directory}")
    files = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not _IGNORED & set(path.relative_to(directory).parts)
    ]
    origin: dict[str, Path] = {}
    groups = set()
    for path in files:
        if path.suffix != ".yaml" or (found := _defined(path)) is None:
            continue
        kind, name = found
        if name in origin:
            raise ValueError(f"{origin[name]} and {path} both define {name}: rename one")
        origin[name] = path
        groups |= {name} if kind == "group" else set()
    if not origin:
        raise ValueError(f"{directory} holds no task: lm-eval reads .yaml files with a key task, or group")
    sha256 = files_sha256(directory, files)
    return OwnTasks(directory, frozenset(origin.keys() - groups), frozenset(groups), sha256)


def _defined(path: Path) -> tuple[str, str] | None:
    """A file's 'task' or 'group' and its name; None for an included file."""
    try:
        content: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        return None
    kind = "group" if "group" in content and "class" not in content else "task"
    return (kind, content[kind]) if isinstance(content.get(kind), str) else None
