"""Processes that share the requests of an evaluation: this one alone, or those that torchrun started.

The main process runs lm-eval: reads tasks, builds prompts, computes metrics and, if allowed, runs code. The others
answer requests with an engine, so, with row invariance, results do not depend on their number. Token ids and text
travel through gloo on any device.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Do = Callable[[Sequence[Any]], list[Any]]
# The others wait while the main process loads data or scores generations.
_TIMEOUT = timedelta(hours=24)


class Processes:
    """This process's rank among `size`; `rank` 0 is the main one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, do: Do, parts: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """On the main process: `do` of each part, part i on process i.

        Raises the first process' ValueError or OSError, after all have finished.
        """
        assert self.is_main and len(parts) == self.size
        if self.size == 1:
            return [do(parts[0])]
        outcome = self._exchange(do, [list(part) for part in parts])
        assert outcome is not None
        for _, error in outcome:
            if error is not None:
                raise error
        return [answers for answers, _ in outcome]

    def serve(self, do: Do) -> None:
        """On every other process: answer parts until `dismiss`."""
        assert not self.is_main
        while self._exchange(do, None, is_serving=True) is not None:
            pass

    def dismiss(self) -> None:
        """On the main process: let the others return from `serve`."""
        if self.size > 1:
            dist.scatter_object_list([None], [None] * self.size)

    def _exchange(self, do: Do, parts: list[Any] | None, is_serving: bool = False) -> list[Any] | None:
        """Receive a part from the main process, do it and return the answers; None when dismissed."""
        received: list[Any] = [None]
        dist.scatter_object_list(received, parts)
        if received[0] is None:
            return None
        answers: list[Any] = []
        error: Exception | None = None
        try:
            answers = do(received[0])
        except (ValueError, OSError) as caught:
            error = caught
        gathered: list[Any] | None = None if is_serving else [None] * self.size
        dist.gather_object((answers, error), gathered)
        return [] if is_serving else gathered


@contextmanager
def join_processes() -> Iterator[Processes]:
    """The job's processes for the block; one unless torchrun started it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Processes(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
