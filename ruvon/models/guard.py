"""Nothing a client writes can become a special token.

A string of a request that spells one, such as ``<|im_end|>``, is rendered with a private-use
character in place of its first: templates still see text of the same length that starts, ends,
strips and compares as before, but the spelling is gone, so whatever special tokens the prompt then
holds are the template's own. The characters are put back before encoding. The one thing a template
cannot do is look for a special token in a message. A request without such strings is rendered and
encoded with no detour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from ruvon.models.messages import map_strings, strings
from ruvon.models.tokenizer import Tokenizer

STAND_INS = range(0xF0000, 0xFFFFD)  # private use, plane 15


class Guard:
    """Finds the spellings of a vocabulary's special tokens."""

    def __init__(self, tokenizer: Tokenizer, sources: Iterable[str]) -> None:
        """``sources``: the templates, whose characters are none to stand in for others."""
        texts = tokenizer.special_texts
        self._tokenizer = tokenizer
        self._sources = tuple(sources)
        self._beginnings = frozenset(text[:size] for text in texts for size in range(1, len(text)))
        self._first = frozenset(text[0] for text in texts)
        self._longest = max(map(len, texts), default=0)

    def guard(self, variables: dict[str, Any]) -> tuple[dict[str, Any], dict[int, str]]:
        """(``variables`` with a stand-in for a character of every spelling of a special token,
        what each stand-in, by code point, stands for)."""
        places = {text: found for text in set(strings(variables)) if (found := self._spells(text))}
        if not places:
            return variables, {}
        originals = sorted({text[at] for text, found in places.items() for at in found})
        used = set().union(*strings(variables), *self._sources)
        free = (chr(code) for code in STAND_INS if chr(code) not in used)
        stand_ins = dict(zip(originals, islice(free, len(originals)), strict=True))
        guarded = {text: _replace(text, found, stand_ins) for text, found in places.items()}
        return (
            map_strings(variables, lambda text: guarded.get(text, text)),
            {ord(stand_in): original for original, stand_in in stand_ins.items()},
        )

    def _spells(self, text: str) -> set[int]:
        """Where ``text`` spells a special token, or ends in the beginning of one that a string
        after it might complete."""
        if not any(char in text for char in self._first):
            return set()
        found: set[int] = set()
        rest = text
        while spans := self._tokenizer.special_spans(rest):  # again, for one within another
            starts = {start for start, _ in spans}
            found |= starts
            rest = _replace(rest, starts, {rest[start]: chr(STAND_INS.stop) for start in starts})
        ends = range(max(0, len(text) - self._longest), len(text))
        return found | {at for at in ends if text[at:] in self._beginnings}


def _replace(text: str, places: set[int], stand_ins: Mapping[str, str]) -> str:
    characters = list(text)
    for at in places:
        characters[at] = stand_ins[characters[at]]
    return "".join(characters)
