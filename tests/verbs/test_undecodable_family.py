"""Families that no backend decodes: said before the work, by verbs that need the engine and by those that do not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from speedstack.cli import main
from speedstack.runtime import Engine
from speedstack.runtime.model.loading import check_decodable
from speedstack.train.config.recipes import QatConfig
from speedstack.train.core.distributed import World
from speedstack.train.qat.recipe import QatRecipe

CANNOT = "the runtime cannot decode model type '{}'; it can decode gpt_oss, mimo_v2_flash, qwen3_moe"


@pytest.fixture(params=["olmoe", "minimax_m2"], ids=["names known", "names unknown"])
def undecodable(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Its model type and a directory that has a config alone: whoever reads on fails with another line."""
    AutoConfig.for_model(request.param).save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole model, which can be packed and converted."""
    path = tmp_path_factory.mktemp("models") / "mixtral"
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    config = AutoConfig.for_model(
        "mixtral", vocab_size=512, num_attention_heads=2, num_key_value_heads=2, eos_token_id=0, **sizes
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def test_whoever_decodes_refuses_it(
    undecodable: tuple[str, Path], tiny_model_dir: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    family, path = undecodable
    commands: list[list[object]] = [
        ["generate", path, "--prompt", "x"],
        ["bench", path, "--out", tmp_path / "bench"],
        ["eval", path, "--suite", "offline", "--out", tmp_path / "eval"],
        ["eval", path, "--out", tmp_path / "eval"],
        ["eval", tiny_model_dir, "--teacher", path, "--corpus", tmp_path / "nowhere", "--out", tmp_path / "eval"],
        ["drafter", "--drafter.target", path, "--run.out", tmp_path / "runs", "--data.corpus", tmp_path / "corpus"],
    ]
    for command in commands:
        assert CANNOT.format(family) in fails(*command)
    for load in (check_decodable, Engine.from_pretrained):
        with pytest.raises(ValueError, match="cannot decode"):
            load(path)
    assert sorted(child.name for child in tmp_path.iterdir()) in (["model"], ["model", "runs"])


def test_whoever_makes_it_for_others_warns(
    mixtral: Path, tiny_model_dir: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def told() -> list[str]:
        return [str(recwarn.pop().message) for _ in range(len(recwarn))]

    for model, num_warnings in ((mixtral, 1), (tiny_model_dir, 0)):
        out = tmp_path / model.name
        for command in (
            ["quantize", model, "--method", "rtn", "--device", "cpu", "--out", out / "packed"],
            ["convert", out / "packed", "--to", "plain", "--out", out / "plain"],
        ):
            assert main([str(argument) for argument in command]) == 0
            found = [message for message in told() if message.startswith(CANNOT.format("mixtral"))]
            assert len(found) == num_warnings
            assert all(message.endswith("generate, eval and bench refuse it") for message in found)
    config = {"qat": {"model": mixtral}, "data": {"corpus": tmp_path / "corpus", "source": str(tmp_path / "nothing")}}
    recipe = QatRecipe(QatConfig.model_validate(config))
    with pytest.warns(UserWarning, match="cannot decode model type 'mixtral'"), pytest.raises(ValueError, match="noth"):
        recipe.build(World(rank=0, size=1, device=torch.device("cpu")))
