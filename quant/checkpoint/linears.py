"""A checkpoint's tensors other than routed experts: passed through, or in FP8 tiles if the format has them.

Without FP8 in the target format, FP8 becomes bfloat16, the one lossy conversion (element times float32 scale has more
digits); it is announced. These formats' makers keep the LM head unquantized, so an FP8 head is declared in config.json
(`fp8.HEAD_FIELD`).
"""

import torch

from speedstack.quant.checkpoint.files import CONFIG_FILE, WeightFiles
from speedstack.quant.checkpoint.formats.codec import Codec, read_fp8
from speedstack.quant.fp8 import TILE_SIZE, FP8Tensor, quantize_fp8

# Linear layers of attention and dense MLPs, by the last part of the module name.
_FP8_LEAVES = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    *("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "wq_a", "wq_b", "wkv", "wo_a", "wo_b"),
)
# DeepSeek-V4's sparse attention keeps the first two in full precision; experts here belong to a prediction head.
_NEVER_FP8 = (".compressor.", ".indexer.", ".experts.")
_HEADS = ("lm_head", "head")  # by family
_QUANTIZED_DTYPES = ("U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0")


def scale_name(codec: type[Codec], name: str) -> str | None:
    """The name of an FP8 tensor's scales; None if the format has no FP8."""
    if codec.linear_scale is None or not name.endswith(".weight"):
        return None
    return f"{name.removesuffix('weight')}{codec.linear_scale[0]}"


def other_names(files: WeightFiles, codec: type[Codec], expert_names: set[str]) -> list[str]:
    """Names of all tensors except experts and scales, unordered. Raises ValueError for unexpected quantized tensors."""
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
    """Raises ValueError for quantized tensors if config.json names no quantization."""
    for name in sorted(files.names()):
        if files.dtype(name) in _QUANTIZED_DTYPES:
            raise ValueError(
                f"{files.path}: {name} is {files.dtype(name)} though {CONFIG_FILE} names no quantization: its "
                "quantization_config is missing"
            )


def read_linear(files: WeightFiles, codec: type[Codec], name: str, shape: tuple[int, ...]) -> torch.Tensor | FP8Tensor:
    """One of `other_names`. Raises ValueError if it is missing or misshapen, NaN in FP8, or not meaningful alone."""
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
    """The tensors that store `tensor`; FP8 that the format cannot hold exactly becomes bfloat16."""
    if isinstance(tensor, torch.Tensor):
        return {name: tensor}
    scales = scale_name(codec, name)
    stored = None if codec.linear_scale is None else tensor.with_scales(codec.linear_scale[1])
    if stored is None or scales is None:
        return {name: tensor.dequantize(torch.bfloat16)}
    return {name: stored.codes_OI, scales: stored.scales_PQ}


def is_fp8_linear(codec: type[Codec], name: str) -> bool:
    """Whether the format's makers store this linear weight in FP8."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    is_linear = name.endswith(".weight") and leaf in _FP8_LEAVES and leaf not in codec.plain_linears
    return is_linear and not any(part in name for part in _NEVER_FP8)


def is_whole_tiles(shape: tuple[int, ...]) -> bool:
    """Whether whole FP8 tiles cover a matrix: loaders disagree on partial ones."""
    return len(shape) == 2 and not any(size % TILE_SIZE for size in shape)


def to_fp8(tensor: torch.Tensor | FP8Tensor, codec: type[Codec], name: str) -> torch.Tensor | FP8Tensor:
    """`tensor` in the format's FP8 if it is whole tiles, else itself.

    FP8 with unsupported scales is rounded again. Raises ValueError for NaN and infinity.
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
    """Modules of unquantized stored matrices, for a config's list of unquantized modules.

    Embeddings are no linear layers; an LM head tied to one is not stored but listed.
    """
    has_head = any(f"{head}.weight" in {*shapes, *fp8_names} for head in _HEADS)
    modules = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name and name not in fp8_names
    ]
    return modules if has_head else [*modules, "lm_head"]
