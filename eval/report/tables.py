"""Columns of a page's tables, by kind of result: headings, units, fields and formats.

Rows that join two records are named tuples. Tables with a column per model are in `sections.suites` and
`sections.quality`.
"""

import math
from typing import NamedTuple

from speedstack.eval.results.ablation import AblationGrid, AblationRow, DrafterMeans
from speedstack.eval.results.microbench import LM_ADAPTER, LmTask, LmTiming, LossMemory, ShapeTimes, StepTimes
from speedstack.eval.results.quality import UnitSensitivity
from speedstack.eval.results.quantization import PtqMethod, QatRun
from speedstack.eval.results.speed import ContestantTiming
from speedstack.eval.results.table import (
    Cell,
    Column,
    compact,
    count,
    format_seconds,
    percent,
    ratio,
    size,
    words,
)

TAU = "\u03c4"
MILLINATS = "millinats a token"

# A run.
STAGES = (words("stage", "name"), words("what it does", "summary"), Column("time", "", "seconds", format_seconds))
STORAGE = (
    words("routed experts' weights", "place"),
    size("MXFP4", "packed_bytes"),
    size("bfloat16", "bf16_bytes"),
    Column("ratio", "", lambda entry: entry.ratio if entry.bf16_bytes else None, ".4f"),
)

# Quality.
DIVERGENCE = (
    words("model", "method"),
    Column("perplexity", "a token", "perplexity", ".3f"),
    Column("KL to teacher", MILLINATS, "kl_to_teacher_nats", ".3f", 1e3, error="kl_stderr_nats"),
    percent("top-1 agreement", "top1_agreement"),
    count("tokens measured", "num_tokens"),
)


def _unit(unit: UnitSensitivity) -> str:
    return f"layer {unit.layer}" + ("" if unit.expert is None else f", expert {unit.expert}")


SENSITIVITY = (
    words("unit", _unit),
    Column("KL", MILLINATS, "kl_nats", ".4f", 1e3, error="kl_stderr_nats"),
    percent("top-1 agreement", "top1_agreement"),
    count("parameters", "num_parameters"),
    count("tokens sent to it", "num_tokens"),
)


# Quantization.
def _ptq_settings(method: PtqMethod) -> str:
    return f"exported, weights {method.model_sha256[:12]}" if method.model_sha256 else compact(method.settings)


PTQ = (
    words("method", "quality.method", note=_ptq_settings),
    Column("KL to full precision", MILLINATS, "quality.kl_to_teacher_nats", ".3f", 1e3, error="quality.kl_stderr_nats"),
    ratio("over rounding", "kl_over_rtn", form=".3f"),
    percent("top-1 agreement", "quality.top1_agreement"),
    Column("loss", "nats a token", "quality.nll_nats", ".4f"),
    Column("time", "s", "seconds", ".1f"),
)


def _qat_changes(run: QatRun) -> str:
    return compact(run.changes) if run.evaluations else "never evaluated"


QAT = (
    words("run", "run", note=_qat_changes),
    count("steps", "last.step"),
    Column("KL to full precision", MILLINATS, "last.heldout_kl", ".3f", 1e3),
    ratio("over rounding", "kl_over_rtn", form=".3f"),
    percent("top-1 agreement", "last.heldout_top1_agreement"),
    Column("loss", "nats a token", "last.heldout_loss", ".4f"),
    percent("weights changed", "last.flips_since_start"),
    percent("oscillating", "last.oscillating", ".3f"),
)
QAT_QUALITY = (
    words("model", "method"),
    Column("KL to full precision", MILLINATS, "kl_to_teacher_nats", ".3f", 1e3, error="kl_stderr_nats"),
    percent("top-1 agreement", "top1_agreement"),
    Column("loss", "nats a token", "nll_nats", ".4f"),
)


# Ablations.
def _doubt(row: AblationRow) -> str:
    return f"others kept {row.busy_cores_of_others:.1f} cores busy" if row.is_doubtful else ""


def grid(result: AblationGrid) -> tuple[Column, ...]:
    return (
        words("model", "model_name", warning="error"),
        words("drafter", lambda row: "none" if row.drafter == "none" else f"for the {row.drafter} model"),
        Column("temperature", "", "temperature", "g"),
        words("served", "served"),
        Column("weight", "bits, scales included", "bits_per_weight", ".4g"),
        size("whole model", "model_bytes"),
        size("experts", "expert_bytes"),
        Column("KL", MILLINATS, "kl_nats", ".3g", 1e3, error="kl_stderr_nats"),
        Column("perplexity", "", "perplexity", ".3f"),
        percent("top-1 agreement", "top1_agreement"),
        Column(result.score_metric or "score", "", "score", ".3f", error="score_stderr"),
        Column(TAU, "greedy", "tau_greedy", ".2f", error="tau_greedy_stderr"),
        Column(TAU, "at its temperature", "tau", ".2f", error="tau_stderr"),
        Column("decoding", "tokens/s", "tokens_per_second", ",.0f", note=_doubt),
        Column(
            "decoding",
            f"tokens/s on {result.gpu}, predicted" if result.gpu else "tokens/s predicted",
            "predicted_tokens_per_second",
            ",.0f",
        ),
    )


def _simulated(row: DrafterMeans) -> Cell:
    extremes = f" ({row.least_tau_simulated:.2f}\u2013{row.most_tau_simulated:.2f})" if row.num_seeds > 1 else ""
    return Cell(f"{row.tau_simulated:.3f}{extremes}", row.tau_simulated)


DRAFTERS = (
    words("row", "row", note=lambda row: compact(row.changes)),
    count("seeds", "num_seeds"),
    count("steps", "num_steps"),
    Column("step", "ms", "step_ms", ".0f"),
    Column(f"{TAU} simulated", "greedy", _simulated),
    ratio("over plain", "over_plain"),
    Column(f"{TAU} served", "greedy", "tau_served", ".3f"),
    Column(f"{TAU} served", "T = 1", "tau_served_t1", ".3f"),
    Column(f"{TAU} served", "T = 1, shared noise", "tau_served_t1_shared_noise", ".3f"),
    Column(f"{TAU} of code prompts", "", "tau_code", ".3f"),
    Column("decoding", "tokens/s", "tokens_per_second", ",.0f"),
)

# Speed.
ACCEPTANCE = (
    words("prompts", "name"),
    count("count", "num_prompts"),
    count("rounds", "num_rounds"),
    count("tokens", "num_committed"),
    Column(TAU, "pooled", "acceptance_length", ".2f"),
    Column(TAU, "mean of responses", "mean_of_responses", ".2f"),
    Column("target's rows", "a token", "rows_per_token", ".2f"),
    Column("proposals", "a token", "drafted_per_token", ".2f"),
)


def _until_ready(entry: ContestantTiming) -> Cell:
    seconds = entry.prepare_seconds, entry.warmup_seconds
    return Cell(f"{seconds[0]:.1f} + {seconds[1]:.1f}", sum(seconds))


def _same_tokens(entry: ContestantTiming) -> Cell | None:
    identity = entry.identity
    if identity is None:
        return None
    text = f"{identity.num_identical} of {identity.num_prompts} as \u201c{identity.reference}\u201d"
    if identity.is_broken:
        return Cell(text, warning=f"promised, but {identity.first_difference}")
    return Cell(text, note=f"{identity.first_difference} (rounding; not promised)" if identity.first_difference else "")


TIMING = (
    words("contestant", "name", note="description"),
    Column("decode", "tokens/s", "decode_tokens_per_second", ",.0f"),
    Column("whole call", "tokens/s", "tokens_per_second", ",.0f"),
    Column("first token", "ms", "first_token_seconds", ",.1f", 1e3),
    Column("prompt", "tokens/s", "prompt_tokens_per_second", ",.0f"),
    Column("token, p50", "ms", "token_ms.p50.median", ".3g"),
    Column("p95", "ms", "token_ms.p95.median", ".3g"),
    Column("p99", "ms", "token_ms.p99.median", ".3g"),
    Column("wait, p99", "ms", "wait_ms.p99.median", ".3g"),
    Column(TAU, "", "acceptance_length", ".2f"),
    Column("energy", "J a token", "joules_per_token.median", ".3g"),
    Column("cost", "USD a million tokens", "usd_per_million_tokens", ".3g"),
    Column("prepare + warm-up", "s", _until_ready),
    words("same tokens?", _same_tokens),
)
SERVING = (
    words("way", "name"),
    words("backend", "backend"),
    Column("temperature", "", "temperature", "g"),
    Column(TAU, "tokens a round", "acceptance.acceptance_length", ".2f"),
    Column("target's rows", "a token", "acceptance.rows_per_token", ".2f"),
    Column("proposals", "a token", "acceptance.drafted_per_token", ".2f"),
    Column("decoding", "tokens/s", "decode_tokens_per_second", ",.0f"),
)


# Benchmarks of single parts.
class TaskMetric(NamedTuple):
    """The engine's and the adapter's score of a task."""

    task: LmTask
    metric: str
    engine: float
    adapter: float


class TaskTiming(NamedTuple):
    """A contestant's times on a task."""

    task: LmTask
    timing: LmTiming


class ShapeSteps(NamedTuple):
    """One contestant among all on a shape."""

    times: ShapeTimes
    steps: StepTimes


def _equal_answers(row: TaskMetric) -> Cell:
    num_equal, num_requests = row.task.agreement.num_equal, row.task.num_requests
    return Cell(f"{num_equal:,} of {num_requests:,}", num_equal / max(1, num_requests))


LM_AGREEMENT = (
    words("task", "task.task", note="task.kind"),
    Column("equal answers", "", _equal_answers),
    Column("largest difference", "nats", "task.agreement.max_difference_nats", ".1e"),
    Column("engine from float64", "nats", "task.agreement.engine_error_nats", ".1e"),
    Column("adapter from float64", "nats", "task.agreement.adapter_error_nats", ".1e"),
    words("metric", "metric"),
    Column("engine", "", "engine", ".6g"),
    Column(
        "adapter",
        "",
        "adapter",
        ".6g",
        warning=lambda row: "" if math.isclose(row.engine, row.adapter, rel_tol=1e-5) else "differ",
    ),
)


def _experts(row: TaskTiming) -> str:
    return f"{row.task.experts_implementation} experts" if row.timing.contestant == LM_ADAPTER else ""


LM_SPEED = (
    words("task", "task.task"),
    words("contestant", "timing.contestant", note=_experts),
    count("requests", "task.num_requests"),
    Column("time", "s", "timing.seconds", ",.2f"),
    Column("rate", "requests/s", "timing.requests_per_second", ".1f"),
    ratio("speed", "timing.speedup", "over the adapter"),
)


def _speedup(row: ShapeSteps) -> float | None:
    """Shown for our row, which is the first."""
    return row.times.speedup if row.steps is row.times.contestants[0] else None


DRAFTER_STEPS = (
    words("shape", "times.shape.name"),
    words("loss", "times.loss"),
    words("contestant", "steps.contestant"),
    Column("step", "ms, median", "steps.median_ms", ",.0f"),
    Column("processor time", "ms, median", "steps.median_cpu_ms", ",.0f"),
    ratio("ours over the fastest peer", _speedup),
)


def _loss_size(one: LossMemory) -> Cell:
    return Cell(f"{one.num_positions:,} positions, {one.vocab_size:,} tokens", float(one.num_positions))


DRAFTER_MEMORY = (
    words("way", "way"),
    Column("size", "", _loss_size),
    size("the logits alone", "logits_bytes"),
    size("peak", "peak_bytes"),
)
QAT_LAYERS = (
    words("way", "way"),
    size("kept for backward, weights", "kept_weight_bytes"),
    size("kept for backward, others", "kept_other_bytes"),
    size("after the last forward", "forward_bytes"),
    size("peak", "peak_bytes"),
)
QAT_STEPS = (
    words("precision", "precision"),
    ratio("step, fake-quant over plain", "ratio", form=".3f"),
    ratio("its processor time", "cpu_ratio", form=".3f"),
)
QUANT = (
    words("operation", "operation"),
    words("dtype", "dtype"),
    words("contestant", "contestant"),
    Column("time", "ms", "seconds", ",.1f", 1e3),
    Column("rate", "GB/s", "bytes_per_second", ".2f", 1e-9),
    percent("of a copy's rate", "fraction_of_copy", ".1f"),
    ratio("times ours", "times_ours"),
    Column("relative squared error", "", "relative_squared_error", ".4f"),
)
CONVERSION = (
    words("conversion", "name", note="description"),
    size("source", "source_bytes"),
    count("shards", "num_source_shards"),
    size("largest shard written", "max_shard_bytes"),
    size("peak memory", "peak_bytes"),
    Column("peak", "in shards", "peak_shards", ".2f"),
    Column("time", "s", "seconds", ".1f"),
)
KERNELS = (
    words("model", "model"),
    words("experts", "expert_format"),
    words("phase", "phase"),
    words("operation", "op"),
    words("grid", lambda kernel: " \u00d7 ".join(map(str, kernel.grid))),
    count("tile", "tile"),
    count("warps", "num_warps"),
    count("registers", "num_registers", "a thread"),
    count("spilled", "local_bytes", "bytes a thread"),
    size("shared memory", "shared_bytes"),
)
