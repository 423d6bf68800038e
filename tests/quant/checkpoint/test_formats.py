"""Each format against code that is not ours: whoever defines it reads our bytes as the same values."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from speedstack.quant.checkpoint import convert, load_checkpoint, load_model
from speedstack.quant.checkpoint.formats import FORMATS, check_family
from speedstack.quant.checkpoint.formats.gguf import from_blocks, to_blocks
from speedstack.quant.checkpoint.names import FAMILIES, hub_names
from speedstack.quant.experts import contraction_last, expert_parameters
from speedstack.quant.mxfp4 import MXFP4Tensor, dequantize, quantize
from tests.packing import save_packed

MakeFamily = Callable[[str], PreTrainedModel]
IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture
def every_code() -> MXFP4Tensor:
    """Random codes, all 16 of them many times, under every scale but NaN: [255, 96]."""
    codes = torch.randint(256, (255, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(-1, 3).contiguous()
    return MXFP4Tensor(codes, scales)


def same_as_ours(path: Path, quantization_config: Any = None) -> None:
    """transformers reads the directory as we do: every tensor, and the logits, with difference zero."""
    reader: Any = AutoModelForCausalLM
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    peer, report = reader.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours = load_model(path, dtype=torch.bfloat16)
    theirs = peer.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(theirs[name].to(tensor.dtype), tensor), name
    peer.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        assert torch.equal(peer(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_transformers_reads_gpt_oss(make_family: MakeFamily, tmp_path: Path) -> None:
    model = make_family("gpt_oss").bfloat16()
    save_packed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    blocks = tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"]
    assert blocks.dtype == torch.uint8 and blocks.shape == (4, 192, 2, 16)
    assert tensors["model.layers.1.mlp.experts.down_proj_scales"].shape == (4, 64, 3)
    assert tensors["model.layers.1.mlp.experts.down_proj_bias"].shape == (4, 64)
    same_as_ours(tmp_path, Mxfp4Config(dequantize=True))


def test_transformers_unpacks_gpt_oss_blocks(every_code: MXFP4Tensor, make_family: MakeFamily, tmp_path: Path) -> None:
    """Their unpacking of what we stored, and of every code at every scale whose values bfloat16 keeps finite."""
    model = make_family("gpt_oss")
    save_packed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in expert_parameters(model).items():
        theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
        experts = model.get_submodule(name.rpartition(".")[0])
        ours = quantize(contraction_last(experts, weight.detach())).dequantize()
        assert torch.equal(theirs, contraction_last(experts, ours))
    codes, scales = every_code.codes[1:253], every_code.scales[1:253]
    theirs = convert_moe_packed_tensors(codes.view(1, 252, 3, 16), scales.view(1, 252, 3))
    ours = dequantize(MXFP4Tensor(codes, scales), torch.bfloat16)
    assert torch.equal(theirs[0].T, ours)


@pytest.mark.parametrize("model_type", ["mimo_v2_flash", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_transformers_reads_what_was_converted(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """The default formats again, written by `convert`, which edits config.json instead of saving a model's."""
    pytest.importorskip("compressed_tensors", reason="transformers reads the packed format through compressed-tensors")
    make_family(model_type).bfloat16().save_pretrained(tmp_path / "plain")
    if model_type == "gpt_oss":
        convert(tmp_path / "plain", "gguf", tmp_path / "gguf")
        convert(tmp_path / "gguf", "gpt-oss", tmp_path / "out")
        same_as_ours(tmp_path / "out", Mxfp4Config(dequantize=True))
    else:
        convert(tmp_path / "plain", "mimo", tmp_path / "mimo")
        convert(tmp_path / "mimo", "compressed-tensors", tmp_path / "out")
        same_as_ours(tmp_path / "out")


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"gpt_oss"}))
def test_transformers_reads_deepseek_v4(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """Its FP8 reader takes expert_dtype fp4 for any family, and dequantizes where there is no GPU."""
    make_family(model_type).bfloat16().save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", "deepseek-v4", tmp_path / "out")
    same_as_ours(tmp_path / "out", FineGrainedFP8Config(dequantize=True, **fp8_options(tmp_path / "out")))


def test_transformers_reads_deepseek_v4_with_fp8_linears(
    make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 2}
    make_tiny_model(**sizes).bfloat16().save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", "deepseek-v4", tmp_path / "out", linears="fp8")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.0.mlp.down_proj.scale"].dtype == torch.float8_e8m0fnu
    assert stored["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.int8
    assert stored["model.layers.1.mlp.experts.0.up_proj.scale"].dtype == torch.float8_e8m0fnu
    same_as_ours(tmp_path / "out", FineGrainedFP8Config(dequantize=True, **fp8_options(tmp_path / "out")))


def test_deepseek_v4_config(make_family: MakeFamily, tmp_path: Path) -> None:
    """The fields of DeepSeek's release; expert_dtype where transformers and where DeepSeek's own code look for it."""
    for model_type in ("deepseek_v4", "qwen3_moe"):
        save_packed(make_family(model_type), tmp_path / "packed")
        convert(tmp_path / "packed", "deepseek-v4", tmp_path / "out")
        fields = json.loads((tmp_path / "out" / "config.json").read_text())
        quantization = fields["quantization_config"]
        assert any("self_attn" in name or "attn." in name for name in quantization.pop("modules_to_not_convert"))
        assert quantization == {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
            "expert_dtype": "fp4",
        }
        assert fields.get("expert_dtype") == ("fp4" if model_type == "deepseek_v4" else None)


def fp8_options(path: Path) -> dict[str, Any]:
    """What config.json says, as an argument: on a machine with a GPU it would choose kernels instead."""
    fields = json.loads((path / "config.json").read_text())["quantization_config"]
    return {key: fields[key] for key in ("weight_block_size", "scale_fmt", "expert_dtype", "modules_to_not_convert")}


def test_transformers_unpacks_mimo_and_deepseek_bytes(every_code: MXFP4Tensor) -> None:
    """Its FP4 reader takes scales as bytes (MiMo's) and as E8M0 (DeepSeek's). Byte 0 is left out: its exponent is
    flushed to zero there.
    """
    reader = Fp8Dequantize(cast(Any, SimpleNamespace()))
    codes, scales = every_code.codes[1:], every_code.scales[1:]
    ours = dequantize(MXFP4Tensor(codes, scales))
    for their_scales in (scales, scales.view(torch.float8_e8m0fnu)):
        assert torch.equal(reader._dequantize_one(codes.view(torch.int8), their_scales, torch.float32), ours)


def test_mimo_layout_and_config(make_family: MakeFamily, tmp_path: Path) -> None:
    """The fields that Xiaomi's release has, and names and dtypes of its tensors."""
    save_packed(make_family("mimo_v2_flash").bfloat16(), tmp_path / "packed")
    convert(tmp_path / "packed", "mimo", tmp_path / "mimo")
    quantization = json.loads((tmp_path / "mimo" / "config.json").read_text())["quantization_config"]
    ignored = quantization.pop("ignored_layers")
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "store_dtype": "mxfp4",
        "mxfp4_block_size": 32,
    }
    assert {f"model.layers.{layer}.self_attn.o_proj" for layer in range(3)} <= set(ignored)
    tensors = load_file(tmp_path / "mimo" / "model.safetensors")
    up = "model.layers.1.mlp.experts.5.up_proj"
    assert tensors[f"{up}.weight"].dtype == tensors[f"{up}.weight_scale"].dtype == torch.uint8
    assert tensors[f"{up}.weight"].shape == (32, 32) and tensors[f"{up}.weight_scale"].shape == (32, 2)


def test_deepseek_v4_as_its_makers_release_it(make_family: MakeFamily, tmp_path: Path) -> None:
    """Names without `model.`, expert_dtype beside quantization_config: read, converted, and gone from the result."""
    make_family("deepseek_v4").bfloat16().save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", "deepseek-v4", tmp_path / "ours")
    from safetensors.torch import save_file

    names, released = hub_names("deepseek_v4"), hub_names("deepseek_v4").as_released()
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    renamed = {names.of(key): released.of(key) for key in load_model(tmp_path / "plain").state_dict()}
    (tmp_path / "theirs").mkdir()
    theirs = {renamed.get(key, key.removeprefix("model.")): tensor for key, tensor in tensors.items()}
    assert "embed.weight" in theirs and "layers.1.ffn.experts.0.w2.scale" in theirs
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    del fields["quantization_config"]["expert_dtype"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields | {"expert_dtype": "fp4"}))
    expected, loaded = load_model(tmp_path / "ours").state_dict(), load_model(tmp_path / "theirs").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in expected.items())
    convert(tmp_path / "theirs", "compressed-tensors", tmp_path / "packed")
    assert "expert_dtype" not in json.loads((tmp_path / "packed" / "config.json").read_text())
    assert load_checkpoint(tmp_path / "packed").tensors.keys() == load_checkpoint(tmp_path / "ours").tensors.keys()


def test_gguf_package_dequantizes_the_same_values(every_code: MXFP4Tensor) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with llama.cpp's own package")
    blocks = to_blocks(every_code)
    assert blocks.shape == (255, 3, 17)
    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(blocks.flatten(-2).numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(theirs, every_code.dequantize().numpy())
    again = from_blocks(blocks)
    assert torch.equal(again.codes, every_code.codes) and torch.equal(again.scales, every_code.scales)


def test_gguf_package_quantizes_to_blocks_we_read() -> None:
    """Its rule is OCP's floor, with ties away from even: values near the middle of two are left out."""
    gguf = pytest.importorskip("gguf", reason="compares with llama.cpp's own package")
    w_NK = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    data = gguf.quants.quantize(w_NK.numpy(), gguf.GGMLQuantizationType.MXFP4)
    theirs = from_blocks(torch.from_numpy(data).view(64, 3, 17))
    ours = quantize(w_NK, "floor")
    assert torch.equal(theirs.scales, ours.scales)
    assert torch.equal(theirs.dequantize(), ours.dequantize())


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_gguf_file_is_llama_cpp_s(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """The reader of the gguf package finds llama.cpp's names, shapes, architecture and values in the file."""
    gguf = pytest.importorskip("gguf", reason="compares with llama.cpp's own package")
    model = make_family(model_type)
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", "gguf", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "experts.gguf")
    architecture = reader.fields["general.architecture"].contents()
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    assert (model_type, architecture) in {("gpt_oss", "gpt-oss"), ("mixtral", "llama"), ("qwen3_moe", "qwen3moe")}
    known = gguf.get_tensor_name_map(arch, 2)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(expert_parameters(model)) // 2 * 3
    for name, weight in expert_parameters(model).items():
        module, _, weight_name = name.rpartition(".")
        values_EOK = quantize(contraction_last(model.get_submodule(module), weight.detach())).dequantize()
        leaves = ["down_proj"] if weight_name == "down_proj" else ["gate_proj", "up_proj"]
        for part, leaf in enumerate(leaves):
            tensor = found[f"{known.get_name(f'{module}.{leaf}')}.weight"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4
            if weight_name == "gate_up_proj":
                is_interleaved, half = model_type == "gpt_oss", values_EOK.shape[1] // 2
                rows = slice(part, None, 2) if is_interleaved else slice(part * half, (part + 1) * half)
                expected_EOK = values_EOK[:, rows]
            else:
                expected_EOK = values_EOK
            assert tuple(reversed(tensor.shape)) == expected_EOK.shape
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(theirs, expected_EOK.numpy())


def test_gguf_package_is_asked_for(make_family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    make_family("olmoe").save_pretrained(tmp_path / "plain")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"the format gguf needs the gguf package: pip install 'speedstack\[gguf\]'"):
        convert(tmp_path / "plain", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_unique_and_plain_takes_every_family() -> None:
    assert len(FORMATS) == 6
    for model_type in FAMILIES:
        check_family(FORMATS["plain"], hub_names(model_type))
