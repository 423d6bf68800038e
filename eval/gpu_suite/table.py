"""The suite's results as text: speeds side by side, phases, and targets.

A target is met when all its cells meet it, missed as soon as one does not, and else unmeasured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from speedstack.eval.gpu_suite.scale import CONTESTANTS, PEER

MET, MISSED, UNMEASURED = "met", "missed", "unmeasured"


@dataclass(frozen=True)
class Target:
    """`values`: measured values, one a cell, None if unmeasured."""

    name: str
    at_least: float
    values: Callable[[dict[str, Any]], list[float | None]]


def races(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, its results) of every timed model, the headline first."""
    for section in ("headline", "speed"):
        yield from document.get("sections", {}).get(section, {}).get("result", {}).items()


def cells(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, cell) of every cell whose timing has begun."""
    for model, found in races(document):
        for cell in found.get("cells", []):
            yield model, cell


def _median(cell: dict[str, Any], name: str) -> float | None:
    found = cell["contestants"].get(name, {}).get("step_seconds")
    return None if found is None else float(found["median"])


def ratio(cell: dict[str, Any], slower: str, faster: str) -> float | None:
    """How many times faster one contestant is than another."""
    numerator, denominator = _median(cell, slower), _median(cell, faster)
    return None if numerator is None or denominator is None else numerator / denominator


def _quant(operation: str) -> Callable[[dict[str, Any]], list[float | None]]:
    def values(document: dict[str, Any]) -> list[float | None]:
        rows = document.get("sections", {}).get("quant", {}).get("result", {}).get("timings", [])
        return [
            row["fraction_of_copy"]
            for row in rows
            if row["operation"] == operation and row["contestant"] == "speedstack"
        ]

    return values


def _of_cells(value: Callable[[dict[str, Any]], float | None]) -> Callable[[dict[str, Any]], list[float | None]]:
    return lambda document: [value(cell) for _, cell in cells(document)]


TARGETS = (
    Target("resident MBU", 0.70, _of_cells(lambda cell: cell["contestants"].get("resident", {}).get("mbu"))),
    Target("resident / graph", 1.15, _of_cells(lambda cell: ratio(cell, "graph", "resident"))),
    Target(f"resident / {PEER}", 3.0, _of_cells(lambda cell: ratio(cell, PEER, "resident"))),
    Target("fake-quant, of copy", 0.80, _quant("fake_quantize")),
    Target("pack, of copy", 0.80, _quant("quantize")),
)


def judge(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per target: verdict, lowest and highest value, cells that met it, and all cells."""
    rows = []
    for target in TARGETS:
        values = target.values(document)
        known = [value for value in values if value is not None]
        num_met = sum(value >= target.at_least for value in known)
        verdict = MISSED if num_met < len(known) else MET if known and len(known) == len(values) else UNMEASURED
        rows.append(
            {
                "target": target.name,
                "at_least": target.at_least,
                "verdict": verdict,
                "lowest": min(known, default=None),
                "highest": max(known, default=None),
                "num_met": num_met,
                "num_measured": len(known),
                "num_cells": len(values),
            }
        )
    return rows


def text(document: dict[str, Any]) -> str:
    """Compilation, speeds, phases, then targets, which readers want most, at the end."""
    lines = [*_kernel_lines(document), *_speed_lines(document), *_phase_lines(document), *_target_lines(document)]
    return "\n".join(lines)


def _kernel_lines(document: dict[str, Any]) -> Iterator[str]:
    records = document.get("kernels", [])
    good = [record for record in records if record["error"] is None]
    if good:
        num_kernels, last = sum(record["num_kernels"] for record in good), max(record["ended"] for record in good)
        slowest = max(record["seconds"] for record in good)
        yield f"{num_kernels} kernels compiled ahead in {last:.0f} s, the slowest plan's in {slowest:.0f} s"
    for record in records:
        if record["error"] is not None:
            job = ", ".join(str(record[key]) for key in ("backend", "model", "length", "flavour"))
            yield f"not compiled ahead: {job}: {record['error']}"


def _speed_lines(document: dict[str, Any]) -> Iterator[str]:
    rows = list(cells(document))
    if not rows:
        return
    yield f"{'model':16}{'rows':>5}{'context':>9}" + "".join(f"{name + ' ms':>16}{'MBU':>6}" for name in CONTESTANTS)
    is_extrapolated = False
    for model, cell in rows:
        line = f"{model:16}{cell['rows']:>5}{cell['context']:>9}"
        for name in CONTESTANTS:
            entry, median = cell["contestants"].get(name, {}), _median(cell, name)
            mark = "*" if entry.get("is_extrapolated") else ""
            is_extrapolated |= bool(mark)
            line += f"{'-' if median is None else f'{1e3 * median:.3f}' + mark:>16}"
            line += f"{'-' if entry.get('mbu') is None else format(entry['mbu'], '.2f'):>6}"
        yield line
    if is_extrapolated:
        yield "* extrapolated from two depths of the model"
    said = set[str]()
    for model, found in races(document):
        lines = []
        if found.get("num_layers", 0) < found.get("num_layers_of_model", 0):
            lines.append(
                f"{model}: the first {found['num_layers']} of {found['num_layers_of_model']} layers, which fit"
            )
        reasons = found.get("not available", {}) | found.get("failed", {})
        lines += [f"{model}, {name}: {reason}" for name, reason in reasons.items()]
        yield from (line for line in lines if line not in said)
        said.update(lines)


def _phase_lines(document: dict[str, Any]) -> Iterator[str]:
    for model, cell in cells(document):
        phases = cell["contestants"].get("graph", {}).get("phases", [])
        if phases:
            yield f"{model}, {cell['rows']} rows, context {cell['context']}: us a phase of the graph backend"
            yield f"  {'phase':28}{'phases':>7}{'measured':>10}{'predicted':>10}{'roofline':>10}"
        for phase in phases:
            keys = ("seconds", "predicted_seconds", "roofline_seconds")
            each = [1e6 * phase[key] / phase["num_phases"] for key in keys]
            yield f"  {phase['phase']:28}{phase['num_phases']:>7}" + "".join(f"{value:>10.2f}" for value in each)


def _target_lines(document: dict[str, Any]) -> Iterator[str]:
    if document.get("scale") == "tiny":
        yield "a trial of the suite: kernels were interpreted, and no figure here is a timing of them"
    copy = document.get("sections", {}).get("environment", {}).get("result", {}).get("copy")
    if copy is not None:
        yield f"copy: {copy['median'] / 1e12:.3f} TB/s median, {copy['best'] / 1e12:.3f} best, read and written"
    yield f"{'target':26}{'at least':>9}  {'verdict':12}{'lowest':>8}{'highest':>9}  cells met"
    for row in judge(document):
        low, high = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("lowest", "highest"))
        yield (
            f"{row['target']:26}{row['at_least']:>9.2f}  {row['verdict']:12}{low:>8}{high:>9}"
            f"  {row['num_met']} of {row['num_cells']}"
        )
