"""Checkpoint formats, one codec per file, all between `ExpertWeight`s and `MXFP4Tensor`s.

codec                what a format is, and what the formats that name every expert share
plain                unquantized safetensors
compressed_tensors   mxfp4-pack-quantized, the default export
gpt_oss              gpt-oss' fused blocks and scales
mimo                 Xiaomi's store_dtype mxfp4
deepseek_v4          DeepSeek's expert_dtype fp4
fp8                  FP8 in tiles, experts too; only read
gguf                 llama.cpp's blocks, for the experts alone
"""

import warnings
from pathlib import Path
from typing import Any

from speedstack.quant.checkpoint.files import CONFIG_FILE
from speedstack.quant.checkpoint.formats.codec import Codec, ExpertWeight, Sink, Weight
from speedstack.quant.checkpoint.formats.compressed_tensors import CompressedTensors
from speedstack.quant.checkpoint.formats.deepseek_v4 import DeepSeekV4
from speedstack.quant.checkpoint.formats.fp8 import FP8
from speedstack.quant.checkpoint.formats.gguf import EXPERTS_FILE, Gguf
from speedstack.quant.checkpoint.formats.gpt_oss import GptOss
from speedstack.quant.checkpoint.formats.mimo import MiMo
from speedstack.quant.checkpoint.formats.plain import Plain
from speedstack.quant.checkpoint.names import HubNames
from speedstack.support.near_miss import did_you_mean

__all__ = [
    "EXPERTS_FILE",
    "FORMATS",
    "Codec",
    "ExpertWeight",
    "Plain",
    "Sink",
    "Weight",
    "check_family",
    "default_format",
    "detect",
    "format_named",
]

_CODECS: tuple[type[Codec], ...] = (CompressedTensors, GptOss, MiMo, DeepSeekV4, Gguf, FP8, Plain)
FORMATS: dict[str, type[Codec]] = {codec.name: codec for codec in _CODECS if codec.is_written}


def format_named(name: str) -> type[Codec]:
    """The format of that name. Raises ValueError, with the nearest known name, for an unknown one."""
    if name not in FORMATS:
        raise ValueError(
            f"unknown checkpoint format {name!r}{did_you_mean(name, FORMATS)}; formats: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def detect(path: Path, config: dict[str, Any]) -> type[Codec]:
    """The format named by the directory's config.json. Warns about quantized activations, which are ignored. Raises
    ValueError for any other quantization.
    """
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(f"{path / CONFIG_FILE}: quantization_config is no object: download it again")
    for codec in _CODECS:
        try:
            is_described = codec.describes(config)
        except ValueError as error:
            raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
        if is_described:
            if _quantizes_activations(path, quantization or {}):
                warnings.warn(f"{path} asks for quantized activations, which are left as they are", stacklevel=3)
            return codec
    assert quantization is not None
    found = " ".join(str(quantization[key]) for key in ("quant_method", "format") if quantization.get(key))
    raise ValueError(
        f"{path} is quantized as {found or 'unknown'}: only unquantized weights, FP8 in tiles and the MXFP4 formats "
        f"{', '.join(name for name in FORMATS if name != Plain.name)} can be read"
    )


def _quantizes_activations(path: Path, quantization: dict[str, Any]) -> bool:
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{path / CONFIG_FILE}: config_groups is no object of objects: download it again")
    return any(group.get("input_activations") for group in groups.values())


def default_format(names: HubNames) -> type[Codec]:
    """A family's export format: compressed-tensors, or gpt-oss' own where that cannot express it."""
    return GptOss if names.is_fused else CompressedTensors


def check_family(codec: type[Codec], names: HubNames) -> None:
    """Raises ValueError when the format cannot express the family."""
    reason = codec.refusal(names)
    if reason is not None:
        able = [name for name, other in FORMATS.items() if other.refusal(names) is None]
        choice = f"choose one of {', '.join(able)}"
        raise ValueError(f"format {codec.name} is not for {names.model_type}: {reason}; {choice}")
