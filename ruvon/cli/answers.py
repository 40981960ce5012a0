"""Where a terminal command's answers come from: a server, or the engine in this very process.

Both give an answer as a generator of `Delta`s; closing it stops the work behind it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from ruvon.cli.client import Client
from ruvon.deltas import Delta
from ruvon.errors import PeerError

Message: TypeAlias = Mapping[str, str]
Options: TypeAlias = Mapping[str, Any]
"""Sampling fields by their API names: temperature, top_p, max_tokens, seed, stop ..."""


class Usage(NamedTuple):
    """How many tokens an answer took; None where a server does not say."""

    num_prompt: int | None = None
    num_output: int | None = None


Answer: TypeAlias = Generator[Delta, None, Usage]
"""The counts are the generator's value: what is stopped early has none."""


class Source(Protocol):
    """Something that answers."""

    @property
    def name(self) -> str: ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """How tokens are drawn where options are silent; empty if that is not known."""

    def chat(self, messages: Sequence[Message], options: Options) -> Answer: ...
    def complete(self, prompt: str, options: Options) -> Answer: ...


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

    def chat(self, messages: Sequence[Message], options: Options) -> Answer:
        return self._stream("/v1/chat/completions", {"messages": list(messages), **options})

    def complete(self, prompt: str, options: Options) -> Answer:
        return self._stream("/v1/completions", {"prompt": prompt, **options})

    def _stream(self, path: str, payload: Options) -> Answer:
        usage = {"stream_options": {"include_usage": True}}
        counts: Mapping[str, Any] = {}
        for event in self.client.stream(path, {"model": self.name, **usage, **payload}):
            counts = event.get("usage") or counts
            yield read_chunk(event)
        return Usage(counts.get("prompt_tokens"), counts.get("completion_tokens"))


def first_model(client: Client) -> Mapping[str, Any]:
    """The first model that a server lists.

    Raises:
        PeerError: it lists none, or cannot be reached.
    """
    models = client.get("/v1/models").get("data") or []
    if not models:
        raise PeerError(f"{client.url} serves no model")
    return models[0]  # type: ignore[no-any-return]


def read_chunk(event: Mapping[str, Any]) -> Delta:
    """What one chunk of a chat or a completion says."""
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta") or choice
    return Delta(
        text=delta.get("content") or delta.get("text") or "",
        reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
        finish=choice.get("finish_reason"),
    )
