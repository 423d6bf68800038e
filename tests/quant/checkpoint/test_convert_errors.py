"""Everything that can be wrong with a conversion: one line, and nothing half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import convert, load_checkpoint, load_model
from speedstack.quant.checkpoint.formats import detect
from tests.packing import save_packed

MakeFamily = Callable[[str], PreTrainedModel]
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("model_type", "target", "reason"),
    [
        ("gpt_oss", "compressed-tensors", "gpt_oss experts have biases and interleaved rows"),
        ("gpt_oss", "mimo", "which MiMo's store_dtype mxfp4 cannot express; choose one of gpt-oss, gguf, plain"),
        ("gpt_oss", "deepseek-v4", "gpt_oss experts have biases"),
        ("qwen3_moe", "gpt-oss", "loaders read gpt-oss' blocks and scales for gpt_oss models alone, not for qwen3_moe"),
        ("deepseek_v4", "gguf", "llama.cpp has no architecture for deepseek_v4"),
    ],
)
def test_pairs_that_cannot_be(
    model_type: str, target: str, reason: str, make_family: MakeFamily, tmp_path: Path
) -> None:
    make_family(model_type).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"format {target} is not for {model_type}: .*") as caught:
        convert(tmp_path / "plain", target, tmp_path / "out")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_quantized_tensors_that_the_config_keeps_quiet_about(plain: Path, refuses: Callable[..., Any]) -> None:
    tensors = load_file(plain / "model.safetensors")
    name = next(name for name in tensors if ".experts." in name)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        save_file(tensors | {name: tensors[name].to(dtype)}, plain / "model.safetensors")
        refuses(plain, "compressed-tensors", "though config.json names no quantization")
        with pytest.raises(ValueError, match=r"though config\.json names no quantization"):
            load_checkpoint(plain)
    linear = next(name for name in tensors if "q_proj" in name)
    save_file(tensors | {linear: tensors[linear].to(torch.float8_e4m3fn)}, plain / "model.safetensors")
    refuses(plain, "compressed-tensors", "is F8_E4M3, quantized and no routed expert")
    refuses(plain, "plain", "is F8_E4M3 though .* names no quantization: its quantization_config is missing")
    with pytest.raises(ValueError, match="is FP8, which the format"):
        load_checkpoint(plain)


def test_unknown_format_names_the_nearest(plain: Path, refuses: Callable[..., Any]) -> None:
    refuses(plain, "gptoss", "unknown checkpoint format 'gptoss'; did you mean 'gpt-oss'")
    refuses(plain, "q4_k_m", "unknown checkpoint format 'q4_k_m'; formats: compressed-tensors, gpt-oss, mimo")


def test_already_there_and_quantized_otherwise(
    plain: Path, packed: Path, edit_config: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    refuses(plain, "plain", "is in the format plain already")
    refuses(packed, "compressed-tensors", "is in the format compressed-tensors already")
    edit_config(plain, quantization_config={"quant_method": "gptq"})
    refuses(plain, "mimo", "is quantized as gptq: only unquantized weights, FP8 in tiles and the MXFP4 formats")
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    edit_config(plain, quantization_config=fp8 | {"weight_block_size": [128, 64]})
    refuses(plain, "mimo", r"config\.json: weight_block_size \[128, 64\] is not supported")
    edit_config(plain, quantization_config=fp8 | {"fmt": "e5m2"})
    refuses(plain, "mimo", r"config\.json: fmt 'e5m2' is not supported")
    edit_config(plain, quantization_config=fp8 | {"store_dtype": "nvfp4"})
    refuses(plain, "mimo", r"config\.json: store_dtype 'nvfp4' of FP8 checkpoints is not known")
    mimo = {"quant_method": "fp8", "store_dtype": "mxfp4"}
    edit_config(plain, quantization_config=mimo | {"weight_block_size": [64, 64]})
    refuses(plain, "gguf", r"config\.json: weight_block_size \[64, 64\] is not supported")
    sizes: tuple[Any, ...] = (None, 128, {}, "128")
    for size in sizes:
        edit_config(plain, quantization_config=mimo | {"weight_block_size": size})
        refuses(plain, "gguf", rf"config\.json: weight_block_size {size} is not supported")
    edit_config(plain, quantization_config=mimo | {"mxfp4_block_size": 16})
    refuses(plain, "gguf", r"mxfp4_block_size 16 is not MXFP4")


@pytest.mark.parametrize("groups", [[{"targets": []}], {"group_0": None}, {"group_0": ["Linear"]}, "group_0", 3])
def test_groups_that_are_none(
    groups: Any, packed: Path, edit_config: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    edit_config(packed, quantization_config=quantization | {"config_groups": groups})
    refuses(packed, "mimo", r"config\.json: config_groups is no object of objects")
    with pytest.raises(ValueError, match="config_groups is no object of objects"):
        load_model(packed)


def test_quantized_layers_that_are_no_experts(
    packed: Path, plain: Path, tmp_path: Path, edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(packed, lambda tensors: tensors.update({f"{name}_packed": torch.zeros(4, dtype=torch.uint8)}))
    refuses(packed, "gguf", r"q_proj\.weight_packed is quantized and no routed expert")
    edit_weights(plain, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refuses(plain, "gguf", r"q_proj\.weight is F8_E4M3, quantized and no routed expert: format plain")


def test_missing_shards_and_tensors(
    packed: Path, tmp_path: Path, edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    path = tmp_path / "shards"
    convert(packed, "mimo", path, max_shard_bytes=60_000)
    shards = sorted(path.glob("*.safetensors"))
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    lost = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    index_file.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.lost": shards[0].name}}))
    refuses(path, "gguf", rf"{shards[0].name} lacks the tensor model\.lost although model.safetensors.index.json names")
    index_file.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.lost": "model-9.safetensors"}}))
    refuses(path, "gguf", r"model-9\.safetensors is missing although model\.safetensors\.index\.json names it")
    index_file.write_text(json.dumps(index))
    shards[1].rename(tmp_path / "elsewhere")
    refuses(path, "gguf", f"{shards[1].name} is missing although")
    edit_weights(packed, lambda tensors: tensors.pop(lost))
    refuses(packed, "gguf", f"lacks the tensor {lost}")
    edit_weights(packed, lambda tensors: tensors.pop(lost.replace("weight_scale", "weight_packed")))
    refuses(packed, "gguf", r"lacks the tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight_packed")


def test_models_without_experts_or_parts_of_them(
    plain: Path, edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    original = load_file(plain / WEIGHTS)

    def without(part: str) -> None:
        edit_weights(plain, lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])

    without(".layers.2.mlp.experts.")
    refuses(plain, "gguf", r"lacks the experts model\.layers\.2\.mlp\.experts\.gate_up_proj")
    without(".experts.")
    refuses(plain, "gguf", "has no routed experts that unquantized safetensors would name")
    save_file(original, plain / WEIGHTS)
    without("model.norm.weight")
    refuses(plain, "gguf", r"lacks the tensor model\.norm\.weight")
    save_file(original, plain / WEIGHTS)
    without(".experts.7.")
    refuses(plain, "gguf", r"have shape \(7, 64, 64\), config\.json asks for \(8, 64, 64\)")


def test_wrong_shapes(
    plain: Path, edit_config: Callable[..., Any], edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    original = load_file(plain / WEIGHTS)
    edit_weights(plain, lambda tensors: tensors.update({name: torch.zeros(32, 96)}))
    refuses(plain, "gguf", rf"{name} has shape \(32, 96\), .* has \(32, 64\): experts of one layer have one shape")
    edit_weights(plain, lambda tensors: tensors.update(original | {"model.norm.weight": torch.ones(96)}))
    refuses(plain, "gguf", r"model\.norm\.weight has shape \(96,\), config\.json asks for \(64,\)")
    edit_weights(plain, lambda tensors: tensors.update(original))
    edit_config(plain, moe_intermediate_size=64)
    refuses(plain, "gguf", r"have shape \(8, 64, 64\), config\.json asks for \(8, 128, 64\)")


def test_experts_with_nan(
    plain: Path,
    tmp_path: Path,
    contents: Callable[..., Any],
    edit_weights: Callable[..., Any],
    refuses: Callable[..., Any],
) -> None:
    """In the last layer: met when most of the result has been written. An older result stays as it is."""
    convert(plain, "gguf", tmp_path / "out")
    before = contents(tmp_path / "out")
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    edit_weights(plain, lambda tensors: tensors[name].view(-1)[5].fill_(torch.nan))
    refuses(plain, "gguf", r"model\.layers\.2\.mlp\.experts\.7 \(down_proj\): cannot quantize NaN or infinity")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("source_format", ["compressed-tensors", "mimo", "deepseek-v4", "gguf"])
def test_nan_scales(
    source_format: str, packed: Path, tmp_path: Path, edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    if source_format != "compressed-tensors":
        convert(packed, source_format, tmp_path / "source")
        packed = tmp_path / "source"
    if source_format == "gguf":
        content = bytearray((packed / "experts.gguf").read_bytes())
        content[-(17 * 32 * 64 // 32) :: 17] = b"\xff" * 64
        (packed / "experts.gguf").write_bytes(content)
    else:
        suffix = "scale" if source_format == "deepseek-v4" else "weight_scale"
        name = f"model.layers.1.mlp.experts.3.up_proj.{suffix}"
        edit_weights(packed, lambda tensors: tensors[name].view(torch.uint8).view(-1)[1].fill_(255))
    target = "mimo" if source_format != "mimo" else "gguf"
    refuses(packed, target, "has the byte 255, which is NaN, for .* scales: the checkpoint is damaged")
    with pytest.raises(ValueError, match="has the byte 255"):
        load_checkpoint(packed)


def test_nan_scales_of_gpt_oss(
    make_family: MakeFamily, tmp_path: Path, edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    save_packed(make_family("gpt_oss"), tmp_path / "source")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    edit_weights(tmp_path / "source", lambda tensors: tensors[name].view(-1)[1].fill_(255))
    refuses(tmp_path / "source", "gguf", f"{name} has the byte 255")
    edit_weights(tmp_path / "source", lambda tensors: tensors.update({name: torch.zeros(4, 64, 4, dtype=torch.uint8)}))
    refuses(tmp_path / "source", "gguf", rf"{name} has shape \(4, 64, 4\), config\.json asks for \(4, 64, 3\)")
    blocks = name.replace("scales", "blocks")
    edit_weights(tmp_path / "source", lambda tensors: tensors.update({blocks: torch.zeros(4, 64, 3, 8).byte()}))
    refuses(tmp_path / "source", "gguf", r"is U8 \(4, 64, 3, 8\), not U8 \[experts, out, in / 32, 16\]")


def test_scales_beyond_bfloat16(
    packed: Path,
    tmp_path: Path,
    stored: Callable[..., Any],
    edit_weights: Callable[..., Any],
    refuses: Callable[..., Any],
) -> None:
    """Byte 254 is no defect between packed formats; as ordinary numbers its values may be infinite."""
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    edit_weights(packed, lambda tensors: tensors[name].fill_(254))
    convert(packed, "mimo", tmp_path / "out")
    assert (stored(tmp_path / "out")[name] == 254).all()
    refuses(packed, "plain", r"model\.layers\.1\.mlp\.experts\.3: its scales exceed the range", tmp_path / "other")


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_damaged_gguf(size: int, packed: Path, tmp_path: Path, refuses: Callable[..., Any]) -> None:
    convert(packed, "gguf", tmp_path / "source")
    file = tmp_path / "source" / "experts.gguf"
    file.write_bytes(file.read_bytes()[:size])
    refuses(tmp_path / "source", "mimo", r"experts\.gguf is truncated or corrupt")
    file.unlink()
    refuses(tmp_path / "source", "mimo", r"experts\.gguf is missing although config\.json says")


def test_places_for_the_result(packed: Path, tmp_path: Path, refuses: Callable[..., Any]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep")
    for occupied in (tmp_path / "notes", tmp_path / "notes" / "todo.txt"):
        refuses(packed, "mimo", "exists and is not a model directory: choose another path", occupied)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "keep"
    refuses(packed, "mimo", "is or holds .*, from which the result is made", packed)
    (packed.parent / "config.json").write_text('{"model_type": "mixtral"}')
    refuses(packed, "mimo", "is or holds .*, from which the result is made", packed.parent)
    (packed.parent / "config.json").unlink()
    for content, message in (
        ('{"name": "a web page"}', "is not a model directory"),
        ('{"model_type": "mimo"}', "original"),
    ):
        site = tmp_path / message
        (site / "original").mkdir(parents=True)
        (site / "original" / "kept.txt").write_text("keep")
        (site / "config.json").write_text(content)
        refuses(packed, "mimo", message, site)
        assert (site / "original" / "kept.txt").read_text() == "keep"
    refuses(tmp_path / "nowhere", "mimo", "no model directory at .*/nowhere")
    with pytest.raises(OSError, match=r"cannot write .*todo.txt/model") as caught:
        convert(packed, "mimo", tmp_path / "notes" / "todo.txt" / "model")
    assert "\n" not in str(caught.value)
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match=r"cannot write .*/locked/model"):
            convert(packed, "mimo", tmp_path / "locked" / "model")
    (tmp_path / "out").mkdir()
    convert(packed, "mimo", tmp_path / "out")
    convert(packed, "gguf", tmp_path / "out")
    assert detect(tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())).name == "gguf"
