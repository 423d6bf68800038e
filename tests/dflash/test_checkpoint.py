"""Drafter directories: z-lab's keys exactly, and one clear line for everything that can be wrong with one."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from speedstack.dflash.checkpoint import check_target, load_drafter, save_drafter

LAYER_KEYS = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_norm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]


def test_keys_are_exactly_z_labs(drafter, tmp_path):
    save_drafter(drafter, tmp_path / "drafter")
    stored = load_file(tmp_path / "drafter" / "model.safetensors")
    expected = ["fc.weight", "hidden_norm.weight", "norm.weight"]
    expected += [f"layers.{i}.{key}" for i in range(2) for key in LAYER_KEYS]
    assert sorted(stored) == sorted(expected)


def test_round_trip_is_exact_and_replaces_what_was_there(drafter, tmp_path):
    path = tmp_path / "drafter"
    for _ in range(2):
        save_drafter(drafter, path)
    loaded = load_drafter(path)
    assert loaded.config == drafter.config
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in drafter.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drafter"]
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "card.json", "config.json", "model.safetensors"]


def test_bfloat16_is_stored_as_such(drafter, tmp_path):
    save_drafter(drafter, tmp_path / "drafter", torch.bfloat16)
    assert load_file(tmp_path / "drafter" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_drafter(tmp_path / "drafter").fc.weight.dtype == torch.bfloat16
    assert load_drafter(tmp_path / "drafter", torch.float32).fc.weight.dtype == torch.float32


def test_broken_directories_are_one_line(drafter, tmp_path):
    path = tmp_path / "drafter"
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_drafter(path)
    save_drafter(drafter, path)
    weights = path / "model.safetensors"
    raw = weights.read_bytes()
    tensors = load(raw)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_drafter(path)
        assert "\n" not in str(caught.value)

    weights.write_bytes(raw[: len(raw) // 2])
    refused("truncated or corrupt")
    weights.write_bytes(b"")
    refused("truncated or corrupt")
    save_file({k: v for k, v in tensors.items() if k != "fc.weight"}, weights)
    refused(r"lacks tensor fc\.weight")
    save_file(tensors | {"mask_hidden": torch.zeros(1)}, weights)
    refused("has tensor mask_hidden")
    save_file(tensors | {"norm.weight": torch.zeros(3)}, weights)
    refused(r"norm\.weight has shape \[3\]")
    weights.unlink()
    refused(r"model\.safetensors is missing")
    (path / "config.json").write_text("{")
    refused("not valid JSON")
    (path / "config.json").write_text("[]")
    refused("not a JSON object")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "hidden size"),
        ({"num_layers": 4}, "number of layers"),
        ({"vocab_size": 127}, "vocabulary"),
        ({"target_sha256": "b" * 64}, "SHA-256"),
    ],
)
def test_another_target_is_refused(draft_config, change, message):
    config = dataclasses.replace(draft_config, target_sha256="a" * 64)
    right: dict[str, Any] = {"target_sha256": "a" * 64, "hidden_size": 64, "num_layers": 3, "vocab_size": 128}
    check_target(config, **right)
    with pytest.raises(ValueError, match=f"another target.*{message}"):
        check_target(config, **(right | change))


def test_taps_beyond_the_target_are_refused_where_its_depth_is_not_known(draft_config):
    config = dataclasses.replace(draft_config, num_target_layers=None, target_layer_ids=(0, 7))
    check_target(config, None, 64, 8, 128)
    with pytest.raises(
        ValueError, match=r"another target: it reads the output of layer 7, this target has layers 0\.\.6"
    ):
        check_target(config, None, 64, 7, 128)


def test_drafters_from_elsewhere_name_no_target(draft_config):
    check_target(draft_config, "b" * 64, 64, 3, 128)
