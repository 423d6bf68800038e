"""Where a model is written: places that are refused, links, several writers at once, and what killed ones leave."""

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedstack.quant.checkpoint import convert
from speedstack.quant.checkpoint.directory import new_directory


def write(directory: Path, content: str) -> None:
    (directory / "config.json").write_text('{"model_type": "mixtral"}')
    (directory / content).write_text(content)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    """Each fills a directory of its own; the one that ends later is there, whole."""
    out = tmp_path / "model"
    with new_directory(out) as first:
        write(first, "first")
        with new_directory(out) as second:
            write(second, "second")
            assert names(first) == ["config.json", "first"]
        assert names(out) == ["config.json", "second"]
    assert names(out) == ["config.json", "first"]
    assert names(tmp_path) == ["model"]


def test_many_writers_at_once(tmp_path: Path) -> None:
    out = tmp_path / "model"
    errors: list[Exception] = []

    def work(writer: int) -> None:
        try:
            for turn in range(25):
                with new_directory(out) as directory:
                    write(directory, f"{writer}-{turn}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(out)[1] == "config.json" and len(names(out)) == 2
    assert names(tmp_path) == ["model"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = {digit: tmp_path / f".model-{digit * 32}.partial" for digit in "01"}
    for directory in left.values():
        (directory / "model").mkdir(parents=True)
        (directory / "model" / "0.shard").touch()
    handle = os.open(left["1"], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with new_directory(tmp_path / "model") as directory:
        write(directory, "new")
    os.close(handle)
    assert names(tmp_path) == [left["1"].name, "model"]


def test_a_writer_is_not_taken_for_dead(tmp_path: Path) -> None:
    with new_directory(tmp_path / "model") as first:
        os.utime(first, (time.time() - 3600,) * 2)
        write(first, "first")
        os.utime(first, (time.time() - 3600,) * 2)
        with new_directory(tmp_path / "model") as second:
            write(second, "second")
    assert names(tmp_path / "model") == ["config.json", "first"]


def test_links(packed: Path, tmp_path: Path, refuses: Callable[..., Any]) -> None:
    """A link stays a link: what it names is replaced, or made."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    for target in ("mimo", "gguf"):
        convert(packed, target, tmp_path / "out")
        assert (tmp_path / "out").is_symlink() and not (tmp_path / "disk" / "model").is_symlink()
        assert ("experts.gguf" in names(tmp_path / "disk" / "model")) == (target == "gguf")
    assert names(tmp_path / "disk") == ["model"]
    (tmp_path / "self").symlink_to(packed)
    refuses(packed, "mimo", "is or holds .*, from which the result is made", tmp_path / "self")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refuses(packed, "mimo", "loop is a link that leads nowhere", tmp_path / "loop")
    (tmp_path / "file").symlink_to(packed / "config.json")
    refuses(packed, "mimo", "exists and is not a model directory", tmp_path / "file")


def test_permissions_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with new_directory(tmp_path / "model") as directory:
        write(directory, "a")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("target", ["mimo", "plain"])
def test_a_source_that_breaks_while_it_is_read(target: str, packed: Path, tmp_path: Path) -> None:
    """It is the source that is named, not the place of the result, and nothing is left there."""
    source = packed / "model.safetensors"

    def cut(done: int, total: int) -> None:
        if done == 1:
            with source.open("r+b") as file:
                file.truncate(source.stat().st_size // 4)

    with pytest.raises(OSError, match=rf"^cannot read model\..* of {packed}: ") as caught:
        convert(packed, target, tmp_path / "out", on_progress=cut)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["packed"]


def test_a_side_file_that_cannot_be_read(packed: Path, tmp_path: Path) -> None:
    (packed / "LICENSE").symlink_to(packed / "gone")
    with pytest.raises(OSError, match=r"^cannot read .*LICENSE: No such file"):
        convert(packed, "mimo", tmp_path / "out")
    assert names(tmp_path) == ["packed"]
