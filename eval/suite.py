"""Suites: named lists of lm-eval tasks with the number of examples and the metric that each is reported by.

A suite is a YAML file; ours lie in `configs/eval/suites/`. lm-eval builds the requests and computes the metrics, the
engine answers. Everything that an interrupted run was told is in its cache, and the same call asks only the rest.
"""

import difflib
import importlib.resources
import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import lm_eval
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speedstack.eval.environment import describe_environment
from speedstack.eval.lm import EngineLM
from speedstack.eval.request_cache import RequestCache, model_key
from speedstack.eval.results import to_plain
from speedstack.eval.sandbox import ISOLATION
from speedstack.eval.suite_result import HeadlineMetric, SuiteBlock, SuiteResult, TaskDocuments, TaskRequests
from speedstack.eval.task_loading import CODE_TASK_NAMES, TaskLoader, leaf_tasks, lm_eval_name, task_hash
from speedstack.eval.team import Team
from speedstack.runtime import Engine

# For metrics whose standard error has no formula.
BOOTSTRAP_ITERATIONS = 1000


class SuiteTask(BaseModel):
    """One task of a suite. Sampling is for tasks that count programs: pass@k needs k samples or more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    num_fewshot: int | None = Field(None, ge=0, description="Examples before a question; None: the task's own number.")
    metric: str | None = Field(None, description="Headline metric and filter, as lm-eval names them: 'acc,none'.")
    num_samples: int = Field(1, ge=1, description="Generations a document.")
    temperature: float = Field(0.0, ge=0, description="Of samples; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Of samples.")


class Suite(BaseModel):
    """A suite's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[SuiteTask, ...] = Field(min_length=1)

    def without(self, names: Collection[str]) -> Self:
        """The suite without these tasks."""
        return self.model_copy(update={"tasks": tuple(entry for entry in self.tasks if entry.task not in names)})


@dataclass(frozen=True)
class SuiteSettings:
    """How a suite is run.

    `task_data` is the directory that `make_tasks` wrote, for our tasks; `data` has local data sets for others';
    `cache` is the directory of answers. `limit` caps the documents a task.
    """

    limit: int | None = None
    task_data: Path | None = None
    data: Path | None = None
    cache: Path | None = None
    seed: int = 0
    chat_template: bool = False
    allow_code: bool = False
    progress: bool = True


def suites_directory() -> Path:
    """Where our suites lie, in a checkout and in an installed package."""
    return Path(str(importlib.resources.files("speedstack"))) / "configs" / "eval" / "suites"


def load_suite(name: str) -> tuple[str, Suite]:
    """Name and content of one of our suites, or of a YAML file. Raises ValueError naming the nearest, or the key."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = suites_directory() / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in suites_directory().glob("*.yaml"))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "."
            raise ValueError(f"no suite '{name}'{hint} Suites: {', '.join(known)}; or give a YAML file")
    try:
        return path.stem, Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read suite {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def cache_directory(parent: Path, engine: Engine, target: Path) -> Path:
    """The directory of this engine's answers about the model in `target`."""
    return parent / model_key(engine, target)


def run_suite(
    engine: Engine,
    target: Path,
    drafter: Path | None,
    name: str,
    suite: Suite,
    settings: SuiteSettings | None = None,
    team: Team | None = None,
) -> SuiteResult:
    """Evaluate `engine`, which was loaded from `target` and `drafter`; on the main process of `team`.

    Raises ValueError for a task nobody knows, data that is neither local nor to be had, and as the engine does. What
    was answered by then is in the cache.
    """
    settings, team = settings or SuiteSettings(), team or Team()
    started = time.perf_counter()
    lm = EngineLM(engine, settings.seed, settings.progress, RequestCache(settings.cache, team.rank), team)
    loader = TaskLoader(
        [entry.task for entry in suite.tasks], settings.task_data, settings.data, allow_code=settings.allow_code
    )
    items: list[Any] = []
    for entry in suite.tasks:
        loaded = loader.load(entry.task)
        for task in (task for item in loaded for task in leaf_tasks(item)):
            _configure(task, entry)
            lm.task_hashes = {**lm.task_hashes, task.task_name: task_hash(task)}
        items += loaded
    output = lm_eval.simple_evaluate(
        model=lm,
        tasks=items,
        task_manager=loader.manager,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.chat_template,
        confirm_run_unsafe_code=settings.allow_code,
        batch_size=engine.max_batch_size,
        device=engine.device.type,
    )
    assert output is not None  # None is what other processes get, and lm-eval knows of one
    samples = output.pop("samples")
    plain = to_plain(output)
    block = SuiteBlock(
        suite=name,
        headline=tuple(
            HeadlineMetric(task=lm_eval_name(entry.task), metric=entry.metric, num_fewshot=entry.num_fewshot)
            for entry in suite.tasks
        ),
        target=str(target),
        target_sha256=engine.target_sha256 or "",
        drafter=None if drafter is None else str(drafter),
        drafter_sha256=engine.drafter_sha256,
        quantization=_quantization(target),
        dtype=str(engine.dtype).removeprefix("torch."),
        backend=engine.backend_name,
        device=engine.device.type,
        max_length=engine.max_length,
        batch_size=engine.max_batch_size,
        num_processes=team.size,
        limit=settings.limit,
        chat_template=settings.chat_template,
        seeds={"sampling": settings.seed} | {k: v for k, v in plain["config"].items() if k.endswith("_seed")},
        code_isolation=ISOLATION if any(entry.task in CODE_TASK_NAMES for entry in suite.tasks) else None,
        seconds=time.perf_counter() - started,
        requests={task: TaskRequests(**asdict(counts)) for task, counts in lm.counts.items()},
        documents={task: _documents(rows, plain["higher_is_better"].get(task, {})) for task, rows in samples.items()},
        environment=describe_environment(),
    )
    return SuiteResult(plain, block)


def _configure(task: Any, entry: SuiteTask) -> None:
    """A task as the suite asks for it. Raises ValueError for samples of a task that does not generate."""
    if entry.num_fewshot is not None:
        task.set_config("num_fewshot", entry.num_fewshot)
    if entry.num_samples == 1 and entry.temperature == 0.0:
        return
    if task.get_config("output_type") != "generate_until" or entry.task not in CODE_TASK_NAMES:
        raise ValueError(f"num_samples and temperature are for {', '.join(CODE_TASK_NAMES)}, not for {entry.task}")
    if entry.num_samples > 1 and entry.temperature == 0.0:
        raise ValueError(f"{entry.num_samples} greedy samples of {entry.task} would be equal: set a temperature")
    task.set_config("repeats", entry.num_samples)
    sampling = {"do_sample": True, "temperature": entry.temperature, "top_p": entry.top_p}
    task.set_config("generation_kwargs", sampling, update=True)


def _documents(samples: list[dict[str, Any]], higher_is_better: dict[str, Any]) -> TaskDocuments:
    """Scores by 'metric,filter', a column each; lm-eval lists the documents once a filter."""
    hashes: dict[str, dict[int, str]] = {}
    scores: dict[str, dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            column = f"{metric},{sample['filter']}"
            scores.setdefault(column, {})[sample["doc_id"]] = to_plain(sample[metric])
            hashes.setdefault(column, {})[sample["doc_id"]] = sample["doc_hash"]
    (first, *_) = hashes.values()
    order = sorted(first)
    return TaskDocuments(
        doc_hashes=tuple(first[doc_id] for doc_id in order),
        scores={column: tuple(values[doc_id] for doc_id in order) for column, values in scores.items()},
        higher_is_better={metric: better for metric, better in higher_is_better.items() if better is not None},
    )


def _quantization(target: Path) -> str | None:
    """The name of a checkpoint's number format, as its config gives it."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return None
    return str(config.get("format") or config.get("quant_method") or "unknown")
