"""Our table of names against the names that the installed transformers writes for each family."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import PreTrainedModel

from speedstack.quant.checkpoint import save_packed
from speedstack.quant.checkpoint.names import _FAMILIES, hub_names


def stored_names(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("model_type", _FAMILIES)
def test_names_are_those_of_save_pretrained(
    model_type: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = make_family(model_type)
    model.save_pretrained(tmp_path / "plain")
    save_packed(model, tmp_path / "packed")
    packed = stored_names(tmp_path / "packed")
    assert {name for name in packed if name.endswith("_packed")}
    as_plain = {name.removesuffix("_packed") for name in packed if not name.endswith("weight_scale")}
    assert as_plain == stored_names(tmp_path / "plain")


def test_gpt_oss_is_refused(make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gpt-oss experts have biases and interleaved rows"):
        save_packed(make_family("gpt_oss"), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_unknown_family_names_the_known_ones(make_family: Callable[[str], PreTrainedModel]) -> None:
    config = make_family("olmoe").config
    config.model_type = "jamba"  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"'jamba' are not known: choose a model of .*mimo_v2_flash"):
        hub_names(config)
