"""The `quantize` verb: routed experts to MXFP4 after training, by rounding or by GPTQ, as a packed model directory.

quantize.json in it records settings, machine, time, and for GPTQ the calibration of each expert matrix. Model and
record appear together, atomically.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from speedstack.eval.config import DEMO_RUN
from speedstack.eval.results.schema import Document, Environment, Record
from speedstack.support.config import Section, load_config_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from speedstack.quant.calibration import GptqReport
    from speedstack.quant.mxfp4 import ScaleRule

RECORD_FILE = "quantize.json"


class CalibrationSection(Section):
    """Text for GPTQ; the other methods need none."""

    source: str = Field(
        str(DEMO_RUN / "corpus"),
        description="Prepared corpus (its training part is read), a .jsonl, .json, .parquet or .txt file, a directory "
        "of such files, or the name of a dataset on the Hugging Face Hub; with a column `text`.",
    )
    max_unusable_fraction: float = Field(
        0.0, ge=0, le=1, description="Part of the source's rows that may have no text; they are left out."
    )
    num_sequences: int = Field(128, ge=1, description="Sequences.")
    sequence_length: int = Field(256, ge=2, description="Tokens in each.")
    batch_size: int = Field(8, ge=1, description="Sequences computed together.")
    seed: int = Field(0, ge=0, description="Seed of the choice of sequences.")


class QuantizeConfig(Section):
    """Quantize a model's routed experts to MXFP4 without training."""

    model: Path = Field(DEMO_RUN / "pretrain" / "export", description="Unquantized model directory.")
    method: Literal["rtn", "mse", "gptq"] = Field(
        "gptq",
        description="rtn: round to nearest. mse: the same, each block with the scale of least squared error. gptq: "
        "columns in turn, each making up for the errors before it on the calibration text.",
    )
    scale_rule: Literal["auto", "floor", "rceil", "even", "mse"] = Field(
        "auto",
        description="Rule that chooses the shared exponent of an MXFP4 block; auto: even for rtn, mse for the others. "
        "Under gptq, mse searches for the least error of the output instead of the weights.",
    )
    damping: float = Field(
        0.01, ge=0, description="gptq: added to the diagonal of the inputs' second moments, as a part of its mean."
    )
    calibration: CalibrationSection = Field(CalibrationSection(), description="Text for gptq.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="gptq: device; auto takes CUDA if present.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="gptq: dtype the model is computed in; auto: bfloat16 if the files hold no routed expert in more, "
        "else float32. What stays unquantized keeps the dtype of the files.",
    )
    out: Path = Field(Path("runs/quantize"), description="Directory for the packed model.")

    @property
    def chosen_scale_rule(self) -> ScaleRule:
        """The scale rule, with `auto` resolved."""
        if self.scale_rule != "auto":
            return self.scale_rule
        return "even" if self.method == "rtn" else "mse"

    @property
    def unused_settings(self) -> tuple[str, ...]:
        """Changed settings that only GPTQ uses, if the method is another."""
        if self.method == "gptq":
            return ()
        names = [f"calibration.{name}" for name in _changed(self.calibration)]
        return (*(name for name in _changed(self) if name in ("damping", "device", "dtype")), *names)

    @model_validator(mode="after")
    def _rule_fits(self) -> QuantizeConfig:
        if self.method == "mse" and self.scale_rule not in ("auto", "mse"):
            raise ValueError(f"method mse is the scale rule mse; for the rule {self.scale_rule} choose method rtn")
        return self


def _changed(config: Section) -> list[str]:
    """Fields whose value is not the default."""
    return [name for name, field in type(config).model_fields.items() if getattr(config, name) != field.default]


class QuantizedExpert(Record):
    """One expert's matrix, with the fields of `speedstack.quant.calibration.ExpertReport`."""

    weight: str
    layer: int
    expert: int
    num_tokens: int
    num_borrowed: int
    error: float
    rtn_error: float
    damping: float | None
    is_fallback: bool


class QuantizeResult(Document):
    """The record beside a quantized model. `experts` is empty for methods without calibration."""

    kind: Literal["quantize"] = "quantize"
    config: dict[str, Any]
    scale_rule: str
    seconds: float
    num_calibration_tokens: int
    experts: tuple[QuantizedExpert, ...]
    environment: Environment


def load_quantize_config(path: Path | None, overrides: Sequence[str]) -> QuantizeConfig:
    """The verb's config; a model directory in place of the YAML file becomes `model`."""
    return load_config_of(QuantizeConfig, "model", path, overrides)


def quantize(config: QuantizeConfig) -> None:
    """Write the packed model and its record; everything but the routed experts is copied.

    Experts are rounded once, from the files' dtype. Raises ValueError for a model that is missing, packed, broken or of
    an unsupported family, for missing or short calibration text, for a dtype that would round experts first, and for a
    foreign output directory; OSError as `convert`. A failure leaves `out` unchanged.
    """
    model_config = _check_directories(config)
    if config.unused_settings:
        warnings.warn(f"method {config.method} takes no {', '.join(config.unused_settings)}: not used", stacklevel=2)
    if config.method == "gptq":
        _calibrate(config, model_config)
    else:
        _round(config, model_config)
    print(f"model: {config.out}")
    print(f"written: {config.out / RECORD_FILE}")


def _check_directories(config: QuantizeConfig) -> PreTrainedConfig:
    """Checks before the work. Returns the model's configuration."""
    from speedstack.quant.checkpoint.config import read_config
    from speedstack.quant.checkpoint.directory import check_apart, check_place, check_target
    from speedstack.quant.checkpoint.files import checkpoint_directory
    from speedstack.quant.checkpoint.names import hub_names
    from speedstack.runtime.model.loading import warn_if_not_decodable

    model_config, codec = read_config(checkpoint_directory(config.model))
    if codec.is_packed:
        raise ValueError(f"{config.model} is quantized already ({codec.name}): give the model it was made from")
    check_apart(config.model, config.out)
    check_target(config.out)
    check_place(config.out)
    hub_names(model_config.model_type)
    warn_if_not_decodable(model_config)
    return model_config


def _round(config: QuantizeConfig, model_config: PreTrainedConfig) -> None:
    from speedstack.quant.checkpoint import convert
    from speedstack.quant.checkpoint.formats import default_format
    from speedstack.quant.checkpoint.names import hub_names
    from speedstack.support.progress import counting_bar

    start = time.perf_counter()
    with counting_bar(config.method, " tensors") as show:
        convert(
            config.model,
            default_format(hub_names(model_config.model_type)).name,
            config.out,
            scale_rule=config.chosen_scale_rule,
            on_progress=show,
            add_files=lambda directory: _write_record(directory, config, start, None),
        )


def _calibrate(config: QuantizeConfig, model_config: PreTrainedConfig) -> None:
    import torch

    from speedstack.quant.checkpoint import check_export, export_model, load_model
    from speedstack.quant.experts import expert_parameters
    from speedstack.runtime.model.device import choose_device

    device = choose_device(config.device)
    windows_NT = _calibration_windows(config, model_config)
    model = load_model(config.model, _computation_dtype(config))
    check_export(model, config.model, is_packed=True)
    torch.nn.Module.to(model, device)

    start = time.perf_counter()
    report = _gptq(model, windows_NT, config)
    export_model(
        model,
        config.model,
        config.out,
        scale_rule=config.chosen_scale_rule,
        only=expert_parameters(model),
        add_files=lambda directory: _write_record(directory, config, start, report),
    )
    print(
        f"{len(report.experts)} matrices on {report.num_tokens} tokens: output error {report.error_ratio:.3f} of "
        f"rounding to nearest; {report.num_borrowers} borrowed tokens, {report.num_fallbacks} rounded to nearest"
    )


def _computation_dtype(config: QuantizeConfig) -> torch.dtype:
    """A dtype that holds the files' experts exactly, so that only MXFP4 rounds them."""
    import torch

    from speedstack.quant.checkpoint.source import value_dtypes

    stored = value_dtypes(config.model, ".experts.")
    is_half = stored == {"BF16"}
    if config.dtype == "bfloat16" and not is_half:
        raise ValueError(
            f"{config.model} has its experts in {' and '.join(sorted(stored))}: --dtype bfloat16 would round them "
            "before they are quantized, use --dtype auto or float32"
        )
    return torch.float32 if config.dtype == "float32" or not is_half else torch.bfloat16


def _write_record(directory: Path, config: QuantizeConfig, start: float, report: GptqReport | None) -> None:
    from speedstack.eval.results.environment import describe_environment

    result = QuantizeResult(
        config=config.model_dump(mode="json"),
        scale_rule=config.chosen_scale_rule,
        seconds=time.perf_counter() - start,
        num_calibration_tokens=0 if report is None else report.num_tokens,
        experts=() if report is None else tuple(QuantizedExpert(**vars(entry)) for entry in report.experts),
        environment=describe_environment(),
    )
    result.save(directory / RECORD_FILE)


def _calibration_windows(config: QuantizeConfig, model_config: PreTrainedConfig) -> torch.Tensor:
    """Calibration token ids, int64 [N, T]."""
    from speedstack.quant.checkpoint.tokenizer import load_tokenizer
    from speedstack.train.data.calibration import calibration_windows

    section, text_config = config.calibration, model_config.get_text_config()
    tokenizer = load_tokenizer(config.model, text_config.vocab_size)
    max_length = getattr(text_config, "max_position_embeddings", None)
    if max_length is not None and section.sequence_length > max_length:
        raise ValueError(
            f"calibration.sequence_length {section.sequence_length} exceeds the model's {max_length} positions"
        )
    return calibration_windows(
        section.source,
        tokenizer,
        section.num_sequences,
        section.sequence_length,
        section.seed,
        section.max_unusable_fraction,
    )


def _gptq(model: PreTrainedModel, windows_NT: torch.Tensor, config: QuantizeConfig) -> GptqReport:
    from speedstack.quant.calibration import gptq_experts
    from speedstack.support.progress import counting_bar

    with counting_bar("GPTQ", "layer") as show:
        return gptq_experts(
            model,
            windows_NT.split(config.calibration.batch_size),
            config.chosen_scale_rule,
            config.damping,
            on_layer=show,
        )
