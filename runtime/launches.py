"""The kernels of a decode step, one a phase of the plan, with the memory and the weights that they work on.

Which phases there are, how they are cut and what lies where, the plan says; here each phase finds its kernel and its
arguments. Weights stay as they are, but for the projection to queries, keys and values, whose rows are sorted by
key/value head and padded to whole tiles, and for the sampling state, which the plan knows as part of the rows.

Legend: R rows, D hidden, N heads, G key/value heads, M heads of a group, H query/key head size, V value head size,
O qkv rows of the checkpoint, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.backend import Rows
from speedstack.runtime.kernels.triton import launch
from speedstack.runtime.phases import ELEMENT_BYTES
from speedstack.runtime.plan import Phase, Plan
from speedstack.runtime.reference import rotary_tables
from speedstack.runtime.ring import ring_length
from speedstack.runtime.spec import AttentionSpec, MoeSpec
from speedstack.runtime.weights import AttentionWeights, DenseWeights, ModelWeights, MoeWeights, Weight

# Fixed, so that the order of every sum is: elements of a contraction axis at a time, (row, head) pairs of a query tile,
# keys at a time, splits combined at a time, blocks of four tokens that draw noise at a time.
CHUNK = 128
QUERIES = 32
KEY_CHUNK = 64
SPLITS_AT_A_TIME = 16
NOISE_BLOCKS = 256
# Warps of a program: attention holds most in registers.
NUM_WARPS = {"attention": 8, "router": 8}
DEFAULT_NUM_WARPS = 4
RECORD = 8  # int32 fields of a row, and of its sampling state

WIDE = {"partial": torch.float32, "router": torch.float32, "logits": torch.float32}
INTEGER = {"rows": torch.int32, "best": torch.int32}


@dataclass(frozen=True)
class Launch:
    """A phase's kernel, its grid, and its arguments by name."""

    phase: Phase
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def run(self, is_dependent: bool) -> None:
        """is_dependent: may begin while the kernel before it ends."""
        self.kernel[self.grid](**self.arguments, IS_DEPENDENT=is_dependent, **self.options(is_dependent))

    def options(self, is_dependent: bool) -> dict[str, Any]:
        """How the kernel is compiled and launched."""
        options = {"num_warps": NUM_WARPS.get(self.phase.op, DEFAULT_NUM_WARPS), "enable_fp_fusion": True}
        return options | ({"launch_pdl": True} if is_dependent else {})


class Memory:
    """The plan's buffers, the key/value buffers of `num_slots` sequences, and what a step gets and gives."""

    def __init__(self, plan: Plan, weights: ModelWeights, num_slots: int, max_length: int) -> None:
        like = weights.embedding_VD
        self.num_slots = num_slots
        self.buffers: dict[str, torch.Tensor] = {}
        for name, num_bytes in plan.memory_bytes().items():
            if name.endswith(".cache"):
                continue
            dtype = INTEGER.get(name, WIDE.get(name, like.dtype))
            size = num_bytes // (ELEMENT_BYTES if dtype == like.dtype and name not in WIDE else 4)
            self.buffers[name] = torch.zeros(size, dtype=dtype, device=like.device)
        self.rows = self.buffers["rows"].view(plan.rows, RECORD)
        self.rows[:, 0] = -1
        self.sampling = torch.zeros(plan.rows, RECORD, dtype=torch.int32, device=like.device)
        self.tokens = torch.zeros(plan.rows, dtype=torch.int32, device=like.device)
        self.hidden_DR = self.buffers["hidden"].view(weights.spec.hidden_size, plan.rows)
        self.logits_VR = self.buffers["logits"].view(weights.spec.vocab_size, plan.rows)
        self.caches = []
        for layer in weights.spec.layers:
            a = layer.attention
            shape = (a.num_kv_heads, num_slots, ring_length(a.window, max_length), a.qk_head_dim + a.v_head_dim)
            self.caches.append(like.new_zeros(shape))


def row_records(rows: Rows, capacity: int) -> torch.Tensor:
    """Int32 [capacity, RECORD] on the CPU; fields as in `kernels.triton.rows`. Rows of a sequence are neighbours."""
    starts = [row for row, slot in enumerate(rows.slots) if row == 0 or slot != rows.slots[row - 1]]
    assert len({rows.slots[row] for row in starts}) == len(starts), "the rows of a sequence have to be neighbours"
    records = [[-1] + [0] * (RECORD - 1) for _ in range(capacity)]
    for sequence, (first, end) in enumerate(zip(starts, [*starts[1:], len(rows.slots)], strict=True)):
        for row in range(first, end):
            records[row][:4] = [rows.tokens[row], rows.slots[row], rows.positions[row], rows.positions[first]]
        records[sequence][4:6] = [first, end - first]
    return torch.tensor(records, dtype=torch.int32)


def grouped_qkv(weight_OD: torch.Tensor, spec: AttentionSpec, columns: int) -> torch.Tensor:
    """Rows of a qkv projection (or its bias) by key/value head: its queries, key and value, zeros up to `columns`."""
    sizes = [
        spec.num_heads * spec.qk_head_dim,
        spec.num_kv_heads * spec.qk_head_dim,
        spec.num_kv_heads * spec.v_head_dim,
    ]
    parts = [part.unflatten(0, (spec.num_kv_heads, -1)) for part in weight_OD.split(sizes)]
    grouped = torch.cat(parts, dim=1)
    padding = grouped.new_zeros(spec.num_kv_heads, columns - grouped.shape[1], *grouped.shape[2:])
    return torch.cat([grouped, padding], dim=1).flatten(0, 1).contiguous()


def build_launches(plan: Plan, weights: ModelWeights, memory: Memory) -> list[Launch]:
    """The kernels of a step in order."""
    builder = _Builder(plan, weights, memory)
    return [builder.launch(phase) for phase in plan.phases]


class _Builder:
    def __init__(self, plan: Plan, weights: ModelWeights, memory: Memory) -> None:
        self.plan, self.weights, self.memory = plan, weights, memory
        self.spec = weights.spec
        self.sizes = {"D": weights.spec.hidden_size, "R": plan.rows, "CHUNK": CHUNK}
        self.eps = {"eps": weights.spec.rms_norm_eps}
        self.pointers = {f"{name}_ptr": tensor for name, tensor in memory.buffers.items()}
        self._tables: dict[AttentionSpec, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(self, phase: Phase) -> Launch:
        kernel, arguments = _ARGUMENTS[phase.op]
        grid = tuple(axis.size for axis in phase.axes)
        launch = Launch(phase, kernel, grid, arguments(self, phase))
        tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
        assert all(tensor.is_contiguous() for tensor in tensors.values()), f"{phase.name}: a tensor has gaps"
        return launch

    def of(self, *names: str) -> dict[str, Any]:
        """Buffers and sizes that every phase shares, by their names in kernels."""
        known = self.pointers | self.sizes | self.eps
        return {name: known[name] for name in names}

    def optional(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Something to point to where there is nothing."""
        return self.memory.hidden_DR if tensor is None else tensor

    def attention_of(self, phase: Phase) -> tuple[AttentionSpec, AttentionWeights]:
        assert phase.layer is not None
        return self.spec.layers[phase.layer].attention, self.weights.layers[phase.layer].attention

    def dense_of(self, phase: Phase) -> DenseWeights:
        assert phase.layer is not None
        mlp = self.weights.layers[phase.layer].mlp
        assert isinstance(mlp, DenseWeights)
        return mlp

    def moe_of(self, phase: Phase) -> tuple[MoeSpec, MoeWeights]:
        assert phase.layer is not None
        spec, weights = self.spec.layers[phase.layer].mlp, self.weights.layers[phase.layer].mlp
        assert isinstance(spec, MoeSpec) and isinstance(weights, MoeWeights)
        return spec, weights

    def embed(self, phase: Phase) -> dict[str, Any]:
        return self.of("rows_ptr", "hidden_ptr", "D", "R", "CHUNK") | {"embedding_ptr": self.weights.embedding_VD}

    def qkv(self, phase: Phase) -> dict[str, Any]:
        spec, weights = self.attention_of(phase)
        columns = phase.axes[1].size * phase.tile
        bias_O = weights.qkv_bias_O
        return self.of("hidden_ptr", "qkv_ptr", "eps", "D", "R", "CHUNK") | {
            "norm_ptr": weights.norm_D,
            "w_ptr": grouped_qkv(weights.qkv_OD, spec, columns),
            "bias_ptr": self.optional(None if bias_O is None else grouped_qkv(bias_O, spec, columns)),
            "COLUMNS": columns,
            "T": phase.tile,
            "HAS_BIAS": bias_O is not None,
        }

    def attention(self, phase: Phase) -> dict[str, Any]:
        spec, weights = self.attention_of(phase)
        assert phase.layer is not None
        qkv = self.plan.phases[self.plan.phase_named[phase.waits[0].counter]]
        if spec not in self._tables:
            cos_TH, sin_TH = rotary_tables(spec, self.plan.max_context, self.memory.hidden_DR.device)
            dtype = self.memory.hidden_DR.dtype
            self._tables[spec] = cos_TH.to(dtype).contiguous(), sin_TH.to(dtype).contiguous()
        cos_TH, sin_TH = self._tables[spec]
        cache = self.memory.caches[phase.layer]
        heads = spec.num_heads // spec.num_kv_heads
        head_tile, head_size = power_of_two(heads), max(16, power_of_two(spec.qk_head_dim))
        # Wide heads take the registers of more queries.
        queries = QUERIES if head_size <= 128 else QUERIES // 2
        return self.of("rows_ptr", "qkv_ptr", "partial_ptr", "eps", "R") | {
            "q_norm_ptr": self.optional(weights.q_norm_H),
            "k_norm_ptr": self.optional(weights.k_norm_H),
            "cos_ptr": cos_TH,
            "sin_ptr": sin_TH,
            "cache_ptr": cache,
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
            "C": min(KEY_CHUNK, self.plan.split_size),
            "HAS_QK_NORM": spec.has_qk_norm,
        }

    def combine(self, phase: Phase) -> dict[str, Any]:
        spec, weights = self.attention_of(phase)
        attention = self.plan.phases[self.plan.phase_named[phase.waits[0].counter]]
        return self.of("rows_ptr", "partial_ptr", "attended_ptr") | {
            "sinks_ptr": self.optional(weights.sinks_N),
            "N": spec.num_heads,
            "V": spec.v_head_dim,
            "VP": power_of_two(spec.v_head_dim),
            "WINDOW": spec.window or 0,
            "SPLIT": self.plan.split_size,
            "SPLITS": attention.axes[2].size,
            "S": SPLITS_AT_A_TIME,
            "HAS_SINKS": spec.has_sinks,
        }

    def o_proj(self, phase: Phase) -> dict[str, Any]:
        spec, weights = self.attention_of(phase)
        width = spec.num_heads * spec.v_head_dim
        return self.of("hidden_ptr", "D", "R", "CHUNK") | {
            "x_ptr": self.pointers["attended_ptr"],
            "x_step": 1,
            "x_row_step": width,
            "w_ptr": weights.output_DO,
            "bias_ptr": self.optional(weights.output_bias_D),
            "K": width,
            "T": phase.tile,
            "HAS_BIAS": weights.output_bias_D is not None,
        }

    def dense_gate_up(self, phase: Phase) -> dict[str, Any]:
        weights = self.dense_of(phase)
        return self.of("hidden_ptr", "act_ptr", "eps", "D", "R", "CHUNK") | {
            "norm_ptr": weights.norm_D,
            "w_ptr": weights.gate_up_FD,
            "WIDTH": weights.down_DF.shape[1],
            "T": phase.tile,
        }

    def dense_down(self, phase: Phase) -> dict[str, Any]:
        weights = self.dense_of(phase)
        return self.of("hidden_ptr", "D", "R", "CHUNK") | {
            "x_ptr": self.pointers["act_ptr"],
            "x_step": self.plan.rows,
            "x_row_step": 1,
            "w_ptr": weights.down_DF,
            "bias_ptr": self.optional(None),
            "K": weights.down_DF.shape[1],
            "T": phase.tile,
            "HAS_BIAS": False,
        }

    def router(self, phase: Phase) -> dict[str, Any]:
        spec, weights = self.moe_of(phase)
        return self.of("hidden_ptr", "eps", "D", "R", "CHUNK") | {
            "norm_ptr": weights.norm_D,
            "w_ptr": weights.router_ED,
            "bias_ptr": self.optional(weights.router_bias_E),
            "logits_ptr": self.pointers["router_ptr"],
            "E": spec.num_experts,
            "T": phase.tile,
            "HAS_BIAS": weights.router_bias_E is not None,
        }

    def experts(self, phase: Phase, weight: Weight, bias: torch.Tensor | None) -> dict[str, Any]:
        """What gate_up and down share: the choice of experts, and one weight."""
        spec, weights = self.moe_of(phase)
        packed = isinstance(weight, MXFP4Tensor)
        return self.of("rows_ptr", "hidden_ptr", "act_ptr", "D", "R", "CHUNK") | {
            "logits_ptr": self.pointers["router_ptr"],
            "correction_ptr": self.optional(weights.correction_bias_E),
            "w_ptr": weight.codes if isinstance(weight, MXFP4Tensor) else weight,
            "scales_ptr": weight.scales if isinstance(weight, MXFP4Tensor) else weight,
            "bias_ptr": self.optional(bias),
            "routed_scale": float(spec.routed_scale),
            "WIDTH": spec.intermediate_size,
            "E": spec.num_experts,
            "K": spec.top_k,
            "EP": power_of_two(spec.num_experts),
            "KP": power_of_two(spec.top_k),
            "T": phase.tile,
            "IS_SIGMOID": spec.scoring == "sigmoid",
            "HAS_CORRECTION": weights.correction_bias_E is not None,
            "RENORMALIZE": spec.renormalize,
            "IS_PACKED": packed,
            "HAS_BIAS": bias is not None,
        }

    def expert_gate_up(self, phase: Phase) -> dict[str, Any]:
        spec, weights = self.moe_of(phase)
        return self.experts(phase, weights.gate_up_EID, weights.gate_up_bias_EI) | self.eps | {
            "norm_ptr": weights.norm_D,
            "limit": 0.0 if spec.swiglu_limit is None else spec.swiglu_limit,
            "alpha": spec.swiglu_alpha,
            "IS_CLAMPED": spec.swiglu_limit is not None,
        }  # fmt: skip

    def expert_down(self, phase: Phase) -> dict[str, Any]:
        _, weights = self.moe_of(phase)
        return self.experts(phase, weights.down_EDI, weights.down_bias_ED)

    def lm_head(self, phase: Phase) -> dict[str, Any]:
        return self.of("hidden_ptr", "logits_ptr", "best_ptr", "eps", "D", "R", "CHUNK") | {
            "norm_ptr": self.weights.norm_D,
            "w_ptr": self.weights.lm_head_VD,
            "VOCAB": self.spec.vocab_size,
            "T": phase.tile,
        }

    def sample(self, phase: Phase) -> dict[str, Any]:
        tiles = self.plan.buffer_named["best"].num_cells
        return self.of("rows_ptr", "logits_ptr", "best_ptr", "R") | {
            "sampling_ptr": self.memory.sampling,
            "token_ptr": self.memory.tokens,
            "VOCAB": self.spec.vocab_size,
            "TILES": tiles,
            "TP": power_of_two(tiles),
            "BLOCKS": NOISE_BLOCKS,
        }


_ARGUMENTS: dict[str, tuple[Any, Callable[[_Builder, Phase], dict[str, Any]]]] = {
    "embed": (launch.embed_kernel, _Builder.embed),
    "qkv": (launch.qkv_kernel, _Builder.qkv),
    "attention": (launch.attention_kernel, _Builder.attention),
    "combine": (launch.combine_kernel, _Builder.combine),
    "o_proj": (launch.project_kernel, _Builder.o_proj),
    "dense_gate_up": (launch.dense_gate_up_kernel, _Builder.dense_gate_up),
    "dense_down": (launch.project_kernel, _Builder.dense_down),
    "router": (launch.router_kernel, _Builder.router),
    "expert_gate_up": (launch.expert_gate_up_kernel, _Builder.expert_gate_up),
    "expert_down": (launch.expert_down_kernel, _Builder.expert_down),
    "lm_head": (launch.lm_head_kernel, _Builder.lm_head),
    "sample": (launch.sample_kernel, _Builder.sample),
}


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def sampling_records(
    seeds: Sequence[int], sequences: Sequence[int], temperatures: Sequence[float], capacity: int
) -> torch.Tensor:
    """Int32 [capacity, RECORD] on the CPU: what `kernels.triton.head` samples by."""
    records = torch.zeros(capacity, RECORD, dtype=torch.int32)
    for row, (seed, sequence) in enumerate(zip(seeds, sequences, strict=True)):
        records[row, :4] = torch.tensor([seed % 2**64, sequence % 2**64], dtype=torch.uint64).view(torch.int32)
    temperature = torch.tensor(list(temperatures), dtype=torch.float32)
    records[: len(temperature), 4] = temperature.view(torch.int32)
    return records
