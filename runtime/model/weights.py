"""A model's weights for the backends: joined projections, MXFP4 or plain experts, FP8 or plain matrices.

Query, key and value (and gate and up) projections are joined once, at load. MXFP4 and FP8 keep the checkpoint's codes
and scales; bfloat16 matrices may stay so in a float32 engine; the rest is converted to the engine's dtype. Drafters use
the same structures (`backends/drafter_weights.py`).

Legend: D hidden, N heads, H head dim, F dense intermediate, E experts, I expert intermediate, V vocabulary.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from speedstack.quant.fp8 import FP8Tensor, joined
from speedstack.quant.mxfp4 import MXFP4Tensor
from speedstack.runtime.model.spec import DenseSpec, LayerSpec, ModelSpec, MoeSpec

logger = logging.getLogger("speedstack.runtime")

Weight = torch.Tensor | MXFP4Tensor
Linear = torch.Tensor | FP8Tensor
# Suffixes of part names in `nbytes_by_part` and `weight_bytes`, by storage format.
MXFP4_PART, FP8_PART, INT8_PART = " (MXFP4)", " (FP8)", " (int8)"
WeightT = TypeVar("WeightT", torch.Tensor, MXFP4Tensor, Weight)


def packed_parts(parts: Iterable[str]) -> list[str]:
    """The parts of `nbytes_by_part` or `weight_bytes` stored in MXFP4, FP8 or int8."""
    return [part for part in parts if part.endswith((MXFP4_PART, FP8_PART, INT8_PART))]


def plain_matrix(weight: Linear, dtype: torch.dtype) -> torch.Tensor:
    """The matrix in the engine's dtype.

    FP8 is defined here alone: element times scale in float32, rounded to bfloat16 whatever the engine's dtype. So the
    text does not depend on whether a backend keeps FP8.
    """
    return weight.dequantize(torch.bfloat16).to(dtype) if isinstance(weight, FP8Tensor) else weight


@dataclass
class AttentionWeights:
    norm_D: torch.Tensor
    qkv_OD: Linear  # query heads, then key heads, then value heads
    output_DO: Linear
    q_norm_H: torch.Tensor | None = None
    k_norm_H: torch.Tensor | None = None
    sinks_N: torch.Tensor | None = None
    qkv_bias_O: torch.Tensor | None = None
    output_bias_D: torch.Tensor | None = None


@dataclass
class DenseWeights:
    norm_D: torch.Tensor
    gate_up_FD: Linear  # gate rows, then up rows
    down_DF: Linear


@dataclass
class MoeWeights:
    norm_D: torch.Tensor
    router_ED: torch.Tensor  # always float32: near ties between experts must not depend on the engine's dtype
    correction_bias_E: torch.Tensor | None
    gate_up_EID: Weight  # gate rows, then up rows
    down_EDI: Weight
    router_bias_E: torch.Tensor | None = None
    gate_up_bias_EI: torch.Tensor | None = None
    down_bias_ED: torch.Tensor | None = None


@dataclass
class LayerWeights:
    attention: AttentionWeights
    mlp: DenseWeights | MoeWeights


class Layers:
    """A stack of layers and its final norm."""

    layers: list[LayerWeights]
    norm_D: torch.Tensor

    def norm_behind(self, is_attention: bool, layer: int | None) -> torch.Tensor:
        """The weight [D] of the norm after a layer's attention, its MLP, or the embedding (None)."""
        if layer is not None and is_attention:
            return self.layers[layer].mlp.norm_D
        following = 0 if layer is None else layer + 1
        return self.layers[following].attention.norm_D if following < len(self.layers) else self.norm_D


@dataclass
class ModelWeights(Layers):
    spec: ModelSpec
    embedding_VD: torch.Tensor
    layers: list[LayerWeights]
    norm_D: torch.Tensor
    lm_head_VD: Linear

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype. Vectors are stored in it; matrices may be narrower."""
        return self.norm_D.dtype

    def linears(self) -> Iterator[Linear]:
        """Every matrix that may be in FP8."""
        for layer in self.layers:
            yield from (layer.attention.qkv_OD, layer.attention.output_DO)
            if isinstance(layer.mlp, DenseWeights):
                yield from (layer.mlp.gate_up_FD, layer.mlp.down_DF)
        yield self.lm_head_VD

    def plain(self) -> "ModelWeights":
        """These weights with FP8 matrices dequantized by `plain_matrix`; the rest is shared. Itself without FP8."""
        if not self.num_fp8():
            return self
        dtype = self.dtype
        layers = []
        for layer in self.layers:
            a, mlp = layer.attention, layer.mlp
            a = replace(a, qkv_OD=plain_matrix(a.qkv_OD, dtype), output_DO=plain_matrix(a.output_DO, dtype))
            if isinstance(mlp, DenseWeights):
                gate_up, down = plain_matrix(mlp.gate_up_FD, dtype), plain_matrix(mlp.down_DF, dtype)
                mlp = replace(mlp, gate_up_FD=gate_up, down_DF=down)
            layers.append(LayerWeights(a, mlp))
        return replace(self, layers=layers, lm_head_VD=plain_matrix(self.lm_head_VD, dtype))

    def widened(self) -> "ModelWeights":
        """These weights with plain matrices in the engine's dtype; the rest is shared. Itself if nothing changes."""

        def wide(owner: Any) -> Any:
            narrow = {
                name: value.to(self.dtype)
                for name, value in vars(owner).items()
                if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 != self.dtype
            }
            return replace(owner, **narrow) if narrow else owner

        layers = [LayerWeights(wide(layer.attention), wide(layer.mlp)) for layer in self.layers]
        is_tied = self.lm_head_VD is self.embedding_VD
        found = wide(self)
        pairs = zip(layers, self.layers, strict=True)
        if found is self and all(a.attention is b.attention and a.mlp is b.mlp for a, b in pairs):
            return self
        return replace(found, layers=layers, lm_head_VD=found.embedding_VD if is_tied else found.lm_head_VD)

    def num_fp8(self) -> int:
        """The number of FP8 matrices."""
        return sum(isinstance(matrix, FP8Tensor) for matrix in self.linears())

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of every part under the names that reports show; packed and FP8 parts have their own."""
        sizes: dict[str, int] = {}

        def add(part: str, *weights: Weight | FP8Tensor | None) -> None:
            for weight in weights:
                name = f"{part}{FP8_PART}" if isinstance(weight, FP8Tensor) else part
                if weight is not None:
                    sizes[name] = sizes.get(name, 0) + weight.nbytes

        add("embedding and LM head", self.embedding_VD)
        if isinstance(self.lm_head_VD, FP8Tensor):
            add("LM head", self.lm_head_VD)
        elif self.lm_head_VD is not self.embedding_VD:
            add("embedding and LM head", self.lm_head_VD)
        add("norms and router", self.norm_D)
        for layer in self.layers:
            a, m = layer.attention, layer.mlp
            add("attention", a.qkv_OD, a.output_DO, a.sinks_N, a.qkv_bias_O, a.output_bias_D)
            add("norms and router", a.norm_D, a.q_norm_H, a.k_norm_H, m.norm_D)
            if isinstance(m, DenseWeights):
                add("dense MLP", m.gate_up_FD, m.down_DF)
            else:
                is_packed = isinstance(m.gate_up_EID, MXFP4Tensor)
                part = f"experts{MXFP4_PART}" if is_packed else "experts"
                add(part, m.gate_up_EID, m.down_EDI, m.gate_up_bias_EI, m.down_bias_ED)
                add("norms and router", m.router_ED, m.correction_bias_E, m.router_bias_E)
        return sizes


# Suffixes of matrix names; norms end with `norm.weight`.
_MATRICES = ("_proj.weight", "_proj", "embed_tokens.weight", "lm_head.weight")


@dataclass
class _Reader:
    """Returns checkpoint tensors by name, converted, and tracks those never asked for.

    keeps_bfloat16: bfloat16 matrices stay so. partly_fp8: FP8 projections joined with unquantized ones.
    """

    tensors: Mapping[str, Weight | FP8Tensor]
    dtype: torch.dtype
    device: torch.device
    keeps_bfloat16: bool = False
    used: set[str] = field(default_factory=set)
    partly_fp8: list[str] = field(default_factory=list)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Weight | FP8Tensor:
        if name not in self.tensors:
            raise ValueError(f"the checkpoint has no tensor {name!r}; it does not fit its config.json")
        self.used.add(name)
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the config asks for {shape}")
        return tensor

    def packed_or_plain(self, name: str, shape: tuple[int, ...]) -> Weight:
        tensor = self._tensor(name, shape)
        if isinstance(tensor, MXFP4Tensor):
            return tensor.to(self.device)
        matrix = plain_matrix(tensor, self.dtype)
        is_kept = self.keeps_bfloat16 and matrix.dtype == torch.bfloat16 and name.endswith(_MATRICES)
        return matrix.to(self.device, matrix.dtype if is_kept else self.dtype)

    def plain(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self.packed_or_plain(name, shape)
        if isinstance(tensor, MXFP4Tensor):
            raise ValueError(f"tensor {name!r} is packed in MXFP4; the runtime takes packed weights for experts only")
        return tensor

    def linear(self, *names_and_rows: tuple[str, int], columns: int) -> Linear:
        """Matrices [rows, columns] joined by rows; FP8 only if all are."""
        shapes = [(name, (rows, columns)) for name, rows in names_and_rows]
        found = [self._tensor(name, shape) for name, shape in shapes]
        fp8 = [_float32_scales(tensor.to(self.device)) for tensor in found if isinstance(tensor, FP8Tensor)]
        if len(fp8) == len(found):
            return fp8[0] if len(fp8) == 1 else joined(fp8)
        self.partly_fp8 += [name for name, _ in shapes if isinstance(self.tensors[name], FP8Tensor)]
        parts = [self.plain(name, *shape) for name, shape in shapes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _float32_scales(tensor: FP8Tensor) -> FP8Tensor:
    """Scales as all backends take them; float32 represents every E8M0 scale."""
    exact = tensor.with_scales(torch.float32)
    assert exact is not None
    return exact


def read_weights(
    spec: ModelSpec,
    tensors: Mapping[str, Weight | FP8Tensor],
    dtype: torch.dtype,
    device: torch.device,
    tied: bool,
    keeps_bfloat16: bool = False,
) -> ModelWeights:
    """Arranges a checkpoint's tensors (transformers' names, fused experts) for decoding.

    Matrices in FP8 stay so, except projections joined with unquantized ones, which is logged.

    Args:
        tied: the LM head is the embedding, even if the checkpoint stores both.
        keeps_bfloat16: bfloat16 matrices stay so, for backends that widen them on the fly.

    Raises:
        ValueError: a tensor is missing or its shape contradicts the config.
    """
    reader = _Reader(tensors, dtype, device, keeps_bfloat16)
    exact = _Reader(tensors, torch.float32, device, used=reader.used)
    D, V = spec.hidden_size, spec.vocab_size
    layers = [_read_layer(reader, exact, f"model.layers.{i}.", layer, D) for i, layer in enumerate(spec.layers)]
    embedding_VD = reader.plain("model.embed_tokens.weight", V, D)
    weights = ModelWeights(
        spec=spec,
        embedding_VD=embedding_VD,
        layers=layers,
        norm_D=reader.plain("model.norm.weight", D),
        lm_head_VD=embedding_VD if tied else reader.linear(("lm_head.weight", V), columns=D),
    )
    if reader.partly_fp8:
        logger.warning(
            "%d projections in FP8 are joined with unquantized ones and held in %s, %s first",
            *(len(reader.partly_fp8), dtype, reader.partly_fp8[0]),
        )
    unused = set(tensors) - reader.used - ({"lm_head.weight"} if tied else set())
    if unused:
        raise ValueError(f"the runtime would ignore {len(unused)} tensors of the checkpoint, {min(unused)!r} first")
    return weights


def _read_layer(reader: _Reader, exact: _Reader, prefix: str, spec: LayerSpec, D: int) -> LayerWeights:
    a, at = spec.attention, prefix + "self_attn."
    q, k, v = a.num_heads * a.qk_head_dim, a.num_kv_heads * a.qk_head_dim, a.num_kv_heads * a.v_head_dim
    attention = AttentionWeights(
        norm_D=reader.plain(prefix + "input_layernorm.weight", D),
        qkv_OD=reader.linear(
            (at + "q_proj.weight", q), (at + "k_proj.weight", k), (at + "v_proj.weight", v), columns=D
        ),
        output_DO=reader.linear((at + "o_proj.weight", D), columns=a.num_heads * a.v_head_dim),
        q_norm_H=reader.plain(at + "q_norm.weight", a.qk_head_dim) if a.has_qk_norm else None,
        k_norm_H=reader.plain(at + "k_norm.weight", a.qk_head_dim) if a.has_qk_norm else None,
        sinks_N=reader.plain(at + "sinks", a.num_heads) if a.has_sinks else None,
        qkv_bias_O=torch.cat(
            [
                reader.plain(at + "q_proj.bias", q),
                reader.plain(at + "k_proj.bias", k),
                reader.plain(at + "v_proj.bias", v),
            ]
        )
        if a.has_bias
        else None,
        output_bias_D=reader.plain(at + "o_proj.bias", D) if a.has_bias else None,
    )
    norm_D = reader.plain(prefix + "post_attention_layernorm.weight", D)
    at = prefix + "mlp."
    mlp: DenseWeights | MoeWeights
    if isinstance(spec.mlp, DenseSpec):
        F = spec.mlp.intermediate_size
        gate_up_FD = reader.linear((at + "gate_proj.weight", F), (at + "up_proj.weight", F), columns=D)
        mlp = DenseWeights(norm_D, gate_up_FD, reader.linear((at + "down_proj.weight", D), columns=F))
    else:
        mlp = _read_moe(reader, exact, at, spec.mlp, norm_D)
    return LayerWeights(attention, mlp)


def _read_moe(reader: _Reader, exact: _Reader, at: str, moe: MoeSpec, norm_D: torch.Tensor) -> MoeWeights:
    D, E, I = norm_D.shape[0], moe.num_experts, moe.intermediate_size  # noqa: E741
    if moe.has_bias:
        return _read_gpt_oss_moe(reader, exact, at, moe, norm_D)
    bias = exact.plain(at + "gate.e_score_correction_bias", E) if moe.has_correction_bias else None
    return MoeWeights(
        norm_D=norm_D,
        router_ED=exact.plain(at + "gate.weight", E, D),
        correction_bias_E=bias,
        gate_up_EID=reader.packed_or_plain(at + "experts.gate_up_proj", (E, 2 * I, D)),
        down_EDI=reader.packed_or_plain(at + "experts.down_proj", (E, D, I)),
    )


def _read_gpt_oss_moe(reader: _Reader, exact: _Reader, at: str, moe: MoeSpec, norm_D: torch.Tensor) -> MoeWeights:
    """gpt-oss has other router names, interleaved gate and up rows, and transposed unpacked experts."""
    D, E, I = norm_D.shape[0], moe.num_experts, moe.intermediate_size  # noqa: E741

    def expert(name: str, out: int, contraction: int) -> Weight:
        is_packed = isinstance(reader.tensors.get(name), MXFP4Tensor)
        weight = reader.packed_or_plain(name, (E, out, contraction) if is_packed else (E, contraction, out))
        return weight if isinstance(weight, MXFP4Tensor) else weight.transpose(1, 2).contiguous()

    return MoeWeights(
        norm_D=norm_D,
        router_ED=exact.plain(at + "router.weight", E, D),
        correction_bias_E=None,
        gate_up_EID=_gate_rows_first(expert(at + "experts.gate_up_proj", 2 * I, D)),
        down_EDI=expert(at + "experts.down_proj", D, I),
        router_bias_E=exact.plain(at + "router.bias", E),
        gate_up_bias_EI=_gate_rows_first(reader.plain(at + "experts.gate_up_proj_bias", E, 2 * I)),
        down_bias_ED=reader.plain(at + "experts.down_proj_bias", E, D),
    )


def _gate_rows_first(weight: WeightT) -> WeightT:
    """De-interleaves the gate and up rows of [E, 2I, ...]: all gate rows first."""
    if isinstance(weight, MXFP4Tensor):
        return MXFP4Tensor(_gate_rows_first(weight.codes), _gate_rows_first(weight.scales))
    return torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)
