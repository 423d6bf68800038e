"""From token ids to text as it is decoded: whole characters only, and nothing past a stop string."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"


class TextStream:
    """Decodes a growing list of tokens and watches for stop strings.

    A token may end in the middle of a UTF-8 character, and text so far may end in the middle of a stop string: both are
    held back until more tokens decide. Only the tail that can still change is decoded again, together with the tokens
    before it: a tokenizer of whole words (SentencePiece) drops the space before the first token that it is given.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._settled = ""  # text of tokens before `_tail`
        self._context: list[int] = []  # those settled last: they begin and end with whole characters
        self._num_context_characters = 0
        self._tail: list[int] = []
        self._emitted = 0
        self.stopped = False

    def push(self, *tokens: int) -> None:
        """Adds tokens; afterwards `stopped` says whether the text now holds a stop string."""
        self._tail += tokens
        text = self._tail_text()
        if not text.endswith(REPLACEMENT):
            self._settled += text
            self._context, self._tail = self._tail, []
            self._num_context_characters = len(self._tokenizer.decode(self._context))
        if self._stop:
            self.stopped = any(stop in self._settled for stop in self._stop)

    @property
    def text(self) -> str:
        """Everything decoded so far, cut before the first stop string."""
        text = self._settled + self._tail_text()
        cuts = [text.index(stop) for stop in self._stop if stop in text]
        return text[: min(cuts)] if cuts else text

    def _tail_text(self) -> str:
        if not self._tail:
            return ""
        return self._tokenizer.decode(self._context + self._tail)[self._num_context_characters :]

    def take(self, is_last: bool) -> str:
        """Text that is certain and was not taken before; at the end, all that is left."""
        if is_last or self.stopped:
            text = self.text
        else:
            held_back = max((_overlap(self._settled, stop) for stop in self._stop), default=0)
            text = self._settled[: len(self._settled) - held_back]
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
