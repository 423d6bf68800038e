"""Heads for multi-token prediction: no layer of the model, so nothing rounds them, and nothing loses them."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import FORMATS, check_export, convert, export_model, load_checkpoint, load_model

PACKED = [name for name in FORMATS if name not in ("plain", "gpt-oss")]
IGNORED = ("ignore", "ignored_layers", "modules_to_not_convert")


@pytest.fixture
def head() -> dict[str, torch.Tensor]:
    """A head's layer with two experts, numbered after the model's layers as DeepSeek and GLM do, and MiMo's names."""
    tensors = {"model.layers.3.eh_proj.weight": torch.randn(128, 128), "model.mtp.norm.weight": torch.randn(64)}
    for index in range(2):
        for part in ("gate", "up", "down"):
            for layer in ("model.layers.3", "model.mtp.layers.0"):
                tensors[f"{layer}.mlp.experts.{index}.{part}_proj.weight"] = torch.randn(128, 128)
    return tensors


@pytest.fixture
def with_head(plain: Path, head: dict[str, torch.Tensor], edit_weights: Callable[..., Any]) -> Path:
    edit_weights(plain, lambda tensors: tensors.update(head))
    return plain


def has_head(path: Path, head: dict[str, torch.Tensor]) -> bool:
    tensors = load_file(path / "model.safetensors")
    return all(name in tensors and torch.equal(tensors[name], tensor) for name, tensor in head.items())


@pytest.mark.filterwarnings(
    "ignore:.*holds the routed experts alone", "ignore:.*linear layers of .* are not of whole tiles"
)
@pytest.mark.parametrize("target", PACKED)
def test_convert_rounds_no_head(
    target: str,
    with_head: Path,
    head: dict[str, torch.Tensor],
    tiny_packed_dir: Path,
    tmp_path: Path,
    edit_weights: Callable[..., Any],
) -> None:
    # Rounding the other linear layers, of which this one is of whole tiles, is no reason to round a head's experts.
    edit_weights(
        with_head, lambda tensors: tensors.update({"model.mtp.layers.0.self_attn.q_proj.weight": torch.randn(128, 128)})
    )
    linears = "fp8" if FORMATS[target].linear_scale else "keep"
    with pytest.warns(UserWarning, match=r"4 expert weights of .* such as model\.layers\.3\.mlp\.experts\.down_proj"):
        result = convert(with_head, target, tmp_path / "out", linears=linears)  # type: ignore[arg-type]
    experts = {name: tensor for name, tensor in head.items() if ".experts." in name}
    assert has_head(tmp_path / "out", experts)
    assert result.num_expert_weights == 4
    expected, found = load_checkpoint(tiny_packed_dir), load_checkpoint(tmp_path / "out")
    assert found.tensors.keys() == expected.tensors.keys()
    if target != "gguf":
        ignored = next(value for key, value in quantization(tmp_path / "out").items() if key in IGNORED)
        assert {name.removesuffix(".weight") for name in experts} <= set(ignored)
    convert(tmp_path / "out", "plain", tmp_path / "back")
    assert has_head(tmp_path / "back", experts)


def quantization(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_exporting_a_model_takes_its_heads_along(
    with_head: Path, head: dict[str, torch.Tensor], tiny_packed_dir: Path, tmp_path: Path, stored: Callable[..., Any]
) -> None:
    export_model(load_model(with_head), with_head, tmp_path / "out", scale_rule="even")
    assert has_head(tmp_path / "out", head)
    assert stored(tmp_path / "out").keys() - stored(tiny_packed_dir).keys() == head.keys()
    matrices = {name.removesuffix(".weight") for name, tensor in head.items() if tensor.ndim == 2}
    assert matrices <= set(quantization(tmp_path / "out")["ignore"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tensors that MiMo.* does not have")
        again = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_model(tiny_packed_dir).state_dict().items())


def test_tied_heads_and_fp8_ones(
    make_family: Callable[[str], PreTrainedModel], tmp_path: Path, stored: Callable[..., Any]
) -> None:
    """A copy of the embedding that is stored as the head stays one; a prediction head in FP8 becomes bfloat16."""
    model = make_family("qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tied, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "plain", dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[3] = 1.5
    export_model(model, tmp_path / "plain", tmp_path / "packed", scale_rule="even")
    copies = [stored(tmp_path / "packed")[name] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert all(copy[3, 0] == 1.5 and copy.dtype == torch.bfloat16 for copy in copies) and torch.equal(*copies)

    convert(tmp_path / "packed", "deepseek-v4", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    codes, scales = torch.randn(128, 128).to(torch.float8_e4m3fn), torch.full((1, 1), 2.0)
    tensors |= {"mtp.proj.weight": codes, "mtp.proj.scale": scales.to(torch.float8_e8m0fnu)}
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    export_model(model, tmp_path / "source", tmp_path / "out", scale_rule="even")
    copied = stored(tmp_path / "out")
    assert torch.equal(copied["mtp.proj.weight"].float(), codes.float() * 2)
    assert "mtp.proj.scale" not in copied


def test_heads_that_cannot_go_along_are_named(with_head: Path, tmp_path: Path) -> None:
    model = load_model(with_head)
    tensors = load_file(with_head / "model.safetensors")
    name = "model.layers.3.mlp.experts.0.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, with_head / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is I8, quantized and no routed expert"):
        check_export(model, with_head, is_packed=True)
    with pytest.raises(ValueError, match=rf"{name} is I8"):
        export_model(model, with_head, tmp_path / "out", scale_rule="even")
    assert not (tmp_path / "out").exists()
    tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight")
    save_file(tensors, with_head / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight"):
        check_export(model, with_head, is_packed=True)
