"""A table of finished QAT runs that started from one model: what each changed, its KL, flips and oscillation.

    python -m speedstack.ablation.qat_table runs/qat-tiny runs/qat-tiny-long --out results/DATE-qat-NAME.json

Reads run directories and trains nothing. Runs are compared with the first one by their own held-out evaluations, so
runs of another model or text (by corpus digest) are refused. Older runs recorded no digest: they are accepted, with a
note in the result, if the corpus' path and settings and the loss before the first step agree.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from speedstack.eval.results.labels import short_names
from speedstack.eval.results.metrics import FILE_NAME, read_metrics
from speedstack.eval.results.quantization import QatEvaluation, QatRun, QatRuns
from speedstack.eval.results.schema import read_json
from speedstack.support.command import module_command, module_parser, show_result
from speedstack.support.config import read_config
from speedstack.train.config.recipes import QatConfig, identity

# Name and device do not change a run, the seed has a column, and the model is the same.
_NO_CHANGES = ("run.name", "run.out", "run.device", "run.seed", "qat.model")
# Fields of a corpus that affect an evaluation.
_READ = ("data.sequence_length", "data.eval_sequences")
# Devices add up in other orders, so losses of one text differ by about 1e-6 relative. Losses of two texts of 16,000
# tokens, drawn alike, differ by about 4e-3: one token's loss, of 4 nats, varies by about 2.
_SAME_LOSS = 1e-4


@dataclass(frozen=True)
class _Found:
    """The content of one run directory. `corpus` is the digest of its text, None in older runs."""

    directory: Path
    config: QatConfig
    model: str
    corpus: str | None
    evaluations: tuple[QatEvaluation, ...]

    @property
    def fields(self) -> dict[str, Any]:
        return identity(self.config)

    @property
    def rtn(self) -> QatEvaluation | None:
        """The evaluation of the rounded model, if the run began with it and evaluated."""
        first = self.evaluations[0]
        return first if self.config.qat.start_from is None and first.step == 0 else None


def qat_table(directories: Sequence[Path]) -> QatRuns:
    """The runs in `directories`, one or more.

    Raises ValueError for a directory without a finished QAT run, and for another model or held-out text than the
    first's.
    """
    found = [_read(directory) for directory in directories]
    first = found[0]
    for run in found[1:]:
        _check_comparable(first, run)
    rtn = next((run.rtn for run in found if run.rtn is not None), None)
    names = _names(found)
    runs = [
        QatRun(
            run=name,
            changes={
                name: value
                for name, value in run.fields.items()
                # The same text may be in another place.
                if value != first.fields.get(name) and name not in _NO_CHANGES and not name.startswith("data.")
            },
            seed=run.config.run.seed,
            evaluations=run.evaluations,
            kl_over_rtn=None,
            environment=_environment(run.directory / "env.json"),
        )
        for name, run in zip(names, found, strict=True)
    ]
    notes: tuple[str, ...] = ()
    if len(found) > 1 and (older := [name for name, run in zip(names, found, strict=True) if run.corpus is None]):
        notes = (
            f"No digest of the text was recorded by {', '.join(older)}: that it is the other runs' is known by the "
            "corpus' path and settings, and by the loss before the first step where there is one, not by its content.",
        )
    return QatRuns(model_sha256=first.model, rtn=rtn, runs=tuple(_over(run, rtn) for run in runs), notes=notes)


def _read(directory: Path) -> _Found:
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{directory} is no run directory: it has no config.yaml")
    config = read_config(QatConfig, directory / "config.yaml")
    lines = [line for line in read_metrics(directory) if line["kind"] == "eval"]
    if not lines or lines[-1]["step"] != config.loop.num_steps:
        raise ValueError(f"{directory} holds a run that has not finished its {config.loop.num_steps} steps")
    path = directory / "inputs.json"
    try:
        inputs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{directory} has no inputs.json, which says what model the run started from") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(inputs, dict) or not isinstance(inputs.get("model"), str):
        raise ValueError(f"{path} does not say what model the run started from: was it written by a QAT run?")
    evaluations = tuple(_evaluation(line, directory / FILE_NAME) for line in lines)
    return _Found(directory, config, inputs["model"], inputs.get("corpus"), evaluations)


def _names(found: Sequence[_Found]) -> list[str]:
    """The runs' names, or path ends if names repeat."""
    names = [run.config.run.name for run in found]
    if len(set(names)) == len(names):
        return names
    return short_names([Path(os.path.abspath(run.directory)).parts for run in found])


def _environment(path: Path) -> dict[str, Any]:
    """The environment that a run started in; empty if not recorded."""
    try:
        content = read_json(path)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
    return content if isinstance(content, dict) else {}


def _evaluation(line: dict[str, Any], path: Path) -> QatEvaluation:
    try:
        return QatEvaluation(**{name: line.get(name) for name in QatEvaluation.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: the evaluation at step {line['step']}: {place}: {first['msg']}") from error


def _over(run: QatRun, rtn: QatEvaluation | None) -> QatRun:
    kl = run.evaluations[-1].heldout_kl
    if rtn is None or not rtn.heldout_kl or kl is None:
        return run
    return run.model_copy(update={"kl_over_rtn": kl / rtn.heldout_kl})


def _check_comparable(first: _Found, run: _Found) -> None:
    if run.model != first.model:
        raise ValueError(f"{run.directory} started from another model than {first.directory}")
    is_recorded = run.corpus is not None and first.corpus is not None
    other = [
        name
        for name, value in first.fields.items()
        if name.startswith("data.") and (name in _READ or not is_recorded) and run.fields[name] != value
    ]
    message = f"{run.directory} was evaluated on other text than {first.directory}"
    if other:
        raise ValueError(f"{message}: {', '.join(other)} differ")
    if is_recorded and run.corpus != first.corpus:
        raise ValueError(f"{message}: the content of its corpus {run.config.data.corpus} is another")
    begins = (first.rtn, run.rtn) if run.config.qat.scale_rule == first.config.qat.scale_rule else (None, None)
    losses = [begin.heldout_loss for begin in begins if begin is not None]
    if not is_recorded and len(losses) == 2 and not math.isclose(*losses, rel_tol=_SAME_LOSS):
        raise ValueError(f"{message}: its loss before the first step is {losses[1]:.6f}, not {losses[0]:.6f}")


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: read, print the table, write JSON."""
    parser = module_parser(__spec__, __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run directories; the first is what others change")
    options = parser.parse_args(arguments)
    result = qat_table(options.runs)
    show_result(result, "\n".join([result.table(), *result.notes]), options.out)


if __name__ == "__main__":
    sys.exit(main())
