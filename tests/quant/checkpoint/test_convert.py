"""Conversion between all formats: every pair and family, byte for byte; and everything that can be wrong with one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MiMoV2FlashForCausalLM, PreTrainedModel

from speedstack.quant.checkpoint import FORMATS, convert, load_checkpoint, load_model, save_packed
from speedstack.quant.checkpoint.formats import detect
from speedstack.quant.checkpoint.names import FAMILIES, hub_names
from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor

MakeFamily = Callable[[str], PreTrainedModel]
PACKED = [name for name in FORMATS if name != "plain"]
WEIGHTS = "model.safetensors"


def able(model_type: str) -> list[str]:
    """Packed formats that can express the family."""
    return [name for name in PACKED if FORMATS[name].refusal(hub_names(model_type)) is None]


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, read without our code."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def edit_config(path: Path, **changes: Any) -> None:
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    (path / WEIGHTS).unlink()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def plain(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "plain"))


@pytest.fixture
def packed(tiny_packed_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_packed_dir, tmp_path / "packed"))


@pytest.fixture(scope="module")
def fp8_model(make_tiny_model: Callable[..., MiMoV2FlashForCausalLM]) -> MiMoV2FlashForCausalLM:
    """All matrices of whole tiles of 128 x 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 2}
    return make_tiny_model(**sizes).bfloat16()


def test_every_family_has_two_packed_formats_or_more() -> None:
    assert {model_type: able(model_type) for model_type in ("gpt_oss", "deepseek_v4", "qwen3_moe")} == {
        "gpt_oss": ["gpt-oss", "gguf"],
        "deepseek_v4": ["compressed-tensors", "mimo", "deepseek-v4"],
        "qwen3_moe": ["compressed-tensors", "mimo", "deepseek-v4", "gguf"],
    }
    assert all(len(able(model_type)) >= 2 for model_type in FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_pairs_are_bit_exact(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """One way, all other ways and back lead to the same files, byte for byte, and load as the same codes and scales."""
    model = make_family(model_type).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    save_packed(model, tmp_path / "saved")
    expected = load_checkpoint(tmp_path / "saved").tensors
    for first in able(model_type):
        convert(tmp_path / "plain", first, tmp_path / first)
        assert contents(tmp_path / first).keys() - {"model.safetensors", "experts.gguf"} == {
            "config.json",
            "generation_config.json",
        }
        loaded = load_checkpoint(tmp_path / first).tensors
        assert loaded.keys() == expected.keys()
        num_packed = 0
        for name, tensor in loaded.items():
            other = expected[name]
            if isinstance(tensor, MXFP4Tensor):
                assert isinstance(other, MXFP4Tensor)
                assert torch.equal(tensor.codes, other.codes) and torch.equal(tensor.scales, other.scales)
                num_packed += 1
            else:
                assert isinstance(other, torch.Tensor) and torch.equal(tensor, other)
        assert num_packed >= 2
    for first in able(model_type):
        for second in set(able(model_type)) - {first}:
            result = convert(tmp_path / first, second, tmp_path / "pair")
            assert (result.source_format, result.target_format) == (first, second)
            assert contents(tmp_path / "pair") == contents(tmp_path / second)
    native = able(model_type)[0]
    assert stored(tmp_path / native).keys() == stored(tmp_path / "saved").keys()
    for name, tensor in stored(tmp_path / "saved").items():
        assert torch.equal(tensor, stored(tmp_path / native)[name]), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_load_from_every_format(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """What training and the engine start from is the same model, whichever format it is in; plain is one of them."""
    model = make_family(model_type).bfloat16()
    save_packed(model, tmp_path / "saved")
    expected = load_model(tmp_path / "saved", dtype=torch.bfloat16).state_dict()
    (source_type,) = {name for name in PACKED if name in ("gpt-oss", "compressed-tensors")} & set(able(model_type))
    for name in {*able(model_type), "plain"} - {source_type}:
        convert(tmp_path / "saved", name, tmp_path / name)
        loaded = load_model(tmp_path / name, dtype=torch.bfloat16).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items()), name


@pytest.mark.parametrize("target", ["mimo", "gguf", "deepseek-v4"])
def test_shards_do_not_matter(target: str, packed: Path, tmp_path: Path) -> None:
    convert(packed, target, tmp_path / "one")
    convert(packed, "deepseek-v4" if target == "mimo" else "mimo", tmp_path / "shards", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "shards").values())
    convert(tmp_path / "shards", target, tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "again")


def test_scale_rule_and_dtypes(plain: Path, tmp_path: Path, make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    """A float32 source, another rule, and back to a plain directory in the model's own dtype."""
    save_packed(make_tiny_model(), tmp_path / "saved", scale_rule="mse")
    convert(plain, "compressed-tensors", tmp_path / "converted", scale_rule="mse")
    saved, converted = stored(tmp_path / "saved"), stored(tmp_path / "converted")
    assert saved.keys() == converted.keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in saved.items())
    convert(tmp_path / "converted", "plain", tmp_path / "values")
    assert stored(tmp_path / "values").keys() == stored(plain).keys()
    assert {tensor.dtype for tensor in stored(tmp_path / "values").values()} == {torch.float32}
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "values", plain)]
    assert configs[0] == configs[1]


def test_side_files_and_extra_tensors(packed: Path, tmp_path: Path) -> None:
    """The tokenizer goes along, and so do heads for multi-token prediction; other weights and directories do not."""
    extra = {"model.mtp.layers.0.weight": torch.randn(4)}
    edit_weights(packed, lambda tensors: tensors.update(extra))
    (packed / "LICENSE").write_text("free")
    (packed / "pytorch_model.bin").write_text("old")
    (packed / "pytorch_model.bin.index.json").write_text("{}")
    (packed / "dflash").mkdir()
    with pytest.warns(UserWarning, match="the sub-directories dflash of .* are not copied"):
        convert(packed, "mimo", tmp_path / "out")
    copied = contents(tmp_path / "out")
    expected = contents_without_directories(packed)
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert copied[name] == expected[name]
    assert copied.keys() == expected.keys() - {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert torch.equal(stored(tmp_path / "out")["model.mtp.layers.0.weight"], extra["model.mtp.layers.0.weight"])


def contents_without_directories(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_unquantized_prediction_head_with_experts(packed: Path, tmp_path: Path) -> None:
    """Their names are those of packed experts in MiMo's layout; their dtype tells them apart."""
    name = "model.mtp.0.mlp.experts.0.{}_proj.weight"
    extra = {name.format(part): torch.randn(32, 32) for part in ("gate", "up", "down")}
    edit_weights(packed, lambda tensors: tensors.update(extra))
    convert(packed, "mimo", tmp_path / "mimo")
    convert(tmp_path / "mimo", "deepseek-v4", tmp_path / "deepseek")
    for directory in ("mimo", "deepseek"):
        tensors = stored(tmp_path / directory)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in extra.items())


def test_fp8_linears(fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path) -> None:
    """As Xiaomi stores them: FP8 with float32 scales, all but o_proj; lossless to DeepSeek's only with E8M0 scales."""
    save_packed(fp8_model, tmp_path / "packed")
    convert(tmp_path / "packed", "mimo", tmp_path / "mimo", linears="fp8")
    tensors = stored(tmp_path / "mimo")
    for layer in range(3):
        assert tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].dtype == torch.bfloat16
        for part in ("q", "k", "v"):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            fp8 = FP8Tensor(tensors[name], tensors[f"{name}_scale_inv"])
            error = (fp8.dequantize() - fp8_model.state_dict()[name].float()).abs()
            assert error.max() < 448 * fp8.scales_PQ.max() / 16
    quantization = json.loads((tmp_path / "mimo" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in quantization["ignored_layers"]
    assert "model.layers.1.mlp.gate" in quantization["ignored_layers"]
    assert not any("q_proj" in name or "experts" in name for name in quantization["ignored_layers"])

    with pytest.warns(UserWarning, match="12 linear layers of .* are FP8, which DeepSeek.* rounded to bfloat16"):
        result = convert(tmp_path / "mimo", "deepseek-v4", tmp_path / "rounded")
    assert result.num_dequantized == 12
    convert(tmp_path / "packed", "deepseek-v4", tmp_path / "deepseek", linears="fp8")
    assert stored(tmp_path / "deepseek")["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    convert(tmp_path / "deepseek", "mimo", tmp_path / "exact")
    convert(tmp_path / "exact", "deepseek-v4", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "deepseek")
    for name in ("mimo", "deepseek"):
        loaded = load_checkpoint(tmp_path / name).tensors
        with pytest.warns(UserWarning, match="FP8"):
            convert(tmp_path / name, "compressed-tensors", tmp_path / "plain-linears")
        again = load_checkpoint(tmp_path / "plain-linears").tensors
        for key, tensor in loaded.items():
            other = again[key]
            if isinstance(tensor, torch.Tensor):
                assert isinstance(other, torch.Tensor) and torch.equal(tensor, other)
                assert tensor.dtype != torch.float8_e4m3fn


def test_fp8_is_for_formats_that_have_it(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format gguf has no FP8 linear layers"):
        convert(packed, "gguf", tmp_path / "out", linears="fp8")
    assert not (tmp_path / "out").exists()


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


def test_cautions(make_family: MakeFamily, packed: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    convert(packed, "mimo", tmp_path / "out")
    convert(packed, "deepseek-v4", tmp_path / "out")
    assert not [str(entry.message) for entry in recwarn if entry.category is UserWarning]
    with pytest.warns(UserWarning, match=r"experts\.gguf holds the routed experts alone"):
        convert(packed, "gguf", tmp_path / "out")
    save_packed(make_family("olmoe"), tmp_path / "olmoe")
    with pytest.warns(UserWarning, match="vLLM and SGLang read MiMo's .* for MiMo models alone, not for olmoe"):
        convert(tmp_path / "olmoe", "mimo", tmp_path / "out")


def refuses(source: Path, target: str, match: str, out: Path | None = None) -> None:
    """One line, and nothing half-written beside the source."""
    before = sorted(entry.name for entry in source.parent.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        convert(source, target, out or source.parent / "out")
    assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in source.parent.iterdir()) == before


def test_quantized_tensors_that_the_config_keeps_quiet_about(plain: Path) -> None:
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
    with pytest.raises(ValueError, match="is FP8, which the format"):
        load_checkpoint(plain)


def test_nan_scales_of_linears(fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path) -> None:
    save_packed(fp8_model, tmp_path / "packed")
    convert(tmp_path / "packed", "mimo", tmp_path / "mimo", linears="fp8")
    edit_weights(
        tmp_path / "mimo",
        lambda tensors: next(t for name, t in tensors.items() if name.endswith("weight_scale_inv")).fill_(torch.nan),
    )
    refuses(tmp_path / "mimo", "deepseek-v4", "scales hold NaN or infinity")


def test_unknown_format_names_the_nearest(plain: Path) -> None:
    refuses(plain, "gptoss", "unknown checkpoint format 'gptoss'; did you mean 'gpt-oss'")
    refuses(plain, "q4_k_m", "unknown checkpoint format 'q4_k_m'; formats: compressed-tensors, gpt-oss, mimo")


def test_already_there_and_quantized_otherwise(plain: Path, packed: Path) -> None:
    refuses(plain, "plain", "is in the format plain already")
    refuses(packed, "compressed-tensors", "is in the format compressed-tensors already")
    edit_config(plain, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    refuses(plain, "mimo", "is quantized as fp8: only unquantized weights and the MXFP4 formats")
    mimo = {"quant_method": "fp8", "store_dtype": "mxfp4"}
    edit_config(plain, quantization_config=mimo | {"weight_block_size": [64, 64]})
    refuses(plain, "gguf", r"config\.json: weight_block_size \[64, 64\] is not supported")
    edit_config(plain, quantization_config=mimo | {"mxfp4_block_size": 16})
    refuses(plain, "gguf", r"mxfp4_block_size 16 is not MXFP4")


def test_quantized_layers_that_are_no_experts(packed: Path, plain: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(packed, lambda tensors: tensors.update({f"{name}_packed": torch.zeros(4, dtype=torch.uint8)}))
    refuses(packed, "gguf", r"q_proj\.weight_packed is quantized and no routed expert")
    edit_weights(plain, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refuses(plain, "gguf", r"q_proj\.weight is F8_E4M3, quantized and no routed expert: format plain")


def test_missing_shards_and_tensors(packed: Path, tmp_path: Path) -> None:
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


def test_models_without_experts_or_parts_of_them(plain: Path) -> None:
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


def test_wrong_shapes(plain: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    original = load_file(plain / WEIGHTS)
    edit_weights(plain, lambda tensors: tensors.update({name: torch.zeros(32, 96)}))
    refuses(plain, "gguf", rf"{name} has shape \(32, 96\), .* has \(32, 64\): experts of one layer have one shape")
    edit_weights(plain, lambda tensors: tensors.update(original | {"model.norm.weight": torch.ones(96)}))
    refuses(plain, "gguf", r"model\.norm\.weight has shape \(96,\), config\.json asks for \(64,\)")
    edit_weights(plain, lambda tensors: tensors.update(original))
    edit_config(plain, moe_intermediate_size=64)
    refuses(plain, "gguf", r"have shape \(8, 64, 64\), config\.json asks for \(8, 128, 64\)")


def test_experts_with_nan(plain: Path, tmp_path: Path) -> None:
    """In the last layer: met when most of the result has been written. An older result stays as it is."""
    convert(plain, "gguf", tmp_path / "out")
    before = contents(tmp_path / "out")
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    edit_weights(plain, lambda tensors: tensors[name].view(-1)[5].fill_(torch.nan))
    refuses(plain, "gguf", r"model\.layers\.2\.mlp\.experts\.7 \(down_proj\): cannot quantize NaN or infinity")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("source_format", ["compressed-tensors", "mimo", "deepseek-v4", "gguf"])
def test_nan_scales(source_format: str, packed: Path, tmp_path: Path) -> None:
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


def test_nan_scales_of_gpt_oss(make_family: MakeFamily, tmp_path: Path) -> None:
    save_packed(make_family("gpt_oss"), tmp_path / "source")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    edit_weights(tmp_path / "source", lambda tensors: tensors[name].view(-1)[1].fill_(255))
    refuses(tmp_path / "source", "gguf", f"{name} has the byte 255")
    edit_weights(tmp_path / "source", lambda tensors: tensors.update({name: torch.zeros(4, 64, 4, dtype=torch.uint8)}))
    refuses(tmp_path / "source", "gguf", rf"{name} has shape \(4, 64, 4\), config\.json asks for \(4, 64, 3\)")
    blocks = name.replace("scales", "blocks")
    edit_weights(tmp_path / "source", lambda tensors: tensors.update({blocks: torch.zeros(4, 64, 3, 8).byte()}))
    refuses(tmp_path / "source", "gguf", r"is U8 \(4, 64, 3, 8\), not U8 \[experts, out, in / 32, 16\]")


def test_scales_beyond_bfloat16(packed: Path, tmp_path: Path) -> None:
    """Byte 254 is no defect between packed formats; as ordinary numbers its values may be infinite."""
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    edit_weights(packed, lambda tensors: tensors[name].fill_(254))
    convert(packed, "mimo", tmp_path / "out")
    assert (stored(tmp_path / "out")[name] == 254).all()
    refuses(packed, "plain", r"model\.layers\.1\.mlp\.experts\.3: its scales exceed the range", tmp_path / "other")


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_damaged_gguf(size: int, packed: Path, tmp_path: Path) -> None:
    convert(packed, "gguf", tmp_path / "source")
    file = tmp_path / "source" / "experts.gguf"
    file.write_bytes(file.read_bytes()[:size])
    refuses(tmp_path / "source", "mimo", r"experts\.gguf is truncated or corrupt")
    file.unlink()
    refuses(tmp_path / "source", "mimo", r"experts\.gguf is missing although config\.json says")


def test_places_for_the_result(packed: Path, tmp_path: Path) -> None:
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


def test_progress_counts_to_the_end(packed: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = convert(packed, "mimo", tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    total = result.num_expert_weights + result.num_other_tensors
    assert result.num_expert_weights == 4
    assert seen == [(done, total) for done in range(total + 1)]


def test_reads_no_more_than_a_tensor_at_a_time(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the means to read rather than map a file (safetensors before 0.8) the result is the same."""

    def mapping_only(*arguments: Any, **options: Any) -> Any:
        if "backend" in options:
            raise TypeError("unexpected keyword argument 'backend'")
        return safe_open(*arguments, **options)

    convert(packed, "mimo", tmp_path / "one")
    monkeypatch.setattr("speedstack.quant.checkpoint.files.safe_open", mapping_only)
    convert(packed, "mimo", tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
