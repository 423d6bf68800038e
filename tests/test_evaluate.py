"""The verbs `eval` and `compare`: what they take, what they leave, and how they refuse."""

import json
import shutil
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.eval.results import QualityResult
from speedstack.evaluate import load_eval_config
from speedstack.jobs import load_compare_config
from speedstack.quant.checkpoint.tokenizer import require_tokenizer
from speedstack.train.corpus import prepare_corpus


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


def test_prose_is_measured_as_far_as_it_can_be(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    paragraph = "It was late, and the rain had not stopped since noon; nobody spoke of the way home. " * 30
    source = tmp_path / "prose.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n}. {paragraph}\n\n{paragraph}"}) + "\n" for n in range(6)))
    tokenizer = require_tokenizer(tiny_model_dir)
    prepare_corpus(tmp_path / "corpus", source=str(source), heldout_fraction=0.4, tokenizer=tokenizer)
    model = ["eval", str(tiny_model_dir), "--device", "cpu", "--backend", "reference", "--corpus"]
    model += [str(tmp_path / "corpus"), "--window", "16", "--num-tokens", "40", "--limit", "1", "--out", str(tmp_path)]
    measured = {}
    for name, tasks in {"default": [], "none": ["--tasks"], "one": ["--tasks", "heldout_perplexity"]}.items():
        recwarn.clear()
        assert main([*model, *tasks]) == 0
        said = [str(warning.message) for warning in recwarn if "give no item for task" in str(warning.message)]
        assert len(said) == (name == "default")
        assert all("next_line and close_line, which is not measured" in line for line in said)
        (measured[name],) = QualityResult.load(tmp_path / "quality.json").methods
    assert {score.task for score in measured["default"].tasks} == {"heldout_perplexity"}
    assert measured["one"] == measured["default"] and measured["none"].tasks == ()
    assert measured["none"].nll_nats == measured["default"].nll_nats
    asked = error_of(capsys, *model, "--tasks", "heldout_perplexity", "close_line")
    assert "give no item for task close_line: hold out more text, or leave the task out" in asked


def test_a_corpus_of_another_tokenizer_is_not_measured(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same tokens with other ids: all of them are in the model's vocabulary."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    fields = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    fields["model"]["merges"] = fields["model"]["merges"][:20]
    (model / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("import textwrap\n" * 20, encoding="utf-8")
    prepare_corpus(tmp_path / "corpus", source=str(tmp_path / "texts"), tokenizer=require_tokenizer(tiny_model_dir))
    line = error_of(capsys, "eval", str(model), "--corpus", str(tmp_path / "corpus"), "--window", "16")
    assert "was tokenized with another tokenizer than that of" in line


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
