"""How far quantized models are from the original: rounding under each scale rule, GPTQ, and other exports.

    python -m speedstack.ablation.ptq MODEL --corpus DIR --export QAD=DIR --out results/DATE-ptq-NAME.json

Everything runs in one process on one text, the held-out part of a prepared corpus, in float32 through transformers'
models, so every family that can be packed can be compared. GPTQ is that of `speedstack quantize --dtype float32`, on
the corpus' training part, for every combination of the given scale rules, sizes, seeds and dampings. Two models are in
memory at a time.

The file is written after every row; later commands add rows that are missing. A file is of one model, text and
software, and is refused for others and while in use. A failed method is named in it until it succeeds. A row from a
later command names its environment, since thread count and command may differ. Seconds are of the quantization alone,
and are no timing beside other work.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from speedstack.eval.quality.heldout import corpus_windows
from speedstack.eval.quality.measure import model_quality
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.results.quantization import PtqMethod, PtqResult
from speedstack.eval.results.schema import Unavailable
from speedstack.quant.calibration import GPTQ_SCALE_RULE, gptq_experts
from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import WeightFiles, checkpoint_directory
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.quant.gptq import DEFAULT_DAMPING
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule
from speedstack.quant.ptq import round_to_nearest
from speedstack.runtime.model.device import choose_device
from speedstack.support.command import EXIT_OK, EXIT_SYSTEM, module_command, module_parser
from speedstack.support.digests import json_sha256
from speedstack.support.files import exclusive
from speedstack.train.data.calibration import calibration_windows

FULL_PRECISION = "full precision"
RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
CALIBRATION_BATCH_SIZE = 8
_RTN, _GPTQ = "RTN, ", "GPTQ, "


@dataclass(frozen=True)
class Gptq:
    """One calibration, with the settings of `speedstack quantize`. Raises ValueError for a number out of range."""

    scale_rule: ScaleRule = GPTQ_SCALE_RULE
    num_sequences: int = 128
    sequence_length: int = 256
    seed: int = 0
    damping: float = DEFAULT_DAMPING

    def __post_init__(self) -> None:
        for name, least in (("num_sequences", 1), ("sequence_length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"the calibration's {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"the damping must be a positive number, got {self.damping}")

    @property
    def name(self) -> str:
        """Name in tables: the rule, and settings other than the default."""
        words = [f"{_GPTQ}{self.scale_rule}"]
        if self.num_sequences != Gptq.num_sequences or self.sequence_length != Gptq.sequence_length:
            of_length = f" of {self.sequence_length}" if self.sequence_length != Gptq.sequence_length else ""
            words.append(f"{self.num_sequences} sequences{of_length}")
        words += [f"damping {self.damping}"] if self.damping != Gptq.damping else []
        words += [f"seed {self.seed}"] if self.seed != Gptq.seed else []
        return ", ".join(words)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as a row has them."""
        calibration = {
            "num_sequences": self.num_sequences,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
        }
        return {"method": "gptq", "scale_rule": self.scale_rule, "damping": self.damping, "calibration": calibration}


@dataclass(frozen=True)
class Way:
    """A row to measure: its name, the fields that identify it, and `make`, which returns the model and its cost."""

    name: str
    row: dict[str, Any]
    make: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]

    def is_row(self, method: PtqMethod) -> bool:
        """Whether `method` is this row's measurement."""
        same = all(getattr(method, key) == value for key, value in self.row.items())
        return method.quality.method == self.name and same


def compare(
    model: str | Path,
    corpus: str | Path,
    exports: dict[str, Path] | None = None,
    *,
    gptq: Sequence[Gptq] = (Gptq(),),
    num_tokens: int = 8192,
    window: int = 256,
    device: str = "auto",
    out: Path | None = None,
    on_method: Callable[[PtqMethod], object] | None = None,
    on_failure: Callable[[Unavailable], object] | None = None,
) -> PtqResult:
    """Measure every method on the held-out part of the prepared corpus in the directory `corpus`.

    `exports` maps names to further model directories, packed or not. `out` is the file of rows, from earlier calls too.
    `on_method` receives each new row, `on_failure` each method that fails now; the result's `unavailable` also has
    earlier failures.

    Raises ValueError, before the work, for directories that are missing or broken, a quantized model, an export of
    another vocabulary or a duplicate name, calibration text beyond the model's positions, a file that is in use or of
    something else, and as `corpus_windows` and `calibration_windows`.
    """
    directory, exports = checkpoint_directory(model), exports or {}
    config, codec_type = read_config(directory)
    if codec_type.is_packed:
        raise ValueError(f"{directory} is quantized already: give the model it was made from")
    vocab_size = config.get_text_config().vocab_size
    for name, path in exports.items():
        if name == FULL_PRECISION or name.startswith((_RTN, _GPTQ)):
            raise ValueError(
                f"an export cannot be called {name!r}, as a row that is measured here is: choose another name"
            )
        if read_config(checkpoint_directory(path))[0].get_text_config().vocab_size != vocab_size:
            raise ValueError(f"the export {name} at {path} has another vocabulary than {directory}")
        with WeightFiles(path):
            pass  # Report a damaged one now, not after the other measurements.
    windows = corpus_windows(corpus, directory, window, num_tokens)
    place = choose_device(device)
    max_length = getattr(config.get_text_config(), "max_position_embeddings", None)
    for one in gptq:
        if max_length is not None and one.sequence_length > max_length:
            raise ValueError(
                f"calibration sequences of {one.sequence_length} tokens exceed the {max_length} positions of "
                f"{directory}"
            )
    with exclusive(out.absolute().parent, out.name) if out is not None else nullcontext():
        table = _Table(directory, windows, window, place, out)
        ways = [Way(FULL_PRECISION, {"settings": {}}, lambda: (table.teacher, {}))]
        # The default rule first, because the others are compared with it.
        rules = sorted(RULES, key=lambda rule: rule != DEFAULT_SCALE_RULE)
        ways += [_rounding(directory, place, rule) for rule in rules]
        for one in gptq:
            sizes = (one.num_sequences, one.sequence_length, one.seed)
            ids_NT = calibration_windows(str(corpus), load_tokenizer(directory, vocab_size), *sizes)
            ways.append(_gptq(directory, place, one, ids_NT))
        ways += [_export(name, path, place) for name, path in exports.items()]
        for way in ways:
            table.measure(way, on_method, on_failure)
        table.save()
        return table.result()


@dataclass
class _Table:
    """The rows so far. Raises ValueError for a file of something else."""

    directory: Path
    windows: list[list[int]]
    window: int
    place: torch.device
    out: Path | None
    rows: list[PtqMethod] = field(default_factory=list)
    failed: list[Unavailable] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.model_sha256 = weights_sha256(self.directory)
        self.text_sha256 = json_sha256(self.windows)
        self.began = self.environment = describe_environment()
        if self.out is not None and self.out.exists():
            found = PtqResult.load(self.out)
            if different := self._differences(found):
                raise ValueError(
                    f"{self.out} has rows of {' and '.join(different)}: give another --out, or delete the file"
                )
            self.rows, self.failed, self.notes = list(found.methods), list(found.unavailable), found.notes
            self.began = found.environment

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The full-precision model, loaded for the first missing row."""
        return _load(self.directory, self.place)

    def measure(
        self,
        way: Way,
        on_method: Callable[[PtqMethod], object] | None,
        on_failure: Callable[[Unavailable], object] | None,
    ) -> None:
        """Add the row of `way` unless it exists, or record why it failed."""
        if any(way.is_row(row) for row in self.rows):
            self._forget_failure(way)
            return
        try:
            student, more = way.make()
            is_teacher = student is self.teacher
            quality = model_quality(way.name, self.teacher, None if is_teacher else student, self.windows)
        except PEER_ERRORS as error:
            failure = Unavailable(name=way.name, reason=one_line(error))
            self._forget_failure(way)
            self.failed.append(failure)
            if on_failure is not None:
                on_failure(failure)
        else:
            self._forget_failure(way)
            kl, rtn = quality.kl_to_teacher_nats, self._rtn_kl(quality.kl_to_teacher_nats, way)
            row = {"kl_over_rtn": kl / rtn if kl is not None and rtn else None} | way.row | more
            environment = None if self.environment == self.began else self.environment
            method = PtqMethod(quality=quality, environment=environment, **row)
            # An export may have been remade.
            self.rows = [each for each in self.rows if each.quality.method != way.name] + [method]
            if on_method is not None:
                on_method(method)
        self.save()

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.out is not None:
            self.result().save(self.out)

    def result(self) -> PtqResult:
        """The rows and failures so far."""
        return PtqResult(
            model_sha256=self.model_sha256,
            text_sha256=self.text_sha256,
            device=self.place.type,
            num_tokens=sum(len(ids) - 1 for ids in self.windows),
            window=self.window,
            methods=tuple(self.rows),
            unavailable=tuple(self.failed),
            notes=self.notes,
            environment=self.began,
        )

    def _forget_failure(self, way: Way) -> None:
        self.failed = [entry for entry in self.failed if entry.name != way.name]

    def _rtn_kl(self, kl: float | None, way: Way) -> float | None:
        """The KL of rounding under the default rule; None if that failed."""
        settings = _rtn_settings(DEFAULT_SCALE_RULE)
        if way.row["settings"] == settings:
            return kl
        return next((row.quality.kl_to_teacher_nats for row in self.rows if row.settings == settings), None)

    def _differences(self, found: PtqResult) -> list[str]:
        """Names of settings in which `found` differs; empty if its rows are comparable."""
        before, now = found.environment, self.environment
        parts = {
            "another model": found.model_sha256 == self.model_sha256,
            "another text": (found.text_sha256, found.window) == (self.text_sha256, self.window),
            "another device": found.device == self.place.type,
            "another machine": (before.cpu_model, before.gpus) == (now.cpu_model, now.gpus),
            "other versions of packages": before.packages == now.packages,
            "another revision of speedstack": before.git_sha == now.git_sha,
        }
        return [part for part, is_same in parts.items() if not is_same]


def _rounding(directory: Path, place: torch.device, rule: ScaleRule) -> Way:
    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        student, start = _load(directory, place), time.perf_counter()
        round_to_nearest(student, rule)
        return student, {"seconds": time.perf_counter() - start}

    return Way(f"{_RTN}{rule}", {"settings": _rtn_settings(rule)}, make)


def _gptq(directory: Path, place: torch.device, options: Gptq, ids_NT: torch.Tensor) -> Way:
    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        student, start = _load(directory, place), time.perf_counter()
        report = gptq_experts(student, ids_NT.split(CALIBRATION_BATCH_SIZE), options.scale_rule, options.damping)
        seconds = time.perf_counter() - start
        summary = {
            "num_calibration_tokens": report.num_tokens,
            "output_error_over_rtn": report.error_ratio,
            "num_matrices": len(report.experts),
            "num_borrowers": report.num_borrowers,
            "num_fallbacks": report.num_fallbacks,
        }
        return student, {"seconds": seconds, "gptq": summary}

    digest = json_sha256(ids_NT.tolist())
    return Way(options.name, {"settings": options.settings, "calibration_sha256": digest}, make)


def _export(name: str, path: Path, place: torch.device) -> Way:
    row = {"settings": {"export": path.name}, "model_sha256": weights_sha256(path)}
    return Way(name, row, lambda: (_load(path, place), {}))


def _load(path: Path, device: torch.device) -> PreTrainedModel:
    model = load_model(path)
    torch.nn.Module.to(model, device)
    return model


def _rtn_settings(rule: ScaleRule) -> dict[str, Any]:
    return {"method": "rtn", "scale_rule": rule}


@module_command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: measure, print the table, write JSON. 1 if a method failed."""
    parser = module_parser(
        __spec__, __doc__, out="result file; rows that it has already stay and are not measured again"
    )
    parser.add_argument("model", type=Path, help="unquantized model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="prepared corpus of the model's tokenizer")
    parser.add_argument("--export", action="append", default=[], metavar="NAME=DIR", help="another quantized model")
    parser.add_argument(
        "--gptq-rules", nargs="*", choices=RULES, default=[GPTQ_SCALE_RULE], help="scale rules of GPTQ; none: no GPTQ"
    )
    several = "; several: every combination"
    parser.add_argument("--num-sequences", type=int, nargs="+", default=[Gptq.num_sequences], help=f"of GPTQ{several}")
    parser.add_argument("--sequence-length", type=int, default=Gptq.sequence_length, help="tokens in each")
    parser.add_argument("--seed", type=int, nargs="+", default=[Gptq.seed], help=f"of the choice of sequences{several}")
    parser.add_argument(
        "--damping", type=float, nargs="+", default=[Gptq.damping], help=f"of the second moments{several}"
    )
    parser.add_argument("--num-tokens", type=int, default=8192, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="tokens in one window (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    failed: list[Unavailable] = []
    grid = (options.gptq_rules, options.num_sequences, options.seed, options.damping)
    result = compare(
        options.model,
        options.corpus,
        _exports(options.export),
        gptq=[
            Gptq(rule, number, options.sequence_length, seed, damping)
            for rule, number, seed, damping in itertools.product(*grid)
        ],
        num_tokens=options.num_tokens,
        window=options.window,
        device=options.device,
        out=options.out,
        on_method=lambda method: print(f"measured: {method.quality.method}", file=sys.stderr),
        on_failure=failed.append,
    )
    print(result.table())
    if options.out is not None:
        print(f"written: {options.out}")
    if failed:
        names = "; ".join(f"{entry.name}: {entry.reason}" for entry in failed)
        print(f"ptq: error: {len(failed)} failed: {names}", file=sys.stderr)
        return EXIT_SYSTEM
    return EXIT_OK


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
