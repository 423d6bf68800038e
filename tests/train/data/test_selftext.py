"""The written text: a function of prompts and settings, resumable shard by shard, never mixed."""

from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors import SafetensorError

from speedstack.train.data import selftext
from speedstack.train.data.selftext import Sampling, continue_prompts, cut_prompts, load_text

PROMPTS = torch.arange(22, dtype=torch.int64).reshape(11, 2)


class CountingEngine:
    """Continues [a, b] with a, seed, a, seed, ... and counts; temperatures are noted."""

    max_batch_size = 3

    def __init__(self, fail_after: int = 10**9) -> None:
        self.num_written = 0
        self.temperatures: list[float] = []
        self.fail_after = fail_after

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: list[int], **_: Any
    ) -> list[Any]:
        if self.num_written >= self.fail_after:
            raise KeyboardInterrupt
        self.num_written += len(prompts)
        self.temperatures.append(temperature)
        pairs = zip(prompts, seed, strict=True)
        return [SimpleNamespace(tokens=([p[0], s] * max_new_tokens)[:max_new_tokens]) for p, s in pairs]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(selftext, "SEQUENCES_A_SHARD", 4)


def write(path, engine, sampling=Sampling(5, seed=100), **ranks):  # noqa: B008 (frozen)
    continue_prompts(path, lambda: engine, "sha", PROMPTS, sampling, **ranks)


def test_text_is_prompts_and_continuations_in_order(tmp_path):
    write(tmp_path, CountingEngine())
    text = load_text(tmp_path, "sha", PROMPTS, Sampling(5, seed=100))
    expected = [[2 * i, 2 * i + 1, 2 * i, 100 + i, 2 * i, 100 + i, 2 * i] for i in range(11)]
    assert [ids.tolist() for ids in text] == expected


def test_an_interrupted_stage_goes_on_with_what_is_missing(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, CountingEngine())
    with pytest.raises(KeyboardInterrupt):
        write(broken, CountingEngine(fail_after=6))
    assert [p.name for p in sorted(broken.iterdir())] == ["settings.json", "shard-00000.safetensors"]
    engine = CountingEngine()
    write(broken, engine)
    assert engine.num_written == 7
    again = CountingEngine()
    write(broken, again)
    assert again.num_written == 0
    sampling = Sampling(5, seed=100)
    both = [torch.stack(load_text(path, "sha", PROMPTS, sampling)) for path in (broken, whole)]
    assert torch.equal(*both)


def test_ranks_share_the_shards(tmp_path):
    engines = [CountingEngine(), CountingEngine()]
    for rank in range(2):
        write(tmp_path, engines[rank], rank=rank, world_size=2)
    assert [engine.num_written for engine in engines] == [7, 4]
    assert torch.stack(load_text(tmp_path, "sha", PROMPTS, Sampling(5, seed=100))).shape == (11, 7)


def test_temperatures_take_turns(tmp_path):
    engine = CountingEngine()
    write(tmp_path, engine, Sampling(2, temperatures=(0.0, 0.7)))
    assert engine.temperatures == [0.0, 0.0, 0.7, 0.7, 0.0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": Sampling(5, temperatures=(1.0,), seed=100)}, "temperatures"),
        ({"sampling": Sampling(6, seed=100)}, "num_new_tokens"),
        ({"target": "other"}, "target_sha256"),
        ({"prompts": PROMPTS + 1}, "prompts_sha256"),
    ],
)
def test_text_made_with_other_settings_is_refused(tmp_path, change, named):
    write(tmp_path, CountingEngine())
    target, prompts = change.get("target", "sha"), change.get("prompts", PROMPTS)
    sampling = change.get("sampling", Sampling(5, seed=100))
    with pytest.raises(ValueError, match=f"another {named}"):
        continue_prompts(tmp_path, CountingEngine, target, prompts, sampling)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"another {named}"):
        load_text(tmp_path, target, prompts, sampling)


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("speedstack.train.core.trainer.save_file", full)
    with pytest.raises(
        OSError, match=r"cannot write .*shard-00000.safetensors: .*No space left.*; make room"
    ) as caught:
        write(tmp_path, CountingEngine())
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_missing_and_corrupt_shards_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no written text"):
        load_text(tmp_path, "sha", PROMPTS, Sampling(5, seed=100))
    write(tmp_path, CountingEngine())
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"shard-00001.*delete it"):
        load_text(tmp_path, "sha", PROMPTS, Sampling(5, seed=100))
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.*delete it"):
        load_text(tmp_path, "sha", PROMPTS, Sampling(5, seed=100))


def test_prompts_are_pieces_of_documents_and_a_function_of_the_keys():
    documents = datasets.Dataset.from_dict({"input_ids": [list(range(100)), [7, 8], list(range(1000, 1010))]})
    prompts = cut_prompts(documents, 40, 5, 3, 1)
    assert torch.equal(prompts, cut_prompts(documents, 40, 5, 3, 1))
    assert not torch.equal(prompts, cut_prompts(documents, 40, 5, 3, 2))
    assert {tuple(row) for row in prompts[::4].tolist()} <= {(99, 0, 1, 2, 3), (1009, 1000, 1001, 1002, 1003)}
    pieces = prompts[torch.arange(40) % 4 != 0]
    assert torch.equal(pieces - pieces[:, :1], torch.arange(5).expand(30, 5))
    assert pieces[:, 0].unique().numel() > 15
    with pytest.raises(ValueError, match="prompt_length = 100"):
        cut_prompts(documents, 4, 100, 0)
