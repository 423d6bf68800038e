"""Speed of a step: contestants take turns, each in its own process with its own weights, in a random order per repeat.

Fractions of bandwidth (MBU) are the plan's bytes of a step, with the experts its rows chose counted, over the median
time and this run's copy bandwidth.

The headline, the first cell of the first model, is timed before all else; its contestants wait for their model's other
cells. Ours take turns when ready, and again with the peer, which compiles for minutes, so results are saved early but
compared only if timed together. The peer recompiles for every cell, and skips cells where that takes too long.
"""

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

from speedstack.eval.gpu_suite.backends import BackendContestant, model_config
from speedstack.eval.gpu_suite.kernels import phase_jobs, speed_jobs
from speedstack.eval.gpu_suite.peer import Peer
from speedstack.eval.gpu_suite.scale import MODEL_SHARES, PEER, Cell
from speedstack.eval.gpu_suite.sections import NOT_AVAILABLE, why_not
from speedstack.eval.gpu_suite.suite import OutOfTime, Suite
from speedstack.eval.results.spread import spread_fields
from speedstack.eval.speed.device_memory import PROCESS_BYTES, USABLE, layers_that_fit, peer_bytes
from speedstack.eval.speed.worker import KILLED, Worker, WorkerFailed
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.spec import ModelSpec

# Weights of a model's time; the first cell includes making weights and the peer's compilation.
FIRST_WEIGHT, CELL_WEIGHT = 10, 2
# Factor on a model's share if its first cell is already measured.
REST_SHARE = 0.5
# Seconds before a cell's end at which the peer must be ready, so that all take turns; and the factor on its last
# compilation time that is allowed.
TURN_SECONDS = 8.0
PEER_MARGIN = 1.3
NOT_MEASURED = "not measured"
HUNG = "not started again: it was killed with the model before"


def run_headline(suite: Suite, result: dict[str, Any], deadline: float) -> None:
    """The first cell of the first model. Raises RuntimeError at the end if a contestant failed."""
    model = timed_models(suite)[0]
    race = Race(suite, model, result.setdefault(model, {}), deadline)
    suite.race = race
    suite.closing.callback(race.close)
    race.start()
    race.measure(suite.scale.cells[0], deadline)
    _raise_problems(_problems(model, race.found))


def run_speed(suite: Suite, result: dict[str, Any], deadline: float) -> None:
    """Every model. Raises RuntimeError at the end if a contestant failed, OutOfTime if a cell was not measured."""
    problems, late = list[str](), list[str]()
    models = timed_models(suite)
    shares = {model: MODEL_SHARES[model] * (REST_SHARE if _begun(suite, model) else 1.0) for model in models}
    started, used = time.monotonic(), 0.0
    for model in models:
        used += shares[model] / sum(shares.values())
        found = result[model] = dict[str, Any]()
        race = _begun(suite, model)
        try:
            end = started + used * (deadline - started)
            if race is None:
                race = Race(suite, model, found, end)
                race.start()
            else:
                race.go_on(found, end)
            race.measure_rest()
        except OutOfTime as error:
            late.append(f"{model}: {error}")
        except (WorkerFailed, ValueError) as error:
            found["error"] = str(error)
            problems.append(f"{model}: {error}")
        finally:
            if race is not None:
                race.close()
        problems += _problems(model, found)
        suite.save()
    _raise_problems(problems)
    if late:
        raise OutOfTime("; ".join(late))


def timed_models(suite: Suite) -> list[str]:
    """Models in timing order: first those that fit a GPU whole."""
    return [model for model in MODEL_SHARES if model in suite.models]


def cell_weights(num_cells: int, has_first: bool) -> list[int]:
    """Time weights of a model's remaining cells; has_first: the first cell is among them."""
    return [FIRST_WEIGHT if number == 0 and has_first else CELL_WEIGHT for number in range(num_cells)]


def _begun(suite: Suite, model: str) -> "Race | None":
    """The race of a model whose first cell has been measured."""
    race = suite.race
    return race if isinstance(race, Race) and race.model == model and race.cells_done else None


def _problems(model: str, found: dict[str, Any]) -> list[str]:
    return [f"{model}, {name}: {reason}" for name, reason in found.get("failed", {}).items()]


def _raise_problems(problems: Sequence[str]) -> None:
    if problems:
        raise RuntimeError(f"{len(problems)} failed, first {problems[0]}")


class Race:
    """One model's contestants and cells. `found` is filled in place; `close` ends all of them."""

    def __init__(self, suite: Suite, model: str, found: dict[str, Any], deadline: float) -> None:
        self.suite, self.model, self.found, self.deadline = suite, model, found, deadline
        self.spec: ModelSpec = spec_from_config(model_config(suite.scale, model))
        environment = suite.result("environment")
        self.bandwidth: float | None = environment.get("copy", {}).get("median")
        self.free_bytes: int | None = environment.get("machine", {}).get("free_bytes")
        self.workers: dict[str, Worker] = {}
        self.cells_done = 0
        self.peer_seconds = 0.0  # of its last preparation
        self._first: dict[str, Any] = {}  # entries of the first cell

    def start(self) -> None:
        """Start every contestant; ours make their weights. Raises ValueError if no layer fits."""
        names = {name: why_not(self.suite, name) for name in self.suite.contestants}
        names |= {name: HUNG for name in self.suite.hung & set(names)}
        ready = [name for name, reason in names.items() if reason is None]
        self.found[NOT_AVAILABLE] = {name: reason for name, reason in names.items() if reason is not None}
        self.found["failed"] = {}
        num_layers = self._num_layers(ready)
        self.found |= {"num_layers": num_layers, "num_layers_of_model": self.spec.num_layers, "cells": []}
        for name in ready:
            kind: tuple[Any, ...] = (BackendContestant, self.suite.scale, self.model, name)
            if name == PEER:
                kind = (Peer, self.suite.scale, self.model)
            self.workers[name] = self.suite.start(*kind, num_layers, self.suite.seed)
        # The peer makes its weights while preparing, and nobody waits for it.
        ours = [name for name in ready if name != PEER]
        for name in ours:
            self.workers[name].begin("load")
        for name in ours:
            self._finish(name, "load", self.deadline)

    def go_on(self, found: dict[str, Any], deadline: float) -> None:
        """Put the results of later cells into another section's `found`."""
        kept = {name: value for name, value in self.found.items() if name not in ("cells", "failed")}
        self.found, self.deadline = found, deadline
        found |= kept | {"cells": [], "failed": {}}

    def measure_rest(self) -> None:
        """Measure all remaining cells. Raises OutOfTime if one was not measured."""
        cells = self.suite.scale.cells[self.cells_done :]
        weights = cell_weights(len(cells), has_first=self.cells_done == 0)
        for number, cell in enumerate(cells):
            now = time.monotonic()
            if now >= self.deadline:
                raise OutOfTime(f"{len(cells) - number} cells were not measured")
            share = weights[number] / sum(weights[number:])
            self.measure(cell, now + (self.deadline - now) * share)
        self._extras()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def _num_layers(self, names: list[str]) -> int:
        """The number of layers that fit with all contestants and the peer in memory."""
        if self.free_bytes is None:
            return self.spec.num_layers
        scale = self.suite.scale
        length = max(scale.cell_length(cell.context) for cell in scale.cells)
        peer = 0
        if PEER in names:
            depths = scale.peer_layers[self.model]
            peer = PROCESS_BYTES + sum(peer_bytes(model_config(scale, self.model, depth), length) for depth in depths)
        num_backends = max(1, len([name for name in names if name != PEER]))
        return layers_that_fit(self.spec, length, num_backends, self.free_bytes - int(peer / USABLE))

    def measure(self, cell: Cell, end: float) -> None:
        """Measure one cell, until `end` at most."""
        record: dict[str, Any] = {"rows": cell.rows, "context": cell.context, "contestants": {}}
        self.found["cells"].append(record)
        self.cells_done += 1
        entries = record["contestants"]
        if self.cells_done == 1:
            self._first = entries
        has_peer = PEER in self.workers
        if has_peer and time.monotonic() + PEER_MARGIN * self.peer_seconds > end - TURN_SECONDS:
            has_peer = False
            record[NOT_MEASURED] = {PEER: f"the last time it took {self.peer_seconds:.0f} s to get ready"}
        if has_peer:
            self.workers[PEER].begin("prepare", cell)
        ours = [name for name in self.workers if name != PEER]
        self._wait_for_kernels(
            job for name in ours for job in speed_jobs(self.suite.scale, self.model, name, cell.context)
        )
        for name in ours:
            self.workers[name].begin("prepare", cell)
        for name in ours:
            self._add(entries, name, self._finish(name, "prepare", end))
        self._take_turns(ours, entries, end)
        record["is_peer_compiling"] = has_peer
        self._say(cell, entries)
        if has_peer:
            self._add(entries, PEER, self._finish(PEER, "prepare", end - TURN_SECONDS))
        if PEER in entries:
            self.peer_seconds = entries[PEER]["prepare_seconds"]
            self._take_turns([*ours, PEER], entries, end)
            record["is_peer_compiling"] = False
            self._say(cell, entries)

    def _say(self, cell: Cell, entries: dict[str, Any]) -> None:
        times = [
            f"{name} {1e3 * entry['step_seconds']['median']:.3f} ms"
            for name, entry in entries.items()
            if "step_seconds" in entry
        ]
        self.suite.say(f"  {self.model}, {cell.rows} rows, context {cell.context}: {', '.join(times) or 'nobody'}")
        self.suite.save()

    def _wait_for_kernels(self, jobs: Iterable[Any]) -> None:
        if self.suite.kernels is not None:
            self.suite.kernels.wait(jobs, self.deadline)

    def _add(self, entries: dict[str, Any], name: str, answer: dict[str, Any] | None) -> None:
        if answer is not None:
            entries[name] = answer

    def _take_turns(self, names: Iterable[str], entries: dict[str, Any], end: float) -> None:
        """Sample the ready contestants in turn, and update their results."""
        racing = [name for name in names if name in self.workers and name in entries]
        samples: dict[str, list[Any]] = {name: [] for name in racing}
        orders = random.Random(self.suite.seed)
        for _ in range(self.suite.scale.num_repeats):
            for name in orders.sample(racing, len(racing)):
                answer = self._ask(name, end, "sample")
                if answer is not None:
                    samples[name].append(answer)
        for name, values in samples.items():
            if values and name in self.workers:
                self._summarize(name, entries[name], values, end)

    def _summarize(self, name: str, entry: dict[str, Any], values: list[Any], end: float) -> None:
        if name == PEER:
            entry["depth_seconds"] = [spread_fields([value[key] for value in values]) for key in ("shallow", "deep")]
            values = [value["seconds"] for value in values]
        seconds = entry["step_seconds"] = spread_fields(values)
        if self.bandwidth is None:
            return
        if "read_bytes" not in entry:
            entry |= self._ask(name, end, "cost", self.bandwidth) or {}
        if "read_bytes" in entry:
            entry["mbu"] = entry["read_bytes"] / seconds["median"] / self.bandwidth

    def _extras(self) -> None:
        """The first cell's extras: the engine's tokens/s, and time by phase. Last, so that they cost no cell.

        Raises OutOfTime if one could not begin.
        """
        scale = self.suite.scale
        for name in [name for name in self.workers if name != PEER and name in self._first]:
            if time.monotonic() >= self.deadline:
                raise OutOfTime("the engine's rate and times by phase were not all measured")
            if self._ask(name, self.deadline, "prepare", scale.cells[0]) is None:
                continue
            self._first[name] |= self._ask(name, self.deadline, "generation") or {}
            if name == "graph" and self.bandwidth is not None:
                self._wait_for_kernels(phase_jobs(scale, self.model, name))
                self._first[name]["phases"] = self._ask(name, self.deadline, "phases", self.bandwidth) or []
            self.suite.save()

    def _ask(self, name: str, end: float, method: str, *arguments: Any) -> Any:
        """A call's answer; None from a contestant that has left the race."""
        if name not in self.workers:
            return None
        self.workers[name].begin(method, *arguments)
        return self._finish(name, method, end)

    def _finish(self, name: str, method: str, end: float) -> Any:
        """The answer to a begun call. A contestant that fails leaves this model's race, with the reason.

        One that hangs in a step, not in a compiler, is not started for other models.
        """
        try:
            return self.workers[name].finish(end)
        except WorkerFailed as error:
            self.workers.pop(name).close()
            self.found["failed"][name] = str(error)
            if method == "sample" and name != PEER and str(error).startswith(KILLED):
                self.suite.hung.add(name)
            return None
