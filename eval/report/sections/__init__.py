"""The kinds of result a report shows: their document classes, and the functions that make their sections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from speedstack.eval.report.page import Section
from speedstack.eval.report.sections import ablation, microbench, quality, quantization, speed, suites
from speedstack.eval.report.sections.found import Found, each, titled
from speedstack.eval.results.ablation import AblationGrid, DrafterAblation
from speedstack.eval.results.microbench import (
    ConversionResult,
    DrafterCost,
    KernelResourcesResult,
    LmBench,
    QatCost,
    QuantBench,
    ServingBench,
)
from speedstack.eval.results.quality import QualityResult, SensitivityResult
from speedstack.eval.results.quantization import PtqResult, QatRuns
from speedstack.eval.results.schema import Environment
from speedstack.eval.results.speed import AcceptanceResult, TimingResult
from speedstack.eval.results.suite import BLOCK, Comparison, SuiteResult

__all__ = ["KINDS", "Found", "Kind", "check", "environment_of", "kind_of", "sections", "titled"]


@dataclass(frozen=True)
class Kind:
    """`document.check(content, path)` returns a result or raises ValueError; `sections` shows one or several."""

    document: Any
    sections: Callable[[Sequence[Found[Any]]], list[Section]]


# In the order of the page.
KINDS = {
    "quality": Kind(QualityResult, each("Quality", quality.quality)),
    "eval": Kind(SuiteResult, suites.suites),
    "comparison": Kind(Comparison, each("Comparison", suites.comparison)),
    "ablation": Kind(AblationGrid, each("Ablation", ablation.grid)),
    "ptq": Kind(PtqResult, each("Ways to quantize", quantization.ptq)),
    "qat_runs": Kind(QatRuns, each("Runs of quantization-aware training", quantization.qat_runs)),
    "sensitivity": Kind(SensitivityResult, each("Sensitivity", quality.sensitivity)),
    "acceptance": Kind(AcceptanceResult, each("Drafting", speed.acceptance)),
    "drafter_ablation": Kind(DrafterAblation, each("Ablation of drafters", ablation.drafters)),
    "serving": Kind(ServingBench, each("Ways to speculate", speed.serving)),
    "timing": Kind(TimingResult, each("Speed", speed.timing)),
    "lm_bench": Kind(LmBench, each("Against lm-eval\u2019s adapter", microbench.lm)),
    "drafter_cost": Kind(DrafterCost, each("Training a drafter", microbench.drafter)),
    "qat_cost": Kind(QatCost, each("Cost of fake-quant", microbench.qat)),
    "quant-bench": Kind(QuantBench, each("MXFP4 kernels", microbench.quant)),
    "conversion": Kind(ConversionResult, each("Conversion", microbench.conversion)),
    "kernel_resources": Kind(KernelResourcesResult, each("GPU kernels", microbench.kernels)),
}


def kind_of(content: Any) -> str | None:
    """The kind named in a result's JSON (in its block, for a suite); None for other JSON."""
    if not isinstance(content, dict):
        return None
    block = content.get(BLOCK, content)
    kind = block.get("kind") if isinstance(block, dict) else None
    return kind if isinstance(kind, str) and "schema_version" in block else None


def check(kind: str, content: Any, path: str) -> Any:
    """`content` as a result. Raises ValueError, naming `path`, if it does not fit the kind."""
    return KINDS[kind].document.check(content, path)


def sections(kind: str, found: Sequence[Found[Any]]) -> list[Section]:
    """The sections of all results of one kind."""
    return KINDS[kind].sections(found)


def environment_of(result: Any) -> Environment | None:
    """Where a result was measured, if known."""
    return getattr(getattr(result, "block", result), "environment", None)
