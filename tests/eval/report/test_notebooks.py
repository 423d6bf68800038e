"""Notebooks run offline from committed results, are the same as their reviewed halves, and hold no outputs. From other
results, which are not a whole demo's, they show what there is.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.report import notebook
from speedstack.eval.results.ablation import AblationGrid
from speedstack.eval.results.report import Report
from speedstack.eval.results.suite import Comparison
from tests.eval.report.test_gather import metrics

RESULTS = Path(__file__).resolve().parents[3] / "results"
NOTEBOOKS = sorted((Path(__file__).resolve().parents[3] / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def test_there_are_three_notebooks() -> None:
    assert NAMES == ["drafter_acceptance", "precision_vs_accuracy", "where_the_time_goes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_no_output_is_committed(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert code[0]["metadata"]["tags"] == ["parameters"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_each_notebook_equals_its_paired_script(path: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    halves = [jupytext.read(path), jupytext.read(path.with_suffix(".py"))]
    cells = [[(cell.cell_type, cell.source) for cell in half.cells] for half in halves]
    assert cells[0] == cells[1], f"run jupytext --sync {path.with_suffix('.py')}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_runs(path: Path) -> None:
    if importlib.util.find_spec("nbmake") is None:
        pytest.skip("nbmake is not installed")
    # Its own pytest, whose plugin executes the cells in a kernel.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=120"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*command, str(path)], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "1 passed" in run.stdout


Run = Callable[..., tuple[set[str], list[str]]]


@pytest.fixture
def run_cells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run_cells(name, **parameters)`: run a notebook's cells with other parameters, in this process; what was shown,
    by the names of the functions that made it, and the lines that were printed.
    """

    def run(name: str, **parameters: str | Path) -> tuple[set[str], list[str]]:
        shown: set[str] = set()

        def show(make: Callable[..., object], *parts: Any) -> object:
            made = real_show(make, *parts)
            if made is not None:
                shown.add(make.__name__)
            return made

        real_show = notebook.show
        directory = NOTEBOOKS[0].parent
        text = (directory / f"{name}.py").read_text(encoding="utf-8")
        for parameter, value in parameters.items():
            text, num_replaced = re.subn(rf"(?m)^{parameter} = .*$", f"{parameter} = {str(value)!r}", text)
            assert num_replaced == 1
        with monkeypatch.context() as patch:
            patch.chdir(directory)
            patch.setattr(notebook, "show", show)
            exec(compile(text, name, "exec"), {})
        return shown, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def whole() -> Report:
    return Report.load(RESULTS / "2026-11-21-demo-tiny-intel.json")


def test_a_run_without_measurements_has_lines_for_figures(run_cells: Run, tmp_path: Path) -> None:
    metrics(tmp_path / "qat")
    assert run_cells("drafter_acceptance", REPORT=tmp_path / "qat") == (
        set(),
        ["not shown: there is no acceptance in what was read"] * 3,
    )
    assert run_cells("where_the_time_goes", REPORT=tmp_path / "qat") == (
        set(),
        ["not shown: there is no timing in what was read"] * 3 + ["not shown: no stage was timed"],
    )
    shown, lines = run_cells("precision_vs_accuracy", REPORT=tmp_path / "qat", COMPARISON="", GRID="")
    assert shown == set()
    assert [line.removeprefix("not shown: there is no ").partition(" ")[0] for line in lines] == [
        "quality",
        *["comparison"] * 3,
        *["grid"] * 6,
    ]


def test_a_bench_without_drafter_and_peers_is_shown(run_cells: Run, whole: Report, tmp_path: Path) -> None:
    """The file that `bench` wrote, of one contestant in one repeat, on a machine that it does not name."""
    assert whole.timing is not None
    (engine,) = (entry for entry in whole.timing.contestants if entry.name == "engine")
    rate = engine.decode_tokens_per_second
    once = rate.model_copy(update={"q1": rate.median, "q3": rate.median, "num_repeats": 1})
    alone = engine.model_copy(update={"decode_tokens_per_second": once})
    update = {"contestants": (alone,), "environment": None, "num_repeats": 1, "unavailable": ()}
    file = whole.timing.model_copy(update=update).save(tmp_path / "timing.json")
    shown, lines = run_cells("where_the_time_goes", REPORT=file)
    assert shown == {"decode_rates", "time_per_text"}
    assert lines[0].endswith(" 1 repeats")
    assert lines[1:] == [
        "engine + drafter was not timed",
        "transformers was not timed",
        "not shown: no stage was timed",
    ]


def test_a_peer_that_did_not_run_says_why(run_cells: Run, whole: Report, tmp_path: Path) -> None:
    assert whole.timing is not None
    reason = {"name": "transformers", "reason": "ImportError: no such module"}
    contestants = tuple(entry for entry in whole.timing.contestants if entry.name != "transformers")
    timing = type(whole.timing).model_validate(
        whole.timing.model_dump() | {"contestants": contestants, "unavailable": [reason]}
    )
    file = whole.model_copy(update={"timing": timing, "quality": None}).save(tmp_path / "x.json")
    shown, lines = run_cells("where_the_time_goes", REPORT=file)
    assert shown == {"decode_rates", "time_per_text", "stage_times"}
    assert "transformers did not run: ImportError: no such module" in lines
    assert any(line.startswith("engine + drafter against engine: 1.") for line in lines)


def test_a_model_alone_a_comparison_of_strangers_and_a_grid_that_failed(
    run_cells: Run, whole: Report, tmp_path: Path
) -> None:
    assert whole.quality is not None
    alone = whole.quality.model_copy(update={"methods": whole.quality.methods[:1]}).save(tmp_path / "quality.json")
    compared = (RESULTS / "2026-11-21-suite-offline-tiny.json").read_text(encoding="utf-8")
    (tmp_path / "compared.json").write_text(compared.replace("MXFP4, distilled", "my run"), encoding="utf-8")
    other = Comparison.load(tmp_path / "compared.json")
    assert "my run" in other.mean_recovery
    grid = AblationGrid.load(RESULTS / "2026-11-21-ablation-tiny.json")
    nothing = {name: None for name in type(grid.rows[0]).model_fields if name not in ("steps", "error")}
    kept = ("name", "format", "modules", "method", "drafter", "temperature")
    failed = tuple(
        row.model_copy(update={**{k: v for k, v in nothing.items() if k not in kept}, "error": "qat: out of memory"})
        for row in grid.rows[:3]
    )
    file = grid.model_copy(update={"rows": failed}).save(tmp_path / "results.json")
    shown, lines = run_cells("precision_vs_accuracy", REPORT=alone, COMPARISON=tmp_path / "compared.json", GRID=file)
    assert shown == {"score_by_bits", "suite_differences", "comparison_table", "grid_table"}
    assert lines[0] == "not shown: no model but full precision was measured, hence no KL from it"
    assert len(lines) == 6 and all(line.startswith("not shown: no row has ") for line in lines[1:])
    partly = grid.model_copy(update={"rows": (*failed, *grid.rows[3:])}).save(tmp_path / "partly.json")
    shown, lines = run_cells("precision_vs_accuracy", COMPARISON="", GRID=partly, TASK="speedstack_no_such_task")
    assert {"divergence", "kl_by_bits", "kl_by_bytes", "kl_by_speed", "grid_score_by_bits", "grid_table"} <= shown
    assert "3 of " in (table := notebook.grid_table(AblationGrid.load(partly))) and "qat: out of memory" in table
    assert table._repr_markdown_() == str(table)


def test_a_result_of_another_kind_is_refused_in_a_line(run_cells: Run) -> None:
    with pytest.raises(ValueError, match="holds no comparison result"):
        run_cells("precision_vs_accuracy", COMPARISON=RESULTS / "2026-11-21-ablation-tiny.json")
