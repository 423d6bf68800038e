"""The CPU backend: a step as a program of fused C++ operations, run by one call.

The program is an array of operation records built once from the spec; a thread pool works through it
(kernels/decode_cpu.cpp, which also says why rows are invariant). Hundreds of PyTorch calls, microseconds each, would
dominate the step of a model whose weights a CPU reads in a tenth of a millisecond. The reference backend is the oracle.

Left out, refused by name: activations other than float32, and sizes that are not multiples of 16 (32 for packed
experts' contraction axes). MXFP4, bfloat16 and FP8 weights stay so, except FP8 matrices with NaN elements, which become
bfloat16.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
from speedstack.runtime.backends.base import DraftRequest, Rounds, Rows
from speedstack.runtime.backends.cpu.builder import Assembler, Buffers
from speedstack.runtime.backends.cpu.drafter import CompiledDrafter, why_not_compiled
from speedstack.runtime.backends.cpu.packed_layout import FP8, INT8, LANES, holds_bfloat16, panels, unpacked
from speedstack.runtime.backends.cpu.program import Program, Runner, records_of
from speedstack.runtime.backends.cpu.speed import SMALL_STEP_ROWS, ThreadChoice, median_seconds, round_cost
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.kv_ring import MAX_ROWS
from speedstack.runtime.model.spec import MoeSpec
from speedstack.runtime.model.weights import ModelWeights

logger = logging.getLogger("speedstack.runtime")

EMBEDDING_PART = "embedding and LM head"


def check_supported(weights: ModelWeights) -> None:
    """Raises ValueError, naming the size, for a model that the kernels do not support."""
    spec = weights.spec
    multiples = [("hidden_size", spec.hidden_size, 32)]
    for layer in spec.layers:
        a = layer.attention
        multiples += [("query/key head size", a.qk_head_dim, LANES), ("value head size", a.v_head_dim, LANES)]
        size = 32 if isinstance(layer.mlp, MoeSpec) else LANES
        multiples.append(("intermediate size", layer.mlp.intermediate_size, size))
    for name, value, multiple in multiples:
        if value % multiple:
            raise ValueError(f"backend 'cpu' needs a {name} that is a multiple of {multiple}, not {value}")
    if weights.dtype != torch.float32 or weights.embedding_VD.device.type != "cpu":
        raise ValueError("backend 'cpu' computes in float32 on the CPU; use backend='reference' for other dtypes")


@dataclass(frozen=True)
class HeldAs:
    """Storage options that trade precision for bytes. Raises ValueError for other values.

    `dense_dtype`: attention, dense MLPs and LM head; None as stored, `int8` in blocks of 32 with a bfloat16 scale.
    `kv_dtype`: key/value buffers; None is float32.
    """

    dense_dtype: str | None = None
    kv_dtype_name: str | None = None

    def __post_init__(self) -> None:
        if self.dense_dtype not in (None, "int8"):
            raise ValueError(f"dense_dtype {self.dense_dtype!r} is not supported; use 'int8', or None: as stored")
        if self.kv_dtype_name not in (None, "float32", "bfloat16"):
            raise ValueError(f"kv_dtype {self.kv_dtype_name!r} is not supported; use 'float32' or 'bfloat16'")

    @property
    def has_int8(self) -> bool:
        return self.dense_dtype == "int8"

    @property
    def kv_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kv_dtype_name == "bfloat16" else torch.float32


AS_STORED = HeldAs()


class CpuBackend:
    """The compiled program for one model and drafter."""

    name = "cpu"
    rows_a_step: int | None = None
    rounds: Rounds | None = None
    has_measured_cost = True

    def __init__(
        self,
        weights: ModelWeights,
        drafter: DFlashDraftModel | None,
        num_slots: int,
        max_length: int,
        held: HeldAs = AS_STORED,
    ) -> None:
        check_supported(weights)
        started = time.perf_counter()
        self.spec, self.num_slots, self.max_length = weights.spec, num_slots, max_length
        self._runner = Runner()
        self._buffers = Buffers.of(weights.spec.hidden_size, weights.spec.layers, weights.spec.vocab_size)
        self._embedding_VD = weights.embedding_VD.contiguous()
        if self._embedding_VD.dtype == torch.float32 and holds_bfloat16(self._embedding_VD):
            self._embedding_VD = self._embedding_VD.to(torch.bfloat16)
        self._target, self._caches, self._layer_ends = Program(), list[torch.Tensor](), list[int]()
        self._held = held
        self._lm_head = panels(weights.lm_head_VD, to_int8=held.has_int8)
        self._assemble(weights)
        self.drafter: CompiledDrafter | ModuleDrafter | None = None
        self._threads = ThreadChoice(torch.get_num_threads())
        self._records = records_of(self._target)
        self._measure_steps()
        self.set_drafter(drafter)
        self.prepare_seconds = time.perf_counter() - started

    def _assemble(self, weights: ModelWeights) -> None:
        spec, held, sizes = self.spec, self._held, (self.num_slots, self.max_length)
        assembler = Assembler(self._target, self._buffers, *sizes, held.has_int8, held.kv_dtype)
        assembler.add_embedding(self._embedding_VD)
        for layer, layer_spec in zip(weights.layers, spec.layers, strict=True):
            assembler.add_layer(layer, layer_spec, spec.rms_norm_eps)
            self._layer_ends.append(len(self._target.ops) - 1)
        # A head in its own format is reported apart from the embedding, which is a table.
        self._target.part = "LM head" if self._lm_head.format in (FP8, INT8) else EMBEDDING_PART
        assembler.add_head(weights.norm_D, self._lm_head, spec.rms_norm_eps)
        assembler.add_best(spec.vocab_size)
        self._caches = assembler.caches

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        self.drafter, after = None, []
        taps: dict[int, torch.Tensor] = {}
        if drafter is not None:
            D, config = self.spec.hidden_size, drafter.config
            self._features_RC = torch.zeros(MAX_ROWS, config.num_taps * D)
            for tap, layer in enumerate(config.target_layer_ids):
                taps[self._layer_ends[layer]] = self._features_RC[:, tap * D : (tap + 1) * D]
            reason = why_not_compiled(drafter)
            if reason is None:
                sizes = (self.num_slots, self.max_length)
                self.drafter = CompiledDrafter(
                    drafter, self._embedding_VD, self._lm_head, self._features_RC, *sizes, self._held.kv_dtype
                )
                after = [self.drafter.context]
            else:
                logger.warning("backend cpu: compiled kernels for the target, PyTorch for the drafter: %s", reason)
                lm_head_VD = unpacked(self._lm_head, self.spec.vocab_size)
                embedding_VD = self._embedding_VD.float()
                self.drafter = ModuleDrafter(drafter, embedding_VD, lm_head_VD, self.num_slots, self.max_length)
        self._target.tap(taps)
        self._records = records_of(self._target, *after)
        self.round_cost = round_cost(self._step_seconds, (), 0)
        if drafter is not None:
            self._measure_drafts(drafter.config.num_proposals)

    def _measure_steps(self) -> None:
        """Measures the best number of threads and the cost of rows, at positions not written yet."""
        for _ in self._threads.trials():
            self._try_step(1)
        self._step_seconds = median_seconds(lambda: self._try_step(1), lambda: self._try_step(SMALL_STEP_ROWS))
        self._threads.row_cost = round_cost(self._step_seconds, (), 0).row

    def _measure_drafts(self, num_drafts: int) -> None:
        request = DraftRequest(0, 0, self._trial_position(num_drafts + 1))
        shortest, longest = (lambda count=count: self.draft([request], count) for count in (1, num_drafts))
        self.round_cost = round_cost(self._step_seconds, median_seconds(shortest, longest), num_drafts)

    def _try_step(self, num_rows: int) -> None:
        num_rows, first = min(num_rows, self.max_length), self._trial_position(num_rows)
        tokens = [self.spec.vocab_size * row // num_rows for row in range(num_rows)]
        rows = Rows(tokens, [0] * num_rows, list(range(first, first + num_rows)))
        self.step(rows, range(num_rows))

    def _trial_position(self, num_rows: int) -> int:
        return max(0, min(self.max_length - num_rows, 128))

    def weight_bytes(self) -> dict[str, int]:
        parts = dict(self._target.weight_bytes)
        parts[EMBEDDING_PART] = parts.get(EMBEDDING_PART, 0) + self._embedding_VD.nbytes
        return parts | ({"drafter": self.drafter.weight_bytes()} if self.drafter is not None else {})

    def cache_bytes(self) -> int:
        drafter = self.drafter.cache_bytes() if self.drafter is not None else 0
        return sum(cache.nbytes for cache in self._caches) + drafter

    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        num_rows = len(rows.tokens)
        assert all(a < b for a, b in pairwise(logit_rows)), "logit rows have to ascend"
        if num_rows <= MAX_ROWS:
            return self._step_chunk(rows, logit_rows)
        parts = []
        for start in range(0, num_rows, MAX_ROWS):
            cut = slice(start, start + MAX_ROWS)
            chunk = Rows(rows.tokens[cut], rows.slots[cut], rows.positions[cut])
            here = [row - start for row in logit_rows if start <= row < start + MAX_ROWS]
            logits_WV, best = self._step_chunk(chunk, here)
            parts.append((logits_WV.clone(), best))
        return torch.cat([logits for logits, _ in parts]), [token for _, best in parts for token in best]

    def _step_chunk(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        num_rows, num_logits = len(rows.tokens), len(logit_rows)
        key_ends = [position + 1 for position in rows.positions]
        num_threads = self._num_threads(num_rows)
        started = time.perf_counter()
        self._runner.run(self._records, rows.tokens, rows.slots, rows.positions, key_ends, logit_rows, num_threads)
        self._threads.record(num_rows, time.perf_counter() - started)
        if isinstance(self.drafter, ModuleDrafter):
            self.drafter.write(self._features_RC[: len(rows.tokens)], rows.slots, rows.positions)
        return self._buffers.logits[:num_logits, : self.spec.vocab_size], self._buffers.best[:num_logits].tolist()

    def _num_threads(self, num_rows: int) -> int:
        if torch.get_num_threads() != self._threads.most:
            self._threads = ThreadChoice(torch.get_num_threads())
        return self._threads.next(num_rows)

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        if isinstance(self.drafter, CompiledDrafter):
            num_threads = self._num_threads(num_drafts * len(requests))
            return self.drafter.draft(self._runner, requests, num_drafts, num_threads)
        assert self.drafter is not None
        return self.drafter.draft(requests, num_drafts)
