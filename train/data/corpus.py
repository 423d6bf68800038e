"""A text corpus on disk: documents split into train and held-out, tokenized once into `datasets` Arrow sets.

The corpus of record is the running interpreter's standard library without its tests: real code, a few million tokens,
present on every machine. Documents are split whole. Its byte-level BPE tokenizer is trained on the training documents;
recipes that start from a model bring that model's. Left out: streaming and mixtures, whose resume is not exact.
"""

from __future__ import annotations

import json
import random
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from speedstack.eval.data.prepared_corpus import check_name, corpus_part, reads_alike
from speedstack.eval.data.rows import CORPUS_FILE
from speedstack.quant.checkpoint.tokenizer import load_tokenizer
from speedstack.support.digests import json_sha256
from speedstack.support.files import atomic_path
from speedstack.train.config.recipes import DataSection
from speedstack.train.data.documents import changed_file, describe_files, load_documents

_SOURCE_FILE = "source.json"
END_OF_TEXT, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"


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
    max_unusable_fraction: float = 0.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Corpus:
    """Tokenize `source`, as `load_documents` takes it, into the directory `path`, or load the corpus that is there.

    `vocab_size` is of the BPE tokenizer trained here, unless a model's `tokenizer` is given. `seed` splits documents;
    at least one is held out. `max_unusable_fraction` of the rows may lack text; they are skipped with a warning.

    Raises ValueError if `path` holds something else or a corpus of other settings, tokenizer or text, and for too
    little or unusable text; OSError if `path` cannot be written.
    """
    path = Path(path)
    settings: dict[str, Any] = {"source": source, "seed": seed, "heldout_fraction": heldout_fraction}
    if tokenizer is None:
        settings["vocab_size"] = vocab_size
    else:
        settings["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    if path.exists():
        return _load_matching(path, settings, tokenizer)
    check_name(path)
    files = describe_files(source)
    documents = load_documents(source, max_unusable_fraction)
    train_rows, heldout_rows = _split(documents, source, heldout_fraction, seed)
    if tokenizer is None:
        tokenizer = train_tokenizer((row["text"] for row in train_rows), vocab_size)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token to separate documents with: set its eos_token")

    with atomic_path(path) as partial:
        partial.mkdir()
        with quiet_datasets():
            for part, rows in (("heldout", heldout_rows), ("train", train_rows)):
                written = partial / "tokens.arrow"
                tokens = tokenize(rows, tokenizer, keep_text=part == "heldout", file=written)
                if not len(tokens):
                    raise ValueError(f"no {part} document of {source} has a token: give more text")
                tokens.save_to_disk(str(partial / part))
                written.unlink()
        tokenizer.save_pretrained(str(partial / "tokenizer"))
        if (changed := changed_file(source, files)) is not None:
            raise ValueError(f"{source} was changed while it was read ({changed}): start again")
        # Beside the settings, not among them: file times do not say what a corpus holds.
        (partial / _SOURCE_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
        # `vocab_size` stays the requested one, which little text does not always reach.
        settings |= {"num_tokens": len(tokenizer), "tokenizer_sha256": tokenizer_sha256(tokenizer)}
        (partial / CORPUS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return load_corpus(path)


def load_corpus(path: Path) -> Corpus:
    """The corpus that `prepare_corpus` wrote at `path`. Raises ValueError if it is missing or unreadable."""
    path = Path(path)
    if not (path / CORPUS_FILE).is_file():
        missing = "" if path.exists() else ", there is nothing"
        raise ValueError(f"{path} is not a prepared corpus{missing}: give one that `demo` or a training verb wrote")
    try:
        tokenizer = load_tokenizer(path / "tokenizer")
    except ValueError as error:
        raise ValueError(f"{error}: delete the corpus to prepare it again") from error
    return Corpus(path, tokenizer, corpus_part(path, "train"), corpus_part(path, "heldout"))


def corpus_for(data: DataSection, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
    """The corpus a config names, prepared if it does not exist yet. Raises as `prepare_corpus`."""
    return prepare_corpus(
        data.corpus,
        data.vocab_size,
        data.split_seed,
        source=data.source,
        heldout_fraction=data.heldout_fraction,
        max_unusable_fraction=data.max_unusable_fraction,
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


def _split(
    documents: datasets.Dataset, source: str, heldout_fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    if len(documents) < 2:
        raise ValueError(f"{source} has {len(documents)} documents; a train and a held-out split need at least 2")
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    num_heldout = min(len(order) - 1, max(1, round(len(order) * heldout_fraction)))
    return documents.select(order[num_heldout:]), documents.select(order[:num_heldout])


def tokenize(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, keep_text: bool, file: Path | None = None
) -> datasets.Dataset:
    """Columns `name`, `input_ids` (int32, ending in the separator) and, if kept, `text`; in `file` or in memory.

    Empty documents are left out, and special tokens spelled in the text are read as such; warnings count both. Raises
    ValueError for text that the tokenizer cannot read.
    """
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    empty: list[str] = []
    spelled: list[tuple[str, int]] = []

    def encode(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        kept: dict[str, list[Any]] = {column: [] for column in features}
        for name, text, ids in zip(rows["name"], rows["text"], _encode(tokenizer, rows), strict=True):
            if not ids:
                empty.append(name)
                continue
            if not special.isdisjoint(ids):
                spelled.append((name, next(token for token in ids if token in special)))
            row = {"name": name, "text": text, "input_ids": [*ids, tokenizer.eos_token_id]}
            for column, values in kept.items():
                values.append(row[column])
        return kept

    columns = {"name": datasets.Value("string")} | ({"text": datasets.Value("string")} if keep_text else {})
    features = datasets.Features({**columns, "input_ids": datasets.Sequence(datasets.Value("int32"))})
    tokens = documents.map(
        encode,
        batched=True,
        batch_size=256,
        features=features,
        remove_columns=documents.column_names,
        cache_file_name=None if file is None else str(file),
        # The fingerprint does not see every change of the tokenizer, so a cache entry could be stale.
        load_from_cache_file=False,
        new_fingerprint=uuid.uuid4().hex,
    )
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(documents)} documents are empty and left out, such as {empty[0]}", stacklevel=2
        )
    if spelled:
        name, token = spelled[0]
        warnings.warn(
            f"{len(spelled)} of {len(documents)} documents spell special tokens, such as {name} "
            f"{tokenizer.convert_ids_to_tokens(token)}: they are read as these tokens",
            stacklevel=2,
        )
    return tokens


def _encode(tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[str]]) -> list[list[int]]:
    try:
        return tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers has no narrower exception
        raise ValueError(
            f"the tokenizer cannot read a document from {rows['name'][0]} on: {' '.join(str(error).split())}"
        ) from error


def _load_matching(path: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Corpus:
    if not (path / CORPUS_FILE).is_file():
        raise ValueError(f"{path} is not a prepared corpus: choose a path that does not exist yet as data.corpus")
    corpus = load_corpus(path)
    stored = _read_object(path / CORPUS_FILE)
    way_out = "choose another data.corpus or delete it"
    different = [
        f"{key} {stored.get(key)} instead of {value}" for key, value in settings.items() if stored.get(key) != value
    ]
    if different:
        raise ValueError(f"{path} is a corpus with {', '.join(different)}: {way_out}")
    if tokenizer is not None and not (
        reads_alike(corpus.heldout, tokenizer) and corpus.heldout[0]["input_ids"][-1] == tokenizer.eos_token_id
    ):
        raise ValueError(f"{path} is a corpus of a tokenizer that reads text differently: {way_out}")
    described = _read_object(path / _SOURCE_FILE).get("files") if (path / _SOURCE_FILE).exists() else None
    if (changed := changed_file(settings["source"], described)) is not None:
        raise ValueError(f"{settings['source']} has changed since {path} was made of it ({changed}): {way_out}")
    return corpus


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a corpus file. Raises ValueError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is missing or corrupt ({error}): delete the corpus to prepare it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object: delete the corpus to prepare it again")
    return value


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    return json_sha256(sorted(tokenizer.get_vocab().items()))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets`; the caller's bar covers the whole stage."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
