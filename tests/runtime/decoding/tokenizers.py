"""Small tokenizers of the kinds that models have, built in memory; ids of special tokens come first."""

from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|end|>"]
TEXTS = (
    "The capital of France is Paris.",
    "naïve 漢字 and 🙂 faces, 日本語です! isn't it 's?",
    "  def f(x):\n    return x  # don't\n",
)


def sentencepiece(metaspace: bool = False) -> PreTrainedTokenizerFast:
    """Llama's kind: pieces that begin with "▁" where a space is, other characters as bytes; adds BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted({word for text in TEXTS for word in text.split(" ") if word.isascii() and word.isprintable()})
    letters = sorted({letter for text in TEXTS for letter in text if letter.isascii() and letter.isprintable()} - {" "})
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    pieces += sorted({f"▁{word}" for word in words if word} - set(pieces))
    raw = Tokenizer(models.Unigram([(piece, -float(len(piece) < 3)) for piece in pieces], unk_id=0, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if metaspace:
        raw.normalizer = None
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    else:
        raw.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    raw.add_special_tokens(SPECIAL_TOKENS)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return _wrapped(raw)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: every token is bytes, spaces included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        TEXTS[:1] * 4,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrapped(raw)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: words with spaces between them, "##" where a word goes on, and transformers' clean-up behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter for text in TEXTS for letter in text if not letter.isspace()}
    pieces = [*SPECIAL_TOKENS, *sorted(letters), *(f"##{letter}" for letter in sorted(letters)), "Paris", "don"]
    raw = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece(cleanup=False)
    raw.add_special_tokens(SPECIAL_TOKENS)
    return _wrapped(raw, clean_up_tokenization_spaces=True)


def _wrapped(raw: object, **options: bool) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|end|>"],
        **options,
    )
