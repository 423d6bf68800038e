"""The tensors that are no routed experts: FP8 in tiles where a format has it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MiMoV2FlashForCausalLM, PreTrainedModel

from speedstack.quant.checkpoint import convert, load_checkpoint
from speedstack.quant.fp8 import FP8Tensor, quantize_fp8
from tests.packing import save_packed

MakeFamily = Callable[[str], PreTrainedModel]
WEIGHTS = "model.safetensors"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def fp8_model(make_tiny_model: Callable[..., MiMoV2FlashForCausalLM]) -> MiMoV2FlashForCausalLM:
    """All matrices of whole tiles of 128 x 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 2}
    return make_tiny_model(**sizes).bfloat16()


def test_fp8_linears(
    fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path, stored: Callable[..., Any], contents: Callable[..., Any]
) -> None:
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


def test_fp8_linears_of_another_format_are_rounded_again(fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path) -> None:
    """Float32 scales are nothing that E8M0 holds: asked for FP8, DeepSeek's format gets FP8 all the same."""
    save_packed(fp8_model, tmp_path / "packed")
    convert(tmp_path / "packed", "mimo", tmp_path / "mimo", linears="fp8")
    result = convert(tmp_path / "mimo", "deepseek-v4", tmp_path / "out", linears="fp8")
    assert result.num_dequantized == 0
    source, target = load_file(tmp_path / "mimo" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj"
    values = FP8Tensor(source[f"{name}.weight"], source[f"{name}.weight_scale_inv"]).dequantize()
    expected = quantize_fp8(values, torch.float8_e8m0fnu)
    assert torch.equal(target[f"{name}.weight"].view(torch.uint8), expected.codes_OI.view(torch.uint8))
    assert torch.equal(target[f"{name}.scale"].view(torch.uint8), expected.scales_PQ.view(torch.uint8))


def test_an_fp8_head_of_cut_tiles_is_moved(
    fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path, edit_weights: Callable[..., Any], refuses: Callable[..., None]
) -> None:
    """Such a head cannot be made here, but one that comes so stays so where the new format has its scales."""
    save_packed(fp8_model, tmp_path / "packed")
    cut = quantize_fp8(torch.randn(192, 128), torch.float8_e8m0fnu)
    edit_weights(
        tmp_path / "packed",
        lambda tensors: tensors.update({name: tensors[name][:192].clone() for name in VOCABULARY}),
    )
    set_field(tmp_path / "packed", "vocab_size", 192)
    refuses(tmp_path / "packed", "mimo", r"lm_head.weight of shape \(192, 128\) is not of whole tiles", lm_head="fp8")
    convert(tmp_path / "packed", "deepseek-v4", tmp_path / "deepseek")
    head = {"lm_head.weight": cut.codes_OI, "lm_head.scale": cut.scales_PQ}
    edit_weights(tmp_path / "deepseek", lambda tensors: tensors.update(head))
    with pytest.warns(UserWarning, match="the LM head is in FP8"):
        convert(tmp_path / "deepseek", "mimo", tmp_path / "mimo", lm_head="fp8")
    moved = load_file(tmp_path / "mimo" / WEIGHTS)
    assert torch.equal(moved["lm_head.weight"].view(torch.uint8), cut.codes_OI.view(torch.uint8))
    assert torch.equal(moved["lm_head.weight_scale_inv"], cut.scales_PQ.float())
    # E8M0 does not hold every float32.
    edit_weights(tmp_path / "mimo", lambda tensors: tensors["lm_head.weight_scale_inv"].mul_(1.5))
    refuses(tmp_path / "mimo", "deepseek-v4", "is not of whole tiles", lm_head="fp8")


def set_field(directory: Path, name: str, value: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))


def test_float16_linears_become_fp8(
    fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path, edit_weights: Callable[..., Any]
) -> None:
    fp8_model.save_pretrained(tmp_path / "plain")
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_weights(tmp_path / "plain", lambda tensors: tensors.update({name: tensors[name].half()}))
    convert(tmp_path / "plain", "mimo", tmp_path / "out", linears="fp8")
    assert load_file(tmp_path / "out" / WEIGHTS)[name].dtype == torch.float8_e4m3fn


def test_settings_that_would_do_nothing(
    packed: Path, plain: Path, make_tiny_model: Callable[..., PreTrainedModel], refuses: Callable[..., None]
) -> None:
    refuses(packed, "gguf", "format gguf has no FP8 linear layers", linears="fp8")
    refuses(plain, "mimo", "has no linear layer of whole tiles of 128 x 128 that FP8 could take", linears="fp8")
    refuses(packed, "mimo", "is packed, .*: scale_rule mse is for rounding an unquantized source", scale_rule="mse")
    some = plain.parent / "some"
    make_tiny_model(hidden_size=128, intermediate_size=256).save_pretrained(some)
    with pytest.warns(UserWarning, match="9 linear layers of .* are not of whole tiles .*, such as .*_proj.weight"):
        convert(some, "mimo", plain.parent / "out", linears="fp8")
    fp8 = [name for name, tensor in load_file(plain.parent / "out" / WEIGHTS).items() if tensor.dtype.itemsize == 1]
    assert "model.layers.0.mlp.up_proj.weight" in fp8


def test_nan_scales_of_linears(
    fp8_model: MiMoV2FlashForCausalLM, tmp_path: Path, edit_weights: Callable[..., Any], refuses: Callable[..., Any]
) -> None:
    save_packed(fp8_model, tmp_path / "packed")
    convert(tmp_path / "packed", "mimo", tmp_path / "mimo", linears="fp8")
    edit_weights(
        tmp_path / "mimo",
        lambda tensors: next(t for name, t in tensors.items() if name.endswith("weight_scale_inv")).fill_(torch.nan),
    )
    refuses(tmp_path / "mimo", "deepseek-v4", "elements or scales are NaN or infinity")
