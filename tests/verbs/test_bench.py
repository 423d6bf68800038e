"""The verb `bench`: files and a table at the end, files before that when something ends it, one line for mistakes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.eval.config import BenchConfig, PromptsConfig
from speedstack.eval.results.speed import AcceptanceResult, TimingResult
from speedstack.verbs.bench import bench


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A directory with two tiny benchmarks."""
    for name, field in (("humaneval", "prompt"), ("gsm8k", "question")):
        rows = [{field: text} for text in ("def f(x):\n", "import os\n", "class A:\n")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def make_config(
    prompts: Path, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> Callable[..., BenchConfig]:
    """`make_config(**fields)`: a bench of a few tokens without peers."""

    def make(**fields: object) -> BenchConfig:
        section = PromptsConfig(sets=("humaneval", "gsm8k"), dir=prompts, num_prompts=2)
        settings: dict[str, object] = {
            "target": tiny_packed_dir,
            "drafter": tiny_packed_drafter_dir,
            "prompts": section,
            "peers": (),
            "num_new_tokens": 6,
            "num_repeats": 2,
            "device": "cpu",
            "backend": "reference",
            "out": tmp_path / "out",
        }
        return BenchConfig.model_validate(settings | fields)

    return make


def test_files_and_table(make_config: Callable[..., BenchConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(gpu_hour_usd=3.6)
    bench(config)
    shown = capsys.readouterr().out
    timing = TimingResult.load(config.out / "timing.json")
    assert [entry.name for entry in timing.sets] == ["humaneval", "gsm8k"]
    assert [entry.name for entry in timing.contestants] == [
        "engine",
        "engine + drafter",
        "engine + drafter, whole blocks",
        "engine + look-up",
    ]
    for entry in timing.contestants:
        assert entry.usd_per_million_tokens is not None
        assert entry.identity is None or entry.identity.num_identical == 4
    assert (config.out / "timing.md").read_text(encoding="utf-8") == timing.table()
    assert timing.table() in shown and "USD/M tokens" in shown
    assert "humaneval: 2 prompts of" in shown and f"written: {config.out / 'timing.json'}" in shown
    acceptance = AcceptanceResult.load(config.out / "acceptance.json")
    assert acceptance.overall.num_prompts == 4 and acceptance.max_new_tokens == 6


def test_the_peers_table_of_the_command_line(
    make_config: Callable[..., BenchConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    arguments = ["--target", config.target, "--drafter", "None", "--prompts.dir", config.prompts.dir]
    arguments += ["--prompts.sets", "gsm8k", "--prompts.num-prompts", 1, "--peers", "vllm", "llama.cpp"]
    arguments += ["--vllm-python", sys.executable, "--llama-cpp-python", "no/python", "--gguf-weights", "q8_0"]
    arguments += ["--num-new-tokens", 4, "--num-repeats", 1, "--no-look-up", "--device", "cpu", "--out", config.out]
    assert main(["bench", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert f"vLLM: did not run: vllm is not installed for {sys.executable}: `make peers` installs it\n" in shown
    assert "llama.cpp: did not run: no interpreter at no/python (No such file or directory): `make peers` " in shown
    assert "energy: not counted: joules are those of an NVIDIA GPU" in shown
    assert not (config.out / "acceptance.json").exists()


def test_what_was_finished_is_kept(
    make_config: Callable[..., BenchConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    save = TimingResult.save
    num_saved = 0

    def interrupted_after_three(self: TimingResult, path: str | Path) -> Path:
        nonlocal num_saved
        num_saved += 1
        if num_saved > 3:
            raise KeyboardInterrupt
        return save(self, path)

    monkeypatch.setattr(TimingResult, "save", interrupted_after_three)
    with pytest.raises(KeyboardInterrupt):
        bench(config)
    assert f"written: {config.out / 'timing.json'}" in capsys.readouterr().out
    kept = TimingResult.load(config.out / "timing.json")
    assert [entry.contestants[0].tokens_per_second.num_repeats for entry in kept.sets] == [2, 1]
    assert kept.contestants[0].tokens_per_second.num_repeats == 1
    assert (config.out / "timing.md").read_text(encoding="utf-8") == kept.table()


def test_look_up_is_not_timed_under_the_name_of_a_drafter(make_config: Callable[..., BenchConfig]) -> None:
    with pytest.raises(ValueError, match="prompt lookup is timed beside a drafter anyway"):
        make_config(drafter="ngram")


def test_mistakes_are_one_line(make_config: Callable[..., BenchConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    common = ["bench", "--target", str(config.target), "--out", str(config.out)]
    for flags, message in (
        (["--prompts.corpus", str(config.out)], "is not a prepared corpus"),
        (["--prompts.sets", "mbbp"], "no prompt set 'mbbp': there are heldout, humaneval, mbpp"),
        (
            ["--prompts.sets", "humaneval", "--prompts.num-prompts", "9", "--prompts.dir", str(config.prompts.dir)],
            "9 were",
        ),
        (["--prompts.sets", "mbpp", "--prompts.dir", str(config.prompts.dir)], "give --prompts.dir"),
        (["--num-new-tokens", "256"], "leaves no room in the model's 256 positions"),
        (["--target", "nowhere"], "no model directory at nowhere"),
        (["--gpu-hour-usd", "0"], "gpu_hour_usd"),
        (["--peers", "sglang"], "peers"),
        (["--peers", "vllm", "--gguf", "m.gguf"], "gguf is for the peer llama.cpp"),
        (["--peers", "transformers", "--vllm-python", "p"], "vllm_python is for the peer vllm"),
        (["--peers", "vllm", "--llama-cpp-python", "p"], "llama_cpp_python is for the peer llama.cpp"),
        (["--gguf-weights", "q4_0"], "q8_0"),
        (["--batch-sizes", "0"], "batch_sizes"),
        (
            f"--prompts.sets gsm8k --prompts.num-prompts 2 --prompts.dir {config.prompts.dir} --batch-sizes 3".split(),
            "gsm8k has 2 prompts, which do not fill batches of 3",
        ),
        (["--prompts.dir", "data"], "prompts.dir needs a benchmark among prompts.sets, which are heldout"),
        (["--prompts.long-tokens", "9"], "prompts.long_tokens needs long among prompts.sets"),
    ):
        assert main([*common, *flags]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0], error
    assert not config.out.exists()
