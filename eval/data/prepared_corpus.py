"""A prepared corpus on disk, for its readers; `train` writes it.

corpus.json   settings it was made with
train/ heldout/   `datasets` sets with a column `input_ids` whose documents end in the separator; held-out has `text`
tokenizer/    the tokenizer it was made with
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import datasets
from transformers import PreTrainedTokenizerBase

_NUM_COMPARED, _MAX_COMPARED_CHARACTERS = 8, 200_000


def corpus_part(
    corpus: Path, part: Literal["train", "heldout"], columns: Sequence[str] = ("input_ids",)
) -> datasets.Dataset:
    """One part's documents with `columns`. Raises ValueError for an unreadable or unprepared directory."""
    directory = corpus / part
    if not directory.is_dir():
        raise ValueError(
            f"{corpus} is not a prepared corpus: it has no {'held-out' if part == 'heldout' else part} part"
        )
    check_name(corpus)
    try:
        documents = datasets.load_from_disk(str(directory))
    # `datasets`, which trusts keys and types in its JSON, and pyarrow raise these.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory} is damaged ({' '.join(str(error).split())}): delete the corpus to prepare it again"
        ) from error
    if not isinstance(documents, datasets.Dataset) or not set(columns) <= set(documents.column_names) or not documents:
        raise ValueError(
            f"{directory} has no documents with {' and '.join(columns)}: delete the corpus to prepare it again"
        )
    return documents


def check_name(corpus: Path) -> None:
    """Raise ValueError for a path that `datasets` would misread."""
    if "::" in str(corpus):
        raise ValueError(f"the path {corpus} has '::' in it, which `datasets` takes for two paths: choose another one")


def reads_alike(heldout: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `tokenizer` reproduces the ids of the first held-out texts of moderate length.

    Equal vocabularies are not enough, because merges and word splitting matter too.
    """
    return all(
        len(row["text"]) > _MAX_COMPARED_CHARACTERS
        or tokenizer.encode(row["text"], add_special_tokens=False, verbose=False) == row["input_ids"][:-1]
        for row in heldout.select(range(min(_NUM_COMPARED, len(heldout))))
    )
