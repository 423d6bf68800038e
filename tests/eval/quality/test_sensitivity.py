"""Sensitivity by layer and by expert: against whole forwards of models quantized for real, and nothing left behind."""

import copy
import csv
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from speedstack.eval.quality.divergence import token_kl
from speedstack.eval.quality.sensitivity import main, measure_sensitivity, sensitivity
from speedstack.eval.results.quality import SensitivityResult
from speedstack.quant.checkpoint import weights_sha256
from speedstack.quant.experts import expert_parameters
from speedstack.quant.mxfp4 import fake_quantize
from speedstack.quant.ptq import round_to_nearest

# Two lengths, as `heldout_windows` gives them.
WINDOWS = [[0, *range(start, start + length)] for start, length in ((3, 30), (60, 30), (120, 30), (200, 11))]


@pytest.fixture
def model(make_tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_tiny_model()


@torch.no_grad()
def mean_kl(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """Over the positions that predict a token of the window, a window at a time."""
    parts = []
    for window in WINDOWS:
        teacher_TV, student_TV = (each(input_ids=torch.tensor([window])).logits[0, :-1] for each in (teacher, student))
        parts.append(token_kl(teacher_TV, student_TV))
    return float(torch.cat(parts).mean())


def test_each_unit_equals_a_model_with_that_unit_quantized(model: PreTrainedModel) -> None:
    result = measure_sensitivity(model, WINDOWS, batch_size=2)
    assert [(unit.layer, unit.expert) for unit in result.units] == [
        (layer, expert) for layer in (1, 2) for expert in (None, *range(8))
    ]
    assert result.num_tokens == 30 * 3 + 11
    for unit in result.units:
        student = copy.deepcopy(model)
        num_parameters = 0
        for name, parameter in expert_parameters(student).items():
            if f"layers.{unit.layer}." in name:
                part = parameter.data if unit.expert is None else parameter.data[unit.expert]
                part.copy_(fake_quantize(part))
                num_parameters += part.numel()
        # A window alone or beside another is rounded differently in float32.
        assert unit.kl_nats == pytest.approx(mean_kl(model, student), rel=1e-3, abs=1e-9)
        assert unit.num_parameters == num_parameters
    everything = copy.deepcopy(model)
    round_to_nearest(everything)
    assert result.all_kl_nats == pytest.approx(mean_kl(model, everything), rel=1e-3)


def test_tokens_are_counted_by_expert(model: PreTrainedModel) -> None:
    result = measure_sensitivity(model, WINDOWS)
    num_ids = sum(map(len, WINDOWS))
    for layer in result.layers():
        assert layer.num_tokens == 2 * num_ids  # two experts a token
        assert layer.num_tokens == sum(unit.num_tokens for unit in result.experts() if unit.layer == layer.layer)


def test_an_expert_that_nobody_chose_changes_nothing(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100.0
    (unit,) = [u for u in measure_sensitivity(model, WINDOWS).experts() if (u.layer, u.expert) == (1, 3)]
    assert (unit.num_tokens, unit.kl_nats, unit.top1_agreement) == (0, 0.0, 1.0)


def test_weights_are_as_before_even_after_an_error(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_sensitivity(model, WINDOWS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    calls = 0

    def breaks(weight: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise ValueError("no more")
        return fake_quantize(weight)

    with pytest.raises(ValueError, match="no more"):
        measure_sensitivity(model, WINDOWS, breaks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_rounding_and_layers_only(model: PreTrainedModel) -> None:
    exact = measure_sensitivity(model, WINDOWS, torch.clone, by_expert=False)
    assert exact.experts() == () and len(exact.layers()) == 2
    assert [unit.kl_nats for unit in exact.units] == [0.0, 0.0] and exact.all_kl_nats == 0.0
    floor = measure_sensitivity(model, WINDOWS, partial(fake_quantize, scale_rule="floor"), by_expert=False)
    assert floor.rounding == "fake_quantize(scale_rule=floor)"
    assert floor.all_kl_nats > 0 and floor.all_kl_nats != measure_sensitivity(model, WINDOWS).all_kl_nats


def test_files(model: PreTrainedModel, tmp_path: Path) -> None:
    result = measure_sensitivity(model, WINDOWS)
    assert SensitivityResult.load(result.save(tmp_path / "a" / "sensitivity.json")) == result
    with result.save_csv(tmp_path / "b" / "sensitivity.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["expert"] for row in rows[:3]] == ["", "0", "1"]
    assert [float(row["kl_nats"]) for row in rows] == [unit.kl_nats for unit in result.units]
    assert [entry.name for entry in (tmp_path / "b").iterdir()] == ["sensitivity.csv"]


def test_no_windows(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no windows"):
        measure_sensitivity(model, [])


def save_corpus(path: Path, ids: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> None:
    """A prepared corpus as far as it is read here; texts are those of the ids."""
    documents = {"input_ids": ids, "text": [tokenizer.decode(each[:-1]) for each in ids]}
    datasets.Dataset.from_dict(documents).save_to_disk(str(path / "heldout"))
    tokenizer.save_pretrained(path / "tokenizer")


def test_command(
    tiny_model_dir: Path,
    tiny_packed_dir: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ["def dedent(text):\n    return text\n" * 8, "import re\n\nclass TextWrapper:\n" * 8]
    save_corpus(tmp_path / "corpus", [[*tiny_tokenizer.encode(text), 0] for text in texts], tiny_tokenizer)
    command = [str(tiny_model_dir), "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")]
    assert main([*command, "--window", "33", "--num-tokens", "100", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    result = SensitivityResult.load(tmp_path / "out" / "sensitivity.json")
    assert result.num_tokens == 100 and len(result.units) == 18
    assert result.model_sha256 == weights_sha256(tiny_model_dir)
    worst = max(result.experts(), key=lambda unit: unit.kl_nats)
    assert f"layer {worst.layer} expert {worst.expert}" in text and (tmp_path / "out" / "sensitivity.csv").is_file()
    # Nothing that was measured is lost with the files.
    (tmp_path / "file").write_text("keep")
    short = ["--layers-only", "--window", "9", "--num-tokens", "8", "--device", "cpu"]
    assert main([*command, *short, "--out", str(tmp_path / "file")]) == 1
    captured = capsys.readouterr()
    assert "everything quantized: KL" in captured.out and "layer 2" in captured.out
    assert captured.err.strip().splitlines()[-1].startswith("sensitivity: error: ")
    for wrong, message in (
        (["--corpus", str(tmp_path)], "is not a prepared corpus"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--window", "1"], "use at least 2"),
        (["--device", "tpu"], "tpu"),
    ):
        assert main([*command, *wrong]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1] and lines[-1].startswith("sensitivity: error: ")
    for model, message in (
        (tmp_path / "nowhere", "no model directory"),
        (tiny_packed_dir, "are quantized already"),
    ):
        assert main([str(model), *command[1:]]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_corpus_of_another_model(
    tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Ids beyond the embedding, and ids within it that mean other tokens."""

    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))

    def refused(model: Path, largest: int, match: str, window: int = 9) -> None:
        shutil.rmtree(tmp_path / "corpus", ignore_errors=True)
        save_corpus(tmp_path / "corpus", [[5, 6, largest, 0]], tiny_tokenizer)
        if model == tiny_model_dir:
            file = tmp_path / "corpus" / "tokenizer" / "tokenizer.json"
            fields = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = fields["model"]["vocab"]
            vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
            file.write_text(json.dumps(fields), encoding="utf-8")
        with pytest.raises(ValueError, match=match) as caught:
            sensitivity(model, tmp_path / "corpus", window=window, device="cpu")
        assert "\n" not in str(caught.value)

    refused(bare, 512, "has the token 512, .* an embedding of 512")
    refused(bare, 511, "a window of 257 tokens exceeds the 256 positions", window=257)
    refused(tiny_model_dir, 511, "was tokenized with another tokenizer than that of")
