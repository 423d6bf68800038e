"""Training windows of a drafter: text the target wrote, corpus windows among it, and the anchors of their blocks.

A window and its anchors are a function of (seed, example number), so nothing is saved to resume. Windows differ in how
much there is to predict; `StepWeights` makes a step's loss the mean over all of it, however the step is batched.

Shape suffixes: B windows, T positions, A anchors a window, N written windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speedstack.dflash.block import document_ids, sample_anchors
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.batches import PackedWindows, generator
from speedstack.train.data.packing import WrittenText
from speedstack.train.drafter.text import ANCHORS, ORDER


@dataclass(frozen=True)
class Windows:
    """Training windows: tokens, documents, allowed labels, and the anchors of the blocks."""

    ids_BT: Tensor
    documents_BT: Tensor
    predictable_BT: Tensor
    anchors_BA: Tensor
    real_BA: Tensor

    def to(self, device: torch.device) -> Windows:
        return Windows(*(tensor.to(device) for tensor in vars(self).values()))


class Batch(NamedTuple):
    """All or some windows of a step, and the step's number."""

    windows: Windows
    step: int


class WindowStream:
    """The endless stream of training windows of a config.

    `corpus` may be None only if `written_fraction` is 1, `written` only if it is 0. `separator_id` ends a corpus
    document; None without one.
    """

    def __init__(
        self,
        config: DrafterConfig,
        corpus: PackedWindows | None,
        written: WrittenText | None,
        separator_id: int | None,
    ) -> None:
        self.seed = config.run.seed
        self.num_anchors, self.written_fraction = config.drafter.num_anchors, config.drafter.written_fraction
        self.corpus, self.written, self.separator_id = corpus, written, separator_id

    def batch(self, indices: Sequence[int]) -> Windows:
        """Windows of the examples with these numbers; written ones are spread evenly among corpus windows."""
        windows = []
        for index in indices:
            num_written = int((index + 1) * self.written_fraction)
            if num_written > int(index * self.written_fraction):
                windows.append(self.written_window(num_written - 1, index))
            else:
                windows.append(self._corpus_window(index - num_written, index))
        columns = zip(*(vars(window).values() for window in windows), strict=True)
        return Windows(*(torch.cat(column) for column in columns))

    def written_window(self, place: int, index: int) -> Windows:
        """Window `place` of the endless written text; its labels are the target's own tokens only."""
        assert self.written is not None
        epoch, within = divmod(place, len(self.written))
        rng = generator(self.seed, ORDER, epoch)
        row = int(torch.randperm(len(self.written), generator=rng)[within])
        ids_BT, documents_BT, predictable_BT = (part[row : row + 1] for part in vars(self.written).values())
        return self._with_anchors(ids_BT, documents_BT, predictable_BT, index)

    def _corpus_window(self, place: int, index: int) -> Windows:
        assert self.corpus is not None and self.separator_id is not None
        ids_BT = self.corpus.examples(self.seed, [place])
        everything = torch.ones_like(ids_BT, dtype=torch.bool)
        return self._with_anchors(ids_BT, document_ids(ids_BT, self.separator_id), everything, index)

    def _with_anchors(self, ids_BT: Tensor, documents_BT: Tensor, predictable_BT: Tensor, index: int) -> Windows:
        rng = generator(self.seed, ANCHORS, index)
        anchors_BA, real_BA = sample_anchors(documents_BT, predictable_BT, self.num_anchors, rng)
        return Windows(ids_BT, documents_BT, predictable_BT, anchors_BA, real_BA)

    def most_frequent(self, size: int, vocab_size: int) -> Tensor:
        """The `size` most frequent predicted tokens, ascending; ties go to lower ids."""
        if self.written is None:
            assert self.corpus is not None
            ids = torch.cat([self.corpus.window(index) for index in range(len(self.corpus))])
        else:
            ids = self.written.ids_NT[self.written.predictable_NT]
        counts_V = torch.bincount(ids, minlength=vocab_size)
        return counts_V.sort(descending=True, stable=True).indices[:size].sort().values


class StepWeights:
    """Weights of a step's batches over all processes.

    `weigh` returns the weight of some windows' predictions, a scalar on its device.
    """

    def __init__(self, stream: WindowStream, batch_size: int, weigh: Callable[[Windows], Tensor]) -> None:
        self.stream, self.batch_size, self.weigh = stream, batch_size, weigh
        self._step, self._weight = -1, torch.zeros(())

    def share(self, batch: Batch) -> Tensor | float:
        """The weight of `batch` over the mean weight of its step's batches."""
        size = len(batch.windows.ids_BT)
        if size == self.batch_size:
            return 1.0
        if self._step != batch.step:
            whole = self.stream.batch(range(batch.step * self.batch_size, (batch.step + 1) * self.batch_size))
            self._step, self._weight = batch.step, self.weigh(whole.to(batch.windows.ids_BT.device))
        least = torch.finfo(self._weight.dtype).tiny
        return self.weigh(batch.windows) / self._weight.clamp_min(least) * (self.batch_size / size)
