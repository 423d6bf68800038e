"""Packed directories: what is in the files, who else can read them, and how writing fails."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from speedstack.quant.checkpoint import load_checkpoint, load_model
from speedstack.quant.checkpoint.names import FAMILIES
from speedstack.quant.experts import contraction_last, enable_fake_quant, expert_parameters
from speedstack.quant.mxfp4 import MXFP4Tensor, quantize
from speedstack.quant.ptq import round_to_nearest
from tests.packing import save_packed

MakeFamily = Callable[[str], PreTrainedModel]
IDS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_loads_bit_for_bit(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """What was trained through fake-quant, what is stored, and what is loaded are the same numbers."""
    model = make_family(model_type)
    save_packed(model, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.is_packed
    assert set(checkpoint.tensors) == set(model.state_dict())
    experts = expert_parameters(model)
    for name, tensor in model.state_dict().items():
        stored = checkpoint.tensors[name]
        if name in experts:
            module = model.get_submodule(name.rpartition(".")[0])
            expected = quantize(contraction_last(module, tensor))
            assert isinstance(stored, MXFP4Tensor)
            assert torch.equal(stored.codes, expected.codes) and torch.equal(stored.scales, expected.scales)
        else:
            assert isinstance(stored, torch.Tensor)
            assert stored.dtype == tensor.dtype and torch.equal(stored, tensor)
    loaded = load_model(tmp_path)
    enable_fake_quant(model)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("scale_rule", ["floor", "rceil", "mse"])
def test_other_scale_rules(scale_rule, make_family: MakeFamily, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = make_family("mimo_v2_flash")
    save_packed(model, tmp_path, scale_rule=scale_rule)
    tensors = load_checkpoint(tmp_path).tensors
    for name, parameter in expert_parameters(model).items():
        assert torch.equal(tensors[name].codes, quantize(parameter, scale_rule).codes)  # type: ignore[union-attr]


def test_layout_on_disk(make_family: MakeFamily, tmp_path: Path) -> None:
    """Names, dtypes and shapes as compressed-tensors defines them, and 4.25 bits a weight."""
    model = make_family("mimo_v2_flash")
    save_packed(model, tmp_path)
    experts = expert_parameters(model)
    fused = experts["model.layers.1.mlp.experts.gate_up_proj"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    up = stored["model.layers.1.mlp.experts.5.up_proj.weight_packed"]
    scales = stored["model.layers.1.mlp.experts.5.up_proj.weight_scale"]
    assert up.dtype == scales.dtype == torch.uint8
    assert up.shape == (32, 32) and scales.shape == (32, 2)
    assert torch.equal(MXFP4Tensor(up, scales).dequantize(), quantize(fused[5, 32:]).dequantize())
    assert "model.layers.1.self_attn.attention_sink_bias" in stored
    packed_bytes = sum(tensor.nbytes for name, tensor in stored.items() if ".experts." in name)
    assert packed_bytes * 8 == 4.25 * sum(parameter.numel() for parameter in experts.values())


def test_quantization_config(make_family: MakeFamily, tmp_path: Path) -> None:
    """Every matrix on disk is either packed or in `ignore`: no loader may take a plain one for a quantized one."""
    for model_type in set(FAMILIES) - {"gpt_oss"}:
        save_packed(make_family(model_type), tmp_path / model_type)
        config = json.loads((tmp_path / model_type / "config.json").read_text())
        quantization = config["quantization_config"]
        assert quantization["quant_method"] == "compressed-tensors"
        assert quantization["format"] == "mxfp4-pack-quantized"
        group = quantization["config_groups"]["group_0"]
        assert group["targets"] == ["Linear"] and group["input_activations"] is None
        assert group["weights"]["group_size"] == 32 and group["weights"]["num_bits"] == 4
        with safe_open(tmp_path / model_type / "model.safetensors", framework="pt") as file:
            matrices = {name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2}  # noqa: SIM118
        plain = {name.removesuffix(".weight") for name in matrices if name.endswith(".weight")} - {"model.embed_tokens"}
        assert plain <= set(quantization["ignore"])
        assert not any(".experts." in name for name in quantization["ignore"])
        assert config["architectures"] == [type(make_family(model_type)).__name__]


@pytest.mark.parametrize("model_type", ["mimo_v2_flash", "qwen3_moe", "mixtral"])
def test_transformers_reads_it_with_difference_zero(model_type: str, make_family: MakeFamily, tmp_path: Path) -> None:
    """The reader people have: transformers with the compressed-tensors package, from the same directory."""
    pytest.importorskip("compressed_tensors", reason="transformers reads the packed format through compressed-tensors")
    model = make_family(model_type).bfloat16()
    save_packed(model, tmp_path)
    round_to_nearest(model)
    # bfloat16, because it dequantizes experts to bfloat16 whatever dtype is asked for; MXFP4 values are exact in it.
    reader: Any = AutoModelForCausalLM
    peer, report = reader.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours = load_model(tmp_path, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(peer.state_dict()[name], tensor) and torch.equal(ours.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(peer(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_compressed_tensors_unpacks_the_same_values() -> None:
    """Their decompressor on our bytes: all 16 codes at every scale that bfloat16 arithmetic keeps normal."""
    pytest.importorskip("compressed_tensors", reason="compares with compressed-tensors' own decompressor")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    codes = (torch.arange(16, dtype=torch.uint8) * 0x11).expand(240, -1).contiguous()
    scales = torch.arange(8, 248, dtype=torch.uint8)[:, None]
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    theirs = compressor.decompress({"weight_packed": codes, "weight_scale": scales}, scheme)["weight"]
    assert torch.equal(theirs.float(), MXFP4Tensor(codes, scales).dequantize())


def test_shards_hold_the_same_tensors(make_family: MakeFamily, tmp_path: Path) -> None:
    model = make_family("mimo_v2_flash")
    save_packed(model, tmp_path / "one")
    save_packed(model, tmp_path / "many", max_shard_bytes=60_000)
    shards = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    one, many = load_checkpoint(tmp_path / "one").tensors, load_checkpoint(tmp_path / "many").tensors
    assert list(one) == list(many)
    for name, tensor in one.items():
        other = many[name]
        if isinstance(tensor, MXFP4Tensor):
            assert isinstance(other, MXFP4Tensor)
            assert torch.equal(tensor.codes, other.codes) and torch.equal(tensor.scales, other.scales)
        else:
            assert isinstance(other, torch.Tensor) and torch.equal(tensor, other)


def test_bfloat16_model_and_tokenizer(
    make_family: MakeFamily, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = make_family("mimo_v2_flash").bfloat16()
    save_packed(model, tmp_path / "out" / "model", tokenizer=tiny_tokenizer)
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model" / "tokenizer.json").is_file()
    checkpoint = load_checkpoint(tmp_path / "out" / "model")
    embeddings = checkpoint.tensors["model.embed_tokens.weight"]
    assert isinstance(embeddings, torch.Tensor) and embeddings.dtype == torch.bfloat16
    round_to_nearest(model)
    loaded = load_model(tmp_path / "out" / "model", dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_replaces_a_model_and_nothing_else(make_family: MakeFamily, tmp_path: Path) -> None:
    model = make_family("mimo_v2_flash")
    target = tmp_path / "model"
    save_packed(model, target)
    (target / "stale.safetensors").touch()
    save_packed(model, target)
    assert not (target / "stale.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep")
    for occupied in (tmp_path / "notes", tmp_path / "notes" / "todo.txt"):
        with pytest.raises(ValueError, match="exists and is not a model directory: choose another path"):
            save_packed(model, occupied)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "keep"


def test_failure_leaves_the_old_model(make_family: MakeFamily, tmp_path: Path) -> None:
    """NaN in the last layer is met after most of the file has been made."""
    model = make_family("mimo_v2_flash")
    save_packed(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        expert_parameters(model)["model.layers.2.mlp.experts.down_proj"][3, 1, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts\.3 \(down_proj\): cannot quantize NaN"):
        save_packed(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_unwritable_places(make_family: MakeFamily, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*/file/model") as caught:
        save_packed(make_family("mimo_v2_flash"), tmp_path / "file" / "model")
    assert "\n" not in str(caught.value)
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match=r"cannot write .*/locked/model"):
            save_packed(make_family("mimo_v2_flash"), tmp_path / "locked" / "model")


def test_a_full_disk_is_an_os_error(make_family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("speedstack.quant.checkpoint.directory.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*/model: .*No space left on device"):
        save_packed(make_family("mimo_v2_flash"), tmp_path / "model")
    assert not list(tmp_path.iterdir())
