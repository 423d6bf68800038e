"""The whole demo at a toy size: what it leaves, that kill -9 costs nothing, and that the same seed gives the same."""

import hashlib
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.eval.results.quality import QualityResult
from speedstack.eval.results.report import Report
from speedstack.eval.results.speed import AcceptanceResult, TimingResult

# Enough files for a held-out third with prompts of every kind.
MODULES = (
    *("textwrap", "argparse", "json.decoder", "shutil", "tempfile", "zipfile", "csv", "dis", "ast", "cmd", "bdb"),
    *("pdb", "inspect", "logging", "optparse", "pickle", "platform", "tarfile", "typing", "uuid", "webbrowser"),
)
# Left margins of the final table.
TABLE = "\u2502\u250c\u251c\u2514"
EXPORTS = (
    "pretrain/export/model.safetensors",
    "ptq/export/model.safetensors",
    "qad/export/model.safetensors",
    "text/train/shard-00000.safetensors",
    "drafter/export/model.safetensors",
    "quality.json",
    "acceptance.json",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of two layers and a few steps on a handful of modules."""
    directory = tmp_path_factory.mktemp("demo-config")
    source = directory / "modules.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for name in MODULES:
            __import__(name)
            file.write(json.dumps({"text": inspect.getsource(sys.modules[name])}) + "\n")
    data = {"sequence_length": 64, "eval_sequences": 2}
    loop = {"num_steps": 6, "batch_size": 2, "micro_batch_size": 2, "eval_every": 3, "save_every": 1, "log_every": 1}
    model = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
    model |= {"num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    model |= {"head_dim": 32, "v_head_dim": 32, "max_position_embeddings": 512}
    drafter = {"num_layers": 1, "target_layer_ids": [0], "num_attention_heads": 2, "num_key_value_heads": 1}
    drafter |= {"intermediate_size": 64, "num_sequences": 8, "num_eval_sequences": 2, "prompt_length": 16}
    settings = {
        "device": "cpu",
        "pretrain": {
            "data": data | {"source": str(source), "vocab_size": 512, "heldout_fraction": 0.3},
            "model": model,
            "loop": loop,
        },
        "qat": {"data": data, "loop": loop},
        "drafter": {"data": data, "loop": loop, "drafter": drafter | {"num_anchors": 4}},
        "quality": {"num_tokens": 64, "window": 32, "limit": 2},
        "acceptance": {"num_prompts": 1, "num_prompt_tokens": 16, "num_new_tokens": 8},
        "timing": {"num_prompts": 1, "num_prompt_tokens": 16, "num_new_tokens": 4, "num_repeats": 1},
    }
    path = directory / "toy.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return path


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in EXPORTS}


def run_until(command: list[str], out: Path, pattern: str) -> None:
    """Start the demo and kill -9 it as soon as a file of that pattern exists in `out`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any(out.glob(pattern)):
            assert process.poll() is None, "the demo ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)  # four processes that import and compile everything; a minute on an idle machine
def test_killed_twice_and_continued_equals_uninterrupted(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["demo", str(config), "--out", str(whole)]) == 0
    shown = capfd.readouterr().out
    assert str((whole / "report.html").resolve()) in shown
    assert "[10/10] report done" in shown

    command = [sys.executable, "-m", "speedstack", "demo", str(config), "--out", str(killed)]
    run_until(command, killed, "pretrain/checkpoints/step-[2-9]/COMPLETE.json")
    run_until(command, killed, "qad/checkpoints/step-[1-9]/COMPLETE.json")
    assert not (killed / "quality.json").exists()
    assert main(["demo", str(config), "--out", str(killed)]) == 0
    assert "[2/10] pretrain done before" in capfd.readouterr().out
    assert digests(killed) == digests(whole)

    # What libraries say goes to a file, not between our lines.
    # Our own warnings are shown: a model of a few steps writes no ends of lines.
    ours = ("[", "speedstack demo", "report: ", "warning: speedstack_close_line: ", *TABLE)
    assert [line for line in shown.splitlines() if line and not line.startswith(ours)] == []
    assert (whole / "demo.log").is_file()

    report = Report.load(whole / "report.json")
    assert [stage.name for stage in report.stages][:4] == ["corpus", "pretrain", "ptq", "qad"]
    assert {curve.stage for curve in report.curves} == {"pretrain", "qad", "drafter"}
    assert report.quality == QualityResult.load(whole / "quality.json")
    assert report.acceptance == AcceptanceResult.load(whole / "acceptance.json")
    assert report.timing == TimingResult.load(whole / "timing.json")
    on_disk, in_memory = report.storage
    assert on_disk.ratio == 4.25 / 16
    # The kernels read four scales at a time, and the toy's rows have one or two: padding of up to 3 bytes on 17.
    assert 4.25 / 16 <= in_memory.ratio < 20 / 17 * 4.25 / 16
    assert set(report.memory_bytes) == {"full precision", "PTQ", "QAD", "QAD + drafter"}
    assert all(example.text for example in report.examples)

    # The command on the page names the file of settings, because these are not a preset's.
    assert report.commands == (f"speedstack demo {whole}/demo.yaml --out {whole}-again",)
    quantities = {(curve.stage, curve.label): curve.quantity for curve in report.curves}
    assert quantities["pretrain", "training"] != quantities["qad", "training"] != quantities["drafter", "training"]

    # A changed amount of measurement repeats what depends on it, and nothing else.
    assert main(["demo", str(config), "--out", str(whole), "--acceptance.num-new-tokens", "6"]) == 0
    shown = capfd.readouterr().out
    assert "[7/10] quality done before" in shown and "[8/10] acceptance started" in shown
    assert AcceptanceResult.load(whole / "acceptance.json").max_new_tokens == 6
