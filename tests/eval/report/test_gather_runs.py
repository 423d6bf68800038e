"""Reports of several runs, and of runs that are not whole: nothing is mixed up, lost, or the end of the report."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedstack.cli import main
from speedstack.eval.report.gather import FACTS_FILE, REPORT_FILE, gather
from speedstack.eval.report.render import render_html, report_sections
from speedstack.eval.results.report import Curve, Report
from speedstack.eval.results.table import Table
from speedstack.support.files import write_atomically
from speedstack.support.stages import stage_store
from speedstack.support.steps import StepRecord
from tests.eval.report.test_gather import acceptance, metrics, ptq, timing

MODEL = {"name": "small", "architecture": "Qwen3MoeForCausalLM", "num_parameters": 9, "num_expert_parameters": 4}
STORAGE = [{"place": "on disk", "packed_bytes": 17, "bf16_bytes": 64}]


def demo(directory: Path, seconds: float = 1.0, **model: Any) -> Path:
    """What a demo leaves, as far as reports read it: records, two runs, facts, a measurement."""
    for stage in ("drafter", "qad"):
        metrics(directory / stage)
        record = StepRecord(stage, 1, "k", "i", {}, {}, {}, seconds, f"{stage} was done", completion="c")
        write_atomically(stage_store(directory).record_path(stage), json.dumps(vars(record)))
    facts = {
        "kind": "facts",
        "schema_version": 1,
        "model": MODEL | model,
        "storage": STORAGE,
        "memory_bytes": {"QAD": {"experts": round(seconds)}},
        "examples": [{"title": "a loop", "prompt": "for", "text": f"{seconds}"}],
    }
    (directory / FACTS_FILE).write_text(json.dumps(facts), encoding="utf-8")
    timing(round(seconds)).save(directory / "timing.json")
    return directory


def series(report: Report) -> list[tuple[str, str, str]]:
    return [(curve.stage, curve.label, curve.quantity) for curve in report.curves]


def quietly(*inputs: Path) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gather(inputs, "Some")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for place in ("muon/qat", "adamw/qat", "adamw/pretrain"):
        metrics(tmp_path / "runs" / place)
    report = quietly(*(tmp_path / "runs" / place for place in ("muon/qat", "adamw/qat", "adamw/pretrain")))
    assert [stage for stage, _, _ in series(report)] == ["muon/qat", "adamw/qat", "adamw/pretrain"]
    # Where names differ, they are as they always were.
    assert [stage for stage, _, _ in series(quietly(tmp_path / "runs" / "adamw"))] == ["pretrain", "qat"]


def test_a_run_that_is_the_working_directory_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in ("one/qat", "two/qat"):
        metrics(tmp_path / run)
    monkeypatch.chdir(tmp_path / "two" / "qat")
    assert [stage for stage, _, _ in series(quietly(Path()))] == ["qat"]
    assert [stage for stage, _, _ in series(quietly(Path(), Path("../../one/qat")))] == ["two/qat", "one/qat"]


def test_two_demos_keep_all_that_each_has(tmp_path: Path) -> None:
    first, second = demo(tmp_path / "first", 1.0), demo(tmp_path / "second", 2.0, num_parameters=11)
    report = quietly(first, second)
    stages = ["first/drafter", "first/qad", "second/drafter", "second/qad"]
    assert [(stage.name, stage.seconds) for stage in report.stages] == list(zip(stages, (1, 1, 2, 2), strict=True))
    assert sorted({stage for stage, _, _ in series(report)}) == stages
    assert len(set(series(report))) == len(series(report))
    assert report.memory_bytes == {"first: QAD": {"experts": 1}, "second: QAD": {"experts": 2}}
    assert [entry.place for entry in report.storage] == ["on disk, first", "on disk, second"]
    assert [(entry.title, entry.text) for entry in report.examples] == [
        ("first: a loop", "1.0"),
        ("second: a loop", "2.0"),
    ]
    assert report.model is not None
    models = [(model.name, model.num_parameters) for model in (report.model, *report.other_models)]
    assert models == [("first: small", 9), ("second: small", 11)]
    assert report.timing == timing(1) and report.own_files == {"timing": str(first / "timing.json")}
    # The same of the directory that holds both, and of a report of them.
    for again in (quietly(tmp_path), quietly(report.save(tmp_path / "elsewhere" / "both.json"))):
        assert again == report.model_copy(update={"created_utc": again.created_utc})


def test_the_page_of_two_demos_names_them_everywhere(tmp_path: Path) -> None:
    report = quietly(demo(tmp_path / "wide", 3.0), demo(tmp_path / "deep", 5.0))
    html = render_html(report)
    for text in (
        "Speed: wide/timing",
        "Speed: deep/timing",
        "wide: training",
        "deep: training",
        "Stage qad.",
        "wide/qad",
    ):
        assert text in html, text
    # A model that both have is one; stages that both have are a figure of two curves each.
    assert html.count("The model: small") == 1 and html.count("Stage qad.") == html.count("Stage drafter.") == 1
    tables = [block for section in report_sections(report) for block in section.blocks if isinstance(block, Table)]
    assert {block.command for block in tables} == {None}


def test_one_demo_s_page_has_no_name_of_its_folder(tmp_path: Path) -> None:
    report = quietly(demo(tmp_path / "zebra"))
    assert {stage for stage, _, _ in series(report)} == {stage.name for stage in report.stages} == {"drafter", "qad"}
    assert list(report.memory_bytes) == ["QAD"] and report.own_files == {} and report.other_models == ()
    assert "zebra" not in render_html(report)


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    place = demo(tmp_path / "demo")
    (tmp_path / "link").symlink_to(place)
    once = quietly(place)
    again = quietly(
        place, place, tmp_path / "link", place / "qad", place / "qad" / "metrics.jsonl", place / "timing.json"
    )
    assert again == once.model_copy(update={"created_utc": again.created_utc})


def test_a_report_stands_beside_its_run_where_the_run_went_on(tmp_path: Path) -> None:
    place = demo(tmp_path / "demo")
    report = quietly(place)
    file = report.save(place / REPORT_FILE)
    assert series(quietly(place, file)) == series(quietly(file, place)) == series(report)
    assert quietly(place, file).attached == ()
    lines = [{"kind": "train", "step": 9, "loss": 0.5}]
    with (place / "qad" / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(lines[0]) + "\n")
    found = {curve.stage: curve.steps for curve in quietly(place, file).curves}
    assert found == {"drafter": (1, 2, 3), "qad": (1, 2, 3, 9), f"qad ({REPORT_FILE})": (1, 2, 3)}
    # A directory in which a report is all there is, is the report.
    shutil.copytree(
        place, tmp_path / "page", ignore=lambda *_: [n.name for n in place.iterdir() if n.name != REPORT_FILE]
    )
    assert series(quietly(tmp_path / "page")) == series(report)


def test_reports_of_one_folder_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("mon/report.json", "tue/report.json", "wed.json"):
        demo(tmp_path / "x", seconds=len(place))
        quietly(tmp_path / "x").save(tmp_path / place)
        shutil.rmtree(tmp_path / "x")
    report = quietly(*(tmp_path / place for place in ("mon/report.json", "tue/report.json", "wed.json")))
    assert [stage.name for stage in report.stages] == [
        f"{place}/{stage}" for place in ("mon", "tue", "wed") for stage in ("drafter", "qad")
    ]
    assert len(set(series(report))) == len(report.curves) == 6


def test_an_older_report_of_two_runs_under_one_name_gets_two(tmp_path: Path) -> None:
    metrics(tmp_path / "qat")
    report = quietly(tmp_path / "qat")
    (curve,) = report.curves
    other = Curve(stage="qat", label=curve.label, quantity=curve.quantity, steps=(1,), values=(9.0,))
    file = report.model_copy(update={"curves": (curve, other)}).save(tmp_path / "old.json")
    assert [(c.stage, c.values[0]) for c in quietly(file).curves] == [("qat", 3.0), ("qat (2)", 9.0)]


def test_results_of_one_name_from_two_reports_have_two_titles(tmp_path: Path) -> None:
    for place in ("x", "y"):
        ptq().model_copy(update={"model_sha256": place}).save(tmp_path / place / "table.json")
        metrics(tmp_path / place / "qat")
        report = quietly(tmp_path / place)
        attached = tuple(each.model_copy(update={"name": "runs/table.json"}) for each in report.attached)
        report.model_copy(update={"attached": attached}).save(tmp_path / f"{place}.json")
    titles = [section.title for section in report_sections(quietly(tmp_path / "x.json", tmp_path / "y.json"))]
    assert titles[:2] == ["Ways to quantize: table", "Ways to quantize: table (2)"]


def test_what_a_directory_holds_besides_is_noted_and_warned_of(tmp_path: Path) -> None:
    """Half a run, torn and foreign files, another schema, a folder that is named as a file."""
    timing().save(tmp_path / "timing.json")
    for name, text in {
        "torn.json": '{"kind": "timing", "schema_ver',
        "deep.json": "[" * 100_000,
        "long.json": '{"kind": ' + "9" * 5000,
        "old.json": json.dumps({"kind": "ptq", "schema_version": 0}),
        "nan.json": acceptance().model_dump_json().replace('"acceptance_length":2.0', '"acceptance_length":NaN'),
        "config.json": '{"model_type": "mixtral"}',
        "trainer_state.json": '{"log_history": [{"step": 1, "loss": 2.0}]}',
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("kind: qat", encoding="utf-8")
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"kind": "train", "st', encoding="utf-8")
    (tmp_path / "nothing").mkdir()
    out = tmp_path / "out"
    with pytest.warns(UserWarning) as warned:
        assert main(["report", str(tmp_path), str(tmp_path / "nothing"), "--out", str(out)]) == 0
    report = Report.load(out / "report.json")
    assert report.timing is not None and not report.curves and not report.attached
    nothing, left_out = report.notes
    assert nothing == f"There is no result in {tmp_path / 'nothing'}"
    for each in ("torn", "deep", "long", "bytes"):
        assert f"{tmp_path / each}.json is not a JSON file" in left_out
    assert "old.json has schema version 0" in left_out and "nan.json does not fit the acceptance schema" in left_out
    assert f"{tmp_path / 'begun' / 'metrics.jsonl'} (no losses yet)" in left_out
    assert "config.json" not in left_out and "trainer_state" not in left_out and "folder.json" not in left_out
    assert [str(each.message) for each in warned] == list(report.notes)
    assert all(note.replace("'", "&#39;") in (out / "report.html").read_text(encoding="utf-8") for note in report.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "x.json is not a JSON file"),
        ('{"kind": "timing", "schema_version": 1', "x.json is not a JSON file"),
        ('{"kind": "timing", "schema_version": "1"}', "x.json has schema version 1, this release"),
        ('{"kind": "timing", "schema_version": 1}', "x.json does not fit the timing schema: device: Field required"),
        ('{"kind": "timing", "schema_version": 1, "device": NaN}', "x.json does not fit the timing schema: device:"),
        ('{"kind": "poem", "schema_version": 1}', "x.json (poem)"),
        ('{"kind": ["timing"], "schema_version": 1}', "x.json is not a result file"),
        ('{"speedstack": {"kind": "eval", "schema_version": 1}}', "x.json does not fit the eval schema: suite: Field"),
        ("[]", "x.json is not a result file"),
        ("", "x.json is not a JSON file"),
    ],
)
def test_a_named_file_that_is_no_result_is_one_line(
    content: str, message: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    metrics(tmp_path / "run")
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    good = () if "poem" in content else (tmp_path / "run",)
    assert message in fails("report", *good, tmp_path / "x.json", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverged_has_the_curve_until_then(tmp_path: Path) -> None:
    metrics(tmp_path / "qat")
    with (tmp_path / "qat" / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"kind": "train", "step": 4, "loss": NaN}\n{"kind": "train", "st')
    with pytest.warns(UserWarning, match="loss is no finite number in 1 of 4 values"):
        report = gather([tmp_path / "qat"], "Some")
    assert report.curves[0].steps == (1, 2, 3) and "the first nan at step 4" in report.notes[0]
    assert "Training" in render_html(report)


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    strange = tmp_path / "caf\udce9"
    metrics(strange / "qat")
    metrics(tmp_path / "plain" / "qat")
    timing().save(strange / "timing.json")
    ptq().save(strange / "table.json")
    report = quietly(strange, tmp_path / "plain")
    assert report.curves[0].stage == "caf\\udce9/qat"
    assert Report.load(report.save(tmp_path / "r.json")) == report and "caf\\udce9" in render_html(report)
