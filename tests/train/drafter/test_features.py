"""Features on disk: rows by window, resumed shard by shard, refused when they are somebody else's."""

from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from speedstack.train.drafter import features
from speedstack.train.drafter.features import (
    FeatureSettings,
    StoredFeatures,
    window_keys,
    windows_sha256,
    write_features,
)

IDS = torch.arange(44, dtype=torch.int64).reshape(11, 4)
SETTINGS = FeatureSettings("sha", (0, 2), False, windows_sha256(IDS), "float32", "float32")


class Compute:
    """Features [n, T, 3] that say which token they are of; counts windows."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.num_windows, self.fail_after = 0, fail_after

    def __call__(self, ids_NT: torch.Tensor) -> torch.Tensor:
        if self.num_windows >= self.fail_after:
            raise KeyboardInterrupt
        self.num_windows += len(ids_NT)
        return ids_NT[..., None] + torch.tensor([0.0, 0.25, 0.5])


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "WINDOWS_A_SHARD", 4)


def test_each_window_finds_its_row(tmp_path):
    write_features(tmp_path, IDS, SETTINGS, Compute())
    stored = StoredFeatures(tmp_path, IDS, SETTINGS)
    assert len(stored) == 11 and set(stored) == set(window_keys(IDS))
    for ids_T, key in zip(IDS, window_keys(IDS), strict=True):
        assert torch.equal(stored[key], Compute()(ids_T[None])[0])


def test_a_window_of_one_document_has_the_key_of_its_tokens():
    """Text that was never cut into documents keeps its keys and its digest, whether its documents are given or not."""
    keys = window_keys(IDS)
    assert window_keys(IDS, torch.zeros_like(IDS)) == window_keys(IDS, torch.full_like(IDS, 3)) == keys
    assert windows_sha256(IDS, torch.zeros_like(IDS)) == windows_sha256(IDS)
    documents = torch.zeros_like(IDS)
    documents[1, 2:], documents[2, 3:], documents[3, 3:] = 1, 1, -1  # two documents, another cut, padding
    mixed = window_keys(IDS[:1].expand_as(IDS), documents)
    assert len(set(mixed[:4])) == 4 and mixed[0] == mixed[4] == keys[0]
    assert windows_sha256(IDS, documents) != windows_sha256(IDS)


def test_an_interrupted_stage_computes_what_is_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path, IDS, SETTINGS, Compute(fail_after=8))
    counts: list[int] = []
    compute = Compute()
    write_features(tmp_path, IDS, SETTINGS, compute, on_progress=counts.append)
    assert compute.num_windows == 3 and counts == [4, 8, 11]
    assert not list(tmp_path.glob("*.part"))


def test_ranks_share_the_shards(tmp_path):
    both = Compute(), Compute()
    for rank, compute in enumerate(both):
        write_features(tmp_path, IDS, SETTINGS, compute, rank=rank, world_size=2)
    assert [compute.num_windows for compute in both] == [7, 4]
    assert len(StoredFeatures(tmp_path, IDS, SETTINGS)) == 11


def test_stored_in_half_the_bytes(tmp_path):
    settings = replace(SETTINGS, dtype="bfloat16")
    write_features(tmp_path, IDS, settings, Compute())
    row = StoredFeatures(tmp_path, IDS, settings)[window_keys(IDS)[3]]
    assert row.dtype == torch.bfloat16 and torch.equal(row, Compute()(IDS[3:4])[0].bfloat16())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_sha256", "other"),
        ("target_layer_ids", (0, 1)),
        ("windows_sha256", windows_sha256(IDS[:, :3])),
        ("dtype", "bfloat16"),
        ("target_dtype", "bfloat16"),
        ("with_final", True),
    ],
)
def test_another_targets_features_are_refused(tmp_path, name, value):
    write_features(tmp_path, IDS, SETTINGS, Compute())
    other = replace(SETTINGS, **{name: value})
    for refused in (
        lambda: write_features(tmp_path, IDS, other, Compute()),
        lambda: StoredFeatures(tmp_path, IDS, other),
    ):
        with pytest.raises(ValueError, match=f"another {name}"):
            refused()


def test_missing_and_corrupt_shards_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no features"):
        StoredFeatures(tmp_path, IDS, SETTINGS)
    write_features(tmp_path, IDS, SETTINGS, Compute())
    shard = tmp_path / "features-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"features-00001.*delete it"):
        StoredFeatures(tmp_path, IDS, SETTINGS)
    shard.unlink()
    with pytest.raises(ValueError, match=r"features-00001.*delete it"):
        StoredFeatures(tmp_path, IDS, SETTINGS)


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("speedstack.train.core.trainer.save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*features-00000.safetensors: .*No space left.*; make room"):
        write_features(tmp_path, IDS, SETTINGS, Compute())
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]
