"""The `quantize` verb: what it writes, and one line for everything it refuses."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from speedstack.cli import main
from speedstack.quant.checkpoint import load_checkpoint, load_model
from speedstack.quant.checkpoint.tokenizer import tokenizer_files
from speedstack.quant.experts import expert_parameters
from speedstack.quant.mxfp4 import MXFP4Tensor, quantize
from speedstack.runtime import Engine
from speedstack.verbs.quantize import QuantizeConfig, QuantizeResult

SMALL = ["--calibration.num-sequences", "6", "--calibration.sequence-length", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(*arguments)`: the one line on stderr, after checking the exit code."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main(["quantize", *map(str, arguments)]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("speedstack: error: ")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.mark.parametrize(("method", "scale_rule"), [("rtn", "even"), ("rtn", "floor"), ("mse", "mse")])
def test_rounding(method: str, scale_rule: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(tiny_model_dir), "--method", method, "--out", str(tmp_path / "out")]
    assert main([*arguments, *(["--scale-rule", scale_rule] if scale_rule == "floor" else [])]) == 0
    tensors = load_checkpoint(tmp_path / "out").tensors
    for name, parameter in expert_parameters(load_model(tiny_model_dir)).items():
        stored, expected = tensors[name], quantize(parameter.detach(), scale_rule)  # type: ignore[arg-type]
        assert isinstance(stored, MXFP4Tensor)
        assert torch.equal(stored.codes, expected.codes) and torch.equal(stored.scales, expected.scales)
    record = QuantizeResult.load(tmp_path / "out" / "quantize.json")
    assert (record.scale_rule, record.experts, record.num_calibration_tokens) == (scale_rule, (), 0)
    assert record.config["method"] == method


def test_gptq_from_a_file(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "job.yaml"
    fields = {"model": str(tiny_model_dir), "calibration": {"source": str(text_file)}, "out": str(tmp_path / "a")}
    config.write_text(json.dumps(fields), encoding="utf-8")
    assert main(["quantize", str(config), *SMALL]) == 0
    text = capsys.readouterr().out
    assert "32 matrices on 192 tokens" in text and str(tmp_path / "a" / "quantize.json") in text
    record = QuantizeResult.load(tmp_path / "a" / "quantize.json")
    assert len(record.experts) == 32 and record.num_calibration_tokens == 192
    assert all(entry.error <= entry.rtn_error for entry in record.experts)
    assert QuantizeConfig.model_validate(record.config).calibration.num_sequences == 6
    # The same command gives the same bytes; another seed of the calibration does not.
    arguments = ["quantize", str(tiny_model_dir), "--calibration.source", str(text_file), *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "c"), "--calibration.seed", "1"]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    engine = Engine.from_pretrained(tmp_path / "a", backend="reference", device="cpu")
    assert engine.generate("def f(", max_new_tokens=4, ignore_eos=True).stats.num_new_tokens == 4


@pytest.fixture
def stored_in(tiny_model_dir: Path, tmp_path: Path) -> Callable[[torch.dtype, str | None], Path]:
    """`stored_in(dtype, named)`: the tiny model in files of a dtype, under a config.json that names another or none."""

    def make(dtype: torch.dtype, named: str | None) -> Path:
        path = Path(shutil.copytree(tiny_model_dir, tmp_path / f"{dtype}-{named}"))
        tensors = load_file(path / "model.safetensors")
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path / "model.safetensors", {})
        fields = json.loads((path / "config.json").read_text()) | {"dtype": named, "of_the_makers": True}
        if named is None:
            del fields["dtype"]
        (path / "config.json").write_text(json.dumps(fields))
        (path / "LICENSE").write_text("free")
        return path

    return make


FILES_AND_NAMES = [
    (torch.float32, "bfloat16"),
    (torch.float16, "bfloat16"),
    (torch.float16, "float16"),
    (torch.bfloat16, None),
]


@pytest.mark.parametrize(("dtype", "named"), FILES_AND_NAMES)
def test_experts_are_rounded_once_and_the_rest_is_copied(
    dtype: torch.dtype, named: str | None, stored_in: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """The files' own dtype decides, not what config.json says of it."""
    source = stored_in(dtype, named)
    masters = load_model(source)  # float32 holds both
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        command = ["quantize", str(source), "--method", method, "--out", str(out)]
        assert main([*command, *(["--calibration.source", str(text_file), *SMALL] if method == "gptq" else [])]) == 0
        stored = load_checkpoint(out).tensors
        for name, weight in expert_parameters(masters).items():
            packed, rounded = stored[name], quantize(weight.detach())
            assert isinstance(packed, MXFP4Tensor)
            if method == "rtn":
                assert torch.equal(packed.codes, rounded.codes) and torch.equal(packed.scales, rounded.scales)
        before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
        others = {name: tensor for name, tensor in before.items() if ".experts." not in name}
        assert all(after[name].dtype == dtype and torch.equal(after[name], tensor) for name, tensor in others.items())
        assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} | {"quantize.json"}
        for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (source / name).read_bytes()
        fields = json.loads((out / "config.json").read_text())
        del fields["quantization_config"]
        assert fields == json.loads((source / "config.json").read_text())


def test_gptq_computes_in_a_dtype_that_holds_the_experts(
    stored_in: Callable[..., Path],
    text_file: Path,
    fails: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from speedstack.quant import checkpoint

    loaded: list[torch.dtype] = []

    def noted(path: Path, dtype: torch.dtype) -> object:
        loaded.append(dtype)
        return load_model(path, dtype)

    monkeypatch.setattr(checkpoint, "load_model", noted)
    options = ["--calibration.source", str(text_file), *SMALL, "--out", str(tmp_path / "out")]
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        source = stored_in(dtype, None)
        assert main(["quantize", str(source), *options]) == 0
        assert loaded.pop() == expected
        if expected == torch.float32:
            line = fails(source, "--dtype", "bfloat16", *options)
            assert "--dtype bfloat16 would round them before they are quantized, use --dtype auto or float32" in line
        else:
            assert main(["quantize", str(source), *options, "--dtype", "float32"]) == 0
            assert loaded.pop() == torch.float32


def test_prediction_heads_go_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    """transformers leaves them out of the model without a word."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    tensors = load_file(model / "model.safetensors")
    head = {f"model.mtp.0.mlp.experts.0.{part}_proj.weight": torch.randn(32, 64) for part in ("gate", "up")}
    head["model.mtp.0.mlp.experts.0.down_proj.weight"] = torch.randn(64, 32)
    save_file(tensors | head, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["quantize", str(model), "--method", "rtn", "--out", str(tmp_path / "out")]) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in head.items())


def test_a_quantized_model_is_refused(fails: Callable[..., str], tiny_packed_dir: Path, tmp_path: Path) -> None:
    line = fails(tiny_packed_dir, "--out", tmp_path / "out")
    assert f"{tiny_packed_dir} is quantized already (compressed-tensors)" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nan_is_refused_and_nothing_is_written(
    method: str, fails: Callable[..., str], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_model_dir)
    with torch.no_grad():
        expert_parameters(model)["model.layers.2.mlp.experts.down_proj"][3, 1, 5] = torch.nan
    bad = tmp_path / "bad"
    model.save_pretrained(bad)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, bad)
    line = fails(bad, "--method", method, "--out", tmp_path / "out", "--calibration.source", text_file, *SMALL)
    where = "model.layers.2.mlp.experts.down_proj" if method == "gptq" else "model.layers.2.mlp.experts.3 (down_proj)"
    assert f"{where}: cannot quantize NaN" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad"]


def test_missing_text_and_too_little(
    fails: Callable[..., str], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    base = [tiny_model_dir, "--out", tmp_path / "out", "--calibration.source"]
    assert "there is no file or directory" in fails(*base, tmp_path / "nowhere.txt")
    assert "fewer than the 9999 asked for" in fails(*base, text_file, *SMALL, "--calibration.num-sequences", "9999")
    line = fails(*base, text_file, *SMALL, "--calibration.sequence-length", "1000")
    assert "1000 exceeds the model's 256 positions" in line
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_another_model(
    fails: Callable[..., str], tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    fields = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    extra = [fields["added_tokens"][0] | {"id": 600 + index, "content": f"<{index}>"} for index in range(9)]
    (model / "tokenizer.json").write_text(json.dumps(fields | {"added_tokens": fields["added_tokens"] + extra}))
    assert "do not belong together" in fails(model, "--out", tmp_path / "out")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in fails(model, "--out", tmp_path / "out")
    # Rounding reads no text; what the source lacks is not made up.
    assert main(["quantize", str(model), "--method", "rtn", "--out", str(tmp_path / "out")]) == 0
    assert tokenizer_files(tmp_path / "out") == []


def test_sources_and_destinations_that_cannot_be_are_refused(
    fails: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert "no model directory at" in fails(tmp_path / "nowhere")
    assert "is or holds" in fails(tiny_model_dir, "--out", tiny_model_dir)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep")
    for occupied in (tmp_path / "notes", tmp_path / "notes" / "todo.txt"):
        assert "exists and is not a model directory" in fails(tiny_model_dir, "--method", "rtn", "--out", occupied)
    # Before the text is read, let alone calibrated on.
    inside = ("--out", tmp_path / "notes" / "todo.txt" / "model", "--calibration.source", tmp_path / "nowhere.txt")
    assert "todo.txt is no directory" in fails(tiny_model_dir, *inside, code=1)
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        inside = ("--out", tmp_path / "locked" / "model", "--calibration.source", tmp_path / "nowhere.txt")
        assert "no permission to write" in fails(tiny_model_dir, *inside, code=1)
    assert (tmp_path / "notes" / "todo.txt").read_text() == "keep"


def test_settings_that_contradict_or_do_nothing(
    fails: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert "choose method rtn" in fails(tiny_model_dir, "--method", "mse", "--scale-rule", "floor")
    with pytest.warns(UserWarning, match=r"method rtn takes no damping, device, dtype, calibration\.seed: not used"):
        settings = ["--method", "rtn", "--damping", "0.5", "--calibration.seed", "3"]
        settings += ["--device", "cpu", "--dtype", "float32"]
        assert main(["quantize", str(tiny_model_dir), *settings, "--out", str(tmp_path / "out")]) == 0
    assert "greater than or equal to 0" in fails(tiny_model_dir, "--damping", "-1")
    assert "did you mean '--calibration.source'" in fails(tiny_model_dir, "--calibration.sorce", "x")


def test_a_family_that_cannot_be_packed(
    fails: Callable[..., str], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Said before the text is read, let alone calibrated on."""
    from transformers import AutoConfig

    AutoConfig.for_model("granitemoe", architectures=["GraniteMoeForCausalLM"]).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    line = fails(tmp_path / "model", "--calibration.source", tmp_path / "nowhere.txt", "--out", tmp_path / "out")
    assert "granitemoe" in line
