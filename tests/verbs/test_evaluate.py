"""The verbs `eval` and `compare`: what they take, what they leave, and how they refuse."""

import bisect
import heapq
import json
import shutil
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.eval.config import EvalConfig
from speedstack.eval.results.quality import QualityResult
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine
from speedstack.train.data.corpus import prepare_corpus
from speedstack.verbs.compare import load_compare_config
from speedstack.verbs.evaluate import load_eval_config, make_task_data


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
    twice = error_of(capsys, "compare", "a.json", "b.json", "./a.json")
    assert "compare takes different result files, and a.json and a.json are one" in twice
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"results": {}, "speedstack": {"kind": "eval", "schema_version": 0}}), encoding="utf-8")
    other_release = f"{old} has schema version 0, this release reads version 1"
    assert other_release in error_of(capsys, "compare", str(old), "b.json")
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
    tokenizer = load_tokenizer(tiny_model_dir)
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
    prepare_corpus(tmp_path / "corpus", source=str(tmp_path / "texts"), tokenizer=load_tokenizer(tiny_model_dir))
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
    short = (Path(__file__).resolve().parents[2] / "eval" / "lm_eval" / "tasks" / "humaneval.yaml").read_text()
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "humaneval.yaml").write_text(short.replace("max_gen_toks: 1024", "max_gen_toks: 8"))
    programs = Path(__file__).resolve().parents[2] / "eval" / "lm_eval" / "tasks" / "programs.py"
    (tasks / "programs.py").write_text(programs.read_text())
    monkeypatch.setattr("speedstack.eval.lm_eval.task_loading.TASKS_DIR", tasks)
    assert main([*model, *settings]) == 0
    first = capsys.readouterr().out
    assert "speedstack_humaneval pass@1,program: 0.0000" in first and "2 requests, 0 of them answered before" in first
    assert main([*model, *settings]) == 0
    assert "2 requests, 2 of them answered before" in capsys.readouterr().out
    results = [str(tmp_path / "out" / "mine.json"), str(tmp_path / "copy.json")]
    (tmp_path / "copy.json").write_text(Path(results[0]).read_text())
    assert main(["compare", *results, "--out", str(tmp_path / "table.md")]) == 0
    assert "within noise" in (tmp_path / "table.md").read_text()


OWN_TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["Q"], num_beams: 1, do_sample: false}
process_results: !function score.score
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""


def test_own_tasks_of_a_reasoning_model_are_measured_and_recorded(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ '=' if enable_thinking is false else '?' }}"
    )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} + {i}"}) + "\n" for i in range(5)))
    (tasks / "sums.yaml").write_text(
        OWN_TASK.replace("ROWS", str(tasks / "rows.jsonl")).replace("CACHE", str(tmp_path / "cache"))
    )
    (tasks / "score.py").write_text("def score(doc, results):\n    return {'right': 1.0, 'length': 2.0}\n")
    suite = tmp_path / "mine.yaml"
    evaluate = ["eval", str(model), "--device", "cpu", "--backend", "reference", "--suite", str(suite)]
    evaluate += ["--include-path", str(tasks), "--out", str(tmp_path / "out"), "--limit", "0.4", "--max-gen-toks", "3"]
    thinking = ["--chat-template-kwargs", '{"enable_thinking": false}', "--think-end-token", "17"]
    suite.write_text("tasks: [{task: sums}]")
    assert "chat_template_kwargs are for the chat template: add --chat-template" in error_of(
        capsys, *evaluate, *thinking
    )
    assert main([*evaluate, "--chat-template", *thinking]) == 0
    said = capsys.readouterr().out
    # No metric is named: all are shown.
    assert "sums right,none: 1.0000" in said and "sums length,none: 2.0000" in said
    block = json.loads((tmp_path / "out" / "mine.json").read_text())["speedstack"]
    assert (block["limit"], block["max_gen_toks"], block["own_tasks"]) == (0.4, 3, ["sums"])
    assert (block["chat_template_kwargs"], block["think_end_token"]) == ({"enable_thinking": False}, "17")
    assert block["requests"]["sums"]["num_new_tokens"] == 6
    suite.write_text("tasks: [{task: sums, metric: rigth}]")
    assert "sums has no metric 'rigth,none'; did you mean 'right,none'" in error_of(
        capsys, *evaluate, "--chat-template", *thinking
    )
    # Said in the end, since the task's own code might have measured it; the answers were there.
    requests = json.loads((tmp_path / "out" / "mine.json").read_text())["speedstack"]["requests"]["sums"]
    assert (requests["num_requests"], requests["num_cached"]) == (2, 2)
    typo = ["--chat-template", "--chat-template-kwargs", '{"enable_thougts": false}']
    assert "'enable_thougts', which the chat template" in error_of(capsys, *evaluate, *typo)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "1.5"], "limit: expected a number of documents, or a share of them between 0 and 1 (got 1.5)"),
        (["--limit", "0"], "limit: expected a number of documents"),
        (["--limit", "-0.5"], "limit: expected a number of documents"),
        (["--max-gen-toks", "9"], "max_gen_toks is for an evaluation with a suite"),
        (["--think-end-token", "</think>"], "think_end_token is for an evaluation with a suite"),
    ],
)
def test_flags_of_suites_are_checked(capsys: pytest.CaptureFixture, flags: list[str], message: str) -> None:
    assert message in error_of(capsys, "eval", "M", *flags)


def test_a_teacher_is_asked_as_those_are_that_are_compared_with_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the chat template and with their limit: else nobody writes what it wrote."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}{{ style }}")
    texts = {f"{name.__name__}.py": Path(str(name.__file__)).read_text() for name in (bisect, heapq)}
    monkeypatch.setattr("speedstack.train.data.corpus.load_corpus", lambda path: None)
    monkeypatch.setattr("speedstack.train.data.heldout.heldout_texts", lambda corpus: texts)
    monkeypatch.setattr("speedstack.eval.data.task_data.NUM_SAME_TEXT", 2)
    config = EvalConfig(
        suite="offline",
        teacher=model,
        device="cpu",
        backend="reference",
        chat_template=True,
        chat_template_kwargs={"style": "terse"},
        max_gen_toks=5,
        out=tmp_path / "out",
    )
    make_task_data(config, {"same_text"})
    rows = [json.loads(line) for line in (tmp_path / "out" / "tasks" / "same_text.jsonl").read_text().splitlines()]
    engine = Engine.from_pretrained(model, backend="reference", device="cpu")
    assert len(rows) == 2
    for row in rows:
        asked = engine.tokenizer.encode(f"<{row['context']}>terse")[-(engine.max_length - 5) :]
        assert row["text"] == engine.generate(asked, max_new_tokens=5).text != ""
