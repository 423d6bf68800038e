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
from speedstack.quant.fp8 import quantize_fp8

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
def as_fp8(
    edit_config: Callable[..., None], edit_weights: Callable[..., None]
) -> Callable[..., dict[str, torch.Tensor]]:
    """`as_fp8(path, *kept)`: store the projections in FP8, experts too, but those with a part of `kept` in their names.

    Returns what they are then, bfloat16 by name.
    """

    def store(path: Path, *kept: str) -> dict[str, torch.Tensor]:
        values: dict[str, torch.Tensor] = {}

        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in list(tensors.items()):
                if not name.endswith("proj.weight") or any(part in name for part in kept):
                    continue
                fp8 = quantize_fp8(tensor.float())
                tensors[name], tensors[f"{name}_scale_inv"] = fp8.codes_OI, fp8.scales_PQ
                scales = fp8.scales_PQ.repeat_interleave(128, 0)[: tensor.shape[0]].repeat_interleave(128, 1)
                values[name] = (fp8.codes_OI.float() * scales[:, : tensor.shape[1]]).bfloat16()

        edit_weights(path, change)
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        edit_config(path, quantization_config=quantization | {"activation_scheme": "dynamic"})
        return values

    return store


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
