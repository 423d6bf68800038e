"""Held-out windows of a prepared corpus, as a model's token ids.

Another tokenizer's ids mean nothing to the model, so they are refused even if its embedding is large enough.
"""

from pathlib import Path

from speedstack.eval.data.prepared_corpus import corpus_part, reads_alike
from speedstack.eval.quality.measure import heldout_windows
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import checkpoint_directory
from speedstack.quant.checkpoint.tokenizer import find_tokenizer, load_tokenizer


def corpus_windows(corpus: str | Path, model: str | Path, window: int, num_tokens: int) -> list[list[int]]:
    """Windows of at most `window` ids of the corpus' held-out part, with `num_tokens` predicted tokens in all.

    Raises ValueError without a prepared corpus, for another tokenizer than that of the model directory `model`, for
    windows beyond the model's positions, and as `heldout_windows`.
    """
    corpus, model = Path(corpus), checkpoint_directory(model)
    heldout = corpus_part(corpus, "heldout")
    config = read_config(model)[0].get_text_config()
    max_window = getattr(config, "max_position_embeddings", None)
    if max_window is not None and window > max_window:
        raise ValueError(f"a window of {window} tokens exceeds the {max_window} positions of {model}")
    theirs, ours = load_tokenizer(corpus / "tokenizer"), find_tokenizer(model)
    if ours is not None and (theirs.get_vocab() != ours.get_vocab() or not reads_alike(heldout, ours)):
        raise ValueError(f"the corpus {corpus} was tokenized with another tokenizer than that of {model}")
    documents = heldout["input_ids"]
    windows = heldout_windows(documents, window, num_tokens, prefix_id=documents[0][-1])
    largest = max(map(max, windows))
    if largest >= config.vocab_size:
        raise ValueError(
            f"the corpus {corpus} has the token {largest}, {model} an embedding of {config.vocab_size}: the corpus was "
            "made for another model"
        )
    return windows
