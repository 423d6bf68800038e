"""Packed directories of models that tests make in memory."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speedstack.quant.checkpoint import convert
from speedstack.quant.checkpoint.directory import MAX_SHARD_BYTES
from speedstack.quant.checkpoint.formats import default_format
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.mxfp4 import ScaleRule


def save_packed(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    scale_rule: ScaleRule | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` at `path` with its experts in MXFP4, in the family's default format."""
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        if tokenizer is not None:
            tokenizer.save_pretrained(plain)
        target = default_format(hub_names(model.config.model_type)).name
        convert(plain, target, path, scale_rule=scale_rule, max_shard_bytes=max_shard_bytes)
