"""The `report` verb and what it gathers: runs, results of every kind, other reports; what is none is named."""

import json
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.eval.report.gather import gather
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.quantization import PtqResult
from speedstack.eval.results.report import Report
from speedstack.eval.results.speed import AcceptanceResult, AcceptanceSet, TimingResult


def timing(num_threads: int = 1, **fields: object) -> TimingResult:
    content = {
        "device": "cpu",
        "dtype": "float32",
        "num_threads": num_threads,
        "num_prompts": 1,
        "num_prompt_tokens": (4,),
        "num_new_tokens": 2,
        "num_repeats": 1,
        "contestants": (),
    }
    return TimingResult.model_validate(content | fields)


def acceptance() -> AcceptanceResult:
    everything = AcceptanceSet(
        name="all prompts",
        num_prompts=1,
        num_rounds=4,
        num_committed=8,
        acceptance_length=2.0,
        mean_of_responses=2.0,
        survival=(0.7, 0.3),
    )
    return AcceptanceResult(
        block_size=3, temperature=0.0, seed=0, max_new_tokens=8, overall=everything, sets=(everything,)
    )


def ptq() -> PtqResult:
    return PtqResult(model_sha256="0", num_tokens=1, window=2, methods=(), environment=describe_environment())


def metrics(run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "train", "step": step, "loss": 3.0 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused report leaves; nothing is written."""
    capsys.readouterr()
    assert main(["report", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_run_and_results_are_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics(tmp_path / "runs" / "pretrain")
    ptq().save(tmp_path / "table.json")
    timing().save(tmp_path / "fast.json")
    out = tmp_path / "out"
    given = [str(tmp_path / name) for name in ("runs", "table.json", "fast.json")]
    assert main(["report", *given, "--out", str(out), "--title", "Mine"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f"<h2>{title}</h2>" in page for title in ("Training", "Ways to quantize", "Speed")) and "Mine" in page
    report = Report.load(out / "report.json")
    assert report.curves[0].values == (3.0, 1.5, 1.0) and report.timing == timing()
    assert [attachment.name for attachment in report.attached] == [str(tmp_path / "table.json")]
    # The report of a report is the report: nothing is lost on the way.
    assert main(["report", str(out / "report.json"), "--out", str(tmp_path / "again"), "--title", "Mine"]) == 0
    again = Report.load(tmp_path / "again" / "report.json")
    assert again.model_copy(update={"created_utc": report.created_utc}) == report


def test_inputs_may_be_named_by_a_flag(tmp_path: Path) -> None:
    timing().save(tmp_path / "timing.json")
    assert main(["report", "--inputs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0


def test_what_is_measured_twice_stands_side_by_side(tmp_path: Path) -> None:
    for name, num_threads in (("a", 1), ("b", 2)):
        timing(num_threads).save(tmp_path / name / "timing.json")
    report = gather([tmp_path / "b", tmp_path / "a"], "Two")
    assert report.timing == timing(2)
    assert [attachment.content["num_threads"] for attachment in report.attached] == [1]
    assert [attachment.name for attachment in gather([tmp_path], "Both").attached] == [
        str(tmp_path / "b" / "timing.json")
    ]


def test_a_directory_s_own_measurement_stands_for_those_of_its_runs(tmp_path: Path) -> None:
    acceptance().save(tmp_path / "acceptance.json")
    acceptance().model_copy(update={"seed": 1}).save(tmp_path / "drafter" / "acceptance.json")
    timing().save(tmp_path / "drafter" / "timing.json")
    report = gather([tmp_path], "Demo")
    assert report.acceptance == acceptance() and report.attached == () and report.timing == timing()


def test_files_that_are_no_results_are_passed_over_in_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timing().save(tmp_path / "timing.json")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    (tmp_path / "plan.json").write_text(json.dumps({"kind": "plan", "schema_version": 1}), encoding="utf-8")
    report = gather([tmp_path], "Some")
    assert report.attached == () and report.notes == (f"Not shown in this report: {tmp_path / 'plan.json'} (plan)",)
    assert "tokenizer.json is not a result file" in refusal(capsys, tmp_path / "tokenizer.json")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "nothing at nowhere" in refusal(capsys, "nowhere", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "no finished run or result in" in refusal(capsys, tmp_path / "empty", "--out", out)
    (tmp_path / "plan.json").write_text(json.dumps({"kind": "plan", "schema_version": 1}), encoding="utf-8")
    line = refusal(capsys, tmp_path / "plan.json", "--out", out)
    assert f"that a report shows; there are {tmp_path / 'plan.json'} (plan)" in line
    for kind in ("timing", "ptq", "comparison"):
        other = tmp_path / f"{kind}.json"
        other.write_text(json.dumps({"kind": kind, "schema_version": 99}), encoding="utf-8")
        line = refusal(capsys, other, "--out", out)
        assert f"{other} has schema version 99, this release reads version 1: measure again" in line
    (tmp_path / "torn.json").write_text('{"kind": "tim', encoding="utf-8")
    assert "torn.json is not a JSON file" in refusal(capsys, tmp_path / "torn.json", "--out", out)
    assert not out.exists()


def test_report_names_the_machine_that_was_timed(tmp_path: Path) -> None:
    elsewhere = describe_environment().model_copy(update={"cpu_model": "Abacus"})
    timing(environment=elsewhere).save(tmp_path / "timing.json")
    assert gather([tmp_path], "Timed elsewhere").environment == elsewhere
