"""Calls `kernels/sampling.cpp`: the tokens of `sampling.sample`, for all rows of a round at once.

PyTorch's logarithms differ in the last bits between builds, so the kernel bounds them. A token that is the largest
within the bounds is certain; if two are too close, a few rows in a million, the caller asks the definition.

Legend: V vocabulary, W rows with logits.
"""

import ctypes
import logging
import struct
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from speedstack.quant.kernels.build import load_library
from speedstack.runtime.backends.base import Draw
from speedstack.runtime.backends.cpu.kernels.build import choose_set, flags_of

logger = logging.getLogger("speedstack.runtime")

SOURCE = Path(__file__).parent / "kernels" / "sampling.cpp"
HEADER = SOURCE.with_name("philox.h")

# Stand for a token, as in the C++ source.
NOT_WANTED, AMBIGUOUS = -1, -2
# A sequence's record: seed, key, top_k, temperature, top_p_share, first_row, num_rows, padding.
_RECORD = struct.Struct("=QQqdIii4x")
_UNSIGNED = (1 << 64) - 1


class SampledRows(NamedTuple):
    """The rows of one sequence whose next tokens are sampled: from `first`, its newest token, through its drafts."""

    draw: Draw
    first: int
    num_rows: int


class CompiledSampler:
    """`num_ambiguous` counts rows left to the definition."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._sample = library.speedstack_sample
        self._sample.argtypes = (pointer, count, count, pointer, count, pointer, count)
        self._sample.restype = None
        self.num_ambiguous = 0

    def choose(
        self,
        logits_WV: torch.Tensor,
        sequences: Sequence[SampledRows],
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> list[int]:
        """The sampled token after each row that needs one: a sequence's first row, and rows after right drafts.

        Args:
            logits_WV: float32 on the CPU.
            sequences: rows to sample; others get NOT_WANTED.
            tokens, positions: of all rows, as in `Rows`.

        Returns:
            Per row a token, NOT_WANTED, or AMBIGUOUS: call `sampling.sample`; drafts after it were not checked.
        """
        assert logits_WV.dtype == torch.float32 and logits_WV.is_cpu and logits_WV.stride(1) == 1
        vocab_size = logits_WV.shape[1]
        records = b"".join(
            _RECORD.pack(
                draw.seed & _UNSIGNED,
                draw.sequence,
                min(draw.params.top_k, vocab_size),
                draw.params.temperature,
                draw.params.top_p_share,
                first,
                num_rows,
            )
            for draw, first, num_rows in sequences
        )
        # Each row's token and position, and space for the next token
        rows = array("i", (*tokens, *positions, *tokens))
        address, _ = rows.buffer_info()
        self._sample(
            logits_WV.data_ptr(), logits_WV.stride(0), vocab_size, records, len(sequences), address, len(tokens)
        )
        chosen = rows[2 * len(tokens) :].tolist()
        self.num_ambiguous += chosen.count(AMBIGUOUS)
        return chosen


def load_sampler() -> CompiledSampler | None:
    """The compiled sampler, built on first use; None, with the reason logged, if it cannot be built."""
    try:
        return load_for(choose_set())
    except ValueError as reason:
        logger.warning("sampling by PyTorch, because %s", reason)
        return None


@cache
def load_for(instruction_set: str) -> CompiledSampler:
    """The sampler for one of INSTRUCTION_SETS. Raises ValueError as `load_library`."""
    return CompiledSampler(load_library(SOURCE, "fast sampling on a CPU", [HEADER], flags_of(instruction_set)))
