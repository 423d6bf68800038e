"""Figures for papers: every axis says what it shows, every measured point has its whisker, legends name all series."""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from speedstack.eval.report import figures
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.report import Report, StageSummary
from speedstack.eval.results.schema import Spread
from speedstack.eval.results.suite import ComparedMetric, Comparison, Difference

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


def test_what_there_is_nothing_of_is_named_in_a_line(made_up_report: Report) -> None:
    quality, acceptance, timing = made_up_report.quality, made_up_report.acceptance, made_up_report.timing
    assert quality and acceptance and timing
    one = comparison()
    unrecovered = [
        entry.model_copy(update={"others": tuple(o.model_copy(update={"recovery": None}) for o in entry.others)})
        for entry in one.metrics
    ]
    undrafted = acceptance.overall.model_copy(update={"survival": ()})
    stopped = [
        entry.model_copy(
            update={"decode_tokens_per_second": Spread(median=0, q1=0, q3=0, minimum=0, maximum=0, num_repeats=1)}
        )
        for entry in timing.contestants
    ]
    lacking: list[tuple[Callable[[], object], str]] = [
        (lambda: figures.divergence(quality.model_copy(update={"methods": quality.methods[:1]})), "but full precision"),
        (lambda: figures.score_by_bits(one, "three", {}, {}), "no task 'three'; there are one, two"),
        (lambda: figures.score_by_bits(one, "two", {"c": 4.0}, {}), "known of none of a, b"),
        (
            lambda: figures.suite_differences(one.model_copy(update={"metrics": tuple(unrecovered)}), {}),
            "no task has a rec",
        ),
        (lambda: figures.suite_differences(one.model_copy(update={"metrics": ()}), {}), "no task has a recovery"),
        (lambda: figures.survival(acceptance.model_copy(update={"sets": (undrafted,)})), "nothing was drafted"),
        (
            lambda: figures.tokens_by_block(acceptance.model_copy(update={"sets": (), "overall": undrafted})),
            "was drafted",
        ),
        (lambda: figures.decode_rates(timing.model_copy(update={"contestants": ()})), "no contestant ran"),
        (lambda: figures.time_per_text(timing.model_copy(update={"num_new_tokens": 1})), "more than its first token"),
        (
            lambda: figures.time_per_text(timing.model_copy(update={"contestants": tuple(stopped)})),
            "more than its first",
        ),
        (lambda: figures.stage_times([StageSummary(name="qat", summary="")]), "no stage was timed"),
    ]
    for draw, message in lacking:
        with pytest.raises(figures.NothingToDraw, match=message):
            draw()


def test_results_that_nobody_named_go_by_their_own_names() -> None:
    first, second = comparison().metrics
    none = tuple(other.model_copy(update={"recovery": None}) for other in first.others)
    partly = comparison().model_copy(update={"metrics": (first.model_copy(update={"others": none}), second)})
    for figure, label in (
        (figures.score_by_bits(comparison(), "one", {"b": 4.25}, {}), "not known of a"),
        (figures.suite_differences(partly, {}), "recovery (% of a)"),
    ):
        legend = figure.axes[0].get_legend()
        assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["b"]
        assert label in figure.axes[0].get_xlabel().replace("\n", " ")


def test_acceptance_of_no_sets_is_that_of_all_prompts(made_up_report: Report) -> None:
    assert made_up_report.acceptance
    alone = made_up_report.acceptance.model_copy(update={"sets": ()})
    assert whiskers(figures.survival(alone)) == 1


def test_one_repeat_has_whiskers_of_no_length(made_up_report: Report) -> None:
    timing = made_up_report.timing
    assert timing
    once = Spread(median=3.3, q1=3.3, q3=3.3, minimum=3.3, maximum=3.3, num_repeats=1)
    # Rounding may put a quartile beyond its median.
    beyond = once.model_copy(update={"q1": 3.3000000000000003, "q3": 3.2999999999999994})
    for rate in (once, beyond):
        update = {"decode_tokens_per_second": rate, "first_token_seconds": rate}
        entries = tuple(entry.model_copy(update=update) for entry in timing.contestants)
        for draw in (figures.decode_rates, figures.time_per_text):
            draw(timing.model_copy(update={"contestants": entries})).draw_without_rendering()
