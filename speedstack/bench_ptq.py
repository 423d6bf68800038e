"""How far ways to quantize a model are from it: rounding under each scale rule, GPTQ, and whatever else was exported.

    python -m speedstack.bench_ptq MODEL --corpus DIR --export QAD=DIR --out results/DATE-ptq-NAME.json

One process, one text, one code path: the held-out part of a prepared corpus, in float32, through transformers' models,
so every family that can be packed can be compared. GPTQ is what `speedstack quantize --dtype float32` does with the
same settings, on the corpus' training part. Two models are in memory at a time, the full-precision one and the one
that is measured.

Seconds are of the quantization alone, and are no timing where other work runs beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from speedstack.eval.environment import describe_environment
from speedstack.eval.heldout import corpus_windows
from speedstack.eval.ptq_rows import PtqMethod, PtqResult
from speedstack.eval.quality import model_quality
from speedstack.quant.calibration import GPTQ_SCALE_RULE, gptq_experts
from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.quant.checkpoint.files import WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.reader import read_config
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule
from speedstack.quant.ptq import round_to_nearest
from speedstack.runtime.select import choose_device
from speedstack.train.calibration import calibration_windows
from speedstack.train.qat import load_tokenizer

FULL_PRECISION = "full precision"
RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
CALIBRATION_BATCH_SIZE = 8


@dataclass(frozen=True)
class Calibration:
    """Text of GPTQ's calibration, as in `speedstack quantize`, whose bounds are checked here: ValueError."""

    num_sequences: int = 128
    sequence_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_sequences", 1), ("sequence_length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"the calibration's {name} must be at least {least}, got {getattr(self, name)}")


def compare(
    model: str | Path,
    corpus: str | Path,
    exports: dict[str, Path] | None = None,
    *,
    gptq_rules: Sequence[ScaleRule] = (GPTQ_SCALE_RULE,),
    calibration: Calibration = Calibration(),
    num_tokens: int = 8192,
    window: int = 256,
    device: str = "auto",
    on_method: Callable[[PtqMethod], object] | None = None,
) -> PtqResult:
    """Measure every method on the held-out part of the prepared corpus in the directory `corpus`.

    `exports` are further model directories by name, packed or not. `on_method` is told each row when it is there.

    Raises ValueError, of one line, for directories that are missing or broken, a model that is quantized already, an
    export of another vocabulary, calibration text of no size or longer than the model's positions, and as
    `corpus_windows`, `calibration_windows` and `gptq_experts` do: what the arguments alone show, before the work.
    """
    directory, exports = checkpoint_directory(model), exports or {}
    config, codec_type = read_config(directory)
    if codec_type.is_packed:
        raise ValueError(f"{directory} is quantized already: give the model it was made from")
    vocab_size = config.get_text_config().vocab_size
    for name, path in exports.items():
        if read_config(checkpoint_directory(path))[0].get_text_config().vocab_size != vocab_size:
            raise ValueError(f"the export {name} at {path} has another vocabulary than {directory}")
        with WeightFiles(path):
            pass  # A damaged one is said now, not after everything else was measured.
    windows = corpus_windows(corpus, directory, window, num_tokens)
    place = choose_device(device)
    batches: tuple[torch.Tensor, ...] = ()
    if gptq_rules:
        max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None and calibration.sequence_length > max_length:
            raise ValueError(
                f"calibration sequences of {calibration.sequence_length} tokens exceed the {max_length} positions of "
                f"{directory}"
            )
        sizes = (calibration.num_sequences, calibration.sequence_length, calibration.seed)
        batches = calibration_windows(str(corpus), load_tokenizer(directory), *sizes).split(CALIBRATION_BATCH_SIZE)
    teacher = _load(directory, place)
    methods: list[PtqMethod] = []

    def add(method: PtqMethod) -> None:
        rtn = next((row for row in methods if row.settings == _rtn_settings(DEFAULT_SCALE_RULE)), method)
        kl, rtn_kl = method.quality.kl_to_teacher_nats, rtn.quality.kl_to_teacher_nats
        methods.append(method.model_copy(update={"kl_over_rtn": kl / rtn_kl if kl is not None and rtn_kl else None}))
        if on_method is not None:
            on_method(methods[-1])

    add(PtqMethod(quality=model_quality(FULL_PRECISION, teacher, None, windows)))
    # The default rule first: it is what the others are compared with.
    for rule in sorted(RULES, key=lambda rule: rule != DEFAULT_SCALE_RULE):
        student, start = _load(directory, place), time.perf_counter()
        round_to_nearest(student, rule)
        seconds = time.perf_counter() - start
        quality = model_quality(f"RTN, {rule}", teacher, student, windows)
        add(PtqMethod(quality=quality, settings=_rtn_settings(rule), seconds=seconds))
    for rule in gptq_rules:
        student, start = _load(directory, place), time.perf_counter()
        report = gptq_experts(student, batches, rule)
        seconds = time.perf_counter() - start
        add(
            PtqMethod(
                quality=model_quality(f"GPTQ, {rule}", teacher, student, windows),
                settings={"method": "gptq", "scale_rule": rule, "calibration": vars(calibration)},
                seconds=seconds,
                gptq={
                    "num_calibration_tokens": report.num_tokens,
                    "output_error_over_rtn": report.error_ratio,
                    "num_matrices": len(report.experts),
                    "num_borrowers": report.num_borrowers,
                    "num_fallbacks": report.num_fallbacks,
                },
            )
        )
    for name, path in exports.items():
        quality = model_quality(name, teacher, _load(path, place), windows)
        add(PtqMethod(quality=quality, settings={"export": path.name}, model_sha256=weights_sha256(path)))
    return PtqResult(
        model_sha256=weights_sha256(directory),
        num_tokens=sum(len(ids) - 1 for ids in windows),
        window=window,
        methods=tuple(methods),
        environment=describe_environment(),
    )


def _load(path: Path, device: torch.device) -> PreTrainedModel:
    model = load_model(path)
    torch.nn.Module.to(model, device)
    return model


def _rtn_settings(rule: ScaleRule) -> dict[str, Any]:
    return {"method": "rtn", "scale_rule": rule}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m speedstack.bench_ptq", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="unquantized model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="prepared corpus of the model's tokenizer")
    parser.add_argument("--export", action="append", default=[], metavar="NAME=DIR", help="another quantized model")
    parser.add_argument(
        "--gptq-rules", nargs="*", choices=RULES, default=[GPTQ_SCALE_RULE], help="scale rules of GPTQ; none: no GPTQ"
    )
    parser.add_argument("--num-sequences", type=int, default=Calibration.num_sequences, help="of GPTQ's calibration")
    parser.add_argument("--sequence-length", type=int, default=Calibration.sequence_length, help="tokens in each")
    parser.add_argument("--seed", type=int, default=Calibration.seed, help="of the choice of sequences")
    parser.add_argument("--num-tokens", type=int, default=8192, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="tokens in one window (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args(arguments)
    try:
        result = compare(
            options.model,
            options.corpus,
            _exports(options.export),
            gptq_rules=options.gptq_rules,
            calibration=Calibration(options.num_sequences, options.sequence_length, options.seed),
            num_tokens=options.num_tokens,
            window=options.window,
            device=options.device,
            on_method=lambda method: print(f"measured: {method.quality.method}", file=sys.stderr),
        )
        print(result.table())
        if options.out is not None:
            print(f"written: {result.save(options.out)}")
    except (ValueError, OSError) as error:
        print(f"bench_ptq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _exports(arguments: Sequence[str]) -> dict[str, Path]:
    exports = {}
    for argument in arguments:
        name, is_named, path = argument.partition("=")
        if not (name and is_named and path) or name in exports:
            raise ValueError(f"--export takes NAME=DIR, each name once, got {argument!r}")
        exports[name] = Path(path)
    return exports


if __name__ == "__main__":
    sys.exit(main())
