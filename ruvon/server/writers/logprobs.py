"""Log-probabilities in OpenAI's two formats: chat's list of tokens, completions' parallel lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from ruvon.deltas import TokenLogprobs
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

Name: TypeAlias = Callable[[int], str]
"""How a token is told: by its text, as a rule."""


def as_token_id(token: int) -> str:
    """What vLLM's ``return_tokens_as_token_ids`` asks for: texts of different tokens may be one."""
    return f"token_id:{token}"


def chat_logprobs(
    entries: Iterable[TokenLogprobs], tokenizer: Tokenizer, name: Name | None = None
) -> ChatLogprobs:
    """``choices[].logprobs`` of a chat answer or chunk."""
    return {
        "content": [
            {
                **top_logprob(entry.token, entry.logprob, tokenizer, name),
                "top_logprobs": [top_logprob(*pair, tokenizer, name) for pair in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def top_logprob(
    token: int, logprob: float, tokenizer: Tokenizer, name: Name | None = None
) -> TopLogprob:
    """One token with its bytes: where it holds part of a character, only they tell the truth."""
    return {
        "token": (name or tokenizer.token_text)(token),
        "bytes": list(tokenizer.token_bytes(token)),
        "logprob": logprob,
    }


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer
) -> PromptLogprobs:
    """``prompt_logprobs``: a map from token ids for each prompt token, none for the first."""
    return [None if entry is None else _prompt_logprob(entry, tokenizer) for entry in entries]


def _prompt_logprob(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, PromptLogprob]:
    ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)}
    ranked[entry.token] = (entry.logprob, entry.rank)
    return {
        str(token): {
            "logprob": logprob,
            "rank": rank,
            "decoded_token": tokenizer.token_text(token),
        }
        for token, (logprob, rank) in ranked.items()
    }


class OffsetLogprobs:
    """Builds completions' logprobs for one choice, piece by piece.

    ``text_offset`` says where in the answer's text a token begins. Tokens are pieces of UTF-8, so
    characters are counted by their leading bytes: a token that goes on with a character begins
    where that character does.
    """

    def __init__(self, tokenizer: Tokenizer, name: Name | None = None) -> None:
        self._tokenizer = tokenizer
        self._name = name or tokenizer.token_text
        self._offset = 0

    def move(self, offset: int) -> None:
        """The next token begins so many characters further on."""
        self._offset += offset

    def add(
        self,
        tokens: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        hidden: frozenset[int],
    ) -> CompletionLogprobs:
        """The next tokens with their log-probabilities, side by side. ``hidden`` ids take no room
        in the text."""
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": [self._place(token, hidden) for token in tokens],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Alternatives by text; where two share one, the likelier stands. The drawn one is in."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            top.setdefault(self._name(token), logprob)
        return top

    def _place(self, token: int, hidden: frozenset[int]) -> int:
        data = b"" if token in hidden else self._tokenizer.token_bytes(token)
        continues = bool(data) and _continues(data[0])
        place = self._offset - continues
        self._offset += num_characters(data)
        return max(place, 0)


def join_logprobs(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """One after the other; at least one."""
    if len(parts) == 1:
        return parts[0]
    return {
        "tokens": [value for part in parts for value in part["tokens"]],
        "token_logprobs": [value for part in parts for value in part["token_logprobs"]],
        "top_logprobs": [value for part in parts for value in part["top_logprobs"]],
        "text_offset": [value for part in parts for value in part["text_offset"]],
    }


def _continues(byte: int) -> bool:
    """Whether a UTF-8 byte continues a character."""
    return byte & 0xC0 == 0x80


def num_characters(data: bytes) -> int:
    """Characters that begin in these bytes of UTF-8."""
    return sum(not _continues(byte) for byte in data)
