"""Figures: well-formed SVG that follows the page's colours, with every number's label on it."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest

from speedstack.eval.report import plots
from speedstack.eval.results.report import Report


def all_figures(report: Report) -> dict[str, str]:
    assert report.quality is not None and report.acceptance is not None and report.timing is not None
    return {
        "loss": plots.training_curves(report.curves[:1]),
        "divergence": plots.divergence_by_method(report.quality),
        "scores": plots.task_scores_by_method(report.quality, {"next_line": "acc"}),
        "acceptance": plots.acceptance_by_position(report.acceptance),
        "speed": plots.tokens_per_second(report.timing),
        "memory": plots.memory_by_part(report.memory_bytes),
    }


def test_figures_are_inline_svg_in_the_pages_colours(made_up_report: Report) -> None:
    before = dict(matplotlib.rcParams)
    figures = all_figures(made_up_report)
    ids: list[str] = []
    for svg in figures.values():
        root = ET.fromstring(svg)
        assert root.tag.endswith("svg") and root.get("role") == "img" and root.get("aria-label")
        assert plots.INK not in svg and plots.GRID not in svg and "currentColor" in svg and "var(--grid" in svg
        assert "DejaVu" not in svg and "<?xml" not in svg and "metadata" not in svg
        # Black and white are invisible on one of the two papers.
        assert not re.search(r"(fill|stroke): #(000000|ffffff)", svg)
        found = re.findall(r'\bid="([^"]+)"', svg)
        for reference in re.findall(r'(?:url\(#|href="#)([^)"]+)', svg):
            assert reference in found
        ids += found
    assert len(ids) == len(set(ids))  # in one page no id may occur twice
    assert dict(matplotlib.rcParams) == before


def test_names_are_text_and_never_markup() -> None:
    title, name = 'Suite "x" onload="y"><script>', '<b>"&amp;"</b>'
    root = ET.fromstring(plots.dots(title, [name], {"s": [(1.0, 1.0, 1.0)]}, "x"))
    assert root.get("aria-label") == title and root.get("onload") is None
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert name in [" ".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]


def test_same_input_same_bytes(made_up_report: Report) -> None:
    assert all_figures(made_up_report) == all_figures(made_up_report)


def test_axes_have_units_and_marks_have_values(made_up_report: Report) -> None:
    figures = all_figures(made_up_report)
    texts = {
        name: [" ".join(element.itertext()) for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]
        for name, svg in figures.items()
    }
    assert "loss (nats)" in texts["loss"] and "training step" in texts["loss"]
    assert {"1.8", "0.81", "PTQ", "QAD"} <= set(texts["divergence"]) and "full precision" not in texts["divergence"]
    assert any("millinats" in text for text in texts["divergence"])
    assert any(text.startswith("score (%") for text in texts["scores"])
    assert "draft position in the block" in texts["acceptance"] and "all prompts (\u03c4 2.45)" in texts["acceptance"]
    assert {"400", "650", "80"} <= set(texts["speed"]) and any("tokens/s" in text for text in texts["speed"])
    assert {"memory (MiB)", "17.0", "4.0"} <= set(texts["memory"])


def test_curves_of_different_quantities_share_no_axis(made_up_report: Report) -> None:
    loss = made_up_report.curves[0]
    for curves in ([], [loss, loss.model_copy(update={"quantity": "KL (nats)"})]):
        with pytest.raises(ValueError, match="one figure shows one stage's curves of one quantity"):
            plots.training_curves(curves)


@pytest.mark.parametrize(
    ("names", "is_one_column"), [(["MXFP4, rounded", "INT2"], False), (["made for the full model, at T=1"] * 2, True)]
)
def test_labels_of_a_legend_stay_inside_the_figure(names: list[str], is_one_column: bool) -> None:
    names = [f"{name} {index}" for index, name in enumerate(names)]
    svg = plots.dots("a title", ["x"], {name: [(1.0, 0.5, 1.5)] for name in names}, "tokens")
    places = {
        text.text: (text.get("x"), text.get("y")) for text in ET.fromstring(svg).iter() if text.tag.endswith("text")
    }
    (left, top), (right, bottom) = (places[name] for name in names)
    assert (left == right, top == bottom) == (is_one_column, not is_one_column)
