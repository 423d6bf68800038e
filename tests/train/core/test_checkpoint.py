from pathlib import Path
from threading import Event

import pytest

from speedstack.train.core.checkpoint import COMPLETE, CheckpointStore


def store_at(path: Path, num_kept: int = 2, world_size: int = 1, config_hash: str = "a") -> CheckpointStore:
    return CheckpointStore(path, num_kept=num_kept, world_size=world_size, config_hash=config_hash)


def save(store: CheckpointStore, step: int) -> None:
    def write(directory: Path) -> None:
        (directory / "sub").mkdir()
        (directory / "sub" / "weights").write_bytes(bytes([step]) * 100)

    store.save(step, {"step": step}, write)
    store.wait()


def test_newest_complete_checkpoint_wins_and_old_ones_go(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    assert store.newest() is None
    for step in (2, 10, 4):
        save(store, step)
    assert store.steps() == [10, 4]
    manifest = store.newest()
    assert manifest is not None
    assert (manifest.step, manifest.state, manifest.files["sub/weights"]["bytes"]) == (10, {"step": 10}, 100)
    save(store, 12)
    assert store.steps() == [12, 10]


@pytest.mark.parametrize("damage", ["no manifest", "cut manifest", "cut file", "flipped bit", "file gone"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    store = store_at(tmp_path)
    save(store, 1)
    save(store, 2)
    path = store.path(2)
    weights, manifest = path / "sub" / "weights", path / COMPLETE
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "cut manifest":
        manifest.write_text(manifest.read_text()[:-30])
    elif damage == "cut file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "flipped bit":
        weights.write_bytes(b"\x03" + weights.read_bytes()[1:])
    else:
        weights.unlink()
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    save(store, 2)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 2, "the damaged one is replaced"


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    for step in (1, 2):
        save(store, step)
    store.path(3).mkdir()
    save(store, 4)
    assert [step for step in store.steps() if (store.path(step) / COMPLETE).exists()] == [4, 2]


def test_other_configuration_or_number_of_processes_is_refused(tmp_path: Path) -> None:
    save(store_at(tmp_path), 1)
    with pytest.raises(ValueError, match="written by another configuration"):
        store_at(tmp_path, config_hash="b").newest()
    with pytest.raises(ValueError, match="written by 1 processes, this run has 2"):
        store_at(tmp_path, world_size=2).newest()


def test_a_failed_save_is_reported_and_leaves_the_older_one(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    save(store, 1)

    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    store.save(2, {}, write)
    with pytest.raises(OSError, match="step-2: No space left on device; step 1 is complete"):
        store.wait()
    store.wait()
    with pytest.warns(UserWarning, match="incomplete"):
        newest = store.newest()
    assert newest is not None
    assert newest.step == 1


def test_save_overlaps_with_the_caller(tmp_path: Path) -> None:
    release, store = Event(), store_at(tmp_path)

    def write(directory: Path) -> None:
        assert release.wait(10)
        (directory / "weights").write_bytes(b"x")

    store.save(1, {}, write)
    assert not (store.path(1) / COMPLETE).exists(), "save has returned before the files are there"
    release.set()
    store.wait()
    assert store.newest() is not None
