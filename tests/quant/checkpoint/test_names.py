"""Our table of names against the names that the installed transformers writes for each family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from speedstack.quant.checkpoint.names import FAMILIES, hub_names
from tests.packing import save_packed


def stored_names(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_of_save_pretrained(
    model_type: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = make_family(model_type)
    model.save_pretrained(tmp_path / "plain")
    save_packed(model, tmp_path / "packed")
    packed = stored_names(tmp_path / "packed")
    names = hub_names(model_type)
    codes, scales = ("_blocks", "_scales") if names.is_fused else ("_packed", "weight_scale")
    assert {name for name in packed if name.endswith(codes)}
    as_plain = {name.removesuffix(codes) for name in packed if not name.endswith(scales)}
    assert as_plain == stored_names(tmp_path / "plain")


def test_deepseek_v4_names_as_released() -> None:
    """What DeepSeek's own inference code and transformers' table of conversions read."""
    names = hub_names("deepseek_v4").as_released()
    for native, released in {
        "model.embed_tokens.weight": "embed.weight",
        "lm_head.weight": "head.weight",
        "model.norm.weight": "norm.weight",
        "model.hc_head.hc_fn": "hc_head_fn",
        "model.layers.2.self_attn.kv_norm.weight": "layers.2.attn.kv_norm.weight",
        "model.layers.2.self_attn.compressor.kv_norm.weight": "layers.2.attn.compressor.norm.weight",
        "model.layers.2.mlp.experts": "layers.2.ffn.experts",
    }.items():
        assert names.of(native) == released


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_rows_split_and_join(model_type: str) -> None:
    names = hub_names(model_type)
    rows = torch.arange(24).view(8, 3)
    gate, up = names.split("gate_up_proj", rows)
    assert gate[:, 0].tolist() == ([0, 6, 12, 18] if names.is_fused else [0, 3, 6, 9])
    assert torch.equal(names.join([gate, up]), rows)
    (down,) = names.split("down_proj", rows)
    assert torch.equal(down, rows)


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'jamba' are not known: choose a model of .*mimo_v2_flash"):
        hub_names("jamba")
