"""Rows of the table from finished steps: measurements, storage, and the cost model's predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speedstack.ablation.config import AblateConfig, PredictSection, RowSpec
from speedstack.ablation.plan import EXPORTS, PlannedRow, Planner
from speedstack.dflash.checkpoint import load_config as load_drafter_config
from speedstack.eval.quality.storage import EXPERTS, bytes_in_format, bytes_per_weight, directory_bytes
from speedstack.eval.results.ablation import BUSY_CORES, AblationGrid, AblationRow, Served
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.speed.planned_step import StepConfig, make_plan
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.formats import number_format
from speedstack.runtime.model.config_file import read_model_config
from speedstack.runtime.model.weight_formats import WeightFormat, WeightFormats, weight_format
from speedstack.runtime.perf.gpus import gpu_named
from speedstack.support.steps import Step, StepStore

# Parts of a plan's weights by the modules that a row quantizes.
_PARTS = {
    "experts": ("experts",),
    "attention": ("attention", "attention_output"),
    "lm_head": ("lm_head",),
    "all": ("experts", "attention", "attention_output", "lm_head", "dense"),
}
_BF16_BYTES = 2


def make_grid(planner: Planner, num_jobs: int, rows: list[AblationRow]) -> AblationGrid:
    """The grid's document."""
    config, suite = planner.config, planner.suite
    metric = None
    if suite is not None:
        entry = next(task for task in suite[1].tasks if task.task == config.suite.score)
        metric = f"{entry.task} {(entry.metric or '').partition(',')[0]}"
    return AblationGrid(
        model_sha256=planner.model_sha256,
        corpus_sha256=planner.corpus_sha256,
        config=config.model_dump(mode="json", exclude={"jobs"}),
        score_metric=metric,
        gpu=config.predict.gpu,
        num_jobs=num_jobs,
        rows=tuple(rows),
        notes=tuple(_notes(rows, config)),
        environment=describe_environment(),
    )


def _notes(rows: list[AblationRow], config: AblateConfig) -> list[str]:
    notes = []
    busy = [row.busy_cores_of_others for row in rows if row.busy_cores_of_others is not None]
    if busy and max(busy) > BUSY_CORES:
        notes.append(
            f"* Other processes kept up to {max(busy):.1f} cores busy while these tokens/s were measured: they are no "
            "timings to compare."
        )
    if any(row.served == "dequantized" and row.tokens_per_second is not None for row in rows):
        notes.append(
            "Rows served dequantized decode ordinary weights that hold the format's values: their tokens/s are not "
            "the format's."
        )
    predicted = config.predict
    if predicted.gpu is not None and any(row.predicted_tokens_per_second is not None for row in rows):
        notes.append(
            f"Predicted tokens/s are the cost model's, of one text at {predicted.context} positions, weights that are "
            f"not quantized in bfloat16, synchronizations of {predicted.handoff_us:g} us; a draft costs reading its "
            "weights and of the LM head. Not measured."
        )
    return notes


def make_row(planned: PlannedRow, planner: Planner, store: StepStore, failures: Mapping[str, str]) -> AblationRow:
    """The row of steps that are finished or have a reason in `failures`."""
    spec = planned.spec
    errors = [f"{step.kind}: {failures[step.name]}" for step in _first_failed(planned, failures)]

    def result(step: Step | None) -> dict[str, Any]:
        return {} if step is None or step.name in failures else store.result(step)

    values: dict[str, Any] = {**vars(spec), "name": spec.name}
    try:
        if planned.model is None or planned.model.name not in failures:
            values |= _stored(planned, planner.config, store)
        quality, suite, timing = (result(step) for step in (planned.quality, planned.suite, planned.timing))
        greedy, sampled = result(planned.acceptance_greedy), result(planned.acceptance)
        values |= {
            "num_tokens": quality.get("num_tokens"),
            "kl_nats": quality.get("kl_to_teacher_nats"),
            "kl_stderr_nats": quality.get("kl_stderr_nats"),
            "perplexity": quality.get("perplexity"),
            "top1_agreement": quality.get("top1_agreement"),
            "score": suite.get("score"),
            "score_stderr": suite.get("stderr"),
            "tau_greedy": greedy.get("acceptance_length"),
            "tau_greedy_stderr": greedy.get("acceptance_length_stderr"),
            "tau": sampled.get("acceptance_length"),
            "tau_stderr": sampled.get("acceptance_length_stderr"),
            "tokens_per_second": timing.get("tokens_per_second"),
            "busy_cores_of_others": timing.get("busy_cores_of_others"),
        }
        if not errors and planner.config.predict.gpu is not None:
            drafter = None if planned.drafter is None else _export(store, planned.drafter)
            values["predicted_tokens_per_second"] = predict(
                planner.config.model, spec, planner.config.predict, drafter, values["tau"] or 1.0
            )
    except (ValueError, OSError) as error:
        errors.append(" ".join(str(error).split()))
    values["steps"] = {role: step.name for role, step in vars(planned).items() if isinstance(step, Step)}
    return AblationRow(**values, error="; ".join(errors) or None)


def _first_failed(planned: PlannedRow, failures: Mapping[str, str]) -> list[Step]:
    """The steps that failed first: none of their needs had failed."""
    steps = {step.name: step for each in planned.steps() for step in each.closure() if step.name in failures}
    return [step for step in steps.values() if not any(need.name in failures for need in step.needs.values())]


def _stored(planned: PlannedRow, config: AblateConfig, store: StepStore) -> dict[str, Any]:
    """How the row's model is served, and its bytes."""
    spec = planned.spec
    path = config.model if planned.model is None else _export(store, planned.model)
    sizes = directory_bytes(path)
    served: Served = "packed" if read_config(path)[1].is_packed else "unquantized" if not spec.format else "dequantized"
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if EXPERTS in name)
    if served == "dequantized":
        total, experts = bytes_in_format(config.model, spec.format, spec.modules)  # type: ignore[arg-type]
    return {
        "served": served,
        "model_bytes": total,
        "expert_bytes": experts,
        "bits_per_weight": number_format(spec.format).bits_per_weight
        if spec.format
        else 8 * bytes_per_weight(config.model),
    }


def _export(store: StepStore, step: Step) -> Path:
    return store.path(step) / EXPORTS[step.kind]


def predict(model: Path, spec: RowSpec, section: PredictSection, drafter: Path | None, tau: float) -> float:
    """Tokens/s of one text on `section.gpu` by the cost model, at `tau` tokens a step with a drafter.

    Unquantized weights are bfloat16, routers in the family's dtype. Raises ValueError as `make_plan`, above all for a
    family without a plan.
    """
    assert section.gpu is not None
    shape, stored = read_model_config(model)
    chosen: WeightFormat = weight_format(spec.format) if spec.format else "bf16"
    formats = WeightFormats(router=stored.router, **dict.fromkeys(_PARTS.get(spec.modules, ()), chosen))
    rows, draft_us = 1, 0.0
    if drafter is not None:
        rows = 1 + load_drafter_config(drafter).num_proposals
        num_bytes: float = _BF16_BYTES * _num_parameters(drafter)
        num_bytes += formats.num_bytes("lm_head", shape.vocab_size * shape.hidden_size)
        draft_us = 1e6 * num_bytes / (gpu_named(section.gpu).bandwidth * section.bandwidth_fraction)
    step = StepConfig(
        model=model,
        gpu=section.gpu,
        rows=rows,
        sequences=1,
        context=section.context,
        acceptance_length=tau,
        draft_us=draft_us,
        handoff_us=section.handoff_us,
        bandwidth_fraction=section.bandwidth_fraction,
    )
    cost = make_plan(step, formats).cost
    return cost.tokens_per_second(cost.predicted_seconds)


def _num_parameters(drafter: Path) -> int:
    with WeightFiles(drafter) as files:
        return sum(math.prod(files.shape(name)) for name in files.names())
