"""Result files: what is written is read back, other versions and broken files are refused with one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from speedstack.eval.results.quality import QualityResult, TaskScore
from speedstack.eval.results.report import DOCUMENTS, Report, write_json_schemas
from speedstack.eval.results.schema import SCHEMA_VERSION, to_plain
from speedstack.eval.results.speed import AcceptanceResult, TimingResult


def test_every_document_survives_the_disk(made_up_report: Report, tmp_path: Path) -> None:
    parts = [made_up_report, made_up_report.quality, made_up_report.acceptance, made_up_report.timing]
    for document in parts:
        assert document is not None
        path = document.save(tmp_path / "deep" / "result.json")
        assert type(document).load(path) == document
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]  # no temporary file left


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, None, "1"])
def test_another_schema_version_is_refused(made_up_report: Report, tmp_path: Path, version: object) -> None:
    path = made_up_report.save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    content["schema_version"] = version
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"schema version {version}, this release reads version {SCHEMA_VERSION}"):
        Report.load(path)


def test_another_version_inside_a_report_is_refused(made_up_report: Report, tmp_path: Path) -> None:
    path = made_up_report.save(tmp_path / "report.json")
    content = json.loads(path.read_text())
    content["quality"]["schema_version"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not fit the report schema: quality\.schema_version"):
        Report.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "holds no quality result"),
        ('{"kind": "timing", "schema_version": 1}', r"holds no quality result \(its kind: timing\)"),
        ('{"kind": "quality", "schema_version": 1, "teacher": "t"}', "methods: Field required"),
        ('{"kind": "quality", "schema_version": 1, "teacher": "t", "methods": [], "x": 1}', "x: Extra inputs"),
    ],
)
def test_files_that_are_no_result_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "quality.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        QualityResult.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no result file at"):
        TimingResult.load(tmp_path / "none.json")


def test_numpy_and_torch_numbers_become_plain() -> None:
    score = TaskScore.model_validate(
        {
            "task": "t",
            "metric": "acc",
            "value": np.float32(0.5),
            "stderr": np.float64(0.25),
            "higher_is_better": True,
            "num_documents": np.int64(3),
        }
    )
    assert (type(score.value), type(score.num_documents)) == (float, int)
    plain = to_plain({"a": np.float64(1.5), "b": [np.int32(2), np.bool_(True)], "c": torch.tensor([1.0]), 3: Path("x")})
    assert plain == {"a": 1.5, "b": [2, True], "c": [1.0], "3": "x"}
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_json_has_not_are_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        TaskScore(task="t", metric="m", value=value, stderr=None, higher_is_better=True, num_documents=1)


def test_json_schemas_are_written_for_every_kind(tmp_path: Path, made_up_report: Report) -> None:
    paths = write_json_schemas(tmp_path)
    assert [path.name for path in paths] == [
        "quality.schema.json",
        "acceptance.schema.json",
        "timing.schema.json",
        "sensitivity.schema.json",
        "conversion.schema.json",
        "report.schema.json",
    ]
    for path, document in zip(paths, DOCUMENTS, strict=True):
        schema = json.loads(path.read_text())
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) == set(document.model_fields)
        assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_unknown_method_is_named(made_up_report: Report) -> None:
    assert made_up_report.quality is not None
    assert made_up_report.quality.method("QAD").kl_to_teacher_nats == 0.00081
    with pytest.raises(ValueError, match="no method 'qat'; there are full precision, PTQ, QAD"):
        made_up_report.quality.method("qat")


def test_speedup_is_a_ratio_of_medians(made_up_report: Report) -> None:
    assert made_up_report.timing is not None
    assert made_up_report.timing.speedup("engine", "transformers") == pytest.approx(5.0)
    assert made_up_report.timing.speedup("engine", "transformers + drafter") is None
    assert AcceptanceResult.model_fields["kind"].default == "acceptance"
