"""The table of QAT runs: what is read from run directories, and which runs are not compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedstack.ablation.qat_table import main, qat_table
from speedstack.eval.report import sections
from speedstack.eval.report.sections import Found
from speedstack.eval.results.quantization import QatRuns
from speedstack.support.config import dump_config
from speedstack.train.config.recipes import QatConfig

CONFIG: dict[str, dict[str, Any]] = {"data": {"corpus": "corpus"}, "loop": {"num_steps": 20}, "qat": {"model": "model"}}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(name, kl, model="m", corpus="c", loss=4.0, **sections)`: the files of a finished run; `corpus` is None
    in one that did not record what it read.
    """

    def make(
        name: str,
        kl: float,
        model: str = "m",
        corpus: str | None = "c",
        loss: float = 4.0,
        **changed: dict[str, Any],
    ) -> Path:
        fields = {key: CONFIG.get(key, {}) | changed.get(key, {}) for key in {*CONFIG, *changed}}
        config = QatConfig.model_validate(
            fields | {"run": {"name": name, "out": str(tmp_path)} | changed.get("run", {})}
        )
        run = Path(config.run.out) / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        inputs = {"model": model} | ({} if corpus is None else {"corpus": corpus})
        (run / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
        (run / "env.json").write_text(json.dumps({"python": "3", "packages": {"torch": "2"}}), encoding="utf-8")
        common = {"kind": "eval", "heldout_loss": loss, "heldout_top1_agreement": 0.9, "elapsed_seconds": 1.0}
        lines = [
            common | {"step": 0, "heldout_kl": 0.002, "oscillating": 0.0},
            {"kind": "train", "step": 10, "loss": 1.0},
            common | {"step": config.loop.num_steps, "heldout_kl": kl, "oscillating": 0.25},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return run

    return make


def test_runs_are_a_result(make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make_run("base", 0.001),
        make_run(
            "damped",
            0.0005,
            qat={"dampening": 1e-5, "model": "moved"},
            run={"seed": 3, "device": "cpu"},
            data={"corpus": "moved"},
        ),
        make_run("short", 0.003, loop={"num_steps": 10}),
    ]
    out = tmp_path / "qat.json"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    result = QatRuns.load(out)
    assert result.model_sha256 == "m" and not result.notes and result.rtn is not None and result.rtn.heldout_kl == 0.002
    assert [(run.run, run.seed, run.changes, run.kl_over_rtn) for run in result.runs] == [
        ("base", 0, {}, 0.5),
        ("damped", 3, {"qat.dampening": 1e-5}, 0.25),
        ("short", 0, {"loop.num_steps": 10}, 1.5),
    ]
    last = result.runs[0].evaluations[-1]
    assert (last.step, last.oscillating, last.flips_since_start) == (20, 0.25, None)
    assert result.runs[0].environment["packages"] == {"torch": "2"}
    shown = capsys.readouterr().out
    assert result.table() in shown and "0.5000     0.250" in shown and "qat.dampening 1e-05" in shown
    (section,) = sections.sections("qat_runs", [Found("qat.json", result)])
    assert "2.000 millinats" in section.paragraphs[0] and len(section.blocks) == 2


def test_refusals(make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def changed(name: str, inputs: str | None) -> Path:
        run = make_run(name, 0.001)
        (run / "inputs.json").unlink()
        if inputs is not None:
            (run / "inputs.json").write_text(inputs, encoding="utf-8")
        return run

    base = make_run("base", 0.001)
    unfinished = make_run("unfinished", 0.001)
    metrics = (unfinished / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(metrics[:2]), encoding="utf-8")
    for other, message in (
        (tmp_path / "nowhere", "is no run directory"),
        (unfinished, "has not finished its 20 steps"),
        (make_run("model", 0.001, model="n"), "started from another model"),
        (make_run("text", 0.001, data={"sequence_length": 64}), "base: data.sequence_length differ"),
        (make_run("content", 0.001, corpus="d"), "the content of its corpus corpus is another"),
        (make_run("older elsewhere", 0.001, corpus=None, data={"corpus": "moved"}), "base: data.corpus differ"),
        (make_run("older", 0.001, corpus=None, loss=4.01), "before the first step is 4.010000, not 4.000000"),
        (changed("no model", '{"target": "m"}'), "inputs.json does not say what model the run started from"),
        (changed("a list", "[]"), "inputs.json does not say what model the run started from"),
        (changed("broken", "{"), "inputs.json is not a JSON file"),
        (changed("lost", None), "has no inputs.json"),
    ):
        assert main([str(base), str(other), "--out", str(tmp_path / "out.json")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("qat_table: error: ") and message in line
    assert not (tmp_path / "out.json").exists()


def test_a_run_that_did_not_record_its_text(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        make_run("new", 0.001),
        make_run("old", 0.001, corpus=None, loss=4.0 + 1e-5),
        # Another rule rounds to other weights: its loss says nothing.
        make_run("old mse", 0.001, corpus=None, loss=4.1, qat={"scale_rule": "mse"}),
    ]
    out = tmp_path / "qat.json"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    (note,) = QatRuns.load(out).notes
    assert note.startswith("No digest of the text was recorded by old, old mse: ") and note in capsys.readouterr().out
    assert main([str(runs[1]), "--out", str(out)]) == 0 and not QatRuns.load(out).notes


def test_runs_of_one_name_are_told_apart(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run("tiny", kl, run={"out": str(tmp_path / place)}) for place, kl in (("adam", 0.1), ("muon", 0.2))]
    assert [run.run for run in qat_table(runs).runs] == ["adam/tiny", "muon/tiny"]


def test_a_run_without_its_environment_has_its_row(make_run: Callable[..., Path]) -> None:
    run = make_run("base", 0.001)
    (run / "env.json").write_text('{"python": ', encoding="utf-8")
    with pytest.warns(UserWarning, match=r"env\.json is not a JSON file"):
        (row,) = qat_table([run]).runs
    assert row.environment == {} and row.evaluations[-1].heldout_kl == 0.001


def test_an_evaluation_that_is_no_number_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run("base", float("nan"))
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl: the evaluation at step 20: heldout_kl: Input should be a fin"
    ):
        qat_table([run])
