"""The verbs `eval` and `compare`: what they take, what they leave, and how they refuse."""

import json
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.evaluate import load_eval_config
from speedstack.jobs import load_compare_config


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on stderr of a command that is refused."""
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_may_stand_for_the_config() -> None:
    config = load_eval_config(Path("some/model"), ["--suite", "code", "--limit", "3", "--batch-size", "2"])
    assert (config.target, config.suite, config.limit, config.batch_size) == (Path("some/model"), "code", 3, 2)


def test_results_may_stand_for_the_config() -> None:
    config = load_compare_config(Path("a.json"), ["b.json", "c.json", "--significance", "0.01"])
    assert config.results == (Path("a.json"), Path("b.json"), Path("c.json")) and config.significance == 0.01


def test_settings_of_the_other_measurement_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert "window is for an evaluation with no suite" in error_of(
        capsys, "eval", "M", "--suite", "code", "--window", "9"
    )
    assert "allow_code is for an evaluation with a suite" in error_of(capsys, "eval", "M", "--allow-code")


def test_bad_input_is_one_line(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no suite 'recover'; did you mean 'recovery'" in error_of(capsys, "eval", "M", "--suite", "recover")
    assert "compare needs two result files" in error_of(capsys, "compare", "a.json")
    assert "no result file at a.json" in error_of(capsys, "compare", "a.json", "b.json")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"results": {}, "speedstack": {"kind": "eval", "schema_version": 0}}), encoding="utf-8")
    other_release = f"{old} has schema version 0, this release reads version 1"
    assert other_release in error_of(capsys, "compare", str(old), str(old))
    model = ["eval", str(tiny_model_dir), "--device", "cpu", "--backend", "reference", "--out", str(tmp_path)]
    code = error_of(capsys, *model, "--suite", "code")
    assert "humaneval runs programs that the model wrote: allow it with --allow-code" in code
    data = error_of(capsys, *model, "--suite", "code", "--allow-code", "--data", str(tmp_path))
    assert f"{tmp_path}/openai/openai_humaneval/default/test.jsonl" in data


PROBLEM = {
    "task_id": "made/0",
    "prompt": "def f(x):\n",
    "canonical_solution": "    return x\n",
    "test": "def check(f):\n    assert f(1) == 1\n",
    "entry_point": "f",
}


def test_a_suite_is_run_resumed_and_compared(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # lm-eval asks compilers and pip for their versions, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    place = tmp_path / "data" / "openai" / "openai_humaneval" / "default"
    place.mkdir(parents=True)
    (place / "test.jsonl").write_text("".join(json.dumps(PROBLEM | {"task_id": f"made/{i}"}) + "\n" for i in range(2)))
    suite = tmp_path / "mine.yaml"
    suite.write_text('tasks: [{task: humaneval, metric: "pass@1,program"}]')
    model = ["eval", str(tiny_model_dir), "--device", "cpu", "--backend", "reference", "--suite", str(suite)]
    settings = ["--allow-code", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--max-length", "256"]
    # 1024 new tokens do not fit.
    assert "max_gen_toks is 1024, but prompt and text share 256 tokens" in error_of(capsys, *model, *settings)
    short = (Path(__file__).resolve().parent.parent / "eval" / "tasks" / "humaneval.yaml").read_text()
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "humaneval.yaml").write_text(short.replace("max_gen_toks: 1024", "max_gen_toks: 8"))
    programs = Path(__file__).resolve().parent.parent / "eval" / "tasks" / "programs.py"
    (tasks / "programs.py").write_text(programs.read_text())
    monkeypatch.setattr("speedstack.eval.task_loading.TASKS_DIR", tasks)
    assert main([*model, *settings]) == 0
    first = capsys.readouterr().out
    assert "speedstack_humaneval pass@1,program: 0.0000" in first and "2 requests, 0 of them answered before" in first
    assert main([*model, *settings]) == 0
    assert "2 requests, 2 of them answered before" in capsys.readouterr().out
    results = [str(tmp_path / "out" / "mine.json"), str(tmp_path / "copy.json")]
    (tmp_path / "copy.json").write_text(Path(results[0]).read_text())
    assert main(["compare", *results, "--out", str(tmp_path / "table.md")]) == 0
    assert "within noise" in (tmp_path / "table.md").read_text()
