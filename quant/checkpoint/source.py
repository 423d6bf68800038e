"""Opens a model directory for rewriting: sorts its tensors and checks them against config.json."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from speedstack.quant.checkpoint.config import build_skeleton, read_config
from speedstack.quant.checkpoint.files import CONFIG_FILE, WeightFiles, checkpoint_directory, read_json
from speedstack.quant.checkpoint.formats import Codec, ExpertWeight, check_family
from speedstack.quant.checkpoint.linears import other_names, read_linear
from speedstack.quant.checkpoint.names import HubNames, hub_names
from speedstack.quant.checkpoint.reader import expert_weights, stored_names, tied_as_stored
from speedstack.quant.fp8 import FP8Tensor


@dataclass(frozen=True)
class Source:
    """An open directory.

    fields: the raw config.json; config: its meaning without quantization; skeleton: its model without weight memory.
    weights: the layers' routed experts; none if opened whole. heads: unquantized expert weights outside the layers,
    such as multi-token prediction.
    others: all other tensors except scales.
    """

    files: WeightFiles
    fields: dict[str, Any]
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    names: HubNames
    codec: Codec
    weights: list[ExpertWeight]
    heads: list[ExpertWeight]
    others: list[str]

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def named_dtype(self) -> torch.dtype | None:
        """config.json's dtype, which may differ from the files'."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else None

    def other(self, name: str) -> torch.Tensor | FP8Tensor:
        """One of `others`. Raises ValueError for NaN in FP8."""
        return read_linear(self.files, type(self.codec), name, self.files.shape(name))

    def whole(self) -> "Source":
        """The same with all tensors in `others`. For unquantized directories."""
        others = sorted(other_names(self.files, type(self.codec), set()), key=natural_key)
        return replace(self, weights=[], heads=[], others=others)


@contextmanager
def open_by_expert(path: Path) -> Iterator[Source]:
    """Opens a directory of a known family, with routed experts separate.

    Raises ValueError for an unknown family or format, and for anything missing, corrupt or inconsistent.
    """
    path = checkpoint_directory(path)
    config, codec_type = read_config(path)
    names = hub_names(config.model_type)
    check_family(codec_type, names)
    with WeightFiles(path) as files:
        names = stored_names(files, names)
        check_family(codec_type, names)
        codec = codec_type(names)
        weights = sorted(codec.find(files), key=natural_key)
        if not weights:
            raise ValueError(f"{path} has no routed experts that {codec.title} would name")
        skeleton = build_skeleton(config)
        heads = _outside(weights, expert_weights(skeleton, names)) if not codec.is_packed else []
        weights = [weight for weight in weights if weight not in heads]
        expert_names = {name for weight in weights for name in codec.tensor_names(weight)}
        others = sorted(other_names(files, codec_type, expert_names), key=natural_key)
        fields = read_json(path / CONFIG_FILE)
        source = Source(files, fields, config, skeleton, names, codec, weights, heads, others)
        _check_against_config(source)
        yield source


@contextmanager
def open_whole(path: Path) -> Iterator[Source]:
    """Opens an unquantized directory of any family, with no separate experts. Raises ValueError for damaged files."""
    path = checkpoint_directory(path)
    config, codec_type = read_config(path)
    assert not codec_type.is_packed
    fields, skeleton, names = read_json(path / CONFIG_FILE), build_skeleton(config), HubNames(config.model_type)
    with WeightFiles(path) as files:
        yield Source(files, fields, config, skeleton, names, codec_type(names), [], [], []).whole()


def value_dtypes(path: str | Path, part: str = "") -> set[str]:
    """safetensors dtypes of an unquantized directory's matrices with `part` in their names.

    FP8 tiles count as BF16, which holds their values. Raises ValueError as `open_whole`.
    """
    with open_whole(Path(path)) as source:
        names = [name for name in source.others if part in name and len(source.files.shape(name)) > 1]
        return {"BF16" if source.files.dtype(name) == "F8_E4M3" else source.files.dtype(name) for name in names}


def natural_key(item: str | ExpertWeight) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    name = item if isinstance(item, str) else f"{item.module}.{item.name}"
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _outside(weights: list[ExpertWeight], of_model: dict[str, ExpertWeight]) -> list[ExpertWeight]:
    """Expert weights in modules that the model lacks."""
    modules = {weight.module for weight in of_model.values()}
    return [weight for weight in weights if weight.module not in modules]


def _check_against_config(source: Source) -> None:
    """Raises ValueError if the files lack tensors or shapes of config.json's model."""
    path, names, others = source.path, source.names, set(source.others)
    expected_weights = expert_weights(source.skeleton, names)
    found = {(weight.module, weight.name): weight for weight in source.weights}
    for weight in expected_weights.values():
        match = found.get((weight.module, weight.name))
        if match is None:
            raise ValueError(f"{path} lacks the experts {weight.module}.{weight.name}: is it a complete model?")
        if match != weight:
            sizes = [(item.num_experts, item.num_rows, item.num_columns) for item in (match, weight)]
            raise ValueError(
                f"{path}: the experts {weight.module}.{weight.name} have shape {sizes[0]}, {CONFIG_FILE} asks for "
                f"{sizes[1]}: the weights and the configuration are of different models"
            )
    tied = tied_as_stored(source.skeleton, source.files, names)
    for native_name, tensor in source.skeleton.state_dict().items():
        if native_name in expected_weights or native_name in tied:
            continue
        name = names.of(native_name)
        if name not in others:
            raise ValueError(f"{path} lacks the tensor {name}: is it a complete model of this {CONFIG_FILE}?")
        if source.files.shape(name) != tuple(tensor.shape):
            raise ValueError(
                f"{path}: {name} has shape {source.files.shape(name)}, {CONFIG_FILE} asks for {tuple(tensor.shape)}: "
                "the weights and the configuration are of different models"
            )
