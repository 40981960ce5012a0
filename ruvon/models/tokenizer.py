"""Text to token ids and back, exactly as the model was trained.

The work is done by the `tokenizers` library; this file adds what serving needs: special tokens
written by a user stay text, and every token's exact bytes are known. Vocabularies are found by
`vocab` and `vocab_gguf`; `text_stream` turns ids back into text while they come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from ruvon.errors import LoadError, RequestError
from ruvon.models.byte_level import (
    DecoderError,
    byte_level_bytes,
    read_decoder,
    sentencepiece_bytes,
)
from ruvon.models.checkpoint import Checkpoint
from ruvon.models.text_stream import TextStream
from ruvon.models.vocab import Vocab, VocabNotFoundError, byte_vocab, read_vocab
from ruvon.models.vocab_gguf import read_gguf_vocab

LONG = (
    4096  # characters from which encoding lets go of the GIL; below, that costs more than it saves
)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that comes with a checkpoint. Raises LoadError if there is none to be used."""
    try:
        return Tokenizer(_find_vocab(checkpoint))
    except DecoderError as error:
        raise LoadError(f"{checkpoint.path}: {error}") from None


def _find_vocab(checkpoint: Checkpoint) -> Vocab:
    if checkpoint.format == "gguf":
        return read_gguf_vocab(checkpoint.path, checkpoint.config)
    try:
        return read_vocab(checkpoint.words, checkpoint.generation)
    except VocabNotFoundError:
        if checkpoint.format != "dummy":
            raise
        return byte_vocab()


class Tokenizer:
    """A model's vocabulary. Safe to use from several threads at once.

    ``added_ids`` are the tokens outside the vocabulary proper, by their text, and ``special_ids``
    those of them that no text spells; all ids are below ``vocab_size``; the rest
    is explained in `Vocab`.
    """

    def __init__(self, vocab: Vocab) -> None:
        """Takes the vocabulary over. Raises DecoderError if its decoder is of an unknown kind."""
        backend = vocab.backend
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.bos_id = vocab.bos_id
        self.eos_ids = vocab.eos_ids
        self.named_tokens = vocab.named_tokens
        self.chat_templates = vocab.chat_templates
        self.added_ids = {token.content: id for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = max([backend.get_vocab_size(False), *(id + 1 for id in added)])
        self._byte_level, self.strips_space = read_decoder(component_state(backend.decoder))
        # Of the tokens asked for so far; the added ones from the start.
        self._bytes = {id: self._spell_added(token.content) for id, token in added.items()}
        self._parsing = backend  # finds special tokens in text
        self._literal = _sibling(backend, literal=True)  # takes them for text
        self._inner = _sibling(backend, literal=True, inner=True)  # the same, amid a longer text
        self._special = {id: token.content for id, token in added.items() if token.special}
        self._finder = _finder(backend)

    @property
    def special_texts(self) -> Sequence[str]:
        """How the special tokens are spelt."""
        return tuple(self._special.values())

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @cached_property
    def longest(self) -> int:
        """Characters that one token can stand for, at most."""
        return max(map(len, self._parsing.get_vocab()))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """``add_special_tokens`` adds what the model expects around a text, such as BOS. With
        ``parse_special`` the text's own special tokens count as such, else they are mere text.
        Raises RequestError for text that is not valid Unicode."""
        backend = self._parsing if parse_special else self._literal
        return list(_encode(backend, text, add_special_tokens).ids)

    def encode_guarded(self, text: str, stand_ins: Mapping[int, str]) -> list[int]:
        """Like `encode` with ``parse_special`` and nothing added, for a text in which characters
        of ``stand_ins`` (by code point) stand for others: they are put back, but no special token
        is found with their help. For that, each stretch between two special tokens that holds
        such a character is encoded again, as plain text."""
        encoding = _encode(self._parsing, text, add_special_tokens=False, offsets=True)
        ids: list[int] = []
        stretch, begin = [], 0
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._special.get(id) != text[start:end].strip():
                stretch.append(id)
                continue
            ids += self._restored(text[begin:start], begin, stretch, stand_ins)
            ids.append(id)
            stretch, begin = [], end
        return ids + self._restored(text[begin:], begin, stretch, stand_ins)

    def _restored(
        self, text: str, begin: int, ids: list[int], stand_ins: Mapping[int, str]
    ) -> list[int]:
        restored = text.translate(stand_ins)
        if restored == text:
            return ids
        backend = self._inner if begin else self._literal
        return list(_encode(backend, restored, add_special_tokens=False).ids)

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Where ``text`` has the spelling of a special token: (start, end), in characters."""
        return list(_encode(self._finder, text, add_special_tokens=False, offsets=True).offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(id) for id in ids if id not in hidden)
        text = raw.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_space else text

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for, perhaps only a part of a character; empty if unknown."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._spell(id)
        return found

    def _spell(self, id: int) -> bytes:
        token = self._parsing.id_to_token(id) if 0 <= id < 1 << 32 else None
        if token is None:
            return b""
        return byte_level_bytes(token) if self._byte_level else sentencepiece_bytes(token)

    def token_text(self, id: int) -> str:
        """A token as text, for people: parts of characters are shown as U+FFFD."""
        return self.token_bytes(id).decode("utf-8", errors="replace")

    def stream(
        self,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> TextStream:
        """The text of one completion of ``prompt_ids``, whose last four suffice. It keeps its
        leading space where it goes on from text; stop strings count after ``min_tokens``. Raises
        RequestError for an empty stop string."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        return TextStream(
            self.token_bytes,
            hidden=hidden,
            strip=self.strips_space and self.special_ids.issuperset(prompt_ids[-1:]),
            stop=stop,
            include_stop=include_stop,
            min_tokens=min_tokens,
            prompt_ids=prompt_ids,
        )

    def _spell_added(self, content: str) -> bytes:
        """Added tokens are written as they are, outside the byte-level alphabet."""
        return content.encode() if self._byte_level else sentencepiece_bytes(content)


def _encode(
    backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool, offsets: bool = False
) -> tokenizers.Encoding:
    try:
        if len(text) < LONG:
            return backend.encode(text, add_special_tokens=add_special_tokens)
        batch = backend.encode_batch if offsets else backend.encode_batch_fast
        return batch([text], add_special_tokens=add_special_tokens)[0]
    except TypeError:  # what the library makes of a lone surrogate
        raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None


def _sibling(
    backend: tokenizers.Tokenizer, *, literal: bool, inner: bool = False
) -> tokenizers.Tokenizer:
    """The same tokenizer with other settings; the vocabulary itself is shared, not copied."""
    twin = tokenizers.Tokenizer(backend.model)
    twin.normalizer = backend.normalizer
    twin.pre_tokenizer = backend.pre_tokenizer
    twin.post_processor = backend.post_processor
    added = backend.get_added_tokens_decoder()
    twin.add_tokens([added[id] for id in sorted(added)])
    twin.encode_special_tokens = literal
    metaspace = component_state(backend.pre_tokenizer)
    if (
        inner and metaspace.get("prepend_scheme") == "first"
    ):  # the prefix space is for a text's start
        twin.pre_tokenizer = pre_tokenizers.Metaspace(
            metaspace["replacement"], prepend_scheme="never", split=metaspace["split"]
        )
    return twin


def _finder(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer of special tokens only: it finds their spellings and drops all else."""
    finder = tokenizers.Tokenizer(models.BPE())
    finder.normalizer = backend.normalizer
    finder.add_tokens(
        [
            AddedToken(token.content, normalized=token.normalized)
            for token in backend.get_added_tokens_decoder().values()
            if token.special
        ]
    )
    return finder


def component_state(component: Any) -> Mapping[str, Any]:
    """A component of a tokenizer as the JSON it is stored as."""
    return {} if component is None else json.loads(component.__getstate__())
