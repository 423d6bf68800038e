"""Speed of a step: contestants take turns, each in a process with weights of its own, in an order drawn every repeat.

Fractions of the bandwidth (MBU) are the bytes that the plan says a step reads, with the experts that its rows chose
counted, over the median time and the bandwidth that a copy reached in this run.
"""

import random
import time
from collections.abc import Sequence
from typing import Any

from speedstack.eval.gpu_suite.backends import BackendContestant, cell_length, model_config
from speedstack.eval.gpu_suite.memory import PROCESS_BYTES, USABLE, layers_that_fit, peer_bytes
from speedstack.eval.gpu_suite.peer import Peer
from speedstack.eval.gpu_suite.scale import PEER, Cell
from speedstack.eval.gpu_suite.sections import NOT_AVAILABLE, why_not
from speedstack.eval.gpu_suite.suite import OutOfTime, Suite
from speedstack.eval.gpu_suite.worker import KILLED, Worker, WorkerFailed
from speedstack.eval.spread import spread_fields
from speedstack.runtime.spec import ModelSpec, spec_from_config

# Of a section's time: the first models are those that a GPU holds whole.
MODEL_SHARES = {"qwen3-30b-a3b": 0.45, "gpt-oss-20b": 0.3, "mimo-v2-flash": 0.25}
# Of a cell's time, what contestants may take to get ready: ours compile for every context, the peer for rows as well,
# and for the first cell all make their weights. What is left is enough to take turns.
PREPARE_SHARE = 0.85
FIRST_WEIGHT, NEW_CONTEXT_WEIGHT, SAME_CONTEXT_WEIGHT = 5, 4, 2
HUNG = "not started again: it was killed with the model before"


def run_speed(suite: Suite, result: dict[str, Any], deadline: float) -> None:
    """Every model. Raises RuntimeError at the end when a contestant failed, OutOfTime when a cell was not measured."""
    problems, late, hung = list[str](), list[str](), set[str]()
    models = [model for model in MODEL_SHARES if model in suite.models]
    started, total, used = time.monotonic(), sum(MODEL_SHARES[model] for model in models), 0.0
    for model in models:
        used += MODEL_SHARES[model] / total
        found = result[model] = dict[str, Any]()
        try:
            _ModelRace(suite, model, found, started + used * (deadline - started), hung).run()
        except OutOfTime as error:
            late.append(f"{model}: {error}")
        except (WorkerFailed, ValueError) as error:
            found["error"] = str(error)
            problems.append(f"{model}: {error}")
        problems += [f"{model}, {name}: {reason}" for name, reason in found.get("failed", {}).items()]
        suite.save()
    if problems:
        raise RuntimeError(f"{len(problems)} failed, first {problems[0]}")
    if late:
        raise OutOfTime("; ".join(late))


def cell_weights(cells: Sequence[Cell]) -> list[int]:
    """How the time of a model is shared among its cells."""
    weights = []
    for number, cell in enumerate(cells):
        is_new = all(cell.context != other.context for other in cells[:number])
        weights.append(FIRST_WEIGHT if number == 0 else NEW_CONTEXT_WEIGHT if is_new else SAME_CONTEXT_WEIGHT)
    return weights


class _ModelRace:
    """One model's contestants and cells."""

    def __init__(self, suite: Suite, model: str, found: dict[str, Any], deadline: float, hung: set[str]) -> None:
        self.suite, self.model, self.found, self.deadline, self.hung = suite, model, found, deadline, hung
        self.spec: ModelSpec = spec_from_config(model_config(suite.scale, model))
        environment = suite.result("environment")
        self.bandwidth: float | None = environment.get("copy", {}).get("median")
        self.free_bytes: int | None = environment.get("machine", {}).get("free_bytes")
        self.workers: dict[str, Worker] = {}

    def run(self) -> None:
        """Fills `found`. Raises OutOfTime when a cell was not measured, ValueError when no layer fits."""
        names = {name: why_not(self.suite, name) for name in self.suite.contestants}
        names |= {name: HUNG for name in self.hung & set(names)}
        ready = [name for name, reason in names.items() if reason is None]
        self.found[NOT_AVAILABLE] = {name: reason for name, reason in names.items() if reason is not None}
        self.found["failed"] = {}
        num_layers = self._num_layers(ready)
        self.found |= {"num_layers": num_layers, "num_layers_of_model": self.spec.num_layers, "cells": []}
        try:
            for name in ready:
                self._start(name, num_layers)
            cells = self.suite.scale.cells
            weights = cell_weights(cells)
            for number, cell in enumerate(cells):
                self._measure(cell, weights[number] / sum(weights[number:]), len(cells) - number)
            self._extras()
        finally:
            for worker in self.workers.values():
                worker.close()

    def _num_layers(self, names: list[str]) -> int:
        """All that fit beside each other and beside the peer."""
        if self.free_bytes is None:
            return self.spec.num_layers
        length = max(cell_length(self.suite.scale, cell) for cell in self.suite.scale.cells)
        peer = 0
        if PEER in names:
            depths = self.suite.scale.peer_layers[self.model]
            peer = PROCESS_BYTES + sum(
                peer_bytes(model_config(self.suite.scale, self.model, depth), length) for depth in depths
            )
        num_backends = max(1, len([name for name in names if name != PEER]))
        return layers_that_fit(self.spec, length, num_backends, self.free_bytes - int(peer / USABLE))

    def _start(self, name: str, num_layers: int) -> None:
        suite = self.suite
        if name == PEER:
            self.workers[name] = suite.start(Peer, suite.scale, self.model, num_layers, suite.seed)
        else:
            self.workers[name] = suite.start(
                BackendContestant, suite.scale, self.model, name, num_layers, suite.seed
            )  # fmt: skip

    def _measure(self, cell: Cell, share: float, cells_left: int) -> None:
        """One cell, in its share of the time that is left."""
        now = time.monotonic()
        if now >= self.deadline:
            raise OutOfTime(f"{cells_left} cells were not measured")
        end = now + (self.deadline - now) * share
        record: dict[str, Any] = {"rows": cell.rows, "context": cell.context, "contestants": {}}
        self.found["cells"].append(record)
        entries = record["contestants"]
        # Compiling takes the host, not the device: all get ready at the same time.
        entries |= self._prepare(cell, now + PREPARE_SHARE * (end - now))
        samples: dict[str, list[Any]] = {name: [] for name in self.workers}
        orders = random.Random(self.suite.seed)
        for _ in range(self.suite.scale.num_repeats):
            for name in orders.sample(list(self.workers), len(self.workers)):
                answer = self._ask(name, end, "sample")
                if answer is not None:
                    samples[name].append(answer)
        for name, values in samples.items():
            if values and name in self.workers:
                self._summarize(name, entries[name], values, end)
        self.suite.say(f"  {self.model}, {cell.rows} rows, context {cell.context}: {', '.join(entries) or 'nobody'}")
        self.suite.save()

    def _summarize(self, name: str, entry: dict[str, Any], values: list[Any], end: float) -> None:
        if name == PEER:
            entry["depth_seconds"] = [spread_fields([value[key] for value in values]) for key in ("shallow", "deep")]
            values = [value["seconds"] for value in values]
        seconds = entry["step_seconds"] = spread_fields(values)
        if self.bandwidth is None:
            return
        cost = self._ask(name, end, "cost", self.bandwidth)
        if cost is not None:
            entry |= cost
            entry["mbu"] = cost["read_bytes"] / seconds["median"] / self.bandwidth

    def _extras(self) -> None:
        """What the first cell is enough for: the engine's own rate, and time by phase. Last, so that it costs no cell.

        Raises OutOfTime when one could not begin.
        """
        entries = self.found["cells"][0]["contestants"]
        for name in [name for name in self.workers if name != PEER and name in entries]:
            if time.monotonic() >= self.deadline:
                raise OutOfTime("the engine's rate and times by phase were not all measured")
            if self._ask(name, self.deadline, "prepare", self.suite.scale.cells[0]) is None:
                continue
            entries[name] |= self._ask(name, self.deadline, "generation") or {}
            if name == "graph" and self.bandwidth is not None:
                entries[name]["phases"] = self._ask(name, self.deadline, "phases", self.bandwidth) or []
            self.suite.save()

    def _prepare(self, cell: Cell, end: float) -> dict[str, dict[str, Any]]:
        for worker in self.workers.values():
            worker.begin("prepare", cell)
        answers = {}
        for name in list(self.workers):
            answer = self._finish(name, "prepare", end)
            if answer is not None:
                answers[name] = answer
        return answers

    def _ask(self, name: str, end: float, method: str, *arguments: Any) -> Any:
        """A call's answer; None from a contestant that has left the race."""
        if name not in self.workers:
            return None
        self.workers[name].begin(method, *arguments)
        return self._finish(name, method, end)

    def _finish(self, name: str, method: str, end: float) -> Any:
        """The answer to what was begun. Who fails leaves the race for this model, with its reason.

        Who hangs in a step, rather than in a compiler, is not started for another model.
        """
        try:
            return self.workers[name].finish(end)
        except WorkerFailed as error:
            self.workers.pop(name).close()
            self.found["failed"][name] = str(error)
            if method == "sample" and name != PEER and str(error).startswith(KILLED):
                self.hung.add(name)
            return None
