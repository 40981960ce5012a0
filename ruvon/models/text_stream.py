"""From token ids back to text, piece by piece, while they are being generated.

A token stands for bytes, not characters: an emoji may be spread over four tokens, a stop string
over three. `TextStream` therefore holds back what is not decided yet, and only that, so that the
pieces joined are the text that decoding all ids at once would give.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from ruvon.errors import RequestError


class TextStream:
    """One completion's text. ``stopped`` is the stop string that ended it, or None so far;
    ``num_tokens`` counts the ids taken in, the one that completed the stop string included."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        hidden: frozenset[int] = frozenset(),
        strip: bool = False,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """``hidden`` ids show nothing; ``strip`` drops the text's leading space, if it has one;
        stop strings that the first ``min_tokens`` complete are text; a character that
        ``prompt_ids`` (the last four suffice) leave unfinished is finished. Raises RequestError for
        an empty stop string, and for one that is not in a list."""
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._strip = strip
        self._rest = b""  # of a character whose other bytes are still to come
        self._stops = StopStrings(stop, include_stop) if stop else None
        self._min_tokens = min_tokens
        self._ended = False
        self.num_tokens = 0
        self._decode(prompt_ids[-4:])  # a character has at most four bytes

    @property
    def stopped(self) -> str | None:
        return self._stops.matched if self._stops else None

    @property
    def over(self) -> bool:
        """Whether a stop string, or whoever reads it, has ended the text."""
        return self._ended or self.stopped is not None

    def end(self) -> None:
        """No more is wanted: what comes later is neither text nor counted."""
        self._ended = True

    def show(self, ids: frozenset[int]) -> None:
        """Have these among the hidden ids give their text all the same."""
        self._hidden -= ids

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now. Once it is over it stays empty."""
        if self._ended:
            return ""
        if self._stops is None and not self._strip:  # most streams, for most of their time
            self.num_tokens += len(ids)
            return self._decode(ids)
        pieces = []
        for id in ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            pieces.append(self._release(self._decode((id,))))
        return "".join(pieces)

    def skip(self, id: int) -> bytes:
        """Take in an id that shows nothing; gives the bytes that `put` may still show of it."""
        self.num_tokens += 1
        return b"" if id in self._hidden else self._token_bytes(id)

    def put(self, data: bytes) -> str:
        """The text that is certain now, of ids that were taken in before."""
        return "" if self.over else self._release(self._decode_bytes(data))

    def cut(self) -> str:
        """The end of one text, and the beginning of another: gives what `finish` does, and no stop
        string reaches from one into the other."""
        text = self.finish()
        self._rest = b""
        if self._stops is not None and not self.over:
            self._stops.restart()
        return text

    def finish(self) -> str:
        """The rest: an unfinished character as U+FFFD, and the beginning of a stop string that
        never came. Empty once the text is over."""
        if self.over:
            return ""
        text = self._release(self._rest.decode(errors="replace"))
        return text + self._stops.finish() if self._stops else text

    def _decode(self, ids: Sequence[int]) -> str:
        if len(ids) == 1:  # of a step, as a rule
            data = b"" if ids[0] in self._hidden else self._token_bytes(ids[0])
        else:
            data = b"".join([self._token_bytes(id) for id in ids if id not in self._hidden])
        return self._decode_bytes(data)

    def _decode_bytes(self, data: bytes) -> str:
        if self._rest:
            data = self._rest + data
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_decoded:]
        return text

    def _release(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        if self._stops is None:
            return text
        return self._stops.push(text, counts=self.num_tokens > self._min_tokens)


class StopStrings:
    """Cuts a growing text at the first of several strings: the one complete first, and of those
    complete at the same character the longest. How the text is chunked makes no difference.

    Each string is followed by a Knuth-Morris-Pratt automaton, whose state is how many of its
    characters the text ends in: that is also how much must be held back.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        if isinstance(stops, str):  # which would be its letters
            raise RequestError(f"stop must be a list of strings, not {stops!r}", param="stop")
        if not all(stops):
            raise RequestError("stop strings must not be empty", param="stop")
        self.matched: str | None = None
        self._include = include
        self._held = ""
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    def push(self, text: str, *, counts: bool = True) -> str:
        """The part of held-back and new text that no stop string can touch any more. Unless it
        ``counts``, a stop string that is completed now is text like any other."""
        text, before = self._held + text, len(self._held)
        for at in range(before, len(text)):
            if (stop := self._advance(text[at])) is not None and counts:
                self.matched, self._held = stop, ""
                return text[: at + 1 if self._include else at + 1 - len(stop)]
        keep = 0 if self._include else max(self._states, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def restart(self) -> None:
        """Forget what came so far."""
        self._states = [0] * len(self._stops)

    def _advance(self, char: str) -> str | None:
        """The longest stop string that ends here."""
        complete = None
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            state = self._states[i]
            while state and stop[state] != char:
                state = borders[state - 1]
            state += stop[state] == char
            if state == len(stop):
                complete = complete or stop
                state = borders[state - 1]
            self._states[i] = state
        return complete


def _borders(stop: str) -> list[int]:
    """For each prefix of ``stop``, how long its longest proper prefix is that is also its end."""
    borders, length = [0], 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length - 1]
        length += stop[length] == char
        borders.append(length)
    return borders
