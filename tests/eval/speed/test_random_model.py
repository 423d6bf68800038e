"""A random model on disk: both forms have one set of values, load, and write text that does not stand still."""

import json
from pathlib import Path

import pytest
import torch

from speedstack.eval.speed import random_model
from speedstack.quant.checkpoint import load_model
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.runtime import Engine
from speedstack.runtime.model.released_models import LAPTOP_MODEL, released_config, released_spec, tiny_config
from speedstack.runtime.model.spec import MoeSpec


def test_the_model_for_laptops_is_as_large_as_it_says() -> None:
    spec = released_spec(LAPTOP_MODEL)
    mixture = spec.layers[0].mlp
    assert isinstance(mixture, MoeSpec) and (mixture.num_experts, mixture.top_k) == (64, 8)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(released_config(LAPTOP_MODEL))
    assert 1.00e9 < sum(parameter.numel() for parameter in model.parameters()) < 1.01e9


def test_packed_and_unpacked_have_the_same_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(model: str) -> object:
        made = tiny_config(model)
        made.vocab_size, made.max_position_embeddings = 300, 1024
        return made

    monkeypatch.setattr(random_model, "released_config", config)
    out = tmp_path / "runs" / "out"
    assert random_model.main(["qwen3-30b-a3b", "--out", str(out)]) == 0
    packed, plain = (load_model(out / name, dtype=torch.float32).state_dict() for name in ("mxfp4", "bf16"))
    assert packed.keys() == plain.keys() and all(torch.equal(packed[name], plain[name]) for name in packed)
    assert len(load_tokenizer(out / "mxfp4", 300)) == 300
    rows = [json.loads(line) for line in (out / "prompts-512.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and all(len(row["prompt"]) == 512 and max(row["prompt"]) < 300 for row in rows)
    engine = Engine.from_pretrained(out / "mxfp4", backend="reference")
    tokens = engine.generate(rows[0]["prompt"][:32], max_new_tokens=24, ignore_eos=True).tokens
    assert len(set(tokens)) > 8
    assert engine.tokenizer is not None and engine.tokenizer.decode(engine.tokenizer.encode("a\nß ")) == "a\nß "

    monkeypatch.undo()
    assert random_model.main(["gpt-2", "--out", str(out)]) == 2
    assert "error: unknown model 'gpt-2'; known: gpt-oss-20b" in capsys.readouterr().err
