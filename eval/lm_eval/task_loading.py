"""lm-eval's task objects by name: ours from their YAML beside this file, any other from lm-eval or a folder of the
user's own.

Ours win over lm-eval's of the same name: `humaneval` and `mbpp` are its prompts with a sandbox of ours around what the
model wrote. Other tasks that run code would run it in this process, and are refused. A folder's win over lm-eval's, as
with lm-eval itself, and may not have the names of ours.
"""

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from speedstack.eval.data.local_data import local_data
from speedstack.eval.lm_eval.own_tasks import OwnTasks
from speedstack.support.digests import json_sha256
from speedstack.support.near_miss import nearest

TASKS_DIR = Path(__file__).resolve().parent / "tasks"
PREFIX = "speedstack_"
# Made from the held-out part of a corpus by `speedstack.eval.data.task_data.make_tasks`.
TASK_NAMES = ("heldout_perplexity", "next_line", "close_line")
# Made by `make_same_text`, of what a full-precision model writes.
TEACHER_TASK_NAMES = ("same_text",)
CODE_TASK_NAMES = ("humaneval", "mbpp")
OUR_NAMES = (*TASK_NAMES, *TEACHER_TASK_NAMES, *CODE_TASK_NAMES)


class TaskLoader:
    """Loads tasks; reading lm-eval's own takes seconds and happens only when `names` has one of them, or a group of the
    user's, which may.

    `task_data` is the directory `make_tasks` wrote, `data` one of data sets as `eval.data.local_data` describes,
    `own` a folder of tasks. Raises ValueError for a name that nobody has, and for one of ours in the folder.
    """

    def __init__(
        self,
        names: Sequence[str],
        task_data: Path | None = None,
        data: Path | None = None,
        allow_code: bool = False,
        own: OwnTasks | None = None,
    ) -> None:
        self._task_data, self._data, self._allow_code, self._own = task_data, data, allow_code, own
        ours = sorted(name for name in (own.names if own else ()) if name in OUR_NAMES or name.startswith(PREFIX))
        if own is not None and ours:
            raise ValueError(f"task {ours[0]} of {own.directory} has the name of one of ours: rename it")
        foreign = [name for name in names if name not in OUR_NAMES]
        # lm-eval reports each step at INFO; a caller that wants that sets the level itself.
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        self.manager = TaskManager(
            include_path=[str(TASKS_DIR), *([str(own.directory)] if own else [])],
            include_defaults=any(own is None or name not in own.tasks for name in foreign),
        )
        for name in foreign:
            if name not in self.manager.task_index:
                near = nearest(name, [*OUR_NAMES, *self.manager.task_index], num_names=3)
                hint = f"; near names: {', '.join(near)}" if near else f"; ours are {', '.join(TASK_NAMES)}"
                raise ValueError(f"no task {name!r}{hint}")

    def load(self, name: str) -> list[Any]:
        """The task, the group, or the tasks of a tag, as objects that lm-eval's `simple_evaluate` takes.

        Raises ValueError for missing data, packages that the task needs, and code that may not or cannot be run safely.
        """
        spec: str | dict[str, Any] = name
        if name in (*TASK_NAMES, *TEACHER_TASK_NAMES):
            spec = _our_config(name, self._task_data)
        elif name in CODE_TASK_NAMES:
            if not self._allow_code:
                raise ValueError(f"task {name} runs programs that the model wrote: allow it with --allow-code")
            spec = lm_eval_name(name)
        try:
            with local_data(self._data):
                loaded = self.manager.load([spec])
        except ImportError as error:
            raise ValueError(f"task {name} needs a package that is not installed: {error}") from error
        except Exception as error:
            # The YAML of a task is a program of its makers', and fails as it likes.
            if self._own is None or name not in self._own.names:
                raise
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"task {name} of {self._own.directory} cannot be loaded ({what})") from error
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False) and name not in CODE_TASK_NAMES:
                raise ValueError(
                    f"task {name} would run what the model wrote in this process; those with a sandbox are "
                    f"{', '.join(CODE_TASK_NAMES)}"
                )
        groups, tasks = loaded.get("groups", {}), loaded["tasks"]
        members = {member for names in loaded.get("group_map", {}).values() for member in names}
        return [item for key, item in (*groups.items(), *tasks.items()) if key not in members]


def lm_eval_name(name: str) -> str:
    """The name that a task has in lm-eval's results."""
    return PREFIX + name if name in OUR_NAMES else name


def generation_settings(name: str) -> dict[str, Any]:
    """What one of our generating tasks asks lm-eval models for."""
    return yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text(encoding="utf-8"))["generation_kwargs"]


def item_name(item: Any) -> str:
    """The name of a task or group in lm-eval's results."""
    return str(item.name if hasattr(item, "get_all_tasks") else item.task_name)


def leaf_tasks(item: Any) -> list[Any]:
    """The tasks of a group, or the task itself."""
    return item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


def task_hash(task: Any) -> str:
    """SHA-256 of everything in a task's configuration."""
    return json_sha256(task.dump_config(), default=str)


def _our_config(name: str, data_dir: Path | None) -> dict[str, Any]:
    """The task's YAML with its data file's absolute path; data may move between runs, so the YAML cannot name it."""
    if data_dir is None:
        raise ValueError(f"task {name} is made from a corpus: name one with --corpus")
    config = yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    data_file = (data_dir / f"{name}.jsonl").resolve()
    if not data_file.is_file():
        raise ValueError(
            f"no data of task {name} at {data_file}: write it with speedstack.eval.data.task_data.make_tasks"
        )
    # To `datasets` a path is a pattern.
    pattern, cache = glob.escape(str(data_file)), str(data_file.parent / ".cache")
    config["dataset_kwargs"] = {"data_files": {"test": pattern}, "cache_dir": cache}
    return config
