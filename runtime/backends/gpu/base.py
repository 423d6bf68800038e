"""The common part of the backends that execute plans on a GPU: plan, memory, rows in, logits and features out.

A step holds up to `MAX_ROWS` rows (`plan/step.py`); larger engine steps are split. Without a GPU the kernels run in
Triton's interpreter in float32, slowly, for tests; set TRITON_INTERPRET=1 before the process starts.

Legend: R rows, C features, W wanted rows, V vocabulary.
"""

import contextlib
import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.base import DraftRequest, Rounds, Rows
from speedstack.runtime.backends.drafter_weights import DrafterWeights, read_drafter
from speedstack.runtime.backends.gpu.buffers import Memory, step_inbox
from speedstack.runtime.backends.torch_drafter import ModuleDrafter
from speedstack.runtime.model.drafter_spec import DrafterSpec, why_not_planned
from speedstack.runtime.model.weight_formats import WeightFormat, WeightFormats
from speedstack.runtime.model.weights import DenseWeights, Linear, ModelWeights, MoeWeights
from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.step import build_plan
from speedstack.runtime.rounds.draft_length import COMPILED

logger = logging.getLogger("speedstack.runtime")

# Older GPUs lack the instruction that Triton uses for E4M3 to float16.
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; it need not be present, and weights may be on any device, meta included.

    capability: major and minor. num_sms: number of multiprocessors.
    """

    capability: tuple[int, int]
    num_sms: int


class TooManyKinds(ValueError):
    """The plan has more kinds of phases than one kernel supports."""


def check_supported(name: str, weights: ModelWeights, target: Target | None) -> bool:
    """Whether kernels are interpreted. Raises ValueError, with the reason, if they can neither be run nor compiled."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"backend {name!r} needs Triton, which is not installed: pip install triton")
    import triton

    from speedstack.runtime.backends.gpu.kernels.dispatch import run_item

    is_interpreted = not isinstance(run_item, triton.JITFunction)
    device, dtype = weights.embedding_VD.device, weights.embedding_VD.dtype
    if is_interpreted and target is not None:
        raise ValueError("kernels for another GPU are compiled, not interpreted: unset TRITON_INTERPRET")
    if device.type != "cuda" and not is_interpreted and target is None:
        raise ValueError(
            f"backend {name!r} runs on a GPU; on a CPU it needs Triton's interpreter, for tests: set TRITON_INTERPRET=1"
        )
    if is_interpreted and dtype != torch.float32:
        raise ValueError(f"backend {name!r} takes float32 only under Triton's interpreter: it computes others wrongly")
    if not is_interpreted and dtype != torch.bfloat16:
        raise ValueError(f"backend {name!r} takes bfloat16 only on a GPU; use backend='reference' for float32")
    if not is_interpreted:
        check_fp8(name, weights, torch.cuda.get_device_capability(device) if target is None else target.capability)
    return is_interpreted


def check_fp8(name: str, weights: ModelWeights, capability: tuple[int, int]) -> None:
    """Raises ValueError for FP8 weights if the GPU has no instruction that decodes them."""
    if capability < FP8_CAPABILITY and weights.num_fp8():
        raise ValueError(
            f"backend {name!r} reads FP8 on GPUs of compute capability {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}; this "
            f"one has {capability[0]}.{capability[1]}: use backend='reference'"
        )


class PlanBackend:
    """Executes plans. Subclasses build kernels in `_prepare` and begin a step in `_start`.

    num_rows: per step; split_size: positions per attention item; both powers of two. num_programs: that the plan is cut
    for. target: compile for this GPU without running; None uses the weights' GPU.
    """

    name: str
    rounds: Rounds | None = None
    plans_drafters = False  # whether its plans include drafters (`drafter_spec.why_not_planned`)
    has_measured_cost = False
    round_cost = COMPILED
    plan: Plan
    memory: Memory

    def __init__(
        self,
        weights: ModelWeights,
        drafter: DFlashDraftModel | None,
        num_slots: int,
        max_length: int,
        num_rows: int,
        split_size: int,
        num_programs: int,
        max_steps: int = 1,
        target: Target | None = None,
    ) -> None:
        assert num_rows & (num_rows - 1) == 0, "tiles are powers of two"
        started = time.perf_counter()
        self.weights, self.num_slots, self.max_length, self.target = weights, num_slots, max_length, target
        self.device = weights.embedding_VD.device
        self._num_rows, self._split_size, self._num_programs = num_rows, split_size, num_programs
        self.rows_a_step: int | None = num_rows
        self._max_steps, self._has_prompt_lookup = max_steps, False
        self._planned_drafter: DrafterWeights | None = None
        self.drafter: ModuleDrafter | None = None
        self.set_drafter(drafter)
        self.prepare_seconds = time.perf_counter() - started

    def _prepare(self) -> None:
        """Builds the kernels and arguments for `plan` and `memory`."""
        raise NotImplementedError

    def compile(self) -> list[Any]:
        """Compiles a step's kernels for `target` into Triton's disk cache and returns them."""
        raise NotImplementedError

    def _start(self) -> None:
        """Starts computing the rows in `memory.rows`."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Waits for what `_start` began; raises RuntimeError if it failed."""

    def set_drafter(self, drafter: DFlashDraftModel | None) -> None:
        w, contexts = self.weights, None
        taps = () if drafter is None else tuple(drafter.config.target_layer_ids)
        with self._all_or_nothing():
            self._planned_drafter = None
            if drafter is not None and self.plans_drafters and why_not_planned(drafter.config) is None:
                self._planned_drafter = read_drafter(drafter, w.embedding_VD.dtype, w.embedding_VD.dtype)
                try:
                    self._make_plan(taps, has_prompt_lookup=False)
                except TooManyKinds as reason:
                    logger.warning("backend %s: the host drafts, not the kernel, because %s", self.name, reason)
                    self._planned_drafter = None
            if self._planned_drafter is None:
                self._make_plan(taps, has_prompt_lookup=False)
            else:
                contexts = self.memory.contexts_of_slots(self.max_length)
            self.drafter = None
            if drafter is not None:
                self.drafter = ModuleDrafter(
                    drafter, w.embedding_VD, w.lm_head_VD, self.num_slots, self.max_length, contexts
                )

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Restores the backend if the block fails, so that plan and tables always match."""
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    def _make_plan(self, taps: tuple[int, ...], has_prompt_lookup: bool) -> None:
        w, self._has_prompt_lookup = self.weights, has_prompt_lookup
        spec = self.planned_drafter
        self.plan = build_plan(
            w.spec, formats_of(w), self._num_programs, self._num_rows, self.max_length, self._split_size, taps=taps,
            has_prompt_lookup=has_prompt_lookup, drafter=spec,
        )  # fmt: skip
        caches = self.memory.caches if hasattr(self, "memory") else None
        self.memory = Memory(self.plan, w, self.num_slots, self.max_length, self._max_steps, caches, spec)
        self._prepare()

    @property
    def planned_drafter(self) -> DrafterSpec | None:
        """The drafter that the plan includes, if any."""
        return None if self._planned_drafter is None else self._planned_drafter.spec

    def weight_bytes(self) -> dict[str, int]:
        drafter = {"drafter": self.drafter.weight_bytes()} if self.drafter is not None else {}
        if self._planned_drafter is not None:
            drafter["drafter"] += self._planned_drafter.joined_bytes()
        return self.weights.nbytes_by_part() | drafter

    def cache_bytes(self) -> int:
        drafter = self.drafter.cache_bytes() if self.drafter is not None else 0
        return sum(cache.nbytes for cache in self.memory.caches) + drafter

    def repeat(self, num_steps: int) -> None:
        """Repeats the newest step with minimal host work, for timing."""
        with self._on_device():
            for _ in range(num_steps):
                self._start()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        # Kernels launch on the current device, which may not be the weights'.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    @torch.no_grad()
    def step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        assert self.target is None, "a backend for another GPU computes nothing"
        assert all(a < b for a, b in pairwise(logit_rows)), "logit rows have to ascend"
        with self._on_device():
            return self._step(rows, logit_rows)

    def _step(self, rows: Rows, logit_rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        parts, best = [], list[int]()
        for start in range(0, len(rows.tokens), self.plan.rows):
            cut = slice(start, start + self.plan.rows)
            draws = None if rows.draws is None else rows.draws[cut]
            self._step_chunk(Rows(rows.tokens[cut], rows.slots[cut], rows.positions[cut], draws=draws))
            here = [row - start for row in logit_rows if start <= row < start + self.plan.rows]
            if here:
                parts.append(self.memory.logits_VR[:, here].T.contiguous())
                best += self.memory.chosen[0, here].tolist()
        return torch.cat(parts) if parts else self.memory.logits_VR.new_empty(0, self.weights.spec.vocab_size), best

    def _step_chunk(self, rows: Rows) -> None:
        self.memory.inbox.copy_(step_inbox(rows, self.plan.rows))
        self._start()
        self._finish()
        if self.drafter is not None and self._planned_drafter is None:
            self.drafter.write(self.memory.features_RC(len(rows.tokens)), rows.slots, rows.positions)

    def draft(self, requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        assert self.drafter is not None
        return self.drafter.draft(requests, num_drafts)


def formats_of(weights: ModelWeights) -> WeightFormats:
    """The weight formats for the plan's cost. A part counts as FP8 if all its matrices are."""
    plain: WeightFormat = "float32" if weights.embedding_VD.dtype == torch.float32 else "bf16"
    layers = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, MoeWeights)]
    is_packed = any(isinstance(mlp.gate_up_EID, MXFP4Tensor) for mlp in layers)
    dense = [layer.mlp for layer in weights.layers if isinstance(layer.mlp, DenseWeights)]

    def of(matrices: Sequence[Linear]) -> WeightFormat:
        return "fp8" if matrices and all(isinstance(matrix, FP8Tensor) for matrix in matrices) else plain

    return WeightFormats(
        attention=of([layer.attention.qkv_OD for layer in weights.layers]),
        attention_output=of([layer.attention.output_DO for layer in weights.layers]),
        dense=of([matrix for mlp in dense for matrix in (mlp.gate_up_FD, mlp.down_DF)]),
        router="float32",
        experts="mxfp4" if is_packed else plain,
        embedding=plain,
        lm_head=of([weights.lm_head_VD]),
    )
