"""Conversion between all formats: every pair and family, byte for byte."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import FORMATS, convert, load_checkpoint, load_model
from speedstack.quant.checkpoint.names import FAMILIES, hub_names
from speedstack.quant.mxfp4 import MXFP4Tensor
from tests.packing import save_packed

MakeFamily = Callable[[str], PreTrainedModel]
WEIGHTS = "model.safetensors"
PACKED = [name for name in FORMATS if name != "plain"]


def able(model_type: str) -> list[str]:
    """Packed formats that can express the family."""
    return [name for name in PACKED if FORMATS[name].refusal(hub_names(model_type)) is None]


def test_every_family_has_two_packed_formats_or_more() -> None:
    assert {model_type: able(model_type) for model_type in ("gpt_oss", "deepseek_v4", "qwen3_moe")} == {
        "gpt_oss": ["gpt-oss", "gguf"],
        "deepseek_v4": ["compressed-tensors", "mimo", "deepseek-v4"],
        "qwen3_moe": ["compressed-tensors", "mimo", "deepseek-v4", "gguf"],
    }
    assert all(len(able(model_type)) >= 2 for model_type in FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_pairs_are_bit_exact(
    model_type: str, make_family: MakeFamily, tmp_path: Path, stored: Callable[..., Any], contents: Callable[..., Any]
) -> None:
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
def test_shards_do_not_matter(
    target: str, packed: Path, tmp_path: Path, stored: Callable[..., Any], contents: Callable[..., Any]
) -> None:
    convert(packed, target, tmp_path / "one")
    convert(packed, "deepseek-v4" if target == "mimo" else "mimo", tmp_path / "shards", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "shards").values())
    convert(tmp_path / "shards", target, tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "again")


def test_scale_rule_and_dtypes(
    plain: Path, tmp_path: Path, make_tiny_model: Callable[..., PreTrainedModel], stored: Callable[..., Any]
) -> None:
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


def test_side_files_and_extra_tensors(
    packed: Path,
    tmp_path: Path,
    stored: Callable[..., Any],
    contents: Callable[..., Any],
    edit_weights: Callable[..., Any],
) -> None:
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
    expected = contents(packed)
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert copied[name] == expected[name]
    assert copied.keys() == expected.keys() - {"pytorch_model.bin", "pytorch_model.bin.index.json"}
    assert torch.equal(stored(tmp_path / "out")["model.mtp.layers.0.weight"], extra["model.mtp.layers.0.weight"])


def test_unquantized_prediction_head_with_experts(
    packed: Path, tmp_path: Path, stored: Callable[..., Any], edit_weights: Callable[..., Any]
) -> None:
    """Their names are those of packed experts in MiMo's layout; their dtype tells them apart."""
    name = "model.mtp.0.mlp.experts.0.{}_proj.weight"
    extra = {name.format(part): torch.randn(32, 32) for part in ("gate", "up", "down")}
    edit_weights(packed, lambda tensors: tensors.update(extra))
    convert(packed, "mimo", tmp_path / "mimo")
    convert(tmp_path / "mimo", "deepseek-v4", tmp_path / "deepseek")
    for directory in ("mimo", "deepseek"):
        tensors = stored(tmp_path / directory)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in extra.items())


def test_cautions(make_family: MakeFamily, packed: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    convert(packed, "mimo", tmp_path / "out")
    convert(packed, "deepseek-v4", tmp_path / "out")
    assert not [str(entry.message) for entry in recwarn if entry.category is UserWarning]
    with pytest.warns(UserWarning, match=r"experts\.gguf holds the routed experts alone"):
        convert(packed, "gguf", tmp_path / "out")
    save_packed(make_family("olmoe"), tmp_path / "olmoe")
    with pytest.warns(UserWarning, match="vLLM and SGLang read MiMo's .* for MiMo models alone, not for olmoe"):
        convert(tmp_path / "olmoe", "mimo", tmp_path / "out")


def test_progress_counts_to_the_end(packed: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = convert(packed, "mimo", tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    total = result.num_expert_weights + result.num_other_tensors
    assert result.num_expert_weights == 4
    assert seen == [(done, total) for done in range(total + 1)]


def test_reads_no_more_than_a_tensor_at_a_time(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Callable[..., Any]
) -> None:
    """Without the means to read rather than map a file (safetensors before 0.8) the result is the same."""

    def mapping_only(*arguments: Any, **options: Any) -> Any:
        if "backend" in options:
            raise TypeError("unexpected keyword argument 'backend'")
        return safe_open(*arguments, **options)

    convert(packed, "mimo", tmp_path / "one")
    monkeypatch.setattr("speedstack.quant.checkpoint.files.safe_open", mapping_only)
    convert(packed, "mimo", tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
