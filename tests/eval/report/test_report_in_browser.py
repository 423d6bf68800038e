"""The page in a real browser: nothing complains or is cut off, tables sort, both colour schemes and paper work.

The browser is Chromium over its debugging pipe, without a driver or a package: the DevTools protocol over
`--remote-debugging-pipe` is JSON messages that end in a zero byte, written to the browser's descriptor 3 and read from
4. Machines without a Chromium skip this file.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from speedstack.eval.report.render import write_report
from speedstack.eval.results.report import Attachment, Report

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser_path() -> str | None:
    """The browser of this machine, None if there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One page of one browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to_browser, self._from_browser = to_browser, from_browser
        self._buffer = b""
        self._next_id = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, width: int, scheme: Literal["light", "dark"] = "light") -> None:
        """Load a local page in a window of `width` CSS pixels."""
        self.complaints.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.media("", scheme)
        self._call("Page.navigate", url=file.resolve().as_uri())
        while self.ask("document.readyState") != "complete":
            pass

    def media(self, media: Literal["", "print"], scheme: Literal["light", "dark"]) -> None:
        """What the page's media queries see."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media=media, features=features)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, which must be plain data."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG, however long."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it prints on A4."""
        answer = self._call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._next_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._from_browser, 1 << 16)
            assert piece, "the browser has gone"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        """Console errors and warnings, exceptions, what a policy blocked, and every request but for the page itself."""
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(f"console: {parameters['args']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(f"exception: {parameters['exceptionDetails']}")
            case "Log.entryAdded":
                self.complaints.append(f"log: {parameters['entry']['text']}")
            case "Network.requestWillBeSent" if parameters["type"] != "Document":
                self.complaints.append(f"request: {parameters['request']['url']}")


@contextlib.contextmanager
def start_browser(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    to_browser_read, to_browser = os.pipe()
    from_browser, from_browser_write = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # The shell puts the pipes where the browser expects them; no sandbox, which containers do not allow.
        command = (
            f'exec "$0" --headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe '
            f'--user-data-dir="$1" 3<&{to_browser_read} 4>&{from_browser_write}'
        )
        process = subprocess.Popen(
            ["bash", "-c", command, program, profile],
            pass_fds=(to_browser_read, from_browser_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser_read)
        os.close(from_browser_write)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(to_browser)
            os.close(from_browser)


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = browser_path()
    if program is None:
        pytest.skip("no Chromium on this machine")
    with start_browser(program) as running:
        yield running


@pytest.fixture
def page(made_up_report: Report, tmp_path: Path) -> Path:
    """A report with every part, and with results whose names and tables are long."""
    attached = tuple(
        Attachment(name=f"results/{name}", content=json.loads((ROOT / "results" / name).read_text(encoding="utf-8")))
        for name in ATTACHED
    )
    return write_report(made_up_report.model_copy(update={"attached": attached}), tmp_path)[1]


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_complains_and_nothing_is_cut_off(browser: Browser, page: Path, width: int) -> None:
    papers = []
    for scheme in ("light", "dark"):
        browser.open(page, width, scheme)
        assert browser.complaints == []
        assert browser.ask("document.documentElement.scrollWidth") <= browser.ask("innerWidth") == width
        assert browser.ask(CUT_OFF) == []
        assert browser.ask(OUTSIDE_FIGURE) == []
        papers.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
        ink = browser.ask("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == browser.ask("getComputedStyle(document.body).color")
    assert papers == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_paper_is_white_and_holds_every_table_whole(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, 700, "dark")
    browser.media("print", "dark")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    # 182 mm between the margins of A4, at 96 dots an inch.
    too_wide = browser.ask(
        "[...document.querySelectorAll('table')].filter((t) => t.scrollWidth > 688)"
        ".map((t) => [t.scrollWidth, t.textContent.trim().slice(0, 60)])"
    )
    assert too_wide == []
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF") and browser.complaints == []


def test_a_click_sorts_a_table_and_the_third_restores_it(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    table = "[...document.querySelectorAll('table')].find((t) => t.textContent.includes('KL to full precision'))"
    rows = f"[...{table}.tBodies[0].rows].map((row) => row.cells[COLUMN].firstChild.textContent)"
    names, values = rows.replace("COLUMN", "0"), rows.replace("COLUMN", "1")
    at_first = browser.ask(names)

    def click(column: int) -> None:
        browser.ask(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').click()")

    click(1)
    falling = browser.ask(values)
    # A dash is no number: it stays at the end, whichever way.
    assert falling[-1] == "\u2013" and len(falling) == len(at_first)
    numbers = [float(text.split()[0]) for text in falling[:-1]]
    assert numbers == sorted(numbers, reverse=True) and browser.ask(names) != at_first
    assert browser.ask(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
    click(1)
    rising = browser.ask(values)
    assert rising == [*reversed(falling[:-1]), "\u2013"]
    click(1)
    assert browser.ask(names) == at_first
    click(0)
    assert browser.ask(names) == sorted(at_first, key=str.lower)
    assert browser.complaints == []


def test_a_script_in_a_result_does_not_run(browser: Browser, page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("</main>", "<script>console.error('ran')</script></main>")
    page.write_text(text, encoding="utf-8")
    browser.open(page, 1280)
    (complaint,) = browser.complaints
    assert "Content Security Policy" in complaint
