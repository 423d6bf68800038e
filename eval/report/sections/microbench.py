"""Sections of microbenchmarks."""

from speedstack.eval.report import plots
from speedstack.eval.report.page import FigureBlock, Headline, Section
from speedstack.eval.report.tables import (
    CONVERSION,
    DRAFTER_MEMORY,
    DRAFTER_STEPS,
    KERNELS,
    LM_AGREEMENT,
    LM_SPEED,
    QAT_LAYERS,
    QAT_STEPS,
    QUANT,
    ShapeSteps,
    TaskMetric,
    TaskTiming,
)
from speedstack.eval.results.microbench import (
    LM_ADAPTER,
    ConversionResult,
    DrafterCost,
    KernelResourcesResult,
    LmBench,
    LmTask,
    QatCost,
    QuantBench,
)
from speedstack.eval.results.table import Table, compact, plural


def lm(result: LmBench, title: str) -> Section:
    """lm-eval through the engine beside its own adapter."""
    text = (
        f"The same requests, in one process, {result.dtype} on {result.device} with "
        f"{plural(result.num_threads, 'thread')}, {result.batch_size} sequences together, taking turns. The adapter "
        "runs the model under the fastest of transformers' experts implementations."
    )
    metrics = [
        TaskMetric(task, metric, *scores) for task in result.tasks for metric, scores in task.agreement.scores.items()
    ]
    timings = [TaskTiming(task, timing) for task in result.tasks for timing in task.timings]
    tables = (
        Table.of(LM_AGREEMENT, metrics, "Answers of the engine against the adapter's."),
        Table.of(LM_SPEED, timings, "Medians of the repeats, with quartiles in brackets."),
    )
    return Section(title, (text,), (*tables, *_lm_figures(result)), _lm_headlines(result))


def _lm_figures(result: LmBench) -> list[FigureBlock]:
    timings = [timing for task in result.tasks for timing in task.timings]
    contestants = dict.fromkeys(timing.contestant for timing in timings if timing.contestant != LM_ADAPTER)
    speedups = {name: [_lm_speedup(task, name) for task in result.tasks] for name in contestants}
    if not any(speedup is not None for row in speedups.values() for speedup in row):
        return []
    svg = plots.dots(
        "Speed against the adapter",
        [f"{task.task} ({task.kind})" for task in result.tasks],
        speedups,
        f"times as fast as {LM_ADAPTER} (whiskers: quartiles)",
        reference=1.0,
    )
    return [FigureBlock(svg, "Median times over the engine's; the dashed line is the adapter.")]


def _lm_speedup(task: LmTask, contestant: str) -> tuple[float, float, float] | None:
    """Ratio of medians, and the ratios at the contestant's quartiles."""
    own = next((timing for timing in task.timings if timing.contestant == contestant), None)
    if own is None or own.seconds.q1 <= 0:
        return None
    adapter = own.speedup * own.seconds.median
    return own.speedup, adapter / own.seconds.q3, adapter / own.seconds.q1


def _lm_headlines(result: LmBench) -> tuple[Headline, ...]:
    best = [
        (task, max((t for t in task.timings if t.contestant != LM_ADAPTER), key=lambda t: t.speedup, default=None))
        for task in result.tasks
        if task.kind != "loglikelihood_rolling"
    ]
    return tuple(
        Headline(f"{timing.speedup:.2f}\u00d7", f"{task.kind}, {timing.contestant}, against {LM_ADAPTER}", task.task)
        for task, timing in best
        if timing is not None
    )


def drafter(result: DrafterCost, title: str) -> Section:
    """Time of a training step beside peers, memory of the loss."""
    steps = [ShapeSteps(times, one) for times in result.times for one in times.contestants]
    absent = (f"{one.name} did not run: {one.reason}" for one in result.unavailable)
    return Section(
        title,
        ("Optimizer steps on random features, contestants taking turns.", *absent),
        (
            Table.of(DRAFTER_STEPS, steps, "Time of an optimizer step."),
            Table.of(DRAFTER_MEMORY, result.memory, "Memory of head, loss and gradient."),
        ),
    )


def qat(result: QatCost, title: str) -> Section:
    """Memory of fake-quantized layers, time of a step."""
    return Section(
        title,
        (f"Layers of {compact(result.layer_shape)}.",),
        (
            Table.of(QAT_LAYERS, result.layers, "Memory of experts that are trained through their quantization."),
            Table.of(QAT_STEPS, result.steps, "Time of an optimizer step; ratios of medians."),
        ),
    )


def quant(result: QuantBench, title: str) -> Section:
    """MXFP4 kernels beside other libraries."""
    absent = (f"{one.name} did not run: {one.reason}" for one in result.unavailable)
    shape = " \u00d7 ".join(map(str, result.shape))
    text = f"A weight of {shape} on {result.device}, scale rule {result.scale_rule}."
    table = Table.of(QUANT, result.timings, "Medians, with quartiles in brackets.")
    return Section(title, (text, *absent), (table,))


def conversion(result: ConversionResult, title: str) -> Section:
    """Memory and time of converting checkpoints."""
    text = "Each in a process of its own; memory is the most it held above what it began with."
    return Section(title, (text,), (Table.of(CONVERSION, result.conversions),))


def kernels(result: KernelResourcesResult, title: str) -> Section:
    """Registers and shared memory of GPU kernels."""
    num_spilling = sum(one.local_bytes > 0 for one in result.kernels)
    num_kernels = plural(len(result.kernels), "kernel")
    text = f"{num_kernels} compiled for {result.target}, {num_spilling} of which spill registers."
    return Section(title, (text,), (Table.of(KERNELS, result.kernels),))
