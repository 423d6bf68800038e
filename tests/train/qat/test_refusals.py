"""What quantization-aware training refuses, in one line, and loses nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.quant.checkpoint.digest import config_sha256
from speedstack.train.config.recipes import QatConfig
from speedstack.train.core.loop import RunResult
from speedstack.train.data.digest import corpus_digest
from speedstack.train.qat.recipe import qat

MakeConfig = Callable[..., QatConfig]


def test_a_model_replaced_in_place_is_refused(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pretrained.export_path, model)
    config = make_qat_config(tmp_path, model, loop__num_steps=1)
    qat(config)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1.0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the model of this run has changed since it was started"):
        qat(config)


def test_a_model_under_another_config_is_another(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(pretrained.export_path, tmp_path / "model"))
    config = make_qat_config(tmp_path, model, loop__num_steps=1)
    shutil.rmtree(qat(config).export_path)
    fields = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(fields | {"routed_scaling_factor": 2.5}), encoding="utf-8")
    with pytest.raises(ValueError, match="the model config of this run has changed since it was started"):
        qat(config)


def test_a_corpus_replaced_in_place_is_refused(
    pretrained: RunResult, corpus_path: Path, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_path, corpus)
    config = make_qat_config(tmp_path, pretrained.export_path, data__corpus=str(corpus), loop__num_steps=1)
    result = qat(config)
    inputs = result.path / "inputs.json"
    recorded = {
        "model": weights_sha256(pretrained.export_path),
        "model config": config_sha256(pretrained.export_path),
        "corpus": corpus_digest(corpus_path),
    }
    assert json.loads(inputs.read_text(encoding="utf-8")) == recorded
    # A finished run is returned, and keeps what it has noted.
    assert qat(config) == result and json.loads(inputs.read_text(encoding="utf-8")) == recorded
    shutil.rmtree(result.export_path)
    tokenizer = corpus / "tokenizer" / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8")
    tokenizer.write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the corpus of this run has changed since it was started"):
        qat(config)
    # What a run did not note when it began is not known later.
    inputs.write_text(json.dumps({"model": recorded["model"]}), encoding="utf-8")
    assert qat(config) == result
    assert json.loads(inputs.read_text(encoding="utf-8")) == {"model": recorded["model"]}


def test_bad_models_are_refused(
    pretrained: RunResult, make_qat_config: MakeConfig, random_model: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        qat(make_qat_config(tmp_path / "a", tmp_path / "nowhere"))
    # For a directory of OLMoE without tokenizer files transformers would make a tokenizer up.
    copy = Path(shutil.copytree(pretrained.export_path, tmp_path / "copy"))
    for name, broken in {"b": copy, "e": random_model("olmoe", tmp_path / "olmoe")}.items():
        (broken / "tokenizer.json").unlink()
        (broken / "tokenizer_config.json").unlink()
        with pytest.raises(ValueError, match="has no tokenizer"):
            qat(make_qat_config(tmp_path / name, broken))
    with pytest.raises(ValueError, match=r"ce_weight 0\.5 is for objective mix: kl has no such weight"):
        make_qat_config(tmp_path / "d", pretrained.export_path, qat__ce_weight=0.5)
    length = load_model(pretrained.export_path).config.max_position_embeddings + 1
    with pytest.raises(ValueError, match=rf"data\.sequence_length {length} exceeds the {length - 1} positions of"):
        qat(make_qat_config(tmp_path / "c", pretrained.export_path, data__sequence_length=length))
