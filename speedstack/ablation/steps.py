"""What each kind of step does; runs in a worker process. `plan.py` decides which steps there are.

A step reads its settings, places and needed steps' directories, fills its own directory and returns the table's
numbers. Long steps (training, lm-eval) resume after a kill.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from speedstack.ablation.plan import EXPORTS
from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.config import EvalConfig
from speedstack.eval.lm_eval.suite import Suite, SuiteSettings, run_suite
from speedstack.eval.lm_eval.task_loading import lm_eval_name
from speedstack.eval.quality.heldout import corpus_windows
from speedstack.eval.quality.measure import model_quality, stderr_over_windows
from speedstack.eval.results.environment import LoadWatch
from speedstack.eval.speed.acceptance import summarize
from speedstack.eval.speed.harness import spread
from speedstack.quant.checkpoint import export_model, load_model
from speedstack.quant.checkpoint.source import value_dtypes
from speedstack.quant.ptq import round_to_nearest
from speedstack.runtime import Engine, Generation
from speedstack.runtime.model.device import choose_dtype
from speedstack.runtime.rounds.speculation import DraftStrategy
from speedstack.support.steps import Step
from speedstack.train.config.recipes import DrafterConfig, QatConfig
from speedstack.train.data.corpus import load_corpus
from speedstack.train.data.heldout import heldout_prompts
from speedstack.train.drafter.job import train_drafter
from speedstack.train.qat.recipe import qat
from speedstack.verbs.evaluate import make_task_data
from speedstack.verbs.quantize import CalibrationSection, QuantizeConfig, quantize


class _Job:
    """A step with its needs by name."""

    def __init__(self, step: Step, needs: Mapping[str, Path], directory: Path) -> None:
        self.step, self.settings, self.places, self.directory = step, step.settings, step.places, directory
        self.model = Path(step.places["model"])
        self.exports = {
            role: needs[role] / EXPORTS[need.kind] for role, need in step.needs.items() if need.kind in EXPORTS
        }
        self.task_data = needs["tasks"] / "tasks" if "tasks" in needs else None

    @property
    def target(self) -> Path:
        """The step's model: the row's own, or the full-precision one."""
        return self.exports.get("target", self.model)

    @property
    def device(self) -> str:
        return str(self.settings["device"])

    @property
    def dtype(self) -> torch.dtype:
        name = self.settings["dtype"]
        return choose_dtype(None if name == "auto" else name, torch.device(self.device))

    def engine(self, **options: Any) -> Engine:
        return Engine.from_pretrained(self.target, device=self.device, dtype=self.dtype, **options)


def run_step(step: Step, needs: Mapping[str, Path], directory: Path) -> dict[str, Any]:
    """Make `step` in `directory`. Raises as the corresponding verbs."""
    if step.kind != "quality":
        _teacher.cache_clear()  # it would take memory that a large model needs
    try:
        return _KINDS[step.kind](_Job(step, needs, directory))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _quantize(job: _Job) -> dict[str, Any]:
    settings, export = job.settings, job.directory / EXPORTS["quantize"]
    if settings["is_packed"]:
        calibration: dict[str, Any] = {}
        if settings["method"] == "gptq":
            options = dict(settings["gptq"])
            calibration = {"device": job.device, "damping": options.pop("damping")}
            calibration["calibration"] = CalibrationSection(
                source=job.places["corpus"], seed=settings["seed"], **options
            )
        quantize(QuantizeConfig(model=job.model, method=settings["method"], out=export, **calibration))
        return {}
    model = load_model(job.model, torch.bfloat16 if value_dtypes(job.model) == {"BF16"} else torch.float32)
    torch.nn.Module.to(model, job.device)
    names = round_to_nearest(model, settings["scale_rule"], settings["format"], settings["modules"])
    export_model(model, job.model, export, scale_rule=None, only=names)
    return {}


def _qat(job: _Job) -> dict[str, Any]:
    config = QatConfig.model_validate_json(job.places["config"])
    run = config.run.model_copy(update={"out": job.directory, "device": job.device})
    metrics = qat(config.model_copy(update={"run": run})).metrics
    shutil.rmtree(job.directory / run.name / "checkpoints", ignore_errors=True)
    return {"metrics": metrics}


def _drafter(job: _Job) -> dict[str, Any]:
    config = DrafterConfig.model_validate_json(job.places["config"])
    run = config.run.model_copy(update={"out": job.directory, "device": job.device})
    section = config.drafter.model_copy(update={"target": job.target})
    metrics = train_drafter(config.model_copy(update={"run": run, "drafter": section})).metrics
    for name in ("checkpoints", "features"):
        shutil.rmtree(job.directory / run.name / name, ignore_errors=True)
    return {"metrics": metrics}


@lru_cache(maxsize=1)
def _teacher(path: Path, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The full-precision model, kept because a worker compares many others with it."""
    model = load_model(path, dtype)
    torch.nn.Module.to(model, device)
    return model


def _quality(job: _Job) -> dict[str, Any]:
    section = job.settings["heldout"]
    windows = corpus_windows(job.places["corpus"], job.model, section["window"], section["num_tokens"])
    student = None
    if "target" in job.exports:
        student = load_model(job.target, job.dtype)
        torch.nn.Module.to(student, job.device)
    quality = model_quality("row", _teacher(job.model, job.device, job.dtype), student, windows)
    return quality.model_dump(mode="json")


def _tasks(job: _Job) -> dict[str, Any]:
    config = EvalConfig(
        suite="offline",
        target=job.model,
        teacher=job.model,
        corpus=Path(job.places["corpus"]),
        device=job.device,  # type: ignore[arg-type]
        dtype=job.settings["dtype"],
        seed=job.settings["seed"],
        out=job.directory,
    )
    make_task_data(config, set(job.settings["tasks"]))
    return {}


def _suite(job: _Job) -> dict[str, Any]:
    settings = job.settings
    engine = job.engine(max_length=settings["max_length"], max_batch_size=settings["batch_size"])
    data = job.places.get("data")
    result = run_suite(
        engine,
        job.target,
        None,
        settings["name"],
        Suite.model_validate(settings["suite"]),
        SuiteSettings(
            limit=settings["limit"],
            task_data=job.task_data,
            data=None if data is None else Path(data),
            cache=job.directory / "answers",
            seed=settings["seed"],
            progress=False,
        ),
    )
    result.save(job.directory / "suite.json")
    result.check_headline()
    task = lm_eval_name(settings["score"])
    metric = next((entry.metric for entry in result.block.headline if entry.task == task), None)
    value = None if metric is None else result.value(task, metric)
    if metric is None or value is None:
        raise ValueError(f"suite.score: {task} has no score of its own, it stands for several tasks: name one of them")
    return {"metric": metric, "score": value, "stderr": result.stderr(task, metric)}


def _acceptance(job: _Job) -> dict[str, Any]:
    engine, prompts, options = _decoding(job)
    generations = engine.generate(prompts, **options)
    stats = [generation.stats for generation in generations]
    acceptance = summarize("all prompts", generations)
    # Texts are independent draws; rounds within a text are not.
    stderr = stderr_over_windows([each.num_round_tokens for each in stats], [each.num_rounds for each in stats])
    return acceptance.model_dump(mode="json") | {"acceptance_length_stderr": stderr}


def _timing(job: _Job) -> dict[str, Any]:
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(job.settings["num_threads"])
        engine, prompts, options = _decoding(job)
        engine.generate(prompts[:1], **options)  # a warm-up
        rates = []
        with LoadWatch() as watch:
            for _ in range(job.settings["num_repeats"]):
                rates.append(_rate(engine.generate(prompts, **options)))
    finally:
        torch.set_num_threads(num_threads)
    return {
        "tokens_per_second": spread(rates).model_dump(mode="json"),
        "busy_cores_of_others": watch.busy_cores_of_others,
        "backend": engine.backend_name,
    }


def _rate(generations: list[Generation]) -> float:
    """Tokens per second after each text's first token."""
    stats = [generation.stats for generation in generations]
    return sum(each.num_round_tokens for each in stats) / sum(each.decode_seconds for each in stats)


def _decoding(job: _Job) -> tuple[Engine, list[list[int]], dict[str, Any]]:
    """An engine for single sequences, the prompts, and the generation options."""
    section, seed = job.settings["speed"], job.settings["seed"]
    num_new_tokens = section["num_new_tokens"]
    max_length = section["num_prompt_tokens"] + num_new_tokens
    engine = job.engine(max_length=max_length, max_batch_size=1)
    if "drafter" in job.exports:
        engine.set_drafter(_foreign_drafter(job.exports["drafter"]))
        engine.set_strategy(DraftStrategy(noise=section["draft_noise"]))
    corpus = load_corpus(Path(job.places["corpus"]))
    sets = heldout_prompts(corpus, section["num_prompts"], section["num_prompt_tokens"], seed)
    prompts = [prompt for prompts in sets.values() for prompt in prompts]
    options = {
        "max_new_tokens": num_new_tokens,
        "temperature": job.settings["temperature"],
        "seed": seed,
        "ignore_eos": True,
    }
    return engine, prompts, options


def _foreign_drafter(path: Path) -> DFlashDraftModel:
    """A drafter for any target of fitting shapes, because drafting for another target is part of the study."""
    drafter = load_drafter(path)
    drafter.config = replace(drafter.config, target_sha256=None)
    return drafter


_KINDS: dict[str, Callable[[_Job], dict[str, Any]]] = {
    "quantize": _quantize,
    "qat": _qat,
    "drafter": _drafter,
    "quality": _quality,
    "tasks": _tasks,
    "suite": _suite,
    "acceptance": _acceptance,
    "timing": _timing,
}
