"""The tensors of a checkpoint that are no routed experts: passed through, or FP8 in tiles where a format says so.

A format without FP8 gets FP8 layers as bfloat16. That is the one lossy step between formats (an E4M3 element times a
float32 scale has more digits than bfloat16), and it is announced.

The makers of these formats keep the language-model head unquantized. In FP8 it is stored as other linear layers are,
and config.json says so (`fp8.HEAD_FIELD`), since the silence of these makers' files means the opposite.
"""

import torch

from speedstack.quant.checkpoint.files import CONFIG_FILE, WeightFiles
from speedstack.quant.checkpoint.formats.codec import Codec, read_fp8
from speedstack.quant.fp8 import TILE_SIZE, FP8Tensor, quantize_fp8

# Linear layers of attention and of dense MLPs, by the last part of their module's name.
_FP8_LEAVES = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "wq_a", "wq_b", "wkv", "wo_a", "wo_b"),
)
# DeepSeek-V4's sparse attention keeps the first two in full precision; experts that come here are a head's.
_NEVER_FP8 = (".compressor.", ".indexer.", ".experts.")
_HEADS = ("lm_head", "head")  # by family
_QUANTIZED_DTYPES = ("U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def scale_name(codec: type[Codec], name: str) -> str | None:
    """Where the scales of the FP8 tensor `name` lie; None when the format has no FP8."""
    if codec.linear_scale is None or not name.endswith(".weight"):
        return None
    return f"{name.removesuffix('weight')}{codec.linear_scale[0]}"


def other_names(files: WeightFiles, codec: type[Codec], expert_names: set[str]) -> list[str]:
    """Names of all tensors but the experts' and the scales that belong to another of them, unordered.

    Raises ValueError for quantized tensors that the format does not account for.
    """
    names = [name for name in files.names() if name not in expert_names]
    scales = {scale_name(codec, name) for name in names if files.dtype(name) == "F8_E4M3"} & set(names)
    kept = [name for name in names if name not in scales]
    for name in sorted(kept):
        if files.dtype(name) in _QUANTIZED_DTYPES and scale_name(codec, name) not in scales:
            raise ValueError(
                f"{files.path}: {name} is {files.dtype(name)}, quantized and no routed expert: format {codec.name} "
                "does not say how to read it"
            )
    return kept


def check_unquantized(files: WeightFiles) -> None:
    """Raises ValueError for quantized tensors in a directory whose config.json names no quantization."""
    for name in sorted(files.names()):
        if files.dtype(name) in _QUANTIZED_DTYPES:
            raise ValueError(
                f"{files.path}: {name} is {files.dtype(name)} though {CONFIG_FILE} names no quantization: its "
                "quantization_config is missing"
            )


def read_linear(files: WeightFiles, codec: type[Codec], name: str, shape: tuple[int, ...]) -> torch.Tensor | FP8Tensor:
    """One of `other_names`.

    Raises ValueError when it is missing or has another shape, for FP8 that is NaN, and for elements that are no values
    by themselves.
    """
    if name not in files or files.dtype(name) not in _QUANTIZED_DTYPES:
        return files.get(name, shape)
    if files.dtype(name) != "F8_E4M3":
        raise ValueError(
            f"{files.path}: {name} is {files.dtype(name)}, quantized and no routed expert: format {codec.name} does "
            "not say how to read it"
        )
    scales = scale_name(codec, name)
    if scales is None:
        raise ValueError(f"{files.path}: {name} is FP8, which the format that config.json names does not have")
    return read_fp8(files, name, scales, shape)


def write_linear(tensor: torch.Tensor | FP8Tensor, codec: type[Codec], name: str) -> dict[str, torch.Tensor]:
    """The tensors that `tensor` is stored as; FP8 the format cannot hold exactly becomes bfloat16."""
    if isinstance(tensor, torch.Tensor):
        return {name: tensor}
    scales = scale_name(codec, name)
    stored = None if codec.linear_scale is None else tensor.with_scales(codec.linear_scale[1])
    if stored is None or scales is None:
        return {name: tensor.dequantize(torch.bfloat16)}
    return {name: stored.codes_OI, scales: stored.scales_PQ}


def is_fp8_linear(codec: type[Codec], name: str) -> bool:
    """Whether `name` is the weight of a linear layer that the format's makers store in FP8."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    is_linear = name.endswith(".weight") and leaf in _FP8_LEAVES and leaf not in codec.plain_linears
    return is_linear and not any(part in name for part in _NEVER_FP8)


def is_whole_tiles(shape: tuple[int, ...]) -> bool:
    """Whether FP8 tiles cover a matrix: loaders disagree on partial ones."""
    return len(shape) == 2 and not any(size % TILE_SIZE for size in shape)


def to_fp8(tensor: torch.Tensor | FP8Tensor, codec: type[Codec], name: str) -> torch.Tensor | FP8Tensor:
    """`tensor` in the format's FP8 if it is of whole tiles, else itself.

    One that is FP8 under scales which the format cannot hold is rounded again. Raises ValueError for NaN and infinity.
    """
    assert codec.linear_scale is not None
    if isinstance(tensor, FP8Tensor):
        if tensor.with_scales(codec.linear_scale[1]) is not None:
            return tensor
        tensor = tensor.dequantize()
    is_float = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not is_float or not is_whole_tiles(tuple(tensor.shape)):
        return tensor
    try:
        return quantize_fp8(tensor.float(), codec.linear_scale[1])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def plain_matrices(shapes: dict[str, tuple[int, ...]], fp8_names: set[str]) -> list[str]:
    """Modules of the unquantized matrices among stored tensors, for a config's list of what is not quantized.

    Embeddings are no linear layers; a language-model head that is one of them is not stored, and listed all the same.
    """
    has_head = any(f"{head}.weight" in {*shapes, *fp8_names} for head in _HEADS)
    modules = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name and name not in fp8_names
    ]
    return modules if has_head else [*modules, "lm_head"]
