"""Texts in many scripts, a small vocabulary trained on them, and tokenizing done by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import regex
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from ruvon.models.byte_level import BYTE_OF
from ruvon.models.tokenizer import Tokenizer
from ruvon.models.vocab import Vocab

START, END, DONE = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

FRAGMENTS = [
    *("Hello", "world", "it's", "THEY'LL", "I'M", "we've", "don't", "'q'", "naïve", "Straße", "İ"),
    *("Привет", "мир", "Ελληνικά", "עברית", "العربية", "हिन्दी", "ไทย"),
    *("日本語", "中文字符", "한국어", "ქართული", "አማርኛ"),
    *("🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u0301", "o\u0308\u0323"),
    *("\u200b", "\u200d", "\ufeff", "\xa0"),
    *("1", "42", "2024", "3.14159", "1,000,000", "²", "½", "Ⅷ", "٣٤", "१२", "𝟘", "x²", "1234567"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\x00", "\x1b", "\u2028", "\u3000"),
    *("def f(x):\n    return x[0] != {'a': 1}", "<html>", "&amp;", "a_b-c", "#include <stdio.h>"),
    *("!?", "...", "—", "«»", "$100", "€5", "C++", "a/b", "http://x.y/?q=1&r=2", "\\n", "~~", "|"),
    *(END, START, DONE, "<|im_", "end|>", "<", ">", "<think>", "Ġ", "▁", "<0x0A>", "\U0010ffff"),
]  # fmt: skip


def mixed_strings(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    joints = ("", "", " ", "\n")

    def one() -> str:
        size = draw.randint(1, 12)
        return "".join(draw.choice(FRAGMENTS) + draw.choice(joints) for _ in range(size))

    return [one() for _ in range(count)]


@cache
def trained_json() -> str:
    """A byte-level BPE of 700 tokens, some of them parts of characters, as a tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(DONE, special=True), AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(mixed_strings(300, seed=1), trainer)
    backend.add_special_tokens([AddedToken(START, special=True)])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend.to_str()


def trained(specials: Sequence[str] = (), added: Sequence[str] = (), **fields: Any) -> Tokenizer:
    """A tokenizer of the trained vocabulary, with more tokens, special ones and others, and fields
    of `Vocab`."""
    backend = tokenizers.Tokenizer.from_str(trained_json())
    backend.add_special_tokens([AddedToken(text, special=True) for text in specials])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return Tokenizer(Vocab(backend, **fields))


class ByteLevelReference:
    """Byte-level BPE in plain Python: cut by each pattern in turn, then merge the pair of the
    lowest rank, leftmost first, until none is left."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        patterns: Sequence[str],
        whole_words: bool = False,
    ) -> None:
        self.vocab = vocab
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.patterns = [regex.compile(pattern) for pattern in patterns]
        self.whole_words = whole_words
        self.char_of = {byte: char for char, byte in BYTE_OF.items()}

    def encode(self, text: str) -> list[int]:
        pieces = [text]
        for pattern in self.patterns:
            pieces = [cut for piece in pieces for cut in cuts(pattern, piece)]
        return [id for piece in pieces for id in self.word(piece)]

    def word(self, text: str) -> list[int]:
        symbols = [self.char_of[byte] for byte in text.encode()]
        if self.whole_words and (id := self.vocab.get("".join(symbols))) is not None:
            return [id]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            rank, at = min((self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairs))
            if rank == 1 << 30:
                break
            symbols[at : at + 2] = ["".join(pairs[at])]
        return [self.vocab[symbol] for symbol in symbols]


def cuts(pattern: regex.Pattern[str], text: str) -> list[str]:
    """``text`` cut before and after every match."""
    found, end = [], 0
    for match in pattern.finditer(text):
        found += [text[end : match.start()], match[0]]
        end = match.end()
    return [piece for piece in [*found, text[end:]] if piece]


def sentencepiece_reference(score: Mapping[str, float], text: str) -> list[str]:
    """SentencePiece's BPE in plain Python: join the neighbours that make the best-scored token."""
    symbols = list(text)
    while True:
        joined = [left + right for left, right in pairwise(symbols)]
        options = [(-score[token], at) for at, token in enumerate(joined) if token in score]
        if not options:
            return symbols
        _, at = min(options)
        symbols[at : at + 2] = [joined[at]]
