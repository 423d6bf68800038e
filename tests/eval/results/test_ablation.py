"""The table of a grid and its figures: every number where it belongs, failures in sight, axes with units."""

import csv
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

from speedstack.eval.report.ablation_figures import (
    ablation_figures,
    grid_score_by_bits,
    kl_by_bits,
    kl_by_bytes,
    kl_by_speed,
    tau_by_bits,
)
from speedstack.eval.report.figures import NothingToDraw
from speedstack.eval.results import environment
from speedstack.eval.results.ablation import AblationGrid, AblationRow
from speedstack.eval.results.environment import LoadWatch, describe_environment
from speedstack.eval.results.schema import Spread

RATE = Spread(median=100.4, q1=90, q3=110, minimum=80, maximum=120, num_repeats=3)


def row(name: str, **fields: Any) -> AblationRow:
    values = {"format": "mxfp4", "modules": "experts", "method": "rtn", "drafter": "none", "temperature": 0.0}
    return AblationRow(name=name, **(values | fields))


@pytest.fixture
def grid() -> AblationGrid:
    full = {"format": "", "modules": "", "method": "none", "served": "unquantized", "bits_per_weight": 32.0}
    measured = {"served": "packed", "bits_per_weight": 4.25, "model_bytes": 20_000_000, "score_stderr": 0.03}
    tau = {"tau_greedy": 3.0, "tau_greedy_stderr": 0.1, "tau_stderr": 0.2}
    return AblationGrid(
        model_sha256="0",
        corpus_sha256="1",
        config={},
        score_metric="same_text exact_match",
        gpu="H200",
        num_jobs=1,
        rows=(
            row("full precision", **full, model_bytes=50_000_000, perplexity=94.0, score=1.0),
            row("a", **measured, kl_nats=0.0007, kl_stderr_nats=0.00002, score=0.7, tokens_per_second=RATE,
                predicted_tokens_per_second=900.0),
            row("a, drafted greedily", **measured, **tau, drafter="full", kl_nats=0.0007, tau=3.0,
                predicted_tokens_per_second=2000.0),
            row("a, drafted", **measured, **tau, drafter="full", temperature=1.0, tau=1.5, busy_cores_of_others=0.9,
                tokens_per_second=RATE),
            row("b", **measured | {"bits_per_weight": 8.25}, format="mxfp8_e4m3", modules="all", kl_nats=0.0001,
                score=0.9),
            row("c", method="qad", error="qat: it | broke"),
        ),
        notes=("A note.",),
        environment=describe_environment(),
    )  # fmt: skip


def test_the_table(grid: AblationGrid, tmp_path: Path) -> None:
    lines = grid.table().splitlines()
    assert lines[0] == (
        "| model | drafter, temperature | served | bits a weight | model, MB | KL, millinats a token | perplexity | "
        "same_text exact_match | tau, greedy | tau | tokens/s | tokens/s on H200, predicted | error |"
    )
    assert lines[2] == "| full precision |  | unquantized | 32 | 50.00 |  | 94.000 | 1.000 |  |  |  |  |  |"
    assert lines[3].startswith("| mxfp4 experts rtn |  | packed | 4.25 | 20.00 | 0.7 ± 0.02 |  | 0.700 ± 0.030 |")
    assert lines[4].endswith("| 3.00 ± 0.10 |  |  | 2000 |  |")
    assert lines[5].endswith("| 3.00 ± 0.10 | 1.50 ± 0.20 | 100* |  |  |")
    assert lines[7].endswith("| qat: it \\| broke |") and grid.num_failed == 1
    assert [one.name for one in grid.models()] == ["full precision", "a", "b", "c"]
    text = grid.save_markdown(tmp_path / "x" / "results.md").read_text(encoding="utf-8")
    assert text == grid.table() + "\nA note.\n"
    with grid.save_csv(tmp_path / "results.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [one["tokens_per_second_median"] for one in rows] == ["", "100.4", "", "100.4", "", ""]
    assert rows[5]["error"] == "qat: it | broke" and rows[4]["kl_nats"] == "0.0001"
    assert AblationGrid.load(grid.save(tmp_path / "results.json")) == grid


def test_figures_say_what_they_show(grid: AblationGrid, tmp_path: Path) -> None:
    figures = ablation_figures(grid)
    assert list(figures) == ["kl_by_bits", "kl_by_bytes", "kl_by_speed", "score_by_bits", "tau_by_bits"]
    for name, figure in figures.items():
        (axes,) = figure.axes
        assert "\nwhiskers: 95 % interval" in axes.get_xlabel() and axes.get_ylabel(), name
        assert axes.get_legend() is not None
        figure.draw_without_rendering()
        inside, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(inside.x0, inside.y0) > -0.02 and inside.x1 < width + 0.02 and inside.y1 < height + 0.02, name
        figure.savefig(tmp_path / f"{name}.png")
    assert "millinats" in figures["kl_by_bits"].axes[0].get_ylabel()
    assert "MB" in figures["kl_by_bytes"].axes[0].get_xlabel()
    labels = [text.get_text() for text in figures["kl_by_bits"].axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["experts", "all", "rtn"]
    # The point of row a: its KL in millinats, with 1.96 standard errors to either side.
    first = next(one for one in figures["kl_by_bits"].axes[0].containers if isinstance(one, ErrorbarContainer))
    (segment,) = first[2][0].get_segments()
    assert [y for _, y in segment] == pytest.approx([0.7 - 1.96 * 0.02, 0.7 + 1.96 * 0.02])
    alone, drafted = (container[0] for container in figures["kl_by_speed"].axes[0].containers)
    assert (*alone.get_xydata(), *drafted.get_xydata()) == (pytest.approx([900, 0.7]), pytest.approx([2000, 0.7]))
    assert (alone.get_markerfacecolor(), drafted.get_markerfacecolor()) == ("none", drafted.get_color())
    assert not speed_lines(grid)
    full = grid.rows[0].model_copy(update={"predicted_tokens_per_second": 450.0})
    drafted_full = full.model_copy(update={"drafter": "full", "predicted_tokens_per_second": 1500.0})
    (line,) = speed_lines(grid.model_copy(update={"rows": (drafted_full, full, *grid.rows[1:])}))
    assert line.get_xdata() == [450.0, 450.0] and line.get_linestyle() == ":"
    assert ablation_figures(grid.model_copy(update={"rows": grid.rows[5:]})) == {}


def test_rows_of_later_axes_are_drawn(grid: AblationGrid) -> None:
    """A method and modules that the figures do not know yet, of a newer grid."""
    later = row("later", method="awq", modules="router", bits_per_weight=6.0, kl_nats=0.002, score=0.5)
    figures = ablation_figures(grid.model_copy(update={"rows": (*grid.rows, later)}))
    legend = figures["kl_by_bits"].axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["experts", "all", "router", "rtn", "awq"]


def test_a_grid_without_figures_says_what_is_missing(grid: AblationGrid, tmp_path: Path) -> None:
    failed = grid.model_copy(update={"rows": grid.rows[5:]})
    for draw, message in (
        (kl_by_bits, "no row has both KL from full precision and bits a quantized weight"),
        (kl_by_bytes, "no row has both KL from full precision and bytes of the whole model"),
        (kl_by_speed, "no row has both KL from full precision and tokens/s on H200"),
        (grid_score_by_bits, "no row has both same_text exact_match and bits a quantized weight"),
        (tau_by_bits, "no row has a drafter's tokens a round"),
    ):
        with pytest.raises(NothingToDraw, match=message):
            draw(failed)
    empty = grid.model_copy(update={"rows": ()})
    assert empty.table() == "No rows.\n" and ablation_figures(empty) == {}
    whole = grid.save_csv(tmp_path / "whole.csv").read_text(encoding="utf-8").splitlines()
    assert empty.save_csv(tmp_path / "empty.csv").read_text(encoding="utf-8").splitlines() == whole[:1]


def speed_lines(grid: AblationGrid) -> list[Line2D]:
    """Full precision's lines in the figure over tokens/s, after checking that the legend names as many."""
    (axes,) = ablation_figures(grid)["kl_by_speed"].axes
    found = [line for line in axes.lines if line.get_label() == "full precision, undrafted"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()].count("full precision, undrafted") == len(found)
    return found


def test_more_temperatures_than_colours_are_drawn(grid: AblationGrid) -> None:
    drafted = [
        row("a", drafter=drafter, temperature=temperature, bits_per_weight=4.25, tau=2.0)
        for drafter in ("full", "quantized")
        for temperature in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    (axes,) = ablation_figures(grid.model_copy(update={"rows": tuple(drafted)}))["tau_by_bits"].axes
    legend = axes.get_legend()
    assert legend is not None
    lines = [handle for handle in legend.legend_handles if isinstance(handle, Line2D)][:10]
    assert len({str(line.get_color()) for line in lines}) == 10


def test_load_of_others_is_what_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"busy": 100.0, "own": 10.0, "now": 0.0}
    monkeypatch.setattr(environment, "_busy_seconds", lambda: clocks["busy"])
    monkeypatch.setattr(environment, "_own_seconds", lambda: clocks["own"])
    monkeypatch.setattr(environment.time, "monotonic", lambda: clocks["now"])
    with LoadWatch() as watch:
        clocks.update(busy=107.0, own=14.0, now=2.0)
    assert watch.busy_cores_of_others == pytest.approx(1.5)
    monkeypatch.setattr(environment, "_busy_seconds", lambda: None)
    with LoadWatch() as watch:
        pass
    assert watch.busy_cores_of_others is None
