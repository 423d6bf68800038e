"""Sections share the time, none costs another one anything, and the file always holds what is known."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.eval.gpu_suite import __main__ as command
from speedstack.eval.gpu_suite import sections
from speedstack.eval.gpu_suite.scale import scale_for
from speedstack.eval.gpu_suite.suite import OutOfTime, Section, Suite, free_path, run_sections
from speedstack.eval.speed.worker import LocalWorker, WorkerFailed
from speedstack.runtime.model.released_models import MODELS


def suite_in(folder: Path, minutes: float = 1.0) -> Suite:
    return Suite(
        scale_for("cpu"), MODELS, ("graph",), minutes, folder / "result.json", LocalWorker, say=lambda line: None
    )


def saved(suite: Suite) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(suite.out.read_text(encoding="utf-8"))
    return found


def test_a_failing_section_costs_itself_alone(tmp_path: Path) -> None:
    suite = suite_in(tmp_path)

    def fails(suite: Suite, result: dict[str, Any], deadline: float) -> None:
        result["half"] = float("nan")
        raise RuntimeError("broken\nin two lines")

    def works(suite: Suite, result: dict[str, Any], deadline: float) -> None:
        before = saved(suite)["sections"]["first"]
        assert before["status"] == "failed" and before["error"] == "RuntimeError: broken"
        assert before["result"] == {"half": None}, "JSON has no NaN"
        result["value"] = 1.5

    assert not run_sections(suite, [Section("first", 1, fails), Section("second", 1, works)])
    found = saved(suite)
    assert not found["is_complete"] and found["kind"] == "gpu-suite" and found["schema_version"] == 1
    assert found["sections"]["second"] | {"seconds": 0} == {
        "status": "complete", "seconds": 0, "error": None, "result": {"value": 1.5},
    }  # fmt: skip
    assert suite.result("second") == {"value": 1.5} and suite.result("third") == {}


def test_time_that_is_left_is_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("speedstack.eval.gpu_suite.suite.time.monotonic", lambda: now[0])
    deadlines = []

    def takes(seconds: float) -> Any:
        def run(suite: Suite, result: dict[str, Any], deadline: float) -> None:
            deadlines.append(deadline)
            now[0] += seconds

        return run

    sections = [Section("a", 1, takes(5)), Section("b", 2, takes(55)), Section("c", 1, takes(1))]
    assert not run_sections(suite_in(tmp_path), sections)
    assert deadlines == [115.0, 145.0], "a share of the whole, counted from the start"
    found = saved(suite_in(tmp_path))["sections"]
    assert found["c"]["status"] == "out of time" and found["b"]["status"] == "complete"


def test_out_of_time_keeps_what_there_is(tmp_path: Path) -> None:
    def stops(suite: Suite, result: dict[str, Any], deadline: float) -> None:
        result["first"] = 1
        raise OutOfTime("two cells were not measured")

    suite = suite_in(tmp_path)
    assert not run_sections(suite, [Section("only", 1, stops)])
    found = saved(suite)["sections"]["only"]
    assert (found["status"], found["result"]) == ("out of time", {"first": 1})


def test_the_whole_suite_without_time_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "x.json"
    assert command.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(out)], start=LocalWorker) == 1
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {record["status"] for record in found["sections"].values()} == {"out of time"}
    assert {row["verdict"] for row in found["targets"]} == {"unmeasured"}
    assert str(out) in capsys.readouterr().out


def test_an_interruption_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(suite: Suite, result: dict[str, Any], deadline: float) -> None:
        result["before"] = 1
        suite.save()
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "SECTIONS", (Section("environment", 1, interrupted),))
    out = tmp_path / "x.json"
    assert command.main(["--device", "cpu", "--only", "environment", "--out", str(out)], start=LocalWorker) == 130
    assert json.loads(out.read_text(encoding="utf-8"))["sections"]["environment"]["result"] == {"before": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "sped"], "unknown section 'sped'; did you mean 'speed'?"),
        (["--models", "qwen"], "did you mean 'qwen3-30b-a3b'?"),
        (["--contestants", ","], "name at least one contestant"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cuda"], "there is no CUDA device here"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is one here")
    defaults = [] if "--device" in arguments else ["--device", "cpu"]
    assert command.main([*defaults, *arguments, "--out", str(tmp_path / "x.json")], start=LocalWorker) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu_suite: error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert command.main(["--device", "cpu", "--out", str(tmp_path / "file" / "x.json")], start=LocalWorker) == 1
    assert capsys.readouterr().err.startswith("gpu_suite: error: ")


def test_a_second_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    first = free_path(tmp_path, "day")
    first.write_text("{}", encoding="utf-8")
    assert [first.name, free_path(tmp_path, "day").name] == ["day.json", "day-2.json"]


class Silent:
    """A checker whose process ends in its second check."""

    is_alive = True

    def begin(self, method: str, *arguments: Any) -> None:
        self.method = method

    def finish(self, deadline: float) -> Any:
        if self.method == "check_row_invariance":
            self.close()
            raise WorkerFailed("its process died (exit code -9)")
        return {}

    def close(self) -> None:
        self.is_alive = False

    def kill(self) -> None:
        self.close()


def test_checks_that_never_ran_have_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "why_not", lambda suite, name: None)
    suite, result = suite_in(tmp_path), dict[str, Any]()
    suite.start, suite.models = lambda *arguments: Silent(), ("mimo-v2-flash",)
    with pytest.raises(RuntimeError, match="1 checks failed, first check_row_invariance of graph on mimo"):
        sections.run_correctness(suite, result, time.monotonic() + 60)
    passed = {name: check["passed"] for name, check in result["graph"]["mimo-v2-flash"].items()}
    assert passed == {
        "check_buffers": True, "check_row_invariance": False, "check_text": None, "check_sampling": None,
        "check_fp8": None,
    }  # fmt: skip
    with pytest.raises(OutOfTime):
        sections.run_correctness(suite, result, time.monotonic() - 1)
    late = result["graph"]["mimo-v2-flash"].values()
    assert {check["passed"] for check in late} == {None}
