"""Shapes of released models are those of their published configs; tiny ones have the same ingredients."""

from dataclasses import replace
from pathlib import Path

import pytest

from speedstack.runtime.model.config_file import read_model_config
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.released_models import MODELS, released_config, released_spec, tiny_config
from speedstack.runtime.model.spec import MoeSpec

SHAPES = Path(__file__).parents[2] / "shapes"


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_the_published_ones(model: str) -> None:
    published, _ = read_model_config(SHAPES / f"{model}.json")
    assert replace(released_spec(model), eos_token_ids=()) == replace(published, eos_token_ids=())


@pytest.mark.parametrize("model", MODELS)
def test_tiny_models_have_every_ingredient(model: str) -> None:
    real, tiny = released_spec(model), spec_from_config(tiny_config(model))
    assert tiny.model_type == real.model_type

    def kinds(attribute: str) -> list[set[object]]:
        return [{_kind(getattr(layer, attribute)) for layer in spec.layers} for spec in (real, tiny)]

    for attribute in ("attention", "mlp"):
        wanted, found = kinds(attribute)
        assert found == wanted


def _kind(part: object) -> object:
    """Everything about a layer's part but its sizes."""
    switches: dict[str, object] = {
        name: value for name, value in vars(part).items() if isinstance(value, bool | str) or value is None
    }
    if isinstance(part, MoeSpec):
        switches |= {"routed_scale": part.routed_scale, "limit": part.swiglu_limit, "alpha": part.swiglu_alpha}
    return type(part).__name__, tuple(sorted(switches.items(), key=str))


def test_first_layers_alone() -> None:
    spec, cut = released_spec("mimo-v2-flash"), spec_from_config(released_config("mimo-v2-flash", 3))
    assert cut.layers == spec.layers[:3]


def test_unknown_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'gpt-2'; known: gpt-oss-20b, mimo-v2-flash, qwen3-30b-a3b"):
        released_config("gpt-2")
