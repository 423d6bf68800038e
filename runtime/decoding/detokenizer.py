"""Incremental detokenization: emits whole characters only, and nothing past a stop string."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"
# Bytes in a UTF-8 character; each may be a token.
MAX_BYTES = 4
FEWEST_PROMPT_TOKENS = 8
# `clean_up_tokenization_spaces` may rewrite these endings once more text follows: " '" in " 's".
UNCLEAN_ENDS = (" ", " '", " n", " n'", " 'v", " 'r")


class TextStream:
    """Decodes the tokens that continue a prompt and watches for stop strings.

    The prompt's text plus this text is what the tokenizer makes of all tokens. SentencePiece drops the space before the
    first token it is given, so the tail is decoded with the tokens before it; settled text is not decoded again.

    An incomplete UTF-8 character or a possible start of a stop string is held back until more tokens decide. A
    character that the prompt begins belongs to the new text. Stop strings are searched with special tokens and, if the
    text leaves them out, also without.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        prompt: Sequence[int] | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        """`prompt`: the tokens before; None if unknown, and the text then continues any whole word."""
        self._stop = tuple(stop)
        self._shown = _View(tokenizer, skip_special_tokens)
        self._views = [self._shown]
        if self._stop and skip_special_tokens:
            self._views.append(_View(tokenizer, skip_special_tokens=False))
        self._is_cleaned = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._context: Sequence[int] | None = None  # tokens before the tail, some of them visible
        self._tail: list[int] = []
        if prompt is not None:
            self._continue(prompt)
        # Lengths of the settled text, with special tokens and as shown, each time text was settled.
        self._lengths: list[tuple[int, int]] = [(0, 0)]
        self._num_taken = 0
        self.stopped = False

    def push(self, *tokens: int) -> None:
        """Adds tokens; `stopped` then says whether the text holds a stop string."""
        # One by one if it matters which token completes a stop string.
        size = 1 if self._stop else max(1, len(tokens))
        for start in range(0, len(tokens), size):
            self._push(list(tokens[start : start + size]))
        self.stopped = any(stop in view.text for stop in self._stop for view in self._views)

    @property
    def has_stops(self) -> bool:
        return bool(self._stop)

    @property
    def text(self) -> str:
        """All text so far, cut before the first stop string."""
        return self._shown.text[: min([len(self._shown.text), *self._stop_places()])]

    def take(self, is_last: bool) -> str:
        """New text that can no longer change; with `is_last`, all that is left."""
        if is_last or self.stopped:
            text = self.text
        else:
            ends = [len(self._shown.settled)]
            for view in self._views:
                held_back = max((_overlap(view.settled, stop) for stop in self._stop), default=0)
                ends.append(self._num_shown(view, len(view.settled) - held_back))
            text = self._shown.settled[: min(ends)]
        piece = text[self._num_taken :]
        self._num_taken = max(self._num_taken, len(text))
        return piece

    def _continue(self, prompt: Sequence[int]) -> None:
        """Keeps the last prompt tokens needed as context; an unfinished character is decoded again."""
        length = FEWEST_PROMPT_TOKENS
        while length < len(prompt) and self._shown.decode(prompt[-length:])[:1] in ("", REPLACEMENT):
            length *= 2
        last = list(prompt[-length:])
        lengths = range(len(last), max(-1, len(last) - MAX_BYTES), -1)
        whole = next((n for n in lengths if not self._may_change(self._shown.decode(last[:n]))), len(last))
        self._context, self._tail = last[:whole], last[whole:]
        for view in self._views:
            view.follow(self._context, self._tail)

    def _push(self, tokens: list[int]) -> None:
        if self._context is None:
            first = self._shown.decode(tokens[:1])
            self._context = tokens[:1] if first and REPLACEMENT not in first else []
            for view in self._views:
                view.follow(self._context)
        self._tail += tokens
        for view in self._views:
            view.see([*self._context, *self._tail])
        if self._may_change(self._shown.decoded):
            return
        if self._shown.tail:
            self._context, self._tail = self._tail, []
        elif not self._shown.num_before:  # no token is visible yet
            self._context, self._tail = [*self._context, *self._tail], []
        else:
            self._tail = []
        for view in self._views:
            view.settle(self._context)
        self._lengths.append((len(self._views[-1].settled), len(self._shown.settled)))

    def _may_change(self, text: str) -> bool:
        return text.endswith(REPLACEMENT) or (self._is_cleaned and text.endswith(UNCLEAN_ENDS))

    def _stop_places(self) -> list[int]:
        """Lengths of the shown text before each stop string found."""
        return [
            self._num_shown(view, view.text.index(stop))
            for stop in self._stop
            for view in self._views
            if stop in view.text
        ]

    def _num_shown(self, view: "_View", length: int) -> int:
        """Characters of the shown text that correspond to the first `length` of a view's text."""
        if view is self._shown:
            return length
        index = bisect.bisect_right(self._lengths, length, key=lambda lengths: lengths[0]) - 1
        start, num_shown = self._lengths[index]
        is_settled = index + 1 < len(self._lengths)
        end = self._lengths[index + 1][1] if is_settled else len(self._shown.text)
        pairs = zip(view.text[start:length], self._shown.text[num_shown:end], strict=False)
        return num_shown + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class _View:
    """One reading of the tokens, with or without special tokens: settled text plus the tail's."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self.settled = ""
        self.decoded = ""  # the tail's tokens and the prompt's
        self.tail = ""
        self.num_before = 0  # characters of the tokens before the tail
        self._unfinished = ""  # replacement characters at the prompt's end that the tail may complete

    @property
    def text(self) -> str:
        return self.settled + self.tail

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=self._skips) if tokens else ""

    def follow(self, context: Sequence[int], unfinished: Sequence[int] = ()) -> None:
        self.num_before = len(self.decode(context))
        self._unfinished = self.decode([*context, *unfinished])[self.num_before :] if unfinished else ""

    def see(self, tokens: Sequence[int]) -> None:
        """Decodes the context's tokens and the tail's."""
        self.decoded = self.decode(tokens)[self.num_before :]
        self.tail = self.decoded.removeprefix(self._unfinished)

    def settle(self, context: Sequence[int]) -> None:
        """Makes the tail's text final; `context` precedes the next tail."""
        self.settled, self.tail = self.text, ""
        self.follow(context)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
