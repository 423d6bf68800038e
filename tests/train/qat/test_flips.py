"""Flips and oscillation, counted by hand on a model whose masters are moved by hand."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from speedstack.quant.experts import expert_parameters
from speedstack.train.qat import flips
from speedstack.train.qat.flips import FlipWatch


@pytest.fixture
def model(make_tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Every expert weight is 4, hence every block has scale 1 and room on both sides of 4."""
    model = make_tiny_model()
    for weight in expert_parameters(model).values():
        weight.data.fill_(4.0)
    return model


def set_and_look(model: PreTrainedModel, watch: FlipWatch, value: float, num_rows: int = 1) -> None:
    """Give the second half of each of the first rows' blocks, of the first expert of each tensor, a value."""
    for weight in expert_parameters(model).values():
        weight.data[0, :num_rows].unflatten(-1, (-1, 32))[..., 16:] = value
    watch.look()


def share(model: PreTrainedModel, num_rows: int = 1) -> float:
    """What part of all expert weights `set_and_look` moves."""
    weights = list(expert_parameters(model).values())
    return sum(num_rows * weight.shape[-1] / 2 for weight in weights) / sum(weight.numel() for weight in weights)


def test_flips_are_counted_since_the_start_and_since_the_last_look(model: PreTrainedModel) -> None:
    watch = FlipWatch(model, "even")
    assert watch.metrics() == {"flips_since_start": 0.0, "flips_since_look": 0.0, "oscillating": 0.0}
    set_and_look(model, watch, 4.9)
    assert watch.metrics()["flips_since_start"] == 0.0, "4.9 is still nearest to 4"
    set_and_look(model, watch, 3.0)
    once = {"flips_since_start": share(model), "flips_since_look": share(model), "oscillating": 0.0}
    assert watch.metrics() == once
    watch.look()
    assert watch.metrics() == once | {"flips_since_look": 0.0}
    set_and_look(model, watch, 2.0, num_rows=2)
    assert watch.metrics()["flips_since_start"] == watch.metrics()["flips_since_look"] == share(model, num_rows=2)


def test_only_coming_back_is_oscillation(model: PreTrainedModel) -> None:
    watch = FlipWatch(model, "even")
    for value in (3.0, 2.0, 1.5):
        set_and_look(model, watch, value)
    assert watch.metrics()["oscillating"] == 0.0, "a way down is no oscillation"
    set_and_look(model, watch, 2.0)
    assert watch.metrics()["oscillating"] == share(model)
    for _ in range(5):
        watch.look()
    assert watch.metrics()["oscillating"] == share(model), "the way there and back is still in sight"
    watch.look()
    assert watch.metrics()["oscillating"] == 0.0


def test_a_new_scale_with_the_same_values_is_no_flip(model: PreTrainedModel) -> None:
    watch = FlipWatch(model, "even")
    weight = next(iter(expert_parameters(model).values()))
    weight.data[0, 0, 0] = 8.0  # its block's scale doubles; 4 is a value of both grids
    watch.look()
    total = sum(parameter.numel() for parameter in expert_parameters(model).values())
    assert watch.metrics()["flips_since_start"] == 1 / total


@pytest.mark.parametrize("period", [2, 16])
def test_a_sample_of_rows_stands_for_large_models(
    period: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a period of 2, rows that take turns, as gpt-oss' gate and up rows do."""
    total = sum(parameter.numel() for parameter in expert_parameters(model).values())
    monkeypatch.setattr(flips, "_MAX_WEIGHTS", total // 2)
    watch = FlipWatch(model, "even")
    num_bytes = sum(tensor.nbytes for tensor in watch.state().values())
    # Every third row, because every second one would be of one kind.
    assert num_bytes == pytest.approx(total / 3 * 17 / 32, rel=0.01)
    for weight in expert_parameters(model).values():
        weight.data.mul_(torch.where(torch.arange(weight.shape[1]) % period < period // 2, 0.5, 1.0).view(1, -1, 1))
    watch.look()
    assert watch.metrics()["flips_since_start"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("max_weights", [1024, 2048, 5000])
def test_many_experts_are_watched_in_part(
    max_weights: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer weights than one row of every expert has; experts and rows take turns."""
    weights = list(expert_parameters(model).values())
    assert max_weights < sum(weight[:, 0].numel() for weight in weights) * 4
    monkeypatch.setattr(flips, "_MAX_WEIGHTS", max_weights)
    watch = FlipWatch(model, "even")
    watched = {name: packed.shape for name, packed in watch._start.items()}
    one_row_each = sum(shape[-1] for shape in watched.values())
    assert max_weights / 2 < sum(shape.numel() for shape in watched.values()) <= max_weights + one_row_each
    for weight in weights:
        weight.data.mul_(torch.where(torch.arange(weight.shape[1]) % 2 == 0, 0.5, 1.0).view(1, -1, 1))
    watch.look()
    assert watch.metrics()["flips_since_start"] == pytest.approx(0.5, abs=0.2)


def test_state_continues_the_record(model: PreTrainedModel) -> None:
    watch, resumed = FlipWatch(model, "even"), FlipWatch(model, "even")
    for value in (3.0, 4.0):
        set_and_look(model, watch, value)
    resumed.load_state(watch.state())
    assert resumed.metrics() == watch.metrics()
    for each in (watch, resumed):
        set_and_look(model, each, 3.0, num_rows=3)
    assert resumed.metrics() == watch.metrics()
    assert resumed.metrics()["oscillating"] == share(model)
    state = watch.state()
    state.popitem()
    with pytest.raises(ValueError, match="no record of flips that is of this model"):
        resumed.load_state(state)
