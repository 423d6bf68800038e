"""The page in a real browser: nothing complains or is cut off, tables sort, both colour schemes and paper work.

The browser is the machine's own Chromium, which Playwright drives: none is downloaded. Machines without a Chromium, or
without Playwright, skip this file.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from speedstack.eval.report.render import write_report
from speedstack.eval.results.report import Attachment, Report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser is driven")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

ROOT = Path(__file__).resolve().parents[3]
ATTACHED = (
    "2026-11-21-suite-offline-tiny.json",
    "2026-11-21-drafter-ablation-tiny.json",
    "2026-11-21-serving-tiny-timed.json",
    "2026-11-21-ptq-tiny-seed1.json",
)
# Texts that stick out of the box they are in, unless it scrolls; SVG has no boxes of that kind.
CUT_OFF = """
[...document.querySelectorAll("main *:not(svg *)")]
  .filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
  .filter((e) => getComputedStyle(e).display !== "inline")
  .filter((e) => !["auto", "scroll"].includes(getComputedStyle(e).overflowX))
  .map((e) => e.tagName + " " + e.className + ": " + e.textContent.trim().slice(0, 60))
"""
# Words of a figure that leave the drawing.
OUTSIDE_FIGURE = """
[...document.querySelectorAll("figure svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const box = text.getBoundingClientRect();
    const isAcross = box.left < frame.left - 1 || box.right > frame.right + 1;
    return isAcross || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map((text) => svg.getAttribute("aria-label") + ": " + text.textContent);
})
"""
# Of messages on the console.
KINDS = ("error", "warning", "assert")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        # Containers do not allow its sandbox.
        running = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture
def complaints() -> list[str]:
    """Console errors and warnings, exceptions, what a policy blocked, and every request but for the page itself."""
    return []


@pytest.fixture
def show(browser: Any, complaints: list[str]) -> Iterator[Callable[..., Any]]:
    """`show(file, width, scheme="light")`: Playwright's page of a local file in a window of `width` CSS pixels."""
    contexts = []

    def show_file(file: Path, width: int, scheme: Literal["light", "dark"] = "light") -> Any:
        complaints.clear()
        window = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=window, is_mobile=width < 600, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda said: complaints.append(f"console: {said.text}") if said.type in KINDS else None)
        page.on("pageerror", lambda error: complaints.append(f"exception: {error}"))
        page.on("request", lambda sent: complaints.append(sent.url) if sent.resource_type != "document" else None)
        page.goto(file.resolve().as_uri())
        return page

    yield show_file
    for context in contexts:
        context.close()


@pytest.fixture
def report(made_up_report: Report, tmp_path: Path) -> Path:
    """A report with every part, and with results whose names and tables are long."""
    attached = tuple(
        Attachment(name=f"results/{name}", content=json.loads((ROOT / "results" / name).read_text(encoding="utf-8")))
        for name in ATTACHED
    )
    return write_report(made_up_report.model_copy(update={"attached": attached}), tmp_path)[1]


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_complains_and_nothing_is_cut_off(
    show: Callable[..., Any], complaints: list[str], report: Path, width: int
) -> None:
    papers = []
    for scheme in ("light", "dark"):
        ask = show(report, width, scheme).evaluate
        assert complaints == []
        assert ask("document.documentElement.scrollWidth") <= ask("innerWidth") == width
        assert ask(CUT_OFF) == []
        assert ask(OUTSIDE_FIGURE) == []
        papers.append(ask("getComputedStyle(document.body).backgroundColor"))
        ink = ask("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == ask("getComputedStyle(document.body).color")
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_paper_is_white_and_holds_every_table_whole(
    show: Callable[..., Any], complaints: list[str], report: Path, tmp_path: Path
) -> None:
    # 182 mm between the margins of A4, at 96 dots an inch.
    page = show(report, 688, "dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    too_wide = page.evaluate(
        "[...document.querySelectorAll('table')].filter((t) => t.scrollWidth > 688)"
        ".map((t) => [t.scrollWidth, t.textContent.trim().slice(0, 60)])"
    )
    assert too_wide == []
    page.pdf(path=tmp_path / "report.pdf", format="A4", print_background=True)
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and complaints == []


def test_a_click_sorts_a_table_and_the_third_restores_it(
    show: Callable[..., Any], complaints: list[str], report: Path
) -> None:
    ask = show(report, 1280).evaluate
    table = "[...document.querySelectorAll('table')].find((t) => t.textContent.includes('KL to full precision'))"
    rows = f"[...{table}.tBodies[0].rows].map((row) => row.cells[COLUMN].firstChild.textContent)"
    names, values = rows.replace("COLUMN", "0"), rows.replace("COLUMN", "1")
    at_first = ask(names)

    def click(column: int) -> None:
        ask(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').click()")

    click(1)
    falling = ask(values)
    # A dash is no number: it stays at the end, whichever way.
    assert falling[-1] == "\u2013" and len(falling) == len(at_first)
    numbers = [float(text.split()[0]) for text in falling[:-1]]
    assert numbers == sorted(numbers, reverse=True) and ask(names) != at_first
    assert ask(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
    click(1)
    rising = ask(values)
    assert rising == [*reversed(falling[:-1]), "\u2013"]
    click(1)
    assert ask(names) == at_first
    click(0)
    assert ask(names) == sorted(at_first, key=str.lower)
    assert complaints == []


def test_a_script_in_a_result_does_not_run(show: Callable[..., Any], complaints: list[str], report: Path) -> None:
    text = report.read_text(encoding="utf-8").replace("</main>", "<script>console.error('ran')</script></main>")
    report.write_text(text, encoding="utf-8")
    show(report, 1280)
    (complaint,) = complaints
    assert "Content Security Policy" in complaint
