import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from speedstack.train.data.corpus import load_corpus, prepare_corpus
from speedstack.train.data.documents import load_documents


def test_split_is_by_document_and_complete(corpus_path: Path) -> None:
    corpus = load_corpus(corpus_path)
    train, heldout = set(corpus.train["name"]), set(corpus.heldout["name"])
    assert not train & heldout
    assert (len(train), len(heldout)) == (24, 6)


def test_tokens_decode_to_the_text_and_end_with_the_separator(corpus_path: Path) -> None:
    corpus = load_corpus(corpus_path)
    row = corpus.heldout[0]
    assert row["input_ids"][-1] == corpus.tokenizer.eos_token_id == 0
    assert corpus.tokenizer.decode(row["input_ids"][:-1]) == row["text"]
    special = (corpus.tokenizer.pad_token_id, corpus.tokenizer.mask_token_id, corpus.tokenizer.bos_token_id)
    assert special == (1, 2, 0)


def test_byte_level_tokenizer_round_trips_any_text(corpus_path: Path) -> None:
    tokenizer = load_corpus(corpus_path).tokenizer
    for text in ("\x00\t \n", "na\u00efve \u2603 .", "a , b ?  c", "\U0001f600"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_preparing_again_loads_and_other_settings_are_refused(corpus_path: Path) -> None:
    source = str(corpus_path.parent / "source.jsonl")
    written = (corpus_path / "corpus.json").stat().st_mtime_ns
    again = prepare_corpus(corpus_path, 300, source=source, heldout_fraction=0.2)
    assert (corpus_path / "corpus.json").stat().st_mtime_ns == written
    prepare_corpus(corpus_path, 9999, source=source, heldout_fraction=0.2, tokenizer=again.tokenizer)
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        prepare_corpus(corpus_path, 300, 1, source=source, heldout_fraction=0.2)
    with pytest.raises(ValueError, match="vocab_size 300 instead of 301"):
        prepare_corpus(corpus_path, 301, source=source, heldout_fraction=0.2)


def test_a_vocabulary_the_text_cannot_fill_is_no_other_corpus(corpus_path: Path, tmp_path: Path) -> None:
    source = str(corpus_path.parent / "source.jsonl")
    first = prepare_corpus(tmp_path / "corpus", 4096, source=source)
    assert len(first.tokenizer) < 4096
    assert json.loads((first.path / "corpus.json").read_text())["num_tokens"] == len(first.tokenizer)
    again = prepare_corpus(tmp_path / "corpus", 4096, source=source)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()


@pytest.mark.parametrize("content", ['{"source": ', "[]", None])
@pytest.mark.parametrize("name", ["corpus.json", "tokenizer/tokenizer.json"])
def test_corrupt_files_are_named_in_one_line(corpus_path: Path, tmp_path: Path, name: str, content: str | None) -> None:
    path = tmp_path / "corpus"
    shutil.copytree(corpus_path, path)
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"corpus.*{Path(name).name if content else 'corpus'}") as caught:
        prepare_corpus(path, 300, source=str(corpus_path.parent / "source.jsonl"), heldout_fraction=0.2)
    assert "\n" not in str(caught.value)


def test_what_a_killed_process_left_is_removed(corpus_path: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    code = (
        "import os, signal, sys, pathlib, speedstack.train.data.corpus as corpus\n"
        "corpus.tokenize = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "corpus.prepare_corpus(pathlib.Path(sys.argv[1]), 300, source=sys.argv[2])\n"
    )
    source = str(corpus_path.parent / "source.jsonl")
    command = [sys.executable, "-c", code, str(directory / "corpus"), source]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert [path.name for path in directory.iterdir()] != []
    prepare_corpus(directory / "corpus", 300, source=source)
    assert [path.name for path in directory.iterdir()] == ["corpus"]


def test_the_same_source_gives_the_same_corpus(corpus_path: Path, tmp_path: Path) -> None:
    source = str(corpus_path.parent / "source.jsonl")
    other = prepare_corpus(tmp_path / "other", 300, source=source, heldout_fraction=0.2)
    assert other.train["input_ids"][:] == load_corpus(corpus_path).train["input_ids"][:]


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text(json.dumps({"body": "x"}) + "\n")
    with pytest.raises(ValueError, match="line 1: no field 'text'; its fields are body"):
        prepare_corpus(tmp_path / "corpus", source=str(source))
    source.write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(ValueError, match="1 documents"):
        prepare_corpus(tmp_path / "corpus", source=str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_directory_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a prepared corpus: choose a path that does not exist yet"):
        prepare_corpus(tmp_path)
    # Who reads one is not told to name a path where nothing is.
    with pytest.raises(ValueError, match="is not a prepared corpus: give one that"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="is not a prepared corpus, there is nothing: give one that"):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no \.jsonl, \.json, \.parquet or \.txt file"):
        prepare_corpus(tmp_path / "new", source=str(tmp_path / "empty"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "/nowhere/at/all", "./nowhere"])
def test_a_file_that_is_missing_is_not_asked_for_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=f"there is no file or directory {source}"):
        load_documents(source)


def test_the_standard_library_is_found_without_its_tests() -> None:
    names = set(load_documents("stdlib")["name"])
    assert {"argparse.py", "asyncio/base_events.py"} <= names
    assert not any({"test", "site-packages"} & set(Path(name).parts) for name in names)
