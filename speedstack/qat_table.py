"""A table of finished QAT runs that started from one model: what each changed, its KL, flips and oscillation.

    python -m speedstack.qat_table runs/qat-tiny runs/qat-tiny-long --out results/DATE-qat-NAME.json

Reads run directories and trains nothing. Runs are compared with the first one named; their numbers are those of their
own evaluations on held-out text, so runs of another model or of other text are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedstack.eval.qat_rows import QatEvaluation, QatRun, QatRuns
from speedstack.train.config import QatConfig, identity, read_config
from speedstack.train.metrics import read_metrics

# A run's name and device say nothing about what it does, and the seed is a column of its own.
_NO_CHANGES = ("run.name", "run.out", "run.device", "run.seed")


def qat_table(directories: Sequence[Path]) -> QatRuns:
    """The runs in `directories`, of which there is at least one.

    Raises ValueError, of one line, for a directory without a finished QAT run, and for runs whose model or held-out
    text is not the first one's.
    """
    runs, digests, configs = [], [], []
    rtn: QatEvaluation | None = None
    for directory in directories:
        if not (directory / "config.yaml").is_file():
            raise ValueError(f"{directory} is no run directory: it has no config.yaml")
        config = read_config(QatConfig, directory / "config.yaml")
        lines = [line for line in read_metrics(directory) if line["kind"] == "eval"]
        if not lines or lines[-1]["step"] != config.loop.num_steps:
            raise ValueError(f"{directory} holds a run that has not finished its {config.loop.num_steps} steps")
        evaluations = tuple(_evaluation(line) for line in lines)
        if rtn is None and config.qat.start_from is None and evaluations[0].step == 0:
            rtn = evaluations[0]
        configs.append(identity(config))
        digests.append(json.loads((directory / "inputs.json").read_text(encoding="utf-8"))["model"])
        _check_comparable(directories[0], directory, configs, digests)
        changes = {
            name: value
            for name, value in configs[-1].items()
            if value != configs[0].get(name) and name not in (*_NO_CHANGES, "qat.model")
        }
        environment = json.loads((directory / "env.json").read_text(encoding="utf-8"))
        runs.append(
            QatRun(
                run=config.run.name,
                changes=changes,
                seed=config.run.seed,
                evaluations=evaluations,
                kl_over_rtn=None,
                environment=environment,
            )
        )
    return QatRuns(model_sha256=digests[0], rtn=rtn, runs=tuple(_over(run, rtn) for run in runs))


def _evaluation(line: dict[str, Any]) -> QatEvaluation:
    return QatEvaluation(**{name: line.get(name) for name in QatEvaluation.model_fields})


def _over(run: QatRun, rtn: QatEvaluation | None) -> QatRun:
    kl = run.evaluations[-1].heldout_kl
    if rtn is None or not rtn.heldout_kl or kl is None:
        return run
    return run.model_copy(update={"kl_over_rtn": kl / rtn.heldout_kl})


def _check_comparable(first: Path, directory: Path, configs: Sequence[dict[str, Any]], digests: Sequence[str]) -> None:
    if digests[-1] != digests[0]:
        raise ValueError(f"{directory} started from another model than {first}")
    other = [name for name in configs[0] if name.startswith("data.") and configs[-1][name] != configs[0][name]]
    if other:
        raise ValueError(f"{directory} was evaluated on other text than {first}: {', '.join(other)} differ")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: read, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m speedstack.qat_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished run directories; the first is what others change")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args(arguments)
    try:
        result = qat_table(options.runs)
        print(result.table())
        if options.out is not None:
            print(f"written: {result.save(options.out)}")
    except (ValueError, OSError) as error:
        print(f"qat_table: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
