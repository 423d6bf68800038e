"""Arguments of each phase's device function: its tensors and compile-time constants.

The plan decides phases, tiles and layouts; this file finds their buffers, weights and sizes for all Triton backends.
Weights stay as loaded, except qkv rows, which are sorted by key/value head and padded to whole tiles. The plan treats
the sampling state as part of the rows.

FP8 scales come last among a phase's pointers, one per tile of FP8_ROWS rows and 128 columns. FP8_ROWS is 128, except
for sorted qkv rows: the common divisor of head sizes and group columns. That is 64 for heads of 192 and 128 (one scale
per 8,192 weights), at worst one per row, 3 % more bytes.

Legend: R rows, D hidden, N heads, G key/value heads, M heads of a group, H query/key head size, V value head size, O
qkv rows of the checkpoint, T positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from speedstack.quant.fp8 import TILE_SIZE, FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backends.drafter_weights import DrafterWeights
from speedstack.runtime.backends.gpu.bindings.drafter import DrafterBinder
from speedstack.runtime.backends.gpu.bindings.multi_step import Bound, MultiStepBinder
from speedstack.runtime.backends.gpu.bindings.step import StepBinder
from speedstack.runtime.backends.gpu.buffers import Memory
from speedstack.runtime.model.qkv_layout import grouped_fp8_qkv, grouped_qkv
from speedstack.runtime.model.spec import AttentionSpec, MoeSpec
from speedstack.runtime.model.weights import (
    AttentionWeights,
    DenseWeights,
    Layers,
    Linear,
    ModelWeights,
    MoeWeights,
    Weight,
)
from speedstack.runtime.plan.ir import Phase, Plan
from speedstack.runtime.plan.ops.drafter import is_drafting
from speedstack.runtime.plan.tiling import BLOCK_COLUMNS, num_blocks, power_of_two

# Fixed, to fix the order of every sum: elements per slice step of a contraction axis, (row, head) pairs per query tile,
# keys at a time, splits combined at a time.
CHUNK = 64
assert TILE_SIZE % CHUNK == 0, "a chunk lies under one scale"
# For MXFP4 products: elements per slice step (a block of 32 for each of four lanes), and the most slices, one per warp.
SLICE = 128
SLICES = 8
# The largest E8M0 scale whose product with 2**126 is a bfloat16; larger ones need another multiplication.
LARGEST_NARROW_SCALE = 128
QUERIES = 32
LONG_CHUNK = 512  # for sums without tensor cores
KEY_CHUNK = 64
SPLITS_AT_A_TIME = 16


class Constants:
    """Compile-time values of a kernel, by name: `constants.D`.

    Triton treats this as one constexpr and compares hash and text, so equal values have equal ones.
    """

    def __init__(self, **values: Any) -> None:
        self.values = values
        self._text = ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"no constant {name!r}") from None

    def __repr__(self) -> str:
        return f"Constants({self._text})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True)
class Binding:
    """One phase's arguments. pointers: contiguous tensors in the order of `kernels/dispatch.py`."""

    phase: Phase
    pointers: tuple[torch.Tensor, ...]
    constants: Constants


def bind(plan: Plan, weights: ModelWeights, memory: Memory, drafter: DrafterWeights | None = None) -> list[Binding]:
    """Bindings of a step's phases in order. drafter: the plan's."""
    builder = Binder(plan, weights, memory, drafter)
    return [builder.bind(phase) for phase in plan.phases]


class Binder(StepBinder):
    """Finds each phase's arguments; a drafter's layers follow the target's, as in `Phase.layer`."""

    def __init__(self, plan: Plan, weights: ModelWeights, memory: Memory, drafter: DrafterWeights | None) -> None:
        super().__init__(plan, weights, memory)
        D = weights.spec.hidden_size
        self.sizes = {"D": D, "R": plan.rows, "CHUNK": CHUNK, "eps": weights.spec.rms_norm_eps}
        self.sizes["NP"] = power_of_two(num_blocks(D))
        self.layer_specs, self.layer_weights = [*self.spec.layers], [*weights.layers]
        self.deciding = MultiStepBinder(plan, weights.spec, memory)
        self.drafter = None if drafter is None else DrafterBinder(self, drafter)
        if self.drafter is not None:
            self.layer_specs += self.drafter.spec.layers
            self.layer_weights += self.drafter.layers

    def bind(self, phase: Phase) -> Binding:
        own = {} if self.drafter is None else self.drafter.bound
        elsewhere = self.deciding.bound | own
        pointers, constants = elsewhere[phase.op](phase) if phase.op in elsewhere else _BOUND[phase.op](self, phase)
        assert all(tensor.is_contiguous() for tensor in pointers), f"{phase.name}: a tensor has gaps"
        axes = tuple(axis.size for axis in phase.axes)
        # A drafter's layers skip steps without blocks; its own phases check for themselves.
        sizes = self.sizes | {"IS_DRAFT": is_drafting(phase) and phase.op not in own}
        if self.drafter is not None and (is_drafting(phase) or phase.op in own):
            sizes["eps"] = self.drafter.spec.rms_norm_eps
        return Binding(phase, pointers, Constants(op=phase.op, axes=axes, T=phase.tile, **sizes, **constants))

    def linear(self, weight: Linear) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], dict[str, Any]]:
        """A matrix or its codes, its FP8 scales if any, and the constant that says so."""
        if isinstance(weight, FP8Tensor):
            return weight.codes_OI, (weight.scales_PQ,), {"FP8_ROWS": weight.tile_rows}
        return weight, (), {"FP8_ROWS": 0}

    def attention_of(self, phase: Phase) -> tuple[AttentionSpec, AttentionWeights]:
        assert phase.layer is not None
        return self.layer_specs[phase.layer].attention, self.layer_weights[phase.layer].attention

    def dense_of(self, phase: Phase) -> DenseWeights:
        assert phase.layer is not None
        mlp = self.layer_weights[phase.layer].mlp
        assert isinstance(mlp, DenseWeights)
        return mlp

    def moe_of(self, phase: Phase) -> tuple[MoeSpec, MoeWeights]:
        assert phase.layer is not None
        spec, weights = self.layer_specs[phase.layer].mlp, self.layer_weights[phase.layer].mlp
        assert isinstance(spec, MoeSpec) and isinstance(weights, MoeWeights)
        return spec, weights

    def tap(self, phase: Phase) -> torch.Tensor | None:
        """The buffer for a copy of the phase's result, None without one."""
        for region in phase.writes:
            if region.buffer.startswith("features."):
                return self.memory.features[int(region.buffer.removeprefix("features."))]
        return None

    def embed(self, phase: Phase) -> Bound:
        m, proposals = self.memory, self.buffers.get("proposals")
        row_allocation = (m.sequences, m.draws, m.rows if proposals is None else proposals, m.rows, m.sampling)
        embedded = self.buffers["hidden"], *self.for_norm(phase)
        pointers = (*row_allocation, self.weights.embedding_VD, *embedded, self.buffers["bins"])
        return pointers, {"HAS_PROPOSALS": proposals is not None}

    def rows(self, phase: Phase) -> torch.Tensor:
        """Records of the rows that a phase computes."""
        return self.buffers["blocks" if is_drafting(phase) else "rows"]

    def for_norm(self, phase: Phase) -> tuple[torch.Tensor, ...]:
        """The next norm's weight, and the buffers for its inputs."""
        owner: Layers = self.weights
        layer = phase.layer
        if self.drafter is not None and is_drafting(phase):
            owner, layer = self.drafter.weights, None if layer is None else layer - self.spec.num_layers
        return (owner.norm_behind(phase.op == "o_proj", layer), *self.buffer("scaled", "squares"))

    def to_norm(self, phase: Phase) -> tuple[torch.Tensor, ...]:
        """The first pointers of a phase that normalizes the hidden state."""
        return (self.rows(phase), *self.buffer("scaled", "squares"))

    def qkv(self, phase: Phase) -> Bound:
        spec, weights = self.attention_of(phase)
        columns = phase.axes[1].size * phase.tile
        qkv_OD, bias_O = weights.qkv_OD, weights.qkv_bias_O
        if self.drafter is not None and is_drafting(phase):
            assert phase.layer is not None
            weight, scales, constants = self.linear(self.drafter.grouped(phase.layer - self.spec.num_layers))
        elif isinstance(qkv_OD, FP8Tensor):
            weight, scales, constants = self.linear(grouped_fp8_qkv(qkv_OD, spec, columns))
        else:
            weight, scales, constants = self.linear(grouped_qkv(qkv_OD, spec, columns))
        bias = self.optional(None if bias_O is None else grouped_qkv(bias_O, spec, columns))
        constants |= {"COLUMNS": columns, "HAS_BIAS": bias_O is not None}
        return (*self.to_norm(phase), weight, bias, self.buffers["qkv"], *scales), constants

    def attention(self, phase: Phase) -> Bound:
        spec, weights = self.attention_of(phase)
        assert phase.layer is not None
        qkv = self.plan.phases[self.plan.phase_named[phase.name.replace("attention", "qkv")]]
        cos_TH, sin_TH = self.tables(spec)
        cache = [*self.memory.caches, *self.memory.contexts][phase.layer]
        heads = spec.num_heads // spec.num_kv_heads
        head_tile, head_size = power_of_two(heads), max(16, power_of_two(spec.qk_head_dim))
        # Wide heads need more registers, so fewer queries and keys at a time.
        queries, keys = (QUERIES, KEY_CHUNK) if head_size <= 64 else (QUERIES // 2, KEY_CHUNK // 2)
        q_norm, k_norm = self.optional(weights.q_norm_H), self.optional(weights.k_norm_H)
        grouped, partial = self.buffer("qkv", "partial")
        return (self.rows(phase), grouped, q_norm, k_norm, cos_TH, sin_TH, cache, partial), {
            "value_scale": float(spec.value_scale),
            "softmax_scale": spec.softmax_scale,
            "num_slots": self.memory.num_slots,
            "M": heads,
            "G": spec.num_kv_heads,
            "H": spec.qk_head_dim,
            "V": spec.v_head_dim,
            "HALF": cos_TH.shape[1],
            "COLUMNS": qkv.axes[1].size * qkv.tile,
            "RING": cache.shape[2],
            "WINDOW": spec.window or 0,
            "SPLIT": self.plan.split_size,
            "SPLITS": phase.axes[2].size,
            "HP": head_size,
            "VP": max(16, power_of_two(spec.v_head_dim)),
            "MP": head_tile,
            "QUERIES": max(queries, head_tile),
            "C": min(keys, self.plan.split_size),
            "HAS_QK_NORM": spec.has_qk_norm,
            "AHEAD": spec.ahead,
        }

    def combine(self, phase: Phase) -> Bound:
        spec, weights = self.attention_of(phase)
        attention = self.plan.phases[self.plan.phase_named[phase.name.replace("combine", "attention")]]
        partial, attended = self.buffer("partial", "attended")
        return (self.rows(phase), self.optional(weights.sinks_N), partial, attended), {
            "N": spec.num_heads,
            "V": spec.v_head_dim,
            "VP": power_of_two(spec.v_head_dim),
            "WINDOW": spec.window or 0,
            "SPLIT": self.plan.split_size,
            "SPLITS": attention.axes[2].size,
            "S": SPLITS_AT_A_TIME,
            "HAS_SINKS": spec.has_sinks,
            "AHEAD": spec.ahead,
        }

    def o_proj(self, phase: Phase) -> Bound:
        spec, weights = self.attention_of(phase)
        width = spec.num_heads * spec.v_head_dim
        x = self.buffers["attended"]
        return self.project(phase, x, BLOCK_COLUMNS, width, width, weights.output_DO, weights.output_bias_D)

    def dense_down(self, phase: Phase) -> Bound:
        weights = self.dense_of(phase)
        x, width = self.buffers["act"], weights.down_DF.shape[1]
        step = self.plan.rows * BLOCK_COLUMNS
        return self.project(phase, x, step, BLOCK_COLUMNS, width, weights.down_DF, None)

    def project(
        self,
        phase: Phase,
        x: torch.Tensor,
        x_step: int,
        x_row_step: int,
        width: int,
        weight: Linear,
        bias: torch.Tensor | None,
    ) -> Bound:
        """A projection to the hidden size. x_step, x_row_step: strides of sixteen elements and of a row in x."""
        tap = self.tap(phase)
        matrix, scales, constants = self.linear(weight)
        result = (self.buffers["hidden"], *self.for_norm(phase), self.optional(tap))
        return (self.rows(phase), x, matrix, self.optional(bias), *result, *scales), constants | {
            "x_step": x_step,
            "x_row_step": x_row_step,
            "K": width,
            "HAS_BIAS": bias is not None,
            "HAS_TAP": tap is not None,
        }

    def dense_gate_up(self, phase: Phase) -> Bound:
        weights = self.dense_of(phase)
        matrix, scales, constants = self.linear(weights.gate_up_FD)
        pointers = (*self.to_norm(phase), matrix, self.buffers["act"], *scales)
        return pointers, constants | {"WIDTH": weights.down_DF.shape[1]}

    def router(self, phase: Phase) -> Bound:
        spec, weights = self.moe_of(phase)
        bias = self.optional(weights.router_bias_E)
        return (*self.to_norm(phase), weights.router_ED, bias, self.buffers["router"]), {
            "E": spec.num_experts,
            "LONG": min(LONG_CHUNK, power_of_two(self.spec.hidden_size)),
            "HAS_BIAS": weights.router_bias_E is not None,
        }

    def choice(self, phase: Phase) -> Bound:
        """The pointers that choose experts, first in the phases that need them."""
        spec, weights = self.moe_of(phase)
        rows, logits = self.buffer("rows", "router")
        return (rows, logits, self.optional(weights.correction_bias_E)), {
            "routed_scale": float(spec.routed_scale),
            "WIDTH": spec.intermediate_size,
            "E": spec.num_experts,
            "K": spec.top_k,
            "EP": power_of_two(spec.num_experts),
            "KP": power_of_two(spec.top_k),
            "IS_SIGMOID": spec.scoring == "sigmoid",
            "HAS_CORRECTION": weights.correction_bias_E is not None,
            "RENORMALIZE": spec.renormalize,
        }

    def expert_weights(self, weight: Weight, bias: torch.Tensor | None) -> Bound:
        constants: dict[str, Any] = {"HAS_BIAS": bias is not None, "IS_PACKED": isinstance(weight, MXFP4Tensor)}
        constants |= {"SLICES": min(SLICES, power_of_two(-(-weight.shape[-1] // SLICE))), "IS_WIDE": False}
        if not isinstance(weight, MXFP4Tensor):
            return (weight, weight, self.optional(bias)), constants
        # Weights on the meta device are assumed to have ordinary scales.
        if not weight.scales.is_meta:
            constants["IS_WIDE"] = bool((weight.scales > LARGEST_NARROW_SCALE).any())
        return (weight.codes, weight.scales, self.optional(bias)), constants

    def expert_gate_up(self, phase: Phase) -> Bound:
        spec, weights = self.moe_of(phase)
        choice, choice_constants = self.choice(phase)
        matrix, matrix_constants = self.expert_weights(weights.gate_up_EID, weights.gate_up_bias_EI)
        buffers = self.buffer("scaled", "squares", "act", "routes")
        return (*choice, *matrix, *buffers), choice_constants | matrix_constants | {
            "IS_SORTED": isinstance(weights.down_EDI, MXFP4Tensor),  # activations lie as its product takes them
            "limit": 0.0 if spec.swiglu_limit is None else spec.swiglu_limit,
            "alpha": spec.swiglu_alpha,
            "IS_CLAMPED": spec.swiglu_limit is not None,
        }

    def expert_down(self, phase: Phase) -> Bound:
        _, weights = self.moe_of(phase)
        choice, choice_constants = self.choice(phase)
        matrix, matrix_constants = self.expert_weights(weights.down_EDI, weights.down_bias_ED)
        act, hidden, routes = self.buffer("act", "hidden", "routes")
        tap = self.tap(phase)
        constants = choice_constants | matrix_constants | {"HAS_TAP": tap is not None}
        return (*choice, *matrix, act, hidden, *self.for_norm(phase), self.optional(tap), routes), constants

    def lm_head(self, phase: Phase) -> Bound:
        best, *rest = self.buffer(*(region.buffer for region in reversed(phase.writes)))
        peaks, logits = rest or (best, self.buffers["logits"])
        matrix, scales, constants = self.linear(self.weights.lm_head_VD)
        pointers = (*self.to_norm(phase), matrix, logits, best, self.memory.sampling, peaks, *scales)
        return pointers, constants | {"VOCAB": self.spec.vocab_size, "HAS_LOGITS": len(rest) > 0}


_BOUND: dict[str, Callable[[Binder, Phase], Bound]] = {
    "embed": Binder.embed,
    "qkv": Binder.qkv,
    "attention": Binder.attention,
    "combine": Binder.combine,
    "o_proj": Binder.o_proj,
    "dense_gate_up": Binder.dense_gate_up,
    "dense_down": Binder.dense_down,
    "router": Binder.router,
    "expert_gate_up": Binder.expert_gate_up,
    "expert_down": Binder.expert_down,
    "lm_head": Binder.lm_head,
}
