"""Text streams: a prompt's text goes on in whole characters, and holds nothing of a stop string."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from speedstack.runtime.decoding.detokenizer import REPLACEMENT, TextStream
from tests.runtime.decoding.tokenizers import TEXTS, byte_level, sentencepiece, word_piece

KINDS: dict[str, Callable[[], Any]] = {
    "SentencePiece": sentencepiece,
    "Metaspace": lambda: sentencepiece(metaspace=True),
    "bytes": byte_level,
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


class Bytes:
    """A tokenizer whose tokens are bytes; those from 256 on are special."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        pieces = [b"" if skip_special_tokens and t > 255 else b"<end>" if t > 255 else bytes([t]) for t in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")


def read(stream: TextStream, tokens: Sequence[int]) -> str:
    """All pieces of a stream that is read after every token; they are its text."""
    pieces = []
    for number, token in enumerate(tokens):
        stream.push(token)
        pieces.append(stream.take(is_last=number == len(tokens) - 1))
        if stream.stopped:
            break
    assert "".join(pieces) == stream.text
    return stream.text


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(Bytes(), stop, prompt=[])
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


@pytest.mark.parametrize("skips", [True, False], ids=["without special tokens", "with them"])
def test_prompt_and_text_are_what_the_tokenizer_makes_of_both(tokenizer: Any, skips: bool) -> None:
    rng = random.Random(3)
    specials = tokenizer.convert_tokens_to_ids(["</s>", "<|user|>", "<|end|>"])
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for num_special in (0, 1, 5):
            for _ in range(num_special):
                places = [
                    n for n in range(len(ids) + 1) if skips or not tokenizer.decode(ids[:n]).endswith(REPLACEMENT)
                ]
                ids.insert(rng.choice(places), rng.choice(specials))
            whole = tokenizer.decode(ids, skip_special_tokens=skips)
            for start in range(len(ids)):
                found = read(TextStream(tokenizer, (), ids[:start], skips), ids[start:])
                # What the prompt begins and the text ends is the text's: a character, " '" that becomes "'s".
                before = next(
                    before
                    for n in range(start, -1, -1)
                    if not (before := tokenizer.decode(ids[:n], skip_special_tokens=skips)).endswith(
                        (REPLACEMENT, *((" ", " '", " n") if tokenizer.clean_up_tokenization_spaces else ()))
                    )
                )
                assert before + found == whole


def test_read_at_once_or_one_by_one(tokenizer: Any) -> None:
    ids = tokenizer.encode(TEXTS[1], add_special_tokens=False)
    at_once = TextStream(tokenizer, (), ids[:4])
    at_once.push(*ids[4:])
    assert at_once.text == read(TextStream(tokenizer, (), ids[:4]), ids[4:])


def test_the_prompt_is_read_no_further_back_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sentencepiece()
    prompt = tokenizer.encode("The capital of France is " * 200, add_special_tokens=False)
    longest = 0
    decode = type(tokenizer).decode

    def counted(self: Any, tokens: list[int], **options: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(self, tokens, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    stream = TextStream(tokenizer, (), prompt)
    assert read(stream, tokenizer.encode("Paris.", add_special_tokens=False)) == " Paris." and longest < 20


def test_a_prompt_of_which_nothing_is_seen_leaves_the_first_space_out() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("The capital", add_special_tokens=False)
    bos = [tokenizer.bos_token_id]
    assert read(TextStream(tokenizer, (), bos), ids) == "The capital" == tokenizer.decode(bos + ids, True)
    assert read(TextStream(tokenizer, (), bos, skip_special_tokens=False), ids) == tokenizer.decode(bos + ids)[3:]


def test_text_after_a_prompt_that_is_not_known_begins_with_its_space(tokenizer: Any) -> None:
    ids = tokenizer.encode("of France", add_special_tokens=False)
    prompt = tokenizer.encode("The capital", add_special_tokens=False)
    goes_on = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    assert read(TextStream(tokenizer), ids) == goes_on


def test_special_tokens_alone_are_no_text() -> None:
    tokenizer = sentencepiece()
    end, words = tokenizer.eos_token_id, tokenizer.encode("is Paris.", add_special_tokens=False)
    for prompt in (words[:1], words[:1] + [end] * 20):
        stream = TextStream(tokenizer, ("never",), prompt)
        assert read(stream, [end] * 50 + words[1:] + [end]) == " Paris."


def test_a_broken_character_at_the_end_is_shown() -> None:
    stream = TextStream(Bytes(), (), prompt=[])
    for token in "é".encode()[:1]:
        stream.push(token)
    assert stream.take(is_last=False) == "" and stream.take(is_last=True) == REPLACEMENT


@pytest.mark.parametrize(
    ("prompt", "tokens", "expected"),
    [
        ("é".encode()[:1], "é".encode()[1:], "é"),
        ("é".encode()[:1], b"b", "b"),  # what was broken is in the prompt's text
        ("🙂".encode()[:3], [256, *"🙂".encode()[3:]], "🙂"),
        ("x�".encode(), b"b", "b"),
        ("x�".encode(), "�b".encode(), "�b"),
    ],
)
def test_a_character_that_the_prompt_begins(prompt: bytes, tokens: Sequence[int], expected: str) -> None:
    assert read(TextStream(Bytes(), (), list(prompt)), list(tokens)) == expected


def test_a_possible_stop_string_is_held_back() -> None:
    taken, stream = pieces("x\n\n# y", stop=("\n\ndef", "!"))
    assert taken == ["x", "", "", "\n\n#", " ", "y"]
    assert not stream.stopped


def test_the_first_stop_string_cuts() -> None:
    taken, stream = pieces("one two three", stop=("three", " tw"))
    assert stream.stopped and stream.text == "one" == "".join(taken)


END = 256


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([*b"it is", END, *b" 42"], "<end>", "it is"),
        ([*b"it is", END, *b" 42"], "is<end>", "it "),
        ([*b"it is", END, END, *b" 42"], "<end> 4", "it is"),
        ([*b"it is", END, *b" 42"], "is 4", "it "),  # as it is read, where special tokens are left out
        ([END, *b"it is", END], "is", "it "),
        ([*b"it", END, *b"it is"], "t i", "iti"),
    ],
)
def test_stop_strings_are_found_with_special_tokens_and_without(tokens: list[int], stop: str, expected: str) -> None:
    stream = TextStream(Bytes(), (stop, "never"), prompt=[])
    assert read(stream, [*tokens, *b" and more"]) == expected and stream.stopped


def test_a_stop_string_with_a_special_token_is_held_back() -> None:
    stream = TextStream(Bytes(), ("s<end>\n",), prompt=[])
    taken = []
    for token in [*b"is", END, *b"x"]:
        stream.push(token)
        taken.append(stream.take(is_last=False))
    assert taken == ["i", "", "", "sx"] and not stream.stopped


def test_special_tokens_are_shown_where_asked_for() -> None:
    stream = TextStream(Bytes(), ("never",), prompt=[], skip_special_tokens=False)
    assert read(stream, [*b"a", END, *b"b"]) == "a<end>b"
