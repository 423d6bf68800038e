"""Calibration windows: seeded, of training text only, from every kind of source."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from speedstack.train.core.batches import PackedWindows
from speedstack.train.data.calibration import calibration_windows
from speedstack.train.data.corpus import load_corpus

LINES = [f"line {number} of a text that nobody else has\n" for number in range(400)]


@pytest.fixture(scope="module")
def tokenizer(corpus_path: Path) -> PreTrainedTokenizerBase:
    return load_corpus(corpus_path).tokenizer


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """One document in a .txt file."""
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


def test_a_corpus_gives_its_training_part(corpus_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    windows_NT = calibration_windows(str(corpus_path), tokenizer, 5, 32, seed=3)
    assert windows_NT.shape == (5, 32) and windows_NT.dtype == torch.int64
    assert torch.equal(windows_NT, PackedWindows(load_corpus(corpus_path).train, 32).examples(3, range(5)))
    assert torch.equal(windows_NT, calibration_windows(str(corpus_path), tokenizer, 5, 32, seed=3))
    assert not torch.equal(windows_NT, calibration_windows(str(corpus_path), tokenizer, 5, 32, seed=4))


def test_a_text_file(text_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    windows_NT = calibration_windows(str(text_file), tokenizer, 8, 64, seed=0)
    for ids_T in windows_NT:
        # The middle of a window; at its ends a token may be half a character of a line's number.
        assert str(tokenizer.decode(ids_T[8:-8])) in "".join(LINES) * 2 or tokenizer.eos_token_id in ids_T
    assert len(set(map(tuple, windows_NT.tolist()))) == 8


def test_documents_come_in_a_seeded_order_and_no_more_than_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "sorted.jsonl"
    rows = [json.dumps({"text": f"alpha = {number}\n" * 20}) for number in range(1000)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    sources = []
    for seed in (0, 1):
        text = str(tokenizer.decode(calibration_windows(str(path), tokenizer, 4, 64, seed=seed).flatten()))
        numbers = {int(number) for number in re.findall(r"alpha = (\d+)\n", text)}
        sources.append(numbers)
        assert max(numbers) > 100, "the head of the file only"
    assert sources[0] != sources[1]


def test_refusals(corpus_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d+ windows of 64 tokens, fewer than the 1000 asked for"):
        calibration_windows(str(corpus_path), tokenizer, 1000, 64, seed=0)
    with pytest.raises(ValueError, match="fewer than one window"):
        calibration_windows(str(text_file), tokenizer, 1, 100_000, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no \.jsonl, \.json, \.parquet or \.txt file"):
        calibration_windows(str(tmp_path / "empty"), tokenizer, 1, 8, seed=0)
    with pytest.raises(ValueError, match="there is no file or directory"):
        calibration_windows(str(tmp_path / "nowhere.jsonl"), tokenizer, 1, 8, seed=0)


def test_another_tokenizer_is_refused(corpus_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="tokenized with another tokenizer"):
        calibration_windows(str(corpus_path), tiny_tokenizer, 1, 8, seed=0)


def test_a_readme_beside_the_data_is_not_data(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "README.txt").write_text("about this data " * 100, encoding="utf-8")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "value = 1\n" * 200}) + "\n", encoding="utf-8")
    windows_NT = calibration_windows(str(tmp_path), tokenizer, 2, 32, seed=0)
    assert "about" not in tokenizer.decode(windows_NT.flatten())
