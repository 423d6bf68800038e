"""Model directories to damage, and the means to: shared by the tests of checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speedstack.quant.checkpoint import convert

WEIGHTS = "model.safetensors"


@pytest.fixture
def plain(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's directory."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "plain"))


@pytest.fixture
def packed(tiny_packed_dir: Path, tmp_path: Path) -> Path:
    """A copy of the packed one's."""
    return Path(shutil.copytree(tiny_packed_dir, tmp_path / "packed"))


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, torch.Tensor]]:
    """All tensors of a directory's safetensors files, read without our code."""

    def read(path: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    return read


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of a directory's files by name, without those of its directories."""
    return lambda path: {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.fixture(scope="session")
def edit_config() -> Callable[..., None]:
    """`edit_config(path, **changes)`: other fields in config.json."""

    def edit(path: Path, **changes: Any) -> None:
        fields = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(fields | changes))

    return edit


@pytest.fixture(scope="session")
def edit_weights() -> Callable[[Path, Callable[[dict[str, torch.Tensor]], object]], None]:
    """`edit_weights(path, change)`: what `change` makes of the tensors of a directory of one file."""

    def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        (path / WEIGHTS).unlink()
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    return edit


@pytest.fixture(scope="session")
def refuses() -> Callable[..., None]:
    """`refuses(source, target, match, out=None, **options)`: one line, and nothing half-written beside the source."""

    def check(source: Path, target: str, match: str, out: Path | None = None, **options: Any) -> None:
        before = sorted(entry.name for entry in source.parent.iterdir())
        with pytest.raises(ValueError, match=match) as caught:
            convert(source, target, out or source.parent / "out", **options)
        assert "\n" not in str(caught.value)
        assert sorted(entry.name for entry in source.parent.iterdir()) == before

    return check
