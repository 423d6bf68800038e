"""A text corpus on disk: documents split into train and held-out, tokenized once into `datasets` Arrow sets.

The corpus of record is the standard library of the running interpreter without its tests: real code, a few million
tokens, and present wherever this package runs. Documents are split whole, so held-out text is never seen in training.
With it comes the tokenizer, a byte-level BPE trained on the training documents. Other text (files, or a dataset of the
Hugging Face Hub) goes the same way; recipes that start from a model bring that model's tokenizer. Left out: streaming
and mixtures of datasets, whose resume is not exact.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from speedstack.train.config import DataSection

END_OF_TEXT, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"

# Directories of tests and of foreign packages; the modules of `encodings` are tables of characters, not code.
_SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
_MIN_DOCUMENT_CHARACTERS = 200
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus. Columns: `name`; `input_ids` (int32, closed by the separator); held-out has `text` too."""

    path: Path
    tokenizer: PreTrainedTokenizerBase
    train: datasets.Dataset
    heldout: datasets.Dataset


def prepare_corpus(
    path: Path,
    vocab_size: int = 4096,
    seed: int = 0,
    *,
    source: str = "stdlib",
    heldout_fraction: float = 0.05,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """Tokenize `source` into the directory `path`; a corpus that is already there is loaded.

    Args:
        path: Corpus directory; it appears complete or not at all.
        vocab_size: Size of the BPE tokenizer trained here; ignored when `tokenizer` is given.
        seed: Seed of the split into training and held-out documents.
        source: "stdlib", a .jsonl, .parquet or .txt file (of text: one document), a directory of such files, or a name
            on the Hugging Face Hub.
        heldout_fraction: Fraction of the documents, at least one, kept for evaluation.
        tokenizer: Tokenizer of the model that will read the corpus.

    Raises:
        ValueError: `path` holds a corpus with other settings or something else, or the source has no usable text.
        OSError: `path` cannot be written.
    """
    path = Path(path)
    settings: dict[str, Any] = {"source": source, "seed": seed, "heldout_fraction": heldout_fraction}
    if tokenizer is None:
        settings["vocab_size"] = vocab_size
    else:
        settings["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    if path.exists():
        return _load_matching(path, settings)

    train_rows, heldout_rows = _split(load_documents(source), heldout_fraction, seed)
    if tokenizer is None:
        tokenizer = train_tokenizer((row["text"] for row in train_rows), vocab_size)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to separate documents with: set its eos_token")

    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}-*.partial"):  # of a process that was killed here
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent))
    try:
        with quiet_datasets():
            tokenize(heldout_rows, tokenizer, keep_text=True).save_to_disk(str(temporary / "heldout"))
            tokenize(train_rows, tokenizer, keep_text=False).save_to_disk(str(temporary / "train"))
        tokenizer.save_pretrained(str(temporary / "tokenizer"))
        # `vocab_size` stays what was asked for, which little text does not always reach.
        settings |= {"num_tokens": len(tokenizer), "tokenizer_sha256": tokenizer_sha256(tokenizer)}
        (temporary / "corpus.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_corpus(path)


def load_corpus(path: Path) -> Corpus:
    """The corpus that `prepare_corpus` wrote at `path`.

    Raises ValueError, one line, where there is none, and for a file of it that cannot be read.
    """
    path = Path(path)
    if not (path / "corpus.json").is_file():
        raise ValueError(f"{path} is not a prepared corpus: choose a path that does not exist yet as data.corpus")
    return Corpus(
        path=path,
        tokenizer=_load_tokenizer(path / "tokenizer"),
        train=datasets.load_from_disk(str(path / "train")),
        heldout=datasets.load_from_disk(str(path / "heldout")),
    )


def corpus_for(data: DataSection, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """The corpus a config names, prepared if it does not exist yet. Raises as `prepare_corpus`."""
    return prepare_corpus(
        data.corpus,
        data.vocab_size,
        data.split_seed,
        source=data.source,
        heldout_fraction=data.heldout_fraction,
        tokenizer=tokenizer,
    )


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: ids 0, 1 and 2 are end of text (also the first token), padding and mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK,
        # Byte-level text is decoded as it was; the default would drop blanks before punctuation.
        clean_up_tokenization_spaces=False,
    )


def load_documents(source: str) -> datasets.Dataset:
    """Columns `name` and `text` of the documents, in an order that depends on nothing but the source.

    `source` is as in `prepare_corpus`. Raises ValueError for one that is neither files nor a dataset that can be
    fetched, and for one without text.
    """
    if source == "stdlib":
        pairs = list(_standard_library())
        return datasets.Dataset.from_dict({"name": [name for name, _ in pairs], "text": [text for _, text in pairs]})
    loaded = load_table(source)
    if "text" not in loaded.column_names:
        raise ValueError(f"source {source} has no column 'text'; its columns are {', '.join(loaded.column_names)}")
    names = [f"{Path(source).name}/{index}" for index in range(len(loaded))]
    return loaded.select_columns(["text"]).add_column("name", names)


def load_table(source: str, split: str = "train") -> datasets.Dataset:
    """All columns of a .jsonl, .parquet or .txt file, a directory of such files, or a split of a dataset of the Hub.

    Raises ValueError for a source that is neither files of one kind nor a dataset that can be fetched.
    """
    place = Path(source)
    if place.exists():
        files = sorted(file for file in ([place] if place.is_file() else place.rglob("*")) if file.suffix in _FORMATS)
        # A README.txt beside the data is not data.
        files = [file for file in files if file.suffix != ".txt"] or files
        formats = {_FORMATS[file.suffix] for file in files}
        if len(formats) != 1:
            raise ValueError(
                f"source {source}: expected .jsonl, .parquet or .txt files of one kind, found {len(files)}"
            )
        kind = formats.pop()
        options = {"sample_by": "document"} if kind == "text" else {}
        return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    if place.suffix in _FORMATS or source.startswith(("/", "./", "../", "~")):
        raise ValueError(f"there is no file or directory {source}")  # nor will the Hub have it, after many retries
    try:
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"source {source} is neither a file nor a dataset that can be fetched: {reason}") from error


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        relative = file.relative_to(root)
        if _SKIPPED_DIRECTORIES.intersection(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            warnings.warn(f"left {file} out of the corpus: {error}", stacklevel=2)
            continue
        if len(text) >= _MIN_DOCUMENT_CHARACTERS:
            yield relative.as_posix(), text


def _split(
    documents: datasets.Dataset, heldout_fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    if len(documents) < 2:
        raise ValueError(f"the corpus has {len(documents)} documents; a train and a held-out split need at least 2")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    num_heldout = min(len(order) - 1, max(1, round(len(order) * heldout_fraction)))
    return documents.select(order[num_heldout:]), documents.select(order[:num_heldout])


def tokenize(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, keep_text: bool) -> datasets.Dataset:
    """Columns `name` and `input_ids` (int32), and `text` if it is kept; each document is closed by the separator."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded]}

    columns = {"name": datasets.Value("string")} | ({"text": datasets.Value("string")} if keep_text else {})
    features = datasets.Features({**columns, "input_ids": datasets.Sequence(datasets.Value("int32"))})
    return documents.map(
        encode,
        batched=True,
        batch_size=256,
        features=features,
        remove_columns=[] if keep_text else ["text"],
        # A stale cache entry would outlive a change of the tokenizer that its fingerprint does not see.
        load_from_cache_file=False,
    )


def _load_matching(path: Path, settings: dict[str, Any]) -> Corpus:
    corpus = load_corpus(path)
    stored = _read_object(path / "corpus.json")
    different = [
        f"{key} {stored.get(key)} instead of {value}" for key, value in settings.items() if stored.get(key) != value
    ]
    if different:
        raise ValueError(f"{path} is a corpus with {', '.join(different)}: choose another data.corpus or delete it")
    return corpus


def _load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    _read_object(path / "tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(str(path))


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a prepared corpus. Raises ValueError that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is missing or corrupt ({error}): delete the corpus to prepare it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object: delete the corpus to prepare it again")
    return value


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`: the caller's own bar stands for the whole stage."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
