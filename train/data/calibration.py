"""Calibration windows: a small, seeded sample of training text, as post-training quantization wants it.

From a prepared corpus the training part is taken, never the held-out one, on which the result will be judged. Other
text (a file, a dataset of the Hub) is tokenized here, only as much of it as the sample needs, and in a seeded order of
the documents, so that a data set sorted by topic gives no one-sided sample.
"""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from speedstack.eval.data.prepared_corpus import reads_alike
from speedstack.train.core.batches import PackedWindows
from speedstack.train.data.corpus import load_corpus, quiet_datasets, tokenize
from speedstack.train.data.documents import load_documents

# Documents and tokens drawn for each that is used, so that a sample comes from many documents.
_SPREAD = 4


def calibration_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    sequence_length: int,
    seed: int,
    max_unusable_fraction: float = 0.0,
) -> torch.Tensor:
    """Token ids, int64 [num_windows, sequence_length], a function of the arguments alone.

    `source` is the directory of a prepared corpus, or any source that `load_documents` takes, of whose rows
    `max_unusable_fraction` may have no text.

    Raises ValueError for a source that does not exist or has no text, for a corpus of another tokenizer, and for text
    too short for that many different windows.
    """
    if (Path(source) / "corpus.json").is_file():
        corpus = load_corpus(Path(source))
        if corpus.tokenizer.get_vocab() != tokenizer.get_vocab() or not reads_alike(corpus.heldout, tokenizer):
            raise ValueError(
                f"the corpus {source} was tokenized with another tokenizer than the model's: give the text itself"
            )
        documents = corpus.train
    else:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token to separate documents with: set its eos_token")
        documents = _sample(
            load_documents(source, max_unusable_fraction), tokenizer, num_windows, sequence_length, seed
        )
    windows = PackedWindows(documents, sequence_length)
    if len(windows) < num_windows:
        raise ValueError(
            f"{source} has {len(windows)} windows of {sequence_length} tokens, fewer than the {num_windows} asked for: "
            "lower the number or the length, or give more text"
        )
    return windows.examples(seed, range(num_windows))


def _sample(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, num_windows: int, sequence_length: int, seed: int
) -> datasets.Dataset:
    """Tokenized documents in a seeded order, as many as `_SPREAD` asks for or as there are."""
    documents = documents.shuffle(seed=seed)
    num_wanted = _SPREAD * num_windows
    chunks: list[datasets.Dataset] = []
    num_tokens = 0
    with quiet_datasets():
        for start in range(0, len(documents), num_wanted):
            chunk = documents.select(range(start, min(start + num_wanted, len(documents))))
            chunks.append(tokenize(chunk, tokenizer, keep_text=False))
            num_tokens += sum(map(len, chunks[-1]["input_ids"]))
            if num_tokens >= num_wanted * sequence_length:
                break
    return datasets.concatenate_datasets(chunks) if chunks else documents
