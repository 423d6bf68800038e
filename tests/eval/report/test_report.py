"""The page: self-contained, complete, escaped, also for a run that has made only a part."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from speedstack.eval.report.page import FigureBlock
from speedstack.eval.report.render import headlines, render_html, report_sections, write_report
from speedstack.eval.report.sections.run import thin_curve
from speedstack.eval.results.report import Attachment, Curve, Report
from speedstack.eval.results.table import Table, format_bytes, format_count, format_number, format_seconds

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Outline(HTMLParser):
    """Collects tags and text, and fails on a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.stack == []
    return parser


def test_the_page_is_self_contained(made_up_report: Report, tmp_path: Path) -> None:
    json_path, html_path = write_report(made_up_report, tmp_path / "out")
    assert Report.load(json_path) == made_up_report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    html = html_path.read_text(encoding="utf-8")
    page = outline(html)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    # One script, of ours, which the page's policy names by its hash: nothing else runs, nothing is loaded.
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'http-equiv="Content-Security-Policy" content="{policy}"' in html
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    # Addresses occur as names of XML vocabularies alone.
    addresses = set(re.findall(r'"(https?://[^"]+)"', html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in html and "@media print" in html and 'name="viewport"' in html
    assert render_html(made_up_report) == html


def test_every_part_is_on_the_page(made_up_report: Report) -> None:
    page = outline(render_html(made_up_report))
    text = " ".join(page.text.split())
    for fact in (
        "A made-up run",
        "seed 7",
        "A Processor",
        "6 min 42 s",
        "12.1 M parameters",
        "29.960",
        "1.800 \u00b1 0.090",
        "97.00%",
        "56.1 \u00b1 5.0%",
        "2.45",
        "2.52",
        "400 (392\u2013404)",
        "4 of 4 as \u201cengine\u201d",
        "promised, but prompt 2 differs from token 17 on",
        "did not run: ValueError: made up",
        "425 B",
        "0.2656",
        "return <b>x</b>",
        "speedstack demo --seed 7",
        "All figures are invented.",
        "Some Linux",
        "0123abcd",
        "acceptance length",
    ):
        assert fact in text, fact
    assert page.tags.count("svg") == 7
    assert "<script>alert(1)</script> stays text" in page.text and page.tags.count("script") == 1


def test_headlines_are_the_figures_of_the_report(made_up_report: Report) -> None:
    found = {headline.label: headline.value for headline in headlines(made_up_report)}
    assert found == {
        "of the experts' bytes on disk": "26.6%",
        "divergence of QAD from the teacher, against PTQ": "0.45\u00d7",
        "tokens a pass of the target (\u03c4), of 8": "2.45",
        "decoding with the drafter against without": "1.62\u00d7",
        "decoding against transformers, both without a drafter": "5.00\u00d7",
    }


def test_every_table_and_figure_names_the_command_that_made_it(made_up_report: Report) -> None:
    html = render_html(made_up_report)
    blocks = html.count("<table") + html.count("<figure>")
    assert blocks > 10
    assert html.count('<p class="origin"><span>command <code>speedstack demo --seed 7</code></span></p>') == blocks


def test_a_second_result_of_a_kind_stands_beside_the_first(made_up_report: Report) -> None:
    assert made_up_report.timing is not None
    again = made_up_report.timing.model_copy(
        update={
            "environment": made_up_report.environment.model_copy(
                update={"command": "speedstack bench", "num_cores": 64}
            )
        }
    )
    attached = Attachment(name="runs/bench/timing.json", content=again.model_dump(mode="json"))
    html = render_html(made_up_report.model_copy(update={"attached": (attached,)}))
    text = outline(html).text
    assert "Speed: timing" in text and "command speedstack bench" in text and "file runs/bench/timing.json" in text
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html)) <= set(ids)
    # Two machines are two descriptions; the first result of a kind is the one at the top.
    assert "64 cores" in text and "2 cores" in text
    assert len(headlines(made_up_report.model_copy(update={"attached": (attached,)}))) == len(headlines(made_up_report))


def test_an_attachment_of_another_schema_is_refused(made_up_report: Report) -> None:
    for content, message in (
        ({"kind": "timing", "schema_version": 99}, "x.json has schema version 99"),
        ({"kind": "poem", "schema_version": 1}, "x.json is of kind 'poem', which a report has no section for"),
    ):
        report = made_up_report.model_copy(update={"attached": (Attachment(name="x.json", content=content),)})
        with pytest.raises(ValueError, match=message):
            render_html(report)


def test_a_run_that_has_made_nothing_yet_still_has_a_page(made_up_report: Report) -> None:
    empty = Report(title="Just begun", created_utc="2026-01-01", environment=made_up_report.environment)
    page = outline(render_html(empty))
    assert "svg" not in page.tags and "Just begun" in page.text and "Words" in page.text
    assert headlines(empty) == []
    assert "Quality" not in page.text and "did not run" not in page.text


@pytest.mark.parametrize("part", ["quality", "acceptance", "timing", "memory_bytes", "storage", "curves", "model"])
def test_any_part_may_be_missing(made_up_report: Report, part: str) -> None:
    default = Report.model_fields[part].get_default()
    outline(render_html(made_up_report.model_copy(update={part: default})))


def test_formats() -> None:
    assert [format_seconds(value) for value in (0.84, 21.4, 59.7, 402.0)] == [
        "0.8 s",
        "21 s",
        "1 min 0 s",
        "6 min 42 s",
    ]
    assert [format_bytes(value) for value in (12, 4177920, 3 * 2**30)] == ["12 B", "4.0 MiB", "3.0 GiB"]
    assert [format_count(value) for value in (5, 4096, 12_100_000, 2e12)] == ["5", "4.1 k", "12.1 M", "2000.0 B"]
    assert [format_number(value) for value in (0.12345, 812.34, 123456.7)] == ["0.1235", "812.3", "123,457"]


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    curve = Curve(
        stage="s", label="l", quantity="q", steps=tuple(range(1001)), values=tuple(float(i) for i in range(1001))
    )
    thin = thin_curve(curve, max_points=100)
    assert len(thin.steps) <= 102 and thin.steps[0] == 0 and thin.steps[-1] == 1000
    assert thin.values == tuple(float(step) for step in thin.steps)
    assert thin_curve(thin, max_points=200) is thin


def test_gathering_is_no_measurement(made_up_report: Report) -> None:
    gathering = "speedstack report there --out here"
    for commands, made in ((made_up_report.commands, "speedstack demo --seed 7"), ((gathering,), None)):
        report = made_up_report.model_copy(update={"commands": commands, "attached": ()})
        blocks = [block for section in report_sections(report) for block in section.blocks]
        named = {block.command for block in blocks if isinstance(block, Table | FigureBlock) and not block.source}
        assert named == {made}
