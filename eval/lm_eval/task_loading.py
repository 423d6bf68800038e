"""lm-eval's task objects by name: ours, lm-eval's, or those of a user's folder.

Ours replace lm-eval's of the same name: `humaneval` and `mbpp` have its prompts and our sandbox. Other tasks that run
code would run it in this process, and are refused. A folder's tasks win over lm-eval's, but may not have our names.
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
# Made from a corpus' held-out part by `speedstack.eval.data.task_data.make_tasks`.
TASK_NAMES = ("heldout_perplexity", "next_line", "close_line")
# Made by `make_same_text` from a full-precision model's text.
TEACHER_TASK_NAMES = ("same_text",)
CODE_TASK_NAMES = ("humaneval", "mbpp")
OUR_NAMES = (*TASK_NAMES, *TEACHER_TASK_NAMES, *CODE_TASK_NAMES)


class TaskLoader:
    """Loads tasks; lm-eval's own, which take seconds to read, only if `names` or a user's group may need them.

    `task_data` is the directory of `make_tasks`, `data` one as in `eval.data.local_data`, `own` a folder of tasks.
    Raises ValueError for an unknown name, and for one of ours in the folder.
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
        # lm-eval reports each step at INFO; callers can set the level themselves.
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
        """The task, group, or tasks of a tag, as `simple_evaluate` takes them.

        Raises ValueError for missing data or packages, and for code that may not run or cannot run safely.
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
            # A task's YAML is its authors' program, and may raise anything.
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
    """Generation settings of one of our generating tasks."""
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
    """The task's YAML with the absolute path of its data file, which may move between runs."""
    if data_dir is None:
        raise ValueError(f"task {name} is made from a corpus: name one with --corpus")
    config = yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    data_file = (data_dir / f"{name}.jsonl").resolve()
    if not data_file.is_file():
        raise ValueError(
            f"no data of task {name} at {data_file}: write it with speedstack.eval.data.task_data.make_tasks"
        )
    # `datasets` takes a path for a pattern.
    pattern, cache = glob.escape(str(data_file)), str(data_file.parent / ".cache")
    config["dataset_kwargs"] = {"data_files": {"test": pattern}, "cache_dir": cache}
    return config
