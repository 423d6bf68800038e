"""Suites: named lists of lm-eval tasks with the number of examples and the metric that each is reported by.

A suite is a YAML file; ours are in `configs/eval/suites/`. lm-eval builds requests and computes metrics, the engine
answers. Answers are cached, so an interrupted run asks only the rest.
"""

import importlib.resources
import json
import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import lm_eval
import yaml
from pydantic import Field, ValidationError, model_validator

from speedstack.eval.lm_eval.adapter import EngineLM
from speedstack.eval.lm_eval.generation_kwargs import defaults_not_computed
from speedstack.eval.lm_eval.headline import find_metric
from speedstack.eval.lm_eval.own_tasks import read_own_tasks
from speedstack.eval.lm_eval.pass_at_k import KS
from speedstack.eval.lm_eval.processes import Processes
from speedstack.eval.lm_eval.request_cache import RequestCache, drafting_key, model_key
from speedstack.eval.lm_eval.sandbox import ISOLATION
from speedstack.eval.lm_eval.task_loading import CODE_TASK_NAMES, TaskLoader, item_name, leaf_tasks
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.schema import to_plain
from speedstack.eval.results.suite import HeadlineMetric, SuiteBlock, SuiteResult, TaskDocuments, TaskRequests
from speedstack.runtime import Engine
from speedstack.support.config import Section
from speedstack.support.near_miss import did_you_mean

logger = logging.getLogger(__name__)

# For metrics without a formula for the standard error.
BOOTSTRAP_ITERATIONS = 1000


class SuiteTask(Section):
    """One task of a suite. Sampling is for tasks that count programs: pass@k needs k samples or more."""

    task: str
    num_fewshot: int | None = Field(None, ge=0, description="Examples before a question; None: the task's own number.")
    metric: str | None = Field(
        None, description="Headline metric as lm-eval names it, 'acc,none'; the filter may be left out if there is one."
    )
    num_samples: int = Field(1, ge=1, description="Generations a document.")
    temperature: float = Field(0.0, ge=0, description="Of samples; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Of samples.")


class Suite(Section):
    """A suite's file."""

    tasks: tuple[SuiteTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [entry.task for entry in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"task {twice[0]} is listed twice, and a result has one score of a task: drop one")
        return self

    def without(self, names: Collection[str]) -> Self:
        """The suite without these tasks."""
        return self.model_copy(update={"tasks": tuple(entry for entry in self.tasks if entry.task not in names)})


@dataclass(frozen=True)
class SuiteSettings:
    """How a suite is run.

    `task_data` is the directory of `make_tasks`; `data` has local data sets; `include_path` is a folder of more tasks;
    `cache` is the directory of answers. `limit` caps documents a task, as a number or a share between 0 and 1.
    `max_gen_toks` overrides each task's; `chat_template_kwargs` and `think_end_token` as for `EngineLM`.
    """

    limit: int | float | None = None
    task_data: Path | None = None
    data: Path | None = None
    include_path: Path | None = None
    cache: Path | None = None
    seed: int = 0
    chat_template: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    think_end_token: str | int | None = None
    max_gen_toks: int | None = None
    allow_code: bool = False
    progress: bool = True


def suites_directory() -> Path:
    """The directory of our suites, in a checkout or an installed package."""
    return Path(str(importlib.resources.files("speedstack"))) / "configs" / "eval" / "suites"


def load_suite(name: str) -> tuple[str, Suite]:
    """Name and content of our suite or a YAML file. Raises ValueError naming the nearest suite, or the key."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = suites_directory() / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in suites_directory().glob("*.yaml"))
            hint = did_you_mean(name, known) or "."
            raise ValueError(f"no suite '{name}'{hint} Suites: {', '.join(known)}; or give a YAML file")
    try:
        return path.stem, Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"cannot read suite {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise ValueError(f"{path}: {place}{first['msg'].removeprefix('Value error, ')}") from error


def cache_directory(parent: Path, engine: Engine, target: Path) -> Path:
    """The directory of this engine's answers with the model in `target`."""
    return parent / model_key(engine, target)


def run_suite(
    engine: Engine,
    target: Path,
    drafter: Path | None,
    name: str,
    suite: Suite,
    settings: SuiteSettings | None = None,
    processes: Processes | None = None,
) -> SuiteResult:
    """Evaluate `engine`, loaded from `target` and `drafter`; call it on the main one of `processes`.

    Raises ValueError for an unknown task or metric, data that cannot be had, unsupported generation settings, and as
    the engine. Earlier answers stay in the cache.
    """
    settings, processes = settings or SuiteSettings(), processes or Processes()
    started = time.perf_counter()
    own = None if settings.include_path is None else read_own_tasks(settings.include_path)
    loader = TaskLoader(
        [entry.task for entry in suite.tasks], settings.task_data, settings.data, settings.allow_code, own
    )
    items: list[Any] = []
    headline: list[HeadlineMetric] = []
    source: dict[str, str] = {}
    tasks: list[Any] = []
    for entry in suite.tasks:
        for item in loader.load(entry.task):
            metric = None if entry.metric is None else find_metric(item, entry.metric)
            headline.append(HeadlineMetric(task=item_name(item), metric=metric, num_fewshot=entry.num_fewshot))
            items.append(item)
            for task in leaf_tasks(item):
                if (other := source.setdefault(task.task_name, entry.task)) != entry.task:
                    raise ValueError(f"suite {name}: {other} and {entry.task} share task {task.task_name}: drop one")
                _configure(task, entry)
                tasks.append(task)
    left_out = defaults_not_computed(target)
    if left_out and any(task.OUTPUT_TYPE == "generate_until" for task in tasks):
        logger.warning(
            "generation_config.json of %s asks for %s, which transformers heeds in every text and the engine does not",
            target,
            ", ".join(f"{key} {value}" for key, value in left_out.items()),
        )
    is_own = {name for name, entry in source.items() if own is not None and {name, entry} & own.names}
    lm = EngineLM(
        engine,
        settings.seed,
        settings.progress,
        RequestCache(settings.cache, processes.rank),
        processes,
        tasks,
        {name: own.sha256 for name in is_own} if own is not None else {},
        drafting_key(engine, drafter),
        settings.chat_template_kwargs,
        settings.think_end_token,
        settings.max_gen_toks,
    )
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
    assert output is not None  # None is for other processes, and lm-eval sees only one
    samples = output.pop("samples")
    plain = to_plain(output)
    block = SuiteBlock(
        suite=name,
        headline=tuple(headline),
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
        num_processes=processes.size,
        limit=settings.limit,
        include_path=None if own is None else str(own.directory),
        include_path_sha256=None if own is None else own.sha256,
        own_tasks=tuple(sorted(is_own)),
        chat_template=settings.chat_template,
        chat_template_kwargs=dict(settings.chat_template_kwargs),
        think_end_token=settings.think_end_token,
        max_gen_toks=settings.max_gen_toks,
        seeds={"sampling": settings.seed} | {k: v for k, v in plain["config"].items() if k.endswith("_seed")},
        code_isolation=ISOLATION if any(entry.task in CODE_TASK_NAMES for entry in suite.tasks) else None,
        seconds=time.perf_counter() - started,
        requests={task: TaskRequests(**asdict(counts)) for task, counts in lm.counts.items()},
        documents={task: _documents(rows, plain["higher_is_better"].get(task, {})) for task, rows in samples.items()},
        environment=describe_environment(),
    )
    return SuiteResult(plain, block)


def _configure(task: Any, entry: SuiteTask) -> None:
    """Configure a task for the suite. Raises ValueError for samples of a non-generating task, or too few."""
    if entry.num_fewshot is not None:
        task.set_config("num_fewshot", entry.num_fewshot)
    metric, _, _ = (entry.metric or "").partition(",")
    if entry.task in CODE_TASK_NAMES and metric in {f"pass@{k}" for k in KS if k > entry.num_samples}:
        raise ValueError(f"{metric} of {entry.task} needs so many samples: num_samples is {entry.num_samples}")
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
    """Scores by 'metric,filter', a column each; lm-eval lists the documents once per filter."""
    hashes: dict[str, dict[int, str]] = {}
    scores: dict[str, dict[int, Any]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            column = f"{metric},{sample['filter']}"
            scores.setdefault(column, {})[sample["doc_id"]] = _score(to_plain(sample[metric]))
            hashes.setdefault(column, {})[sample["doc_id"]] = sample["doc_hash"]
    (first, *_) = hashes.values()
    order = sorted(first)
    return TaskDocuments(
        doc_hashes=tuple(first[doc_id] for doc_id in order),
        scores={column: tuple(values[doc_id] for doc_id in order) for column, values in scores.items()},
        higher_is_better={metric: better for metric, better in higher_is_better.items() if better is not None},
    )


def _score(value: Any) -> Any:
    """A document's score in a result: one or several finite numbers, else None."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        return None
    return tuple(numbers) if isinstance(value, list) else value


def _quantization(target: Path) -> str | None:
    """The checkpoint's number format, from its config."""
    config = json.loads((target / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return None
    return str(config.get("format") or config.get("quant_method") or "unknown")
