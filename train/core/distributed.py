"""The processes of a job: one, or as many as torchrun started.

`torchrun --nproc_per_node=N -m speedstack qat CONFIG.yaml` (or the `deepspeed` launcher) sets RANK, WORLD_SIZE,
LOCAL_RANK and the rendezvous. Without them the job is one process and uses neither torch.distributed nor DeepSpeed.
GPUs use NCCL, CPUs gloo. On CPUs DeepSpeed compiles a helper once (about a minute) and needs a C++ compiler.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from speedstack.train.config.recipes import JobConfig

T = TypeVar("T")
# One process may tokenize a corpus or export hundreds of gigabytes while the others wait; DeepSpeed's default is ten
# minutes.
_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class World:
    """This process among the processes of the job, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """This process's part of `items`: equal parts in order; a remainder is left out."""
        num_items = len(items) // self.size
        return items[self.rank * num_items : (self.rank + 1) * num_items]

    def barrier(self) -> None:
        """Return when every process has called this."""
        if self.size > 1:
            dist.barrier()

    def mean(self, values: Mapping[str, float | None]) -> dict[str, float]:
        """Means over the processes that have a value; None is no value, and a key without any value is left out.

        All processes must give the same keys in the same order.
        """
        if self.size == 1 or not values:
            return {key: value for key, value in values.items() if value is not None}
        rows = [(0.0, 0) if value is None else (value, 1) for value in values.values()]
        totals = torch.tensor(rows, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return {key: total / num for key, (total, num) in zip(values, totals.tolist(), strict=True) if num}

    def on_main(self, function: Callable[[], T]) -> T:
        """Run `function` on the main process; all processes return its result or raise its ValueError or OSError."""
        if self.size == 1:
            return function()
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the main process, then on the others, which may read files that it wrote."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()


@contextmanager
def join_world(config: JobConfig) -> Iterator[World]:
    """Join the job's processes for the block.

    Raises ValueError if CUDA is missing or the number of processes does not fit the config.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = resolve_device(config.run.device)
    check_divisible(config, size)
    if device.type == "cpu":
        # DeepSpeed, which transformers imports too, picks an accelerator on import: it would take an unwanted GPU, and
        # warn where there is none.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if size == 1:
        yield World(rank=0, size=1, device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        # It warns about having no leaf modules, which `zero_optimization` asks for.
        deepspeed.utils.logger.addFilter(lambda record: "leaf module" not in record.getMessage())
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=_TIMEOUT, verbose=False)
        # Once per process, not per job: DeepSpeed keeps the groups of the first job.
        atexit.register(dist.destroy_process_group)
    world = World(rank=dist.get_rank(), size=size, device=device)
    yield world
    # Not in a `finally`: after an error on one process the others would never arrive, and torchrun ends them anyway.
    world.barrier()


def resolve_device(name: str) -> torch.device:
    """The torch device for run.device. Raises ValueError for cuda without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch sees no CUDA device: use --run.device cpu or auto")
    return torch.device(name)


def check_divisible(config: JobConfig, world_size: int) -> None:
    """Raise ValueError unless the batch divides among the processes and the optimizer can be sharded as asked."""
    loop, stage = config.loop, config.distributed.zero_stage
    per_step = max(1, loop.micro_batch_size) * world_size
    if loop.batch_size % per_step:
        raise ValueError(
            f"loop.batch_size {loop.batch_size} is not a multiple of {per_step}, "
            f"which is {world_size} processes times loop.micro_batch_size"
        )
    if world_size == 1 and stage:
        raise ValueError(f"distributed.zero_stage {stage} shards over processes, and there is one: start with torchrun")
    if world_size > 1 and stage and config.optim.name == "muon":
        raise ValueError(
            "Muon needs whole matrices, ZeRO shards them: use optim.name adamw or distributed.zero_stage 0"
        )
