"""Writes a model in memory as the directory it came from, with its changed values.

Routed experts become MXFP4 in the family's default format, or stay plain if none supports the family. Unchanged tensors
are stored as in the source. A changed tensor keeps the source's dtype if it holds every value, else becomes wider.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from speedstack.quant.checkpoint.directory import check_apart, new_directory
from speedstack.quant.checkpoint.files import CONFIG_FILE
from speedstack.quant.checkpoint.formats import Codec, ExpertWeight, Plain, default_format
from speedstack.quant.checkpoint.names import FAMILIES
from speedstack.quant.checkpoint.reader import expert_weights, tied_as_stored
from speedstack.quant.checkpoint.source import Source, open_by_expert, open_whole
from speedstack.quant.checkpoint.writer import Writer
from speedstack.quant.experts import contraction_last
from speedstack.quant.fp8 import FP8Tensor
from speedstack.quant.mxfp4 import MXFP4Tensor, ScaleRule, quantize


def can_be_packed(model_type: str) -> bool:
    """Whether a packed format supports the family."""
    return model_type in FAMILIES


def check_export(model: PreTrainedModel, source: str | Path, is_packed: bool) -> None:
    """Raises ValueError if `export_model` would, as far as the source tells. Reads no tensor."""
    with _open(Path(source), is_packed) as opened:
        if not is_packed:
            skeleton: Any = opened.skeleton
            skeleton._weight_conversions = getattr(model, "_weight_conversions", None)
            _as_stored(opened, skeleton, skeleton.state_dict())


@torch.no_grad()
def export_model(
    model: PreTrainedModel,
    source: str | Path,
    out: str | Path,
    *,
    scale_rule: ScaleRule | None,
    only: Collection[str] | None = None,
    add_files: Callable[[Path], object] | None = None,
) -> None:
    """Writes `model`, loaded from `source` and possibly changed, at `out`.

    `scale_rule`: of the experts' MXFP4, as in training; None leaves all weights unquantized. `only`: state-dict names
    that may have changed. The rest is the source's: config.json fields, tokenizer, licences, tensors unknown to
    transformers. A model directory at `out` is replaced; `add_files` gets the directory before it appears.

    Raises ValueError for a family that cannot be packed, an incomplete source or other tensor names, NaN or infinity in
    packed experts, and an `out` that must not be replaced. Raises OSError if `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    check_apart(source, out)
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if only is None or name in only}
    with _open(source, scale_rule is not None) as opened, new_directory(out) as partial:
        codec: Codec = Plain(opened.names)
        stacks: dict[ExpertWeight, str] = {}
        if scale_rule is None:
            changed = _as_stored(opened, model, state_dict)
        else:
            codec = default_format(opened.names)(opened.names.as_written())
            stacks = {weight: name for name, weight in expert_weights(opened.skeleton, opened.names).items()}
            unpacked = state_dict.keys() - set(stacks.values())
            changed = {opened.names.of(name): state_dict[name] for name in unpacked}
        others = _Others(opened, changed)

        def experts(weight: ExpertWeight) -> Iterator[MXFP4Tensor]:
            assert scale_rule is not None
            name = stacks[weight]
            module = opened.skeleton.get_submodule(name.rpartition(".")[0])
            for weight_OK in contraction_last(module, state_dict[name]):
                try:
                    yield quantize(weight_OK, scale_rule).to("cpu")
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

        writer = Writer(opened, codec, partial)
        writer.write_tensors(experts, others.get)
        writer.finish(others.is_widened)
        if add_files is not None:
            add_files(partial)


class _Others:
    """Tensors other than packed experts, by their names on disk."""

    def __init__(self, source: Source, changed: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._changed = changed
        self.is_widened = False

    def get(self, name: str) -> torch.Tensor | FP8Tensor:
        """The source's tensor if the model has its values, else the model's in a dtype that holds them."""
        stored = self._source.other(name)
        if name not in self._changed:
            return stored
        values = self._changed[name].cpu().contiguous()
        plain = stored.dequantize(torch.bfloat16) if isinstance(stored, FP8Tensor) else stored
        if torch.equal(plain.to(values.dtype), values):
            return stored
        # bfloat16 holds all MXFP4 values, float16 does not.
        dtypes = [dtype for dtype in (plain.dtype, torch.bfloat16) if dtype.itemsize <= plain.dtype.itemsize]
        dtype = next((dtype for dtype in dtypes if _holds(dtype, values)), values.dtype)
        named = self._source.named_dtype
        self.is_widened |= dtype != plain.dtype or (named is not None and not _holds(named, values))
        return values.to(dtype)


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    return torch.equal(values.to(dtype).to(values.dtype), values)


def _open(path: Path, is_packed: bool) -> AbstractContextManager[Source]:
    return open_by_expert(path) if is_packed else open_whole(path)


def _as_stored(
    source: Source, model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A model's tensors under the names and splits of the source. Raises ValueError if a name differs."""
    tied = tied_as_stored(source.skeleton, source.files, source.names)
    stored = revert_weight_conversion(model, {name: tensor for name, tensor in state_dict.items() if name not in tied})
    lacking = sorted(stored.keys() - set(source.others))
    if lacking:
        raise ValueError(f"{source.path} lacks the tensor {lacking[0]}: is it a complete model of this {CONFIG_FILE}?")
    # The files may still store a copy of a tied tensor.
    return stored | {name: tensor for name, tensor in state_dict.items() if name in tied}
