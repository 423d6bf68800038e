import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speedstack.eval.quality.divergence import token_nll
from speedstack.quant.checkpoint import load_model
from speedstack.train.config.recipes import ModelSection, PretrainConfig
from speedstack.train.core.batches import PackedWindows
from speedstack.train.core.loop import RunResult
from speedstack.train.data.corpus import load_corpus
from speedstack.train.data.digest import corpus_digest
from speedstack.train.pretrain import model_config, pretrain


@torch.no_grad()
def test_the_export_is_the_model_that_was_evaluated(pretrained: RunResult, corpus_path: Path) -> None:
    model = load_model(pretrained.export_path)
    windows = PackedWindows(load_corpus(corpus_path).heldout, 32)
    places = [index * len(windows) // 4 for index in range(4)]
    ids = torch.stack([windows.window(place) for place in places])
    logits = model(input_ids=ids).logits
    loss = token_nll(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).mean().item()
    # The same float32 products through another experts implementation.
    assert loss == pytest.approx(pretrained.metrics["heldout_loss"], abs=1e-5)


def test_the_export_has_the_tokenizer_and_the_declared_geometry(pretrained: RunResult) -> None:
    config = json.loads((pretrained.export_path / "config.json").read_text())
    assert config["architectures"] == ["MiMoV2FlashForCausalLM"]
    assert (config["eos_token_id"], config["vocab_size"]) == (0, 300)
    assert (pretrained.export_path / "tokenizer.json").is_file()


def test_a_corpus_replaced_in_place_is_refused(
    make_pretrain_config: Callable[..., PretrainConfig], corpus_path: Path, tmp_path: Path
) -> None:
    corpus = Path(shutil.copytree(corpus_path, tmp_path / "corpus"))
    config = make_pretrain_config(tmp_path, data__corpus=str(corpus), loop__num_steps=1)
    result = pretrain(config)
    assert json.loads((result.path / "inputs.json").read_text()) == {"corpus": corpus_digest(corpus_path)}
    shutil.rmtree(result.export_path)
    tokenizer = corpus / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(f"{tokenizer.read_text()}\n")
    with pytest.raises(ValueError, match="the corpus of this run has changed since it was started"):
        pretrain(config)


def test_the_default_geometry_is_the_model_of_record(corpus_path: Path) -> None:
    config = model_config(ModelSection(), load_corpus(corpus_path).tokenizer)
    sliding = ["sliding_attention"] * 4
    assert config.layer_types == ["full_attention", *sliding, "full_attention"]
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 5
    assert (config.attention_value_scale, config.norm_topk_prob) == (1.0, True)
    rope = config.to_dict()["rope_parameters"]["sliding_attention"]
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.5, 1e4)


def test_bfloat16_export_keeps_the_router_bias_in_float32(
    make_pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    result = pretrain(make_pretrain_config(tmp_path, model__export_dtype="bfloat16", loop__num_steps=1))
    dtypes = {name: tensor.dtype for name, tensor in load_file(result.export_path / "model.safetensors").items()}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16), name
    assert json.loads((result.export_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_windows_longer_than_the_model_are_refused(
    make_pretrain_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"data.sequence_length 128 exceeds model.max_position_embeddings 64"):
        pretrain(make_pretrain_config(tmp_path, data__sequence_length=128))
