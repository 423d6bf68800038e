"""Calibration windows: a small, seeded sample of training text for post-training quantization.

A prepared corpus gives its training part, never the held-out part that judges the result. Other text is tokenized here,
as much as the sample needs, in a seeded order of the documents, because a data set may be sorted by topic.
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

    `source`: a prepared corpus, or what `load_documents` takes. Raises ValueError for a source that is missing or too
    short for that many different windows, and for a corpus of another tokenizer.
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
    """Tokenized documents in a seeded order: `_SPREAD` times the sample, or all there are."""
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
