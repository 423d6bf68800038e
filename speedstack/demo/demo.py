"""The `demo` verb: the whole stack on the model of record, in stages that survive any interruption.

`DemoStages` decides what is done; this file opens the directory, draws the progress and shows the result.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from speedstack.demo.config import SIZES, DemoConfig, training_settings
from speedstack.demo.stages import CONFIG_FILE, DemoStages
from speedstack.support.config import dump_config, read_config
from speedstack.support.files import exclusive, write_atomically
from speedstack.support.progress import StageProgress, format_seconds
from speedstack.support.quiet import quiet
from speedstack.support.stages import run_stages

LOG_FILE = "demo.log"
# Checkpoints, exports and corpus of a whole demo, with room for a new file before the old one goes.
NEEDED_BYTES = {"tiny": 2 * 2**30, "small": 8 * 2**30}
NUM_DIFFERENCES_SHOWN = 3


def demo(config: DemoConfig) -> None:
    """Run or continue the demo in `config.out`, then print its figures and the path of the report.

    Raises ValueError if the directory is in use or holds something else or other training settings, for a missing
    device, and as the stages; OSError for a directory that cannot be written or a full disk.
    """
    from speedstack.runtime.model.device import choose_device

    # Resolved once, so that "auto" and its device are the same demo.
    config = config.model_copy(update={"device": choose_device(config.device).type})
    _open(config)
    with exclusive(config.out):
        write_atomically(config.out / CONFIG_FILE, dump_config(config))
        stages = DemoStages(config).all()
        expected = {stage.name: stage.expected_seconds for stage in stages}
        with quiet(config.out / LOG_FILE) as console:
            title = f"speedstack demo, size {config.size}, seed {config.seed}, in {config.out}"
            console.print(title, highlight=False, soft_wrap=True)
            with StageProgress(console, expected, total_name="demo") as progress:
                seconds = run_stages(config.out, stages, progress)
    _show(config.out, seconds)


def _open(config: DemoConfig) -> None:
    """Check that `config.out` is or can become a demo's directory, on a disk with enough room."""
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    is_new = not (out / CONFIG_FILE).is_file()
    if is_new and any(not child.name.startswith(".") for child in out.iterdir()):
        raise ValueError(f"{out} is neither empty nor a demo's directory; pass another --out")
    if not is_new:
        _refuse_other_training(config)
    if not os.access(out, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write; pass another --out", str(out))
    free, needed = shutil.disk_usage(out).free, NEEDED_BYTES[config.size]
    if is_new and free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{free / 2**30:.1f} GiB free, the demo needs {needed / 2**30:.0f}; pass another --out",
            str(out),
        )


def _refuse_other_training(config: DemoConfig) -> None:
    """Raise ValueError if `config` would train other models than those in its directory.

    Measurement settings may change: they repeat only minutes.
    """
    file = config.out / CONFIG_FILE
    way_out = f"pass another --out, or delete {config.out}"
    try:
        there = training_settings(read_config(SIZES[config.size], file))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as settings of this release ({error}); {way_out}") from error
    here = training_settings(config)
    differences = [f"{name} {there[name]} there, {here[name]} now" for name in here if there[name] != here[name]]
    if differences:
        shown = "; ".join(differences[:NUM_DIFFERENCES_SHOWN])
        if len(differences) > NUM_DIFFERENCES_SHOWN:
            shown += f"; and {len(differences) - NUM_DIFFERENCES_SHOWN} more"
        raise ValueError(f"{config.out} holds a demo with other settings ({shown}); {way_out}")


def _show(out: Path, seconds: float) -> None:
    from speedstack.eval.report.render import headlines
    from speedstack.eval.results.report import Report

    console = Console()
    table = Table(title=f"speedstack demo ({format_seconds(seconds)})", title_justify="left", show_header=False)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column()
    table.add_column(style="dim")
    for headline in headlines(Report.load(out / "report.json")):
        table.add_row(headline.value, headline.label, headline.detail)
    console.print(table)
    console.print(f"report: {(out / 'report.html').resolve()}", highlight=False, soft_wrap=True)
