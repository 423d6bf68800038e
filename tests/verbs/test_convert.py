"""The verb `convert`: models and drafters from one format to another, and one line for what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speedstack.cli import main


def test_convert_names_its_source_before_the_flags(
    tiny_packed_dir: Path, fails: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(tiny_packed_dir), "--to", "mimo", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "compressed-tensors to mimo: 4 expert weights" in text and f"written: {out}" in text
    assert (out / "tokenizer.json").is_file()
    job = tmp_path / "job.yaml"
    job.write_text(f"source: {out}\nto: plain\nout: {tmp_path / 'plain'}\n", encoding="utf-8")
    assert main(["convert", str(job)]) == 0
    assert "did you mean 'mimo'" in fails("convert", tiny_packed_dir, "--to", "mimi", "--out", tmp_path / "x")
    assert "nowhere" in fails("convert", tmp_path / "nowhere", "--to", "mimo", "--out", tmp_path / "x")
    assert "already" in fails("convert", out, "--to", "mimo", "--out", tmp_path / "x")
    assert str(job) in fails("convert", out, "--to", "plain", "--out", job / "x", code=1)
    assert not (tmp_path / "x").exists()


def test_convert_describes_every_format() -> None:
    from speedstack.dflash.formats.registry import FORMATS as DRAFTER_FORMATS
    from speedstack.quant.checkpoint import FORMATS
    from speedstack.verbs.convert import ConvertConfig

    description = ConvertConfig.model_fields["to"].description
    assert description is not None and all(name in description for name in (*FORMATS, *DRAFTER_FORMATS))


@pytest.mark.filterwarnings("ignore:this drafter reads the output of the target's last layer")
def test_convert_recognizes_a_drafter(
    tiny_model_dir: Path,
    tiny_packed_dir: Path,
    tiny_drafter_dir: Path,
    fails: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of the target nothing but its head is read.
    monkeypatch.setattr("speedstack.quant.checkpoint.load_checkpoint", None)
    out = tmp_path / "out"
    target = ("--target", str(tiny_model_dir))
    assert main(["convert", str(tiny_drafter_dir), "--to", "speculators", "--out", str(out), *target]) == 0
    assert "drafter of 2 layers for blocks of 8: to speculators" in capsys.readouterr().out
    verifier = json.loads((out / "config.json").read_text(encoding="utf-8"))["speculators_config"]["verifier"]
    assert verifier == {"architectures": ["MiMoV2FlashForCausalLM"], "name_or_path": str(tiny_model_dir)}
    back = tmp_path / "back"
    assert main(["convert", str(out), "--to", "zlab", "--out", str(back)]) == 0
    assert (back / "model.safetensors").read_bytes() == (tiny_drafter_dir / "model.safetensors").read_bytes()
    nowhere = ("--out", tmp_path / "x")
    assert "choose one of speedstack" in fails("convert", tiny_drafter_dir, "--to", "gguf", *nowhere)
    for flag, value in (
        ("--linears", "fp8"),
        ("--lm-head", "fp8"),
        ("--scale-rule", "mse"),
        ("--max-shard-bytes", "10"),
    ):
        line = fails("convert", tiny_drafter_dir, "--to", "zlab", *nowhere, flag, value)
        name = flag.removeprefix("--").replace("-", "_")
        assert f"is a drafter, for which the setting {name} does nothing" in line
    line = fails("convert", tiny_packed_dir, "--to", "mimo", *nowhere, "--target", tiny_model_dir)
    assert "is a model, for which the setting target does nothing" in line
    assert not (tmp_path / "x").exists()


def test_a_drafter_is_taken_over_for_its_target_in_another_format(
    tiny_packed_dir: Path,
    tiny_packed_drafter_dir: Path,
    fails: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The SHA-256 of files cannot tell the same values in another format from another model."""
    target, drafter = tmp_path / "mimo", tmp_path / "drafter"
    assert main(["convert", str(tiny_packed_dir), "--to", "mimo", "--out", str(target)]) == 0
    command = ["generate", str(target), "--prompt", "def f(x):", "--max-new-tokens", "8", "--device", "cpu"]
    assert "--to speedstack --target TARGET" in fails(*command, "--drafter", tiny_packed_drafter_dir)
    take_over = ["convert", str(tiny_packed_drafter_dir), "--to", "speedstack", "--out", str(drafter)]
    with pytest.warns(UserWarning, match="the result is for the latter"):
        assert main([*take_over, "--target", str(target)]) == 0
    capsys.readouterr()
    assert main(command) == 0
    alone = capsys.readouterr().out
    assert main([*command, "--drafter", str(drafter)]) == 0
    assert capsys.readouterr().out == alone
    fields = json.loads((tiny_packed_drafter_dir / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps(fields | {"hidden_size": 8}), encoding="utf-8")
    line = fails("convert", tmp_path / "wide", "--to", "zlab", "--out", tmp_path / "x", "--target", target)
    assert "it expects hidden size 8" in line
