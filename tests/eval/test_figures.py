"""Figures for papers: every axis says what it shows, every measured point has its whisker, legends name all series."""

from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from speedstack.eval import figures
from speedstack.eval.compare import ComparedMetric, Comparison, Difference
from speedstack.eval.environment import describe_environment
from speedstack.eval.results import Report

NAMES = {"a": "full precision", "b": "rounded"}


def comparison() -> Comparison:
    def metric(task: str, value: float, is_noise: bool) -> ComparedMetric:
        other = Difference(
            result="b",
            value=value,
            delta=value - 0.8,
            stderr=0.02,
            p_value=0.5,
            is_noise=is_noise,
            recovery=value / 0.8,
        )
        return ComparedMetric(
            task=task,
            metric="acc,none",
            num_documents=100,
            higher_is_better=True,
            test="McNemar",
            baseline=0.8,
            baseline_stderr=0.04,
            others=(other,),
        )

    return Comparison(
        suite="made up",
        baseline="a",
        significance=0.05,
        metrics=(metric("one", 0.79, True), metric("two", 0.4, False)),
        mean_recovery={"b": 0.75},
        target_sha256={"a": "0", "b": "1"},
        environment=describe_environment(),
    )


def drawn(report: Report) -> dict[str, Figure]:
    assert report.quality and report.acceptance and report.timing
    return {
        "divergence": figures.divergence(report.quality),
        "score_by_bits": figures.score_by_bits(comparison(), "two", {"a": 16.0, "b": 4.25}, NAMES),
        "suite_differences": figures.suite_differences(comparison(), NAMES),
        "survival": figures.survival(report.acceptance),
        "tokens_by_block": figures.tokens_by_block(report.acceptance),
        "decode_rates": figures.decode_rates(report.timing),
        "time_per_text": figures.time_per_text(report.timing),
        "stage_times": figures.stage_times(report.stages),
    }


def whiskers(figure: Figure) -> int:
    (axes,) = figure.axes
    return sum(isinstance(one, ErrorbarContainer) and one.has_xerr | one.has_yerr for one in axes.containers)


def test_every_figure_is_labelled_and_can_be_printed(made_up_report: Report, tmp_path: Path) -> None:
    for name, figure in drawn(made_up_report).items():
        (axes,) = figure.axes
        label = axes.get_xlabel()
        assert label and (name == "stage_times" or "\nwhiskers: " in label), name
        assert axes.get_ylabel() or len(axes.get_yticklabels()) > 0, name
        # Nothing leaves the page, however it is saved; inches, and a hair for anti-aliasing.
        figure.draw_without_rendering()
        inside, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(inside.x0, inside.y0) > -0.02 and inside.x1 < width + 0.02 and inside.y1 < height + 0.02, name
        for suffix in ("png", "pdf"):
            figure.savefig(tmp_path / f"{name}.{suffix}")
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 3000


def test_whiskers_are_the_intervals(made_up_report: Report) -> None:
    made = drawn(made_up_report)
    assert made_up_report.acceptance and whiskers(made["survival"]) == len(made_up_report.acceptance.sets)
    assert whiskers(made["suite_differences"]) == 2
    (axes,) = made["score_by_bits"].axes
    (bar,) = [one for one in axes.containers if isinstance(one, ErrorbarContainer) and one.has_yerr]
    (segment,) = bar[2][0].get_segments()
    assert segment[1][1] - segment[0][1] == pytest.approx(2 * 1.96 * 0.02)
    # Chance is hollow.
    first, second = (one[0] for one in made["suite_differences"].axes[0].containers)
    assert first.get_markerfacecolor() == "white" and second.get_markerfacecolor() != "white"


def test_accepted_tokens_have_the_variance_of_their_distribution() -> None:
    # 0, 1 or 2 accepted with chances 0.5, 0.2, 0.3.
    mean = 0.2 + 2 * 0.3
    assert figures._variance_of_count((0.5, 0.3)) == pytest.approx(0.2 + 4 * 0.3 - mean**2)


def test_a_task_that_was_not_compared_is_named() -> None:
    with pytest.raises(ValueError, match="no task 'three'; there are one, two"):
        figures.score_by_bits(comparison(), "three", {}, {})
