"""Data sets of tasks from local files, whatever the names of the directories."""

import json
from pathlib import Path

import datasets
import pytest

from speedstack.eval.data.local_data import local_data
from speedstack.eval.lm_eval.task_loading import _our_config


def put(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["data[1]", "da*ta?", "~ data"])
def test_a_directory_is_no_pattern(name: str, tmp_path: Path) -> None:
    for place in (name, "data1", "data"):
        put(tmp_path / place / "made" / "up" / "default" / "test.jsonl", json.dumps({"q": place}) + "\n")
        put(tmp_path / place / "next_line.jsonl", json.dumps({"q": place}) + "\n")
    with local_data(tmp_path / name):
        assert datasets.load_dataset("made/up")["test"]["q"][:] == [name]
    config = _our_config("next_line", tmp_path / name)
    found = datasets.load_dataset(config["dataset_path"], split="test", **config["dataset_kwargs"])
    assert found["q"][:] == [name]


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    file = put(tmp_path / "made" / "up" / "default" / "test.jsonl", '{"q": 1}\n{"q": \n')
    with local_data(tmp_path), pytest.raises(ValueError, match=f"cannot read {file}: ") as error:
        datasets.load_dataset("made/up")
    assert "\n" not in str(error.value)
