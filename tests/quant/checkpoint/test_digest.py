"""The digest that ties a drafter to its target."""

import hashlib
import shutil
from pathlib import Path

from speedstack.quant.checkpoint import weights_sha256


def test_is_the_sha256_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}'
    )
    (tmp_path / "a.safetensors").write_bytes(b"first")
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "unrelated.safetensors").write_bytes(b"third")
    assert weights_sha256(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()


def test_follows_the_weights_alone(tiny_packed_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_packed_dir, tmp_path / "copy"))
    (copy / "config.json").unlink()
    assert weights_sha256(copy) == weights_sha256(tiny_packed_dir)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert weights_sha256(copy) != weights_sha256(tiny_packed_dir)
