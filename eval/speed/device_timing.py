"""Times of work on a device, by its own clock."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from speedstack.runtime.model.spec import ModelSpec

if TYPE_CHECKING:
    from speedstack.runtime.backends.gpu.op_launch import Launch


def device_seconds(call: Any, device: torch.device) -> float:
    """Time of `call()`'s work on the device, by its own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def phase_kinds(launches: list["Launch"], spec: ModelSpec) -> Iterator[tuple[str, list["Launch"]]]:
    """Phases of one operation and one shape together; attention of sliding layers apart from global ones."""
    kinds: dict[str, list[Launch]] = {}
    for launch in launches:
        name, layer = launch.phase.op, launch.phase.layer
        if layer is not None and name in ("qkv", "attention", "combine"):
            window = spec.layers[layer].attention.window
            name += " (global)" if window is None else f" (window {window})"
        kinds.setdefault(name, []).append(launch)
    yield from kinds.items()


def replayer(launches: Sequence["Launch"], device: torch.device) -> Callable[[], None]:
    """What runs these kernels one after another: on a GPU a CUDA graph, so that no time is the host's."""

    def run() -> None:
        for index, launch in enumerate(launches):
            launch.run(is_dependent=device.type == "cuda" and index > 0)

    if device.type != "cuda":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    replay: Callable[[], None] = graph.replay
    return replay
