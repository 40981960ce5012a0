"""Where a terminal command's answers come from: a server, or the engine in this very process.

Both give an answer as a generator of `Piece`s; closing it stops the work behind it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ruvon.cli.client import Client
from ruvon.errors import PeerError

Message: TypeAlias = Mapping[str, str]
Options: TypeAlias = Mapping[str, Any]
"""Sampling fields by their API names: temperature, top_p, max_tokens, seed, stop ..."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of an answer. The last piece carries why it ended and how many tokens it took."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    num_prompt: int | None = None
    num_output: int | None = None


class Source(Protocol):
    """Something that answers."""

    @property
    def name(self) -> str: ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """How tokens are drawn where options are silent; empty if that is not known."""

    def chat(self, messages: Sequence[Message], options: Options) -> Generator[Piece]: ...
    def complete(self, prompt: str, options: Options) -> Generator[Piece]: ...


@dataclass(frozen=True, slots=True)
class Remote:
    """A server."""

    client: Client
    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def connect(cls, client: Client, model: str | None) -> Remote:
        """Ask which model is there, unless one is named."""
        card: Mapping[str, Any] = {"id": model} if model else first_model(client)
        return cls(client, str(card["id"]), card.get("default_sampling") or {})

    def chat(self, messages: Sequence[Message], options: Options) -> Generator[Piece]:
        return self._stream("/v1/chat/completions", {"messages": list(messages), **options})

    def complete(self, prompt: str, options: Options) -> Generator[Piece]:
        return self._stream("/v1/completions", {"prompt": prompt, **options})

    def _stream(self, path: str, payload: Options) -> Generator[Piece]:
        usage = {"stream_options": {"include_usage": True}}
        for event in self.client.stream(path, {"model": self.name, **usage, **payload}):
            yield _piece(event)


def first_model(client: Client) -> Mapping[str, Any]:
    """The first model that a server lists.

    Raises:
        PeerError: it lists none, or cannot be reached.
    """
    models = client.get("/v1/models").get("data") or []
    if not models:
        raise PeerError(f"{client.url} serves no model")
    return models[0]  # type: ignore[no-any-return]


def _piece(event: Mapping[str, Any]) -> Piece:
    """One chunk of a chat or a completion."""
    usage = event.get("usage") or {}
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or choice
    return Piece(
        text=delta.get("content") or delta.get("text") or "",
        reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
        finish=choice.get("finish_reason"),
        num_prompt=usage.get("prompt_tokens"),
        num_output=usage.get("completion_tokens"),
    )
