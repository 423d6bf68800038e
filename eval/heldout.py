"""Held-out windows of a prepared corpus, as the token ids of a model that is to be measured on them.

A corpus is `train`'s to write; what is known of it here is its directory: `heldout`, a `datasets` set with a column
`input_ids` whose documents end in the separator, and `tokenizer`. Ids of another tokenizer are numbers without meaning
to the model, so they are refused even where its embedding is large enough for them.
"""

from pathlib import Path

import datasets
from transformers import AutoTokenizer

from speedstack.eval.quality import heldout_windows
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import checkpoint_directory


def corpus_windows(corpus: str | Path, model: str | Path, window: int, num_tokens: int) -> list[list[int]]:
    """Windows of at most `window` ids of the held-out part of the directory `corpus`, `num_tokens` predicted in all.

    Raises ValueError for a directory that is no prepared corpus, for one of another tokenizer than that of the model
    directory `model`, for windows that the model has no positions for, and as `heldout_windows` does.
    """
    corpus, model = Path(corpus), checkpoint_directory(model)
    if not (corpus / "heldout").is_dir():
        raise ValueError(f"{corpus} is not a prepared corpus: it has no held-out part")
    config = read_config(model)[0].get_text_config()
    max_window = getattr(config, "max_position_embeddings", None)
    if max_window is not None and window > max_window:
        raise ValueError(f"a window of {window} tokens exceeds the {max_window} positions of {model}")
    theirs, ours = _vocabulary(corpus / "tokenizer"), _vocabulary(model)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(f"the corpus {corpus} was tokenized with another tokenizer than that of {model}")
    documents = datasets.load_from_disk(str(corpus / "heldout"))["input_ids"]
    windows = heldout_windows(documents, window, num_tokens, prefix_id=documents[0][-1])
    largest = max(map(max, windows))
    if largest >= config.vocab_size:
        raise ValueError(
            f"the corpus {corpus} has the token {largest}, {model} an embedding of {config.vocab_size}: the corpus was "
            "made for another model"
        )
    return windows


def _vocabulary(directory: Path) -> dict[str, int] | None:
    """Token -> id of the tokenizer in a directory; None where there is none."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} has no tokenizer that can be read: {' '.join(str(error).split())}") from error
