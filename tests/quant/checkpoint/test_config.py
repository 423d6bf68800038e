"""Where the files of a directory and its metadata disagree: every reader takes the same side, or refuses by name."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import convert, load_checkpoint, load_model
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.runtime import Engine

IDS = list(range(3, 40))


def logits(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, V] of the engine, and of the model that training loads."""
    with torch.no_grad():
        return Engine.from_pretrained(path, backend="reference").logits(IDS), load_model(path)(
            torch.tensor([IDS])
        ).logits[0]


def shard(path: Path) -> tuple[Path, Path]:
    """Two shards and an index in place of the one file; returns the shards."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    files = [path / f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
    weight_map = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files[0], files[1]


def add(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = load_file(file) | tensors
    file.unlink()
    save_file(stored, file, metadata={"format": "pt"})


def test_the_index_decides_between_copies(plain: Path, tmp_path: Path) -> None:
    expected, _ = logits(plain)
    first, second = shard(plain)
    stale = {name: torch.randn_like(tensor) for name, tensor in load_file(first).items() if "experts.1." in name}
    assert stale
    add(second, stale)
    with pytest.warns(UserWarning, match=rf"copies of {len(stale)} tensors in shards .*experts\.1\..*are not read"):
        ours, theirs = logits(plain)
    assert torch.equal(ours, expected)
    # Sums of another order.
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=2e-5)
    with pytest.warns(UserWarning, match="are not read"):
        convert(plain, "compressed-tensors", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path / "out")


def test_copies_that_no_index_tells_apart_are_refused(plain: Path) -> None:
    first, second = shard(plain)
    add(first, {"model.surprise": torch.zeros(2)})
    add(second, {"model.surprise": torch.ones(2)})
    with pytest.raises(ValueError, match=r"the tensor model\.surprise in two shards"):
        load_checkpoint(plain)


def test_a_shard_without_what_the_index_says_is_refused(plain: Path) -> None:
    first, second = shard(plain)
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    name = sorted(load_file(first))[0]
    index["weight_map"][name] = second.name
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{second.name} lacks the tensor {name} although"):
        load_checkpoint(plain)
    (plain / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="names no tensor"):
        load_checkpoint(plain)


def test_a_stored_head_is_the_head_whatever_the_flag_says(plain: Path, edit_config: Callable[..., None]) -> None:
    expected, _ = logits(plain)
    edit_config(plain, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="files hold another one: it is read as untied"):
        ours, theirs = logits(plain)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=2e-5)


def test_a_head_stored_twice_stays_tied(plain: Path, edit_config: Callable[..., None]) -> None:
    embedding = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
    add(plain / "model.safetensors", {"lm_head.weight": embedding.clone()})
    edit_config(plain, tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config(plain)[0].tie_word_embeddings
    ours, theirs = logits(plain)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=2e-5)
    # What was found of a file does not outlive it.
    add(plain / "model.safetensors", {"lm_head.weight": embedding + 1})
    with pytest.warns(UserWarning, match="read as untied"):
        assert not read_config(plain)[0].tie_word_embeddings


@pytest.mark.parametrize("model_type", ["mixtral", "mimo_v2_flash", "deepseek_v3", "olmoe"])
def test_fused_experts_are_those_of_a_tensor_each(
    model_type: str, make_family: Callable[[str], PreTrainedModel], stored: Callable[[Path], Any], tmp_path: Path
) -> None:
    """transformers' own names all over, which `save_pretrained` writes where it is asked to."""
    model = make_family(model_type)
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(name.endswith(".experts.gate_up_proj") for name in stored(tmp_path / "fused"))
    expected, found = (dict[str, Any](load_checkpoint(tmp_path / name).tensors) for name in ("each", "fused"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name in ("each", "fused"):
        convert(tmp_path / name, "compressed-tensors", tmp_path / f"{name}-packed")
    expected, found = (stored(tmp_path / f"{name}-packed") for name in ("each", "fused"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_experts_stored_both_ways_are_refused(
    make_family: Callable[[str], PreTrainedModel], stored: Callable[[Path], Any], tmp_path: Path
) -> None:
    model = make_family("olmoe")
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    both = {name: tensor for name, tensor in stored(tmp_path / "fused").items() if ".experts." in name}
    add(tmp_path / "each" / "model.safetensors", both)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts fused and one by one"):
        load_checkpoint(tmp_path / "each")
    with pytest.raises(ValueError, match="weights do not fit the configuration"):
        load_model(tmp_path / "each")


def test_fp8_experts_are_the_values_that_the_plain_directory_has(
    plain: Path, tmp_path: Path, stored: Callable[[Path], Any], as_fp8: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """MiMo-V2-Flash as released: all projections in FP8 but those of the attention's output."""
    values = as_fp8(plain, "o_proj", "experts.3.")
    convert(plain, "plain", tmp_path / "bf16")
    bf16 = stored(tmp_path / "bf16")
    assert all(torch.equal(bf16[name], value) for name, value in values.items())
    assert bf16.keys() == {name for name in stored(plain) if not name.endswith("_scale_inv")}
    (ours, theirs), (expected, _) = logits(plain), logits(tmp_path / "bf16")
    assert torch.equal(ours, expected)
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=2e-5)
    for source in (plain, tmp_path / "bf16"):
        convert(source, "mimo", tmp_path / f"{source.name}-mimo")
    packed, again = (stored(tmp_path / f"{name}-mimo") for name in (plain.name, "bf16"))
    experts = {name for name in again if ".experts." in name}
    assert experts and all(torch.equal(packed[name], again[name]) for name in experts)
    moved = [name for name in values if ".experts." not in name]
    assert moved and all(
        torch.equal(packed[name].view(torch.uint8), stored(plain)[name].view(torch.uint8)) for name in moved
    )


def test_damaged_fp8_is_refused(
    plain: Path, edit_config: Callable[..., None], edit_weights: Callable[..., Any], as_fp8: Callable[..., Any]
) -> None:
    as_fp8(plain)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with WeightFiles(plain) as files:
        scales = files.get(f"{name}_scale_inv", (1, 1))
    edit_weights(plain, lambda tensors: tensors.update({f"{name}_scale_inv": torch.full((1, 1), float("inf"))}))
    with pytest.raises(ValueError, match=rf"{name}: elements or scales are NaN or infinity"):
        load_checkpoint(plain)
    edit_weights(plain, lambda tensors: tensors.update({f"{name}_scale_inv": scales.expand(2, 1).clone()}))
    with pytest.raises(ValueError, match=rf"{name}_scale_inv has shape \(2, 1\)"):
        load_checkpoint(plain)
    edit_weights(plain, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(ValueError, match=f"lacks the tensor {name}_scale_inv"):
        load_checkpoint(plain)
    edit_config(plain, quantization_config=None)
    with pytest.raises(ValueError, match="names no quantization: its quantization_config is missing"):
        load_model(plain)
