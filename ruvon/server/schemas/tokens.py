"""``POST /tokenize`` and ``/detokenize``."""

from __future__ import annotations

from ruvon.server.schemas.base import Fields, TokenIds
from ruvon.server.schemas.chat import TemplateFields


class TokenizeRequest(Fields):
    """``POST /tokenize`` with a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(TemplateFields):
    """``POST /tokenize`` with messages."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds
    return_token_strs: bool | None = None
