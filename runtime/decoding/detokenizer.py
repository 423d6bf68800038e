"""From token ids to text as it is decoded: whole characters only, and nothing past a stop string."""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"
# A character has at most so many bytes, each of which may be a token.
MAX_BYTES = 4
FEWEST_PROMPT_TOKENS = 8
# Ends that tokenizers with `clean_up_tokenization_spaces` may write in another way once more follows: " '" in " 's".
UNCLEAN_ENDS = (" ", " '", " n", " n'", " 'v", " 'r")


class TextStream:
    """Decodes a growing list of tokens that continue a prompt, and watches for stop strings.

    The prompt's text and this one are together what the tokenizer makes of all tokens: a tokenizer of whole words
    (SentencePiece) drops the space before the first token that it is given, so the tokens before have to be there. Only
    the tail that can still change is decoded again, together with the tokens before it.

    A token may end in the middle of a UTF-8 character, and text so far may end in the middle of a stop string: both are
    held back until more tokens decide. A character that the prompt begins and the first tokens end is theirs, whole.

    Stop strings are looked for with special tokens and, where those are left out of the text, also without.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        prompt: Sequence[int] | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        """`prompt`: the tokens before; None where they are not known, and the text continues that of any whole word."""
        self._stop = tuple(stop)
        self._shown = _View(tokenizer, skip_special_tokens)
        self._views = [self._shown]
        if self._stop and skip_special_tokens:
            self._views.append(_View(tokenizer, skip_special_tokens=False))
        self._is_cleaned = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._context: Sequence[int] | None = None  # tokens before the tail, of which some are to be seen
        self._tail: list[int] = []
        if prompt is not None:
            self._continue(prompt)
        # How long the settled text with special tokens and the one shown were, each time that some was settled.
        self._lengths: list[tuple[int, int]] = [(0, 0)]
        self._num_taken = 0
        self.stopped = False

    def push(self, *tokens: int) -> None:
        """Adds tokens; afterwards `stopped` says whether the text now holds a stop string."""
        # One by one, where it matters which of them a stop string ends in.
        size = 1 if self._stop else max(1, len(tokens))
        for start in range(0, len(tokens), size):
            self._push(list(tokens[start : start + size]))
        self.stopped = any(stop in view.text for stop in self._stop for view in self._views)

    @property
    def has_stops(self) -> bool:
        return bool(self._stop)

    @property
    def text(self) -> str:
        """Everything decoded so far, cut before the first stop string."""
        return self._shown.text[: min([len(self._shown.text), *self._stop_places()])]

    def take(self, is_last: bool) -> str:
        """Text that is certain and was not taken before; at the end, all that is left."""
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
        """Keeps as many of the prompt's last tokens as tell how to go on; an unfinished character is decoded anew."""
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
        elif not self._shown.num_before:  # nothing is to be seen of any token yet
            self._context, self._tail = [*self._context, *self._tail], []
        else:
            self._tail = []
        for view in self._views:
            view.settle(self._context)
        self._lengths.append((len(self._views[-1].settled), len(self._shown.settled)))

    def _may_change(self, text: str) -> bool:
        return text.endswith(REPLACEMENT) or (self._is_cleaned and text.endswith(UNCLEAN_ENDS))

    def _stop_places(self) -> list[int]:
        """Where the text shown ends before a stop string, of each that was found."""
        return [
            self._num_shown(view, view.text.index(stop))
            for stop in self._stop
            for view in self._views
            if stop in view.text
        ]

    def _num_shown(self, view: "_View", length: int) -> int:
        """Characters of the text shown that the first `length` of a view's text are."""
        if view is self._shown:
            return length
        index = bisect.bisect_right(self._lengths, length, key=lambda lengths: lengths[0]) - 1
        start, num_shown = self._lengths[index]
        is_settled = index + 1 < len(self._lengths)
        end = self._lengths[index + 1][1] if is_settled else len(self._shown.text)
        pairs = zip(view.text[start:length], self._shown.text[num_shown:end], strict=False)
        return num_shown + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class _View:
    """One way to read the tokens, with special tokens or without: text that is settled, and the tail's."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self.settled = ""
        self.decoded = ""  # the tail's tokens, those of the prompt included
        self.tail = ""
        self.num_before = 0  # characters of the tokens before the tail
        self._unfinished = ""  # what the prompt's text ends with in place of a character that the tail may finish

    @property
    def text(self) -> str:
        return self.settled + self.tail

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=self._skips) if tokens else ""

    def follow(self, context: Sequence[int], unfinished: Sequence[int] = ()) -> None:
        self.num_before = len(self.decode(context))
        self._unfinished = self.decode([*context, *unfinished])[self.num_before :] if unfinished else ""

    def see(self, tokens: Sequence[int]) -> None:
        """The context's tokens and the tail's."""
        self.decoded = self.decode(tokens)[self.num_before :]
        self.tail = self.decoded.removeprefix(self._unfinished)

    def settle(self, context: Sequence[int]) -> None:
        """The tail's text is certain; `context` comes before the next."""
        self.settled, self.tail = self.text, ""
        self.follow(context)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
