"""Tiny models of three families, and every buffer of a step as the reference backend has it, for tests of plans.

Legend: R rows, D hidden, V vocabulary, G key/value heads, K choices of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from speedstack.quant.mxfp4 import MXFP4Tensor, quantize
from speedstack.runtime.backend import Rows
from speedstack.runtime.plan import Phase
from speedstack.runtime.plan_backend import PlanBackend
from speedstack.runtime.reference import ReferenceBackend, _experts, rms_norm, route, swiglu
from speedstack.runtime.shapes import empty_weights
from speedstack.runtime.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec, YarnSpec
from speedstack.runtime.weights import AttentionWeights, DenseWeights, ModelWeights, MoeWeights

CPU = torch.device("cpu")
MAX_LENGTH, NUM_SLOTS, NUM_ROWS = 64, 3, 4
LOST = 69  # a token of which one test takes the embedding away

# Every ingredient of the three families at sizes that fill no tile: three heads a group, a hidden size that is no
# multiple of a chunk, a last tile that is cut.
MIMO = (
    LayerSpec(AttentionSpec(6, 2, 24, 20, 9, 5e5), DenseSpec(40)),
    LayerSpec(
        AttentionSpec(6, 2, 24, 20, 8, 1e4, window=9, has_sinks=True, value_scale=0.7),
        MoeSpec(5, 2, 24, "sigmoid", True, True, routed_scale=1.5),
    ),
)
QWEN3 = (
    LayerSpec(
        AttentionSpec(4, 1, 16, 16, 16, 1e4, has_qk_norm=True),
        MoeSpec(6, 3, 32, "softmax", has_correction_bias=False, renormalize=False),
    ),
)
GPT_OSS = (
    LayerSpec(
        AttentionSpec(
            2, 2, 16, 16, 16, 1.5e5, window=12, has_sinks=True, has_bias=True,
            yarn=YarnSpec(8.0, 32, 32.0, 1.0, False, 1.2),
        ),
        MoeSpec(4, 2, 32, "softmax", False, True, has_bias=True, swiglu_limit=0.7, swiglu_alpha=1.702),
    ),
)  # fmt: skip


def build(layers: Sequence[LayerSpec], hidden_size: int, is_packed: bool, vocab_size: int = LOST + 1) -> ModelWeights:
    """Random float32 weights, large enough that nothing is near zero and the SwiGLU's clamp is reached."""
    spec = ModelSpec("test", vocab_size, hidden_size, 1e-5, MAX_LENGTH, (), tuple(layers))
    weights = empty_weights(spec, torch.float32, CPU, is_packed)
    generator = torch.Generator().manual_seed(0)

    def fill(owner: Any) -> None:
        for name, value in vars(owner).items():
            if isinstance(value, MXFP4Tensor):
                plain = torch.randn(value.shape, generator=generator) * 0.2
                setattr(owner, name, quantize(plain))
            elif isinstance(value, torch.Tensor):
                is_norm = "norm" in name
                value.uniform_(0.8, 1.2, generator=generator) if is_norm else value.normal_(0, 0.2, generator=generator)

    fill(weights)
    for layer in weights.layers:
        fill(layer.attention)
        fill(layer.mlp)
    return weights


CASES: dict[str, Callable[[], ModelWeights]] = {
    "mimo": lambda: build(MIMO, 72, False),
    "qwen3-mxfp4": lambda: build(QWEN3, 96, True),
    "gpt-oss-mxfp4": lambda: build(GPT_OSS, 64, True),
}


# The same families with as few items as show every kind of phase, for many schedules.
SMALL_LENGTH = 32
SMALL_CASES: dict[str, Callable[[], ModelWeights]] = {
    "mimo": lambda: build((LayerSpec(replace(MIMO[1].attention, num_heads=2), MIMO[1].mlp),), 40, False, 24),
    "dense": lambda: build((LayerSpec(AttentionSpec(2, 1, 16, 16, 8, 1e4), DenseSpec(40)),), 40, False, 24),
    "qwen3-mxfp4": lambda: build(
        (replace(QWEN3[0], attention=replace(QWEN3[0].attention, num_heads=2)),), 32, True, 24
    ),
    "gpt-oss-mxfp4": lambda: build(GPT_OSS, 32, True, 24),
}


def prefilled(
    weights: ModelWeights, lengths: Sequence[int], max_length: int = MAX_LENGTH
) -> tuple[ReferenceBackend, list[list[int]]]:
    """A reference backend whose slots hold sequences of these lengths, and NaN wherever nothing was written."""
    backend = ReferenceBackend(weights, None, NUM_SLOTS, max_length)
    for cache in backend.caches:
        cache.k_SLGH.fill_(float("nan"))
        cache.v_SLGH.fill_(float("nan"))
    generator = torch.Generator().manual_seed(1)
    num_known = min(LOST, weights.spec.vocab_size)
    ids = [torch.randint(0, num_known, (max_length,), generator=generator).tolist() for _ in lengths]
    for slot, length in enumerate(lengths):
        if length:
            backend.step(Rows(ids[slot][:length], [slot] * length, list(range(length))), [])
    return backend, ids


def fill(backend: PlanBackend, reference: ReferenceBackend) -> None:
    """The same contexts as the reference's, and NaN in every buffer that a step has to write before it reads."""
    for cache, wanted in zip(backend.memory.caches, reference.caches, strict=True):
        both_SLGH = torch.cat([wanted.k_SLGH, wanted.v_SLGH], dim=-1)
        cache.copy_(both_SLGH[:NUM_SLOTS].permute(2, 0, 1, 3))
    for buffer in backend.memory.buffers.values():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))


def rows_of(ids: list[list[int]], *places: tuple[int, int]) -> Rows:
    """Rows at (slot, position)."""
    return Rows([ids[s][p] for s, p in places], [s for s, _ in places], [p for _, p in places])


def expected_buffers(backend: ReferenceBackend, rows: Rows) -> dict[str, torch.Tensor]:
    """What each phase of a step writes, by the reference's own functions, rows first."""
    weights, eps = backend.weights, backend.weights.spec.rms_norm_eps
    slots_R, positions_R = torch.tensor(rows.slots), torch.tensor(rows.positions)
    hidden_RD = weights.embedding_VD[torch.tensor(rows.tokens)]
    seen = {"embed": hidden_RD}
    for index, (layer, spec) in enumerate(zip(weights.layers, weights.spec.layers, strict=True)):
        a, at = layer.attention, f"L{index:02d}."
        x_RD = rms_norm(hidden_RD, a.norm_D, eps)
        bias_O = 0.0 if a.qkv_bias_O is None else a.qkv_bias_O
        seen[at + "qkv"] = x_RD @ a.qkv_OD.T + bias_O

        def attend(x_RD: torch.Tensor, a: AttentionWeights, index: int = index) -> torch.Tensor:
            return backend._attention(index, x_RD, a, slots_R, positions_R, None)

        identity = torch.eye(a.output_DO.shape[1])
        seen[at + "combine"] = attend(x_RD, replace(a, output_DO=identity, output_bias_D=None))
        hidden_RD = seen[at + "o_proj"] = hidden_RD + attend(x_RD, a)
        x_RD = rms_norm(hidden_RD, layer.mlp.norm_D, eps)
        if isinstance(layer.mlp, DenseWeights):
            gate_RF, up_RF = (x_RD @ layer.mlp.gate_up_FD.T).chunk(2, dim=-1)
            seen[at + "gate_up"] = F.silu(gate_RF) * up_RF
            hidden_RD = seen[at + "down"] = hidden_RD + seen[at + "gate_up"] @ layer.mlp.down_DF.T
        else:
            assert isinstance(spec.mlp, MoeSpec)
            hidden_RD = seen[at + "down"] = hidden_RD + _mixture(x_RD, layer.mlp, spec.mlp, seen, at)
    final_RD = rms_norm(hidden_RD, weights.norm_D, eps)
    seen["lm_head"] = final_RD @ weights.lm_head_VD.T
    return seen


def _mixture(
    x_RD: torch.Tensor, moe: MoeWeights, spec: MoeSpec, seen: dict[str, torch.Tensor], at: str
) -> torch.Tensor:
    logits_RE = seen[at + "router"] = x_RD @ moe.router_ED.T + (
        0.0 if moe.router_bias_E is None else moe.router_bias_E
    )  # fmt: skip
    experts_RK, weights_RK = route(logits_RE, moe.correction_bias_E, spec)
    act, out_RD = [], torch.zeros_like(x_RD)
    for k in range(spec.top_k):
        index_R = experts_RK[:, k]
        gate_up_RI = (_experts(moe.gate_up_EID, index_R, x_RD.dtype) @ x_RD[:, :, None])[..., 0]
        if moe.gate_up_bias_EI is not None:
            gate_up_RI = gate_up_RI + moe.gate_up_bias_EI[index_R]
        act.append(swiglu(gate_up_RI, spec))
        down_RD = (_experts(moe.down_EDI, index_R, x_RD.dtype) @ act[-1][:, :, None])[..., 0]
        if moe.down_bias_ED is not None:
            down_RD = down_RD + moe.down_bias_ED[index_R]
        out_RD = out_RD + weights_RK[:, k, None] * down_RD
    seen[at + "gate_up"] = torch.cat(act, dim=1)
    return out_RD


def found_buffer(backend: PlanBackend, phase: Phase, num_rows: int) -> torch.Tensor | None:
    """What a phase wrote, rows first, in the reference's order of columns; None where that is not compared."""
    R = backend.plan.rows
    buffers, weights = backend.memory.buffers, backend.weights
    if phase.op in ("embed", "o_proj", "dense_down", "expert_down"):
        return backend.memory.hidden_DR.T[:num_rows]
    if phase.op == "lm_head":
        return backend.memory.logits_VR.T[:num_rows]
    if phase.layer is None:
        return None
    a, mlp = weights.spec.layers[phase.layer].attention, weights.spec.layers[phase.layer].mlp
    if phase.op == "qkv":
        columns = phase.axes[1].size * phase.tile
        grouped = buffers["qkv"][: a.num_kv_heads * columns * R].view(a.num_kv_heads, columns, R)
        q = a.num_heads // a.num_kv_heads * a.qk_head_dim
        ends = [0, q, q + a.qk_head_dim, q + a.qk_head_dim + a.v_head_dim]
        parts = [grouped[:, start:end].flatten(0, 1) for start, end in pairwise(ends)]
        return torch.cat(parts).T[:num_rows]
    if phase.op == "combine":
        return buffers["attended"][: R * a.num_heads * a.v_head_dim].view(R, -1)[:num_rows]
    if phase.op == "router":
        assert isinstance(mlp, MoeSpec)
        return buffers["router"][: mlp.num_experts * R].view(-1, R).T[:num_rows]
    if phase.op == "expert_gate_up":
        assert isinstance(mlp, MoeSpec)
        return buffers["act"][: R * mlp.top_k * mlp.intermediate_size].view(R, -1)[:num_rows]
    if phase.op == "dense_gate_up":
        return buffers["act"][: mlp.intermediate_size * R].view(-1, R).T[:num_rows]
    return None


def check_caches(backend: PlanBackend, reference: ReferenceBackend) -> None:
    """Keys and values are the reference's, and what was not written is what it was."""
    for cache, wanted in zip(backend.memory.caches, reference.caches, strict=True):
        both = torch.cat([wanted.k_SLGH, wanted.v_SLGH], dim=-1)[:NUM_SLOTS].permute(2, 0, 1, 3)
        # float32 sums of up to 96 terms in another order
        torch.testing.assert_close(cache, both, rtol=1e-4, atol=3e-5, equal_nan=True)


def naming(phase: str) -> Callable[[str], str]:
    """What puts the phase before a comparison's message."""
    return lambda message: f"{phase}: {message}"
