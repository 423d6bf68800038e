"""The table of ways to quantize: its rows against models quantized by hand, and one line for what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.ablation import ptq
from speedstack.ablation.ptq import PtqResult, main
from speedstack.cli import main as speedstack
from speedstack.eval.quality.divergence import token_kl
from speedstack.eval.quality.heldout import corpus_windows
from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.quant.ptq import round_to_nearest
from speedstack.support.files import exclusive
from speedstack.train.data.corpus import prepare_corpus
from tests.packing import save_packed

CALIBRATION = ["--num-sequences", "4", "--sequence-length", "32"]
GPTQ = "GPTQ, mse, 4 sequences of 32"


@pytest.fixture(scope="module")
def corpus(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for part, text in enumerate(Path(__file__).read_text(encoding="utf-8").split("\n\n\n")):
        (directory / f"{part}.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(tiny_model_dir)
    return prepare_corpus(directory / "corpus", source=str(directory), heldout_fraction=0.3, tokenizer=tokenizer).path


def test_the_table(tiny_model_dir: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_model_dir)
    save_packed(model, tmp_path / "floor", scale_rule="floor")
    calibration = [f"--calibration.{flag.removeprefix('--')}" if flag[0] == "-" else flag for flag in CALIBRATION]
    command = ["quantize", str(tiny_model_dir), *calibration, "--calibration.source", str(corpus), "--device", "cpu"]
    assert speedstack([*command, "--out", str(tmp_path / "gptq")]) == 0
    out = tmp_path / "ptq.json"
    arguments = [str(tiny_model_dir), "--corpus", str(corpus), *CALIBRATION, "--num-tokens", "100", "--window", "33"]
    exports = ["--export", f"floor={tmp_path / 'floor'}", "--export", f"verb={tmp_path / 'gptq'}"]
    assert main([*arguments, *exports, "--device", "cpu", "--out", str(out)]) == 0
    result = PtqResult.load(out)
    rows = {method.quality.method: method for method in result.methods}
    rules = ("RTN, even", "RTN, floor", "RTN, rceil", "RTN, mse")
    assert tuple(rows) == ("full precision", *rules, GPTQ, "floor", "verb")
    assert result.table() in capsys.readouterr().out and result.model_sha256 == weights_sha256(tiny_model_dir)

    round_to_nearest(model, "rceil")
    teacher, kl = load_model(tiny_model_dir), []
    for window in corpus_windows(corpus, tiny_model_dir, 33, 100):
        with torch.no_grad():
            logits = [each(input_ids=torch.tensor([window])).logits[0, :-1] for each in (teacher, model)]
        kl.append(token_kl(*logits))
    assert result.num_tokens == len(torch.cat(kl)) == 100
    assert rows["RTN, rceil"].quality.kl_to_teacher_nats == pytest.approx(float(torch.cat(kl).mean()), rel=1e-6)
    # A packed model is the model in memory, bit for bit; GPTQ is what the verb makes.
    for export, method in (("floor", "RTN, floor"), ("verb", GPTQ)):
        assert rows[export].quality.model_copy(update={"method": method}) == rows[method].quality
        assert rows[export].kl_over_rtn == rows[method].kl_over_rtn
    assert rows["verb"].model_sha256 == weights_sha256(tmp_path / "gptq")
    assert rows["full precision"].kl_over_rtn is None and rows["RTN, even"].kl_over_rtn == 1.0
    assert rows[GPTQ].gptq["num_calibration_tokens"] == 128


def test_a_way_that_fails_costs_no_other_row_and_is_made_up_for(
    tiny_model_dir: Path,
    tiny_packed_dir: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "ptq.json"
    common = [str(tiny_model_dir), "--corpus", str(corpus), *CALIBRATION, "--device", "cpu", "--out", str(out)]
    arguments = [*common, "--num-tokens", "100", "--window", "33", "--export", f"packed={tiny_packed_dir}"]

    def failing(error: BaseException) -> Callable[..., Any]:
        def fail(*_: object) -> None:
            raise error

        return fail

    def names() -> list[str]:
        return [method.quality.method for method in PtqResult.load(out).methods]

    rounded = ["full precision", "RTN, even", "RTN, floor", "RTN, rceil", "RTN, mse"]
    gptq_experts = ptq.gptq_experts
    monkeypatch.setattr(ptq, "gptq_experts", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert names() == rounded
    # What is there is not made again.
    monkeypatch.setattr(ptq, "round_to_nearest", failing(AssertionError("again")))
    monkeypatch.setattr(ptq, "gptq_experts", failing(RuntimeError("out of memory")))
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"ptq: error: 1 failed: {GPTQ}: RuntimeError: out of memory"
    assert f"{GPTQ}: failed: RuntimeError: out of memory" in shown.out and names() == [*rounded, "packed"]
    monkeypatch.setattr(ptq, "gptq_experts", gptq_experts)
    # Another command neither loses the failure nor fails by it; nor does it lose notes.
    noted = PtqResult.load(out).model_copy(update={"notes": ("by hand",)})
    noted.save(out)
    assert main([*arguments, "--gptq-rules"]) == 0
    assert PtqResult.load(out) == noted and [entry.name for entry in noted.unavailable] == [GPTQ]
    # It says what it ran in, where that is not what the first rows ran in.
    first = noted.environment
    with monkeypatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "something")
        assert main(arguments) == 0
    result = PtqResult.load(out)
    assert names() == [*rounded, "packed", GPTQ] and not result.unavailable and result.notes == ("by hand",)
    assert result.environment == first and [row.environment for row in result.methods[:-1]] == [None] * 6
    own = result.methods[-1].environment
    assert own is not None and own.thread_settings["OMP_WAIT_POLICY"] == "something"
    # A row that is there has not failed, whatever the file says.
    result.model_copy(update={"unavailable": noted.unavailable}).save(out)
    assert main(arguments) == 0 and PtqResult.load(out) == result
    assert all(method.kl_over_rtn is not None for method in result.methods[1:])
    # Another calibration is one row more, an export made anew one instead.
    save_packed(load_model(tiny_model_dir), tmp_path / "floor", scale_rule="floor")
    more = [*arguments[:-1], f"packed={tmp_path / 'floor'}", "--damping", "0.01", "0.1", "--seed", "0"]
    assert main(more) == 0
    assert names() == [*rounded, GPTQ, f"{GPTQ}, damping 0.1", "packed"]
    text = out.read_text(encoding="utf-8")
    with exclusive(tmp_path, out.name):
        assert main([*arguments, "--seed", "7"]) == 2
    assert f"another process is writing {out}" in capsys.readouterr().err and out.read_text(encoding="utf-8") == text
    for changed, message in ((["--window", "17"], "rows of another text"), (["--num-tokens", "90"], "another text")):
        assert main([*arguments, *changed]) == 2
        assert message in capsys.readouterr().err and out.read_text(encoding="utf-8") == text
    out.write_text(text.replace('"torch": "', '"torch": "0.'), encoding="utf-8")
    assert main(arguments) == 2
    assert "rows of other versions of packages: give another --out" in capsys.readouterr().err


def test_refusals(
    tiny_model_dir: Path, tiny_packed_dir: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *arguments: object, model: Path = tiny_model_dir) -> str:
        """What went to stderr, after checking its last line."""
        assert main([str(model), "--corpus", str(corpus), *map(str, arguments)]) == 2
        text = capsys.readouterr().err
        line = text.strip().splitlines()[-1]
        assert line.startswith("ptq: error: ") and message in line
        return text

    refused("is quantized already", model=tiny_packed_dir)
    refused("no model directory", model=tmp_path / "nowhere")
    refused("no model directory", "--export", f"QAD={tmp_path / 'nowhere'}")
    refused("takes NAME=DIR", "--export", tiny_packed_dir)
    for name in ("full precision", "RTN, even", "GPTQ, mse, seed 1"):
        refused(f"cannot be called '{name}'", "--export", f"{name}={tiny_packed_dir}")
    refused("fewer than the 9999", "--num-sequences", 9999)
    refused("num_sequences must be at least 1, got 0", "--num-sequences", 0)
    refused("sequence_length must be at least 2, got 0", "--sequence-length", 0)
    refused("seed must be at least 0, got -1", "--seed", -1)
    refused("damping must be a positive number, got 0.0", "--damping", 0)
    (tmp_path / "other.json").write_text('{"kind": "timing", "schema_version": 1}', encoding="utf-8")
    refused("holds no ptq result", "--out", tmp_path / "other.json", *CALIBRATION)
    refused("sequences of 257 tokens exceed the 256 positions", "--sequence-length", 257, "--num-sequences", 1)
    refused("is not a prepared corpus", "--corpus", tmp_path)
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    config = (other / "config.json").read_text(encoding="utf-8")
    (other / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 500'), encoding="utf-8")
    refused("has another vocabulary", "--export", f"QAD={other}")
    (other / "config.json").write_text(config, encoding="utf-8")
    (other / "model.safetensors").unlink()
    assert "measured" not in refused("has no model.safetensors", "--export", f"QAD={other}")
