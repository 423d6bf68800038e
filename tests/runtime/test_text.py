"""Text streams: whole characters, and nothing of a stop string."""

from typing import Any

import tokenizers

from speedstack.runtime.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class Words:
    """A tokenizer of words, "▁" for a space, that drops the first space of what it decodes, as SentencePiece does."""

    def __init__(self) -> None:
        self._decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
        )

    def decode(self, tokens: list[str]) -> str:
        return self._decoder.decode(tokens)


def pieces(text: str, stop: tuple[str, ...] = (), tokenizer: Any = None) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer or Bytes(), stop)
    taken = []
    data = text.encode()
    for index, token in enumerate(data):
        stream.push(token)
        taken.append(stream.take(is_last=index == len(data) - 1))
        if stream.stopped:
            break
    return taken, stream


def test_characters_are_held_back_until_they_are_whole() -> None:
    taken, stream = pieces("aé漢!")
    assert [piece for piece in taken if piece] == ["a", "é", "漢", "!"]
    assert stream.text == "aé漢!"


def test_spaces_between_words_survive() -> None:
    tokens: list[Any] = ["▁one", "▁two", "▁", "<0xE6>", "<0xBC>", "<0xA2>", "<0xC3>", "<0xA9>", "▁three"]
    stream = TextStream(Words(), ())
    taken = []
    for token in tokens:
        stream.push(token)
        taken.append(stream.take(is_last=token == tokens[-1]))
    assert "".join(taken) == stream.text == Words().decode(tokens) == "one two 漢é three"
    assert "".join(taken[:2]) == "one two"


def test_a_broken_character_at_the_end_is_shown() -> None:
    stream = TextStream(Bytes(), ())
    for token in "é".encode()[:1]:
        stream.push(token)
    assert stream.take(is_last=False) == "" and stream.take(is_last=True) == "�"


def test_a_possible_stop_string_is_held_back() -> None:
    taken, stream = pieces("x\n\n# y", stop=("\n\ndef", "!"))
    assert taken == ["x", "", "", "\n\n#", " ", "y"]
    assert not stream.stopped


def test_the_first_stop_string_cuts() -> None:
    taken, stream = pieces("one two three", stop=("three", " tw"))
    assert stream.stopped and stream.text == "one" == "".join(taken)
