"""Correctness, row invariance and speed of the GPU backends, measured in one go.

python -m speedstack.eval.gpu_suite [--minutes 8] [--only correctness,speed] [--out results/x.json]
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from speedstack.eval.gpu_suite.scale import CONTESTANTS, scale_for
from speedstack.eval.gpu_suite.sections import run_correctness, run_environment, run_quant
from speedstack.eval.gpu_suite.speed import run_headline, run_speed
from speedstack.eval.gpu_suite.suite import Section, Suite, free_path, run_sections
from speedstack.eval.gpu_suite.table import judge, text
from speedstack.eval.speed.worker import InterpretedWorker, ProcessWorker, StartWorker
from speedstack.runtime.model.released_models import MODELS
from speedstack.support.command import EXIT_INTERRUPTED, EXIT_OK, EXIT_SYSTEM, module_command, module_parser
from speedstack.support.near_miss import did_you_mean

ENVIRONMENT = Section("environment", 0.05, run_environment)
SECTIONS = (
    ENVIRONMENT,
    Section("headline", 0.32, run_headline),
    Section("correctness", 0.2, run_correctness),
    Section("speed", 0.37, run_speed),
    Section("quant", 0.06, run_quant),
)


@module_command
def main(arguments: Sequence[str] | None = None, start: StartWorker | None = None) -> int:
    """Exit status: 0 if every section is complete, 1 if one is not, 2 for bad settings.

    `start` makes workers; None: in processes, on a CPU with interpreted kernels.
    """
    parser = module_parser(__spec__, __doc__, out="result file (default: results/DATE-gpu-suite.json)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    known = ",".join(section.name for section in SECTIONS)
    parser.add_argument("--only", default=known, help="sections (default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="families and shapes (default: %(default)s)")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="default: %(default)s")
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu to try the suite: tiny models, kernels interpreted"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and orders (default: %(default)s)")
    options = parser.parse_args(arguments)
    only = _chosen("section", options.only, [section.name for section in SECTIONS])
    suite = Suite(
        scale=scale_for(options.device),
        models=_chosen("model", options.models, MODELS),
        contestants=_chosen("contestant", options.contestants, CONTESTANTS),
        minutes=options.minutes,
        out=options.out or free_path(Path("results"), f"{datetime.now(UTC):%Y-%m-%d}-gpu-suite"),
        start=start or (InterpretedWorker if options.device == "cpu" else ProcessWorker),
        seed=options.seed,
    )
    if options.minutes <= 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes:g}")
    _check_device(options.device)
    suite.save()
    # Always measured, because every fraction is of the copy's bandwidth.
    sections = [section for section in SECTIONS if section.name in only or section is ENVIRONMENT]
    try:
        is_complete = run_sections(suite, sections)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {suite.out}", file=sys.stderr)
        return EXIT_INTERRUPTED
    suite.document["targets"] = judge(suite.document)
    suite.save()
    print(text(suite.document))
    print(f"written: {suite.out}")
    return EXIT_OK if is_complete else EXIT_SYSTEM


def _chosen(what: str, names: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a comma-separated list. Raises ValueError, with the nearest known name, for an unknown one."""
    chosen = tuple(name for name in names.split(",") if name)
    if not chosen:
        raise ValueError(f"name at least one {what}: {', '.join(known)}")
    for name in chosen:
        if name not in known:
            hint = did_you_mean(name, known, 0.3) or "."
            raise ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")
    return chosen


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use cuda, or cpu to try the suite on tiny models")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; --device cpu tries the suite on tiny models")


if __name__ == "__main__":
    sys.exit(main())
