"""The rows of a grid as steps: which steps there are, what their results depend on, and what rows share.

    quantize | qat      a model directory
    drafter             a drafter for the full-precision model or for one of those; it writes its text first
    quality             KL, perplexity and top-1 agreement of a model
    tasks, suite        data of our own lm-eval tasks; the score of a model
    acceptance          tokens a round of a model with a drafter at one temperature
    timing              tokens/s of the same

A step's settings hold all that decides its result: digests of checkpoint and corpus, its part of the config, the
device. Raise a kind's number in `VERSIONS` when its code computes something else; `SOFTWARE` names the packages that
affect its numbers. Steps of other versions are not used, because one table is of one software.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speedstack.ablation.config import TRAINED, AblateConfig, RowSpec, drafter_config, qat_config
from speedstack.eval.lm_eval.request_cache import side_files
from speedstack.eval.lm_eval.suite import Suite, load_suite
from speedstack.eval.lm_eval.task_loading import TASK_NAMES, TEACHER_TASK_NAMES
from speedstack.eval.results.environment import describe_environment
from speedstack.quant.checkpoint import weights_sha256
from speedstack.quant.formats import number_format
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE
from speedstack.runtime.model.device import choose_device
from speedstack.support.digests import files_sha256
from speedstack.support.steps import Step
from speedstack.train.config.recipes import DrafterConfig, JobConfig, identity
from speedstack.train.data.digest import corpus_digest

VERSIONS = {
    "quantize": 1,
    "qat": 1,
    "drafter": 1,
    "quality": 1,
    "tasks": 1,
    "suite": 2,
    "acceptance": 2,
    "timing": 1,
}
# lm-eval affects the scores of a suite alone. Other packages change no number.
SOFTWARE = {kind: ("speedstack", "torch", "transformers") for kind in VERSIONS} | {
    kind: ("speedstack", "torch", "transformers", "lm_eval") for kind in ("tasks", "suite")
}
# Where a step leaves its model or drafter, below its directory.
EXPORTS = {"quantize": "export", "qat": "run/export", "drafter": "run/export"}
# Fields that name places; the settings have digests of the inputs there instead.
_PLACES = (
    "run.device",
    "data.corpus",
    "qat.model",
    "qat.start_from",
    "drafter.target",
    "drafter.text",
    "drafter.features_path",
)


@dataclass(frozen=True)
class PlannedRow:
    """A row and its steps, None for one it lacks. `model` is None for the full-precision model."""

    spec: RowSpec
    model: Step | None
    drafter: Step | None
    quality: Step
    suite: Step | None
    acceptance_greedy: Step | None
    acceptance: Step | None
    timing: Step | None

    def steps(self) -> list[Step]:
        """The row's steps without None."""
        return [step for step in vars(self).values() if isinstance(step, Step)]


class Planner:
    """Makes the steps of one config, with digests of checkpoint and corpus taken once.

    Raises ValueError for a missing checkpoint or corpus, and an unknown suite, task or device.
    """

    def __init__(self, config: AblateConfig) -> None:
        self.config = config
        self.device = choose_device(config.device).type
        self.machine = describe_environment()
        self.suite = _suite(config)
        self.model_sha256 = model_digest(config.model)
        self.corpus_sha256 = corpus_digest(config.corpus)
        self.places = {"model": str(config.model), "corpus": str(config.corpus)}

    def rows(self) -> list[PlannedRow]:
        """The config's rows, in order."""
        return [self._row(spec) for spec in self.config.rows()]

    def _row(self, spec: RowSpec) -> PlannedRow:
        model = self._model(spec)
        drafter = None
        if spec.drafter != "none":
            drafter = self._drafter(model if spec.drafter == "quantized" else None)
        greedy = None if drafter is None else self._acceptance(model, drafter, 0.0)
        return PlannedRow(
            spec=spec,
            model=model,
            drafter=drafter,
            quality=self._quality(model),
            suite=self._suite_step(model),
            acceptance_greedy=greedy,
            acceptance=greedy if drafter is None else self._acceptance(model, drafter, spec.temperature),
            timing=self._timing(model, drafter, spec.temperature),
        )

    def _model(self, spec: RowSpec) -> Step | None:
        if spec.method == "none":
            return None
        if spec.method in TRAINED:
            config = qat_config(self.config, spec.method, Path())
            return self._training("qat", config, {})
        rule = "mse" if spec.method in ("mse", "gptq") else DEFAULT_SCALE_RULE
        settings = self._of_model() | {
            "format": spec.format,
            "modules": spec.modules,
            "method": spec.method,
            "scale_rule": rule if number_format(spec.format).has_scale_rule else None,
            "is_packed": spec.is_packed,
        }
        if spec.method == "gptq":
            settings |= {
                "corpus": self.corpus_sha256,
                "seed": self.config.seed,
                "gptq": self.config.gptq.model_dump(mode="json"),
            }
        return self._step("quantize", settings)

    def _drafter(self, target: Step | None) -> Step:
        # The path of the target is filled in when the step runs.
        return self._training("drafter", drafter_config(self.config, Path(), Path()), _target(target))

    def _training(self, kind: str, config: JobConfig, needs: Mapping[str, Step]) -> Step:
        fields = identity(config)
        settings = {key: value for key, value in fields.items() if key not in _PLACES}
        settings["device"] = self.device
        if fields.get("qat.start_from") is not None:
            settings["start_from"] = model_digest(Path(fields["qat.start_from"]))
        if isinstance(config, DrafterConfig):
            prompts = config.drafter.prompts
            for source in (prompts.source, prompts.heldout_source):
                if source is not None and Path(source).exists():
                    settings[f"prompts of {source}"] = tree_digest(Path(source))
        settings |= {"corpus": self.corpus_sha256} | ({} if needs else {"model": self.model_sha256})
        places = {"config": config.model_dump_json()}
        return self._step(kind, settings, needs, places)

    def _quality(self, model: Step | None) -> Step:
        # Either way the full-precision model is in it, as the teacher.
        settings = self._of_corpus() | {"heldout": self.config.heldout.model_dump(mode="json")}
        return self._step("quality", settings, _target(model))

    def _suite_step(self, model: Step | None) -> Step | None:
        if self.suite is None:
            return None
        section, (name, suite) = self.config.suite, self.suite
        needs = _target(model)
        ours = sorted({task.task for task in suite.tasks} & {*TASK_NAMES, *TEACHER_TASK_NAMES})
        if ours:
            data = self._of_corpus() | {"tasks": ours, "seed": self.config.seed}
            needs |= {"tasks": self._step("tasks", data)}
        settings = self._of_model() | {
            "suite": suite.model_dump(mode="json"),
            "name": name,
            "score": section.score,
            "limit": section.limit,
            "max_length": section.max_length,
            "batch_size": section.batch_size,
            "seed": self.config.seed,
        }
        if section.data is None:
            return self._step("suite", settings, needs)
        return self._step("suite", settings | {"data": tree_digest(section.data)}, needs, {"data": str(section.data)})

    def _acceptance(self, model: Step | None, drafter: Step, temperature: float) -> Step:
        return self._step("acceptance", self._prompts(temperature), _target(model) | {"drafter": drafter})

    def _timing(self, model: Step | None, drafter: Step | None, temperature: float) -> Step | None:
        if not self.config.speed.num_repeats:
            return None
        settings = self._prompts(temperature) | {
            "num_repeats": self.config.speed.num_repeats,
            "num_threads": torch.get_num_threads(),
            "machine": [self.machine.cpu_model, self.machine.num_cores, *self.machine.gpus],
            "thread_settings": self.machine.thread_settings,
        }
        needs = _target(model) | ({} if drafter is None else {"drafter": drafter})
        # A worker has its GPU to itself, but shares the CPU's cores.
        return self._step("timing", settings, needs, is_exclusive=self.device == "cpu")

    def _prompts(self, temperature: float) -> dict[str, Any]:
        speed = self.config.speed.model_dump(mode="json", exclude={"num_repeats"})
        return self._of_corpus() | {"speed": speed, "temperature": temperature, "seed": self.config.seed}

    def _of_model(self) -> dict[str, Any]:
        return {"model": self.model_sha256, "device": self.device, "dtype": self.config.dtype}

    def _of_corpus(self) -> dict[str, Any]:
        return self._of_model() | {"corpus": self.corpus_sha256}

    def _step(
        self,
        kind: str,
        settings: Mapping[str, Any],
        needs: Mapping[str, Step] | None = None,
        places: Mapping[str, str] | None = None,
        is_exclusive: bool = False,
    ) -> Step:
        all_places = self.places | dict(places or {})
        software = {name: self.machine.packages.get(name, "unknown") for name in SOFTWARE[kind]}
        return Step(kind, VERSIONS[kind], settings, needs or {}, all_places, is_exclusive, software)


def _target(model: Step | None) -> dict[str, Step]:
    return {} if model is None else {"target": model}


def _suite(config: AblateConfig) -> tuple[str, Suite] | None:
    """The suite with the requested tasks. Raises ValueError naming the existing ones."""
    section = config.suite
    if section.name is None:
        return None
    name, suite = load_suite(section.name)
    there = [task.task for task in suite.tasks]
    for task in (*section.tasks, section.score):
        if task not in there or (section.tasks and task not in section.tasks):
            raise ValueError(
                f"suite.score or suite.tasks: no task '{task}' in suite {name}; there are {', '.join(there)}"
            )
    suite = suite.without([task for task in there if section.tasks and task not in section.tasks])
    if next(task.metric for task in suite.tasks if task.task == section.score) is None:
        raise ValueError(f"suite.score: task {section.score} of suite {name} has no headline metric")
    return name, suite


def model_digest(path: Path) -> str:
    """SHA-256 of a model directory's weights, its configs, its tokenizer and its chat template."""
    files = json.dumps(side_files(path), sort_keys=True)
    return hashlib.sha256(f"{weights_sha256(path)}{files}".encode()).hexdigest()


def tree_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a directory. Raises ValueError for neither."""
    if not path.exists():
        raise ValueError(f"there is nothing at {path}")
    return files_sha256(path, [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()))
