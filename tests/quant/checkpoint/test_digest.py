"""The digests that tie a drafter, and what a model made, to their model."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from speedstack.quant.checkpoint import convert, weights_sha256
from speedstack.quant.checkpoint.digest import model_sha256


def test_the_digest_is_the_sha256_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}'
    )
    (tmp_path / "a.safetensors").write_bytes(b"first")
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "unrelated.safetensors").write_bytes(b"third")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()


def test_the_digest_changes_with_the_weights_alone(tiny_packed_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_packed_dir, tmp_path / "copy"))
    (copy / "config.json").unlink()
    assert weights_sha256(copy) == weights_sha256(tiny_packed_dir)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert weights_sha256(copy) != weights_sha256(tiny_packed_dir)


def test_a_model_is_its_weights_and_configs(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    before = model_sha256(copy)
    (copy / "README.md").write_text("a model")
    assert before == model_sha256(copy) == model_sha256(tiny_model_dir)
    digests = {before}
    for name, key, value in (
        ("config.json", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("config.json", "attention_value_scale", 1.0),
        ("generation_config.json", "eos_token_id", [0, 5]),
    ):
        file = copy / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | {key: value}))
        digests.add(model_sha256(copy))
    assert len(digests) == 4 and weights_sha256(copy) == weights_sha256(tiny_model_dir)


def test_a_model_is_the_shards_that_its_index_means(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"first")
    (tmp_path / "b.safetensors").write_bytes(b"second")
    digests = []
    for place in "ab":
        weight_map = {"x": f"{place}.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        digests.append((weights_sha256(tmp_path), model_sha256(tmp_path)))
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


@pytest.mark.filterwarnings("ignore:experts.gguf holds the routed experts alone")
def test_the_digest_changes_with_experts_in_gguf(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Their safetensors files are the same bytes, whatever the experts."""
    convert(tiny_model_dir, "gguf", tmp_path / "even", scale_rule="even")
    convert(tiny_model_dir, "gguf", tmp_path / "floor", scale_rule="floor")
    contents = [(tmp_path / rule / "model.safetensors").read_bytes() for rule in ("even", "floor")]
    assert contents[0] == contents[1]
    assert weights_sha256(tmp_path / "even") != weights_sha256(tmp_path / "floor")
