"""The real contestants on the tiny model: all run, and make the same greedy tokens in float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from speedstack.eval.peers import (
    ENGINE,
    ENGINE_DRAFTER,
    ENGINE_WHOLE_BLOCKS,
    EXPERTS_IMPLEMENTATIONS,
    TRANSFORMERS,
    TRANSFORMERS_DRAFTER,
    FirstTokenClock,
    TimingSettings,
    measure_timing,
    try_experts_implementations,
)
from speedstack.eval.results import TimingResult
from speedstack.eval.timing import Sample
from speedstack.quant.checkpoint import load_model

PROMPTS = [[5, 17, 200, 31, 8, 90], [300, 301, 302]]


def test_all_contestants_make_the_same_tokens(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> None:
    settings = TimingSettings(num_new_tokens=24, num_repeats=2, backend="reference")
    result = measure_timing(tiny_packed_dir, tiny_packed_drafter_dir, PROMPTS, settings, progress=False)
    assert [entry.name for entry in result.contestants] == [
        ENGINE,
        ENGINE_DRAFTER,
        ENGINE_WHOLE_BLOCKS,
        TRANSFORMERS,
        TRANSFORMERS_DRAFTER,
    ], result.unavailable
    for entry in result.contestants[1:]:
        assert entry.identity is not None
        assert entry.identity.num_identical == len(PROMPTS), (entry.name, entry.identity.first_difference)
    promised = [entry.identity.promised for entry in result.contestants[1:] if entry.identity is not None]
    assert promised == [True, True, True, False]
    # Both count rounds of the same proposals, whose last ones are cut by the length in different ways.
    ours, theirs = result.contestants[2].acceptance_length, result.contestants[4].acceptance_length
    assert ours is not None and theirs == pytest.approx(ours, rel=0.1)
    for entry in result.contestants:
        assert 0 < entry.first_token_seconds.median < entry.warmup_seconds + 60
        assert entry.decode_tokens_per_second.median > 0
    assert result.num_threads == torch.get_num_threads() and result.num_prompt_tokens == (6, 3)
    assert TimingResult.load(result.save(tmp_path / "timing.json")) == result


def test_without_drafter_and_with_a_peer_that_cannot_run(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("this class is not known")

    monkeypatch.setattr("speedstack.eval.peers.load_model", refuse)
    settings = TimingSettings(num_new_tokens=4, num_repeats=1, backend="reference")
    result = measure_timing(tiny_model_dir, None, PROMPTS[:1], settings, progress=False)
    assert [entry.name for entry in result.contestants] == [ENGINE]
    assert result.contestants[0].acceptance_length is None
    assert [(entry.name, entry.reason) for entry in result.unavailable] == [
        (TRANSFORMERS, "ValueError: this class is not known")
    ]


def test_the_try_experts_implementations_is_one_that_runs(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float32).eval()
    set_implementation = type(model).set_experts_implementation

    def only_eager(self: torch.nn.Module, name: str) -> None:
        if name != "eager":
            raise NotImplementedError(f"{name} is not built")
        set_implementation(self, name)

    monkeypatch.setattr(type(model), "set_experts_implementation", only_eager)
    seconds, unavailable = try_experts_implementations(model, PROMPTS[0])
    assert list(seconds) == ["eager"] and seconds["eager"] > 0
    assert [entry.name for entry in unavailable] == [
        f"transformers ({name} experts)" for name in EXPERTS_IMPLEMENTATIONS if name != "eager"
    ]
    monkeypatch.setattr("speedstack.eval.peers.EXPERTS_IMPLEMENTATIONS", ("grouped_mm",))
    settings = TimingSettings(num_new_tokens=4, num_repeats=1, backend="reference")
    result = measure_timing(tiny_model_dir, None, PROMPTS[:1], settings, progress=False)
    assert [entry.name for entry in result.contestants] == [ENGINE]
    assert [(entry.name, entry.reason) for entry in result.unavailable] == [
        ("transformers (grouped_mm experts)", "NotImplementedError: grouped_mm is not built"),
        (TRANSFORMERS, "none of its experts implementations runs this model"),
    ]


def test_experts_implementations_are_compared_by_decoding_alone(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner(model: object, assistant: object) -> Callable[[list[int], int], Sample]:
        return lambda prompt, num_new_tokens: Sample([1] * num_new_tokens, 10.0, 10.0 + 0.5 * (num_new_tokens - 1))

    monkeypatch.setattr("speedstack.eval.peers._transformers_runner", runner)
    seconds, _ = try_experts_implementations(load_model(tiny_model_dir), PROMPTS[0])
    assert set(seconds.values()) == {0.5}


def test_first_token_clock_skips_the_prompt() -> None:
    clock = FirstTokenClock()
    clock.put(torch.tensor([[1, 2, 3]]))
    assert clock.first_token_time is None
    clock.put(torch.tensor([4]))
    first = clock.first_token_time
    clock.put(torch.tensor([5]))
    clock.end()
    assert first is not None and clock.first_token_time == first


def test_another_dtype_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'float16': use 'float32' or 'bfloat16'"):
        measure_timing(tiny_model_dir, None, PROMPTS, TimingSettings(dtype="float16"))
