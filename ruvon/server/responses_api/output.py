"""The items of an answer while they grow: each says its events, and what it is so far.

An event is its type and its fields; the writer numbers them. Every event of an item and the item
itself are made here from the same state, so ids and texts cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias
from uuid import uuid4

import orjson

from ruvon.server.responses_api.answers import Status
from ruvon.server.sealed import seal

MOST_REPEATED = 1 << 20  # bytes of log-probabilities that are told once more before an item ends

Event: TypeAlias = tuple[str, dict[str, Any]]


def new_id(prefix: str) -> str:
    """``msg`` → ``msg_1f0c...``."""
    return f"{prefix}_{uuid4().hex}"


class Output:
    """One item. Its events come from ``added``, then ``delta`` as often as there is news, then
    ``done``, which says how it ended."""

    def __init__(self, index: int, prefix: str) -> None:
        self.id = new_id(prefix)
        self.status: Status = "in_progress"
        self._index = index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def item(self) -> dict[str, Any]:
        """The item as far as it has come."""
        raise NotImplementedError

    def kept(self) -> dict[str, Any]:
        """The item as it is stored, to be read again as input."""
        return self.item()

    def added(self) -> Iterator[Event]:
        yield self._whole("response.output_item.added")

    def done(self, status: Status) -> Iterator[Event]:
        self.status = status
        yield from self._ending()
        yield self._whole("response.output_item.done")

    def _ending(self) -> Iterator[Event]:
        """Events before the last."""
        raise NotImplementedError

    def _whole(self, kind: str) -> Event:
        return kind, {"output_index": self._index, "item": self.item()}

    def _of(self, kind: str, **fields: Any) -> Event:
        """An event about a piece of this item."""
        return kind, {"item_id": self.id, "output_index": self._index, **fields}


class Message(Output):
    """What the model says, in one part. Its log-probabilities are JSON from the start: they are
    repeated in up to four events, and may be megabytes, which take long to write."""

    def __init__(self, index: int) -> None:
        super().__init__(index, "msg")
        self._logprobs: list[bytes] = []
        self._begun = False

    def item(self) -> dict[str, Any]:
        return self._item(json_list(self._logprobs))

    def kept(self) -> dict[str, Any]:
        return self._item([])

    def added(self) -> Iterator[Event]:
        yield from super().added()
        self._begun = True
        yield self._of("response.content_part.added", content_index=0, part=self._part([]))

    def delta(self, text: str, logprobs: list[bytes]) -> Iterator[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        told = json_list(logprobs)
        yield self._of("response.output_text.delta", content_index=0, delta=text, logprobs=told)

    def _ending(self) -> Iterator[Event]:
        self._logprobs = [b",".join(self._logprobs)] if self._logprobs else []
        again = sum(map(len, self._logprobs)) <= MOST_REPEATED
        told = json_list(self._logprobs if again else [])
        yield self._of("response.output_text.done", content_index=0, text=self.text, logprobs=told)
        yield self._of("response.content_part.done", content_index=0, part=self._part(told))

    def _item(self, logprobs: object) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": [self._part(logprobs)] if self._begun else [],
        }

    def _part(self, logprobs: object) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": logprobs,
        }


def json_list(values: list[bytes]) -> orjson.Fragment:
    """JSON values → the JSON list of them."""
    return orjson.Fragment(b"[%b]" % b",".join(values))


class Reasoning(Output):
    """What the model says to itself. It is told as it is; whoever asks for a summary gets the same
    text as one, for there is nobody to write another."""

    def __init__(self, index: int, *, summary: bool, sealed: bool) -> None:
        """``sealed``: give it as ``encrypted_content`` too, for clients that send that back."""
        super().__init__(index, "rs")
        self._summary = summary
        self._sealed = sealed
        self._begun = False

    def item(self) -> dict[str, Any]:
        item = {
            "id": self.id,
            "type": "reasoning",
            "status": self.status,
            "summary": [self._part("summary_text")] if self._begun and self._summary else [],
            "content": [self._part("reasoning_text")] if self._begun else [],
        }
        if self._sealed:
            item["encrypted_content"] = seal(self.text)
        return item

    def added(self) -> Iterator[Event]:
        yield from super().added()
        self._begun = True
        yield self._of(
            "response.content_part.added", content_index=0, part=self._part("reasoning_text")
        )
        if self._summary:
            yield self._of(
                "response.reasoning_summary_part.added",
                summary_index=0,
                part=self._part("summary_text"),
            )

    def delta(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        yield self._of("response.reasoning_text.delta", content_index=0, delta=text)
        if self._summary:
            yield self._of("response.reasoning_summary_text.delta", summary_index=0, delta=text)

    def _ending(self) -> Iterator[Event]:
        text = self.text
        yield self._of("response.reasoning_text.done", content_index=0, text=text)
        part = self._part("reasoning_text")
        yield self._of("response.content_part.done", content_index=0, part=part)
        if self._summary:
            yield self._of("response.reasoning_summary_text.done", summary_index=0, text=text)
            part = self._part("summary_text")
            yield self._of("response.reasoning_summary_part.done", summary_index=0, part=part)

    def _part(self, kind: str) -> dict[str, str]:
        return {"type": kind, "text": self.text}


class Call(Output):
    """A call of a function, with arguments in JSON, or of a custom tool, with text."""

    def __init__(
        self, index: int, call_id: str, name: str, namespace: str | None, custom: bool
    ) -> None:
        super().__init__(index, "ctc" if custom else "fc")
        self._fields = {
            "type": "custom_tool_call" if custom else "function_call",
            "call_id": call_id,
            "name": name,
        }
        if namespace is not None:
            self._fields["namespace"] = namespace
        self._key = "input" if custom else "arguments"
        self._event = (
            f"response.{'custom_tool_call_input' if custom else 'function_call_arguments'}"
        )

    def item(self) -> dict[str, Any]:
        return {"id": self.id, "status": self.status, **self._fields, self._key: self.text}

    def delta(self, text: str) -> Iterator[Event]:
        if text:
            self._texts.append(text)
            yield self._of(f"{self._event}.delta", delta=text)

    def _ending(self) -> Iterator[Event]:
        more = {self._key: self.text}
        if self._key == "arguments":
            more["name"] = self._fields["name"]
        yield self._of(f"{self._event}.done", **more)
