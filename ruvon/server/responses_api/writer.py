"""The fold: deltas become the events of a stream and the response object, from one state.

A client that puts the events together has the object: items open and close in the order in which
the model writes them, and every event is numbered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from ruvon.deltas import Delta, ToolCall
from ruvon.engine.types import Job
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.events import event
from ruvon.server.failures import openai_error
from ruvon.server.responses import ResponseUsage
from ruvon.server.responses_api.output import Call, Event, Message, Output, Reasoning, new_id
from ruvon.server.writers.envelope import Tally
from ruvon.server.writers.logprobs import chat_logprobs


def usage(tally: Tally) -> ResponseUsage:
    """``cache_write_tokens`` counts what a client pays to have kept; here nobody does."""
    return {
        "input_tokens": tally.num_prompt,
        "input_tokens_details": {"cached_tokens": tally.num_cached, "cache_write_tokens": 0},
        "output_tokens": tally.num_output,
        "output_tokens_details": {"reasoning_tokens": tally.num_reasoning},
        "total_tokens": tally.num_prompt + tally.num_output,
    }


def error_fields(error: Exception) -> dict[str, Any]:
    """Of an event ``error``: as OpenAI has them, and once more under the key for which its SDK
    raises."""
    told = openai_error(error)["error"]
    return {
        "code": told["code"],
        "message": told["message"],
        "param": told["param"],
        "error": told,
    }


@dataclass(frozen=True, slots=True)
class Shape:
    """What a request wants to see of its answer."""

    logprobs: bool = False
    summary: bool = False  # reasoning as a summary too
    sealed: bool = False  # reasoning as encrypted_content too
    background: bool = False
    max_tool_calls: int | None = None  # what the model calls beyond is left out, as OpenAI has it
    names: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    """A tool's name as the model knows it → its namespace and its name there."""


class ResponsesWriter:
    """Writes one response: as a stream (``opening``, ``events``, ``closing``) or as a whole
    (``feed``, ``result``)."""

    done = b""  # there is no [DONE] here

    def __init__(
        self,
        id: str,
        fields: Mapping[str, Any],
        shape: Shape,
        job: Job,
        tokenizer: Tokenizer,
        keep: Callable[[ResponsesWriter], None] | None = None,
        record: Callable[[bytes], None] | None = None,
    ) -> None:
        """``fields`` are what the response says of its request. ``keep`` is called once it has
        ended, before the client can know; ``record`` gets every event of a stream."""
        self.id = id
        self.tally = Tally([job])
        self.status = "queued" if shape.background else "in_progress"
        self._created_at = int(time.time())
        self._completed_at: int | None = None
        self._error: dict[str, str] | None = None
        self._fields = fields
        self._shape = shape
        self._tokenizer = tokenizer
        self._keep = keep
        self._record = record
        self._number = 0
        self._items: list[Output] = []
        self._open: Output | None = None
        self._call: int | None = None  # the number of the call that is open
        self._pending: list[bytes] = []  # log-probabilities of tokens whose text is still to come

    # ------------------------------------------------------------------ a stream, or the whole

    def opening(self) -> bytes:
        events = [("response.created", {"response": self.snapshot()})]
        if self._shape.background:
            events.append(("response.queued", {"response": self.snapshot()}))
            return self._encode(events)
        return self._encode([*events, *self._begin()])

    def events(self, delta: Delta) -> bytes:
        return self._encode(self._fold(delta))

    def closing(self) -> bytes:
        data = self._encode([(f"response.{self.status}", {"response": self.snapshot()})])
        self._settle()
        return data

    def error(self, error: Exception) -> bytes:
        """What ends a stream that has failed: the response as far as it came, then the error."""
        self.fail(error)
        data = self._encode(
            [
                ("response.failed", {"response": self.snapshot()}),
                ("error", error_fields(error)),
            ]
        )
        self._settle()
        return data

    def feed(self, delta: Delta) -> None:
        for _ in self._fold(delta):
            pass

    def result(self) -> Mapping[str, object]:
        self._settle()
        return self.snapshot()

    # ------------------------------------------------------------------ the object

    def snapshot(self) -> dict[str, Any]:
        """The response as far as it has come."""
        reason = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": self._completed_at,
            "status": self.status,
            "error": self._error,
            "incomplete_details": reason,
            **self._fields,
            "output": self.output(),
            "usage": None if self.status in ("queued", "in_progress") else usage(self.tally),
        }

    def output(self) -> list[dict[str, Any]]:
        return [item.item() for item in self._items]

    def kept(self) -> list[dict[str, Any]]:
        """The items as they are stored."""
        return [item.kept() for item in self._items]

    def fail(self, error: Exception) -> None:
        self._end("failed")
        self._error = {"code": "server_error", "message": openai_error(error)["error"]["message"]}

    def cancel(self) -> bytes:
        """End it where it is. There is no event for that but the one of a failure."""
        self._end("cancelled")
        data = self._encode([("response.failed", {"response": self.snapshot()})])
        self._settle()
        return data

    def _settle(self) -> None:
        if self._keep is not None:
            self._keep(self)

    def _end(self, status: str) -> None:
        """End without the events of what is still open."""
        self.status = status
        if self._open is not None:
            self._open.status = "incomplete"
            self._open = None

    # ------------------------------------------------------------------ the fold

    def _fold(self, delta: Delta) -> Iterator[Event]:
        self.tally.feed(delta)
        if self.status == "queued":
            yield from self._begin()
        if self._shape.logprobs:
            self._score(delta)
        if delta.reasoning:
            yield from self._think(delta.reasoning)
        if delta.text:
            yield from self._say(delta.text)
        if delta.tool_call is not None:
            yield from self._act(delta.tool_call)
        if delta.finish is not None:
            yield from self._finish(delta.finish == "length")

    def _begin(self) -> Iterator[Event]:
        self.status = "in_progress"
        yield "response.in_progress", {"response": self.snapshot()}

    def _score(self, delta: Delta) -> None:
        """Log-probabilities belong to the text that comes with their tokens or next; those of
        reasoning and calls to none."""
        if delta.reasoning or delta.tool_call is not None:
            self._pending.clear()
        if delta.num_reasoning < len(delta.tokens) and delta.tool_call is None:
            entries = delta.logprobs[delta.num_reasoning :]
            told = chat_logprobs(entries, self._tokenizer)["content"]
            self._pending += map(orjson.dumps, told)

    def _think(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, Reasoning):
            shape = self._shape
            made = Reasoning(len(self._items), summary=shape.summary, sealed=shape.sealed)
            yield from self._start(made)
        assert isinstance(self._open, Reasoning)
        yield from self._open.delta(text)

    def _say(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, Message):
            yield from self._start(Message(len(self._items)))
        assert isinstance(self._open, Message)
        logprobs, self._pending = self._pending, []
        yield from self._open.delta(text, logprobs)

    def _act(self, call: ToolCall) -> Iterator[Event]:
        most = self._shape.max_tool_calls
        if most is not None and call.index >= most:
            return
        if not isinstance(self._open, Call) or call.index != self._call:
            self._call = call.index
            namespace, name = self._shape.names.get(call.name or "", (None, call.name or ""))
            call_id = call.id or new_id("call")
            yield from self._start(Call(len(self._items), call_id, name, namespace, call.custom))
        assert isinstance(self._open, Call)
        yield from self._open.delta(call.arguments)

    def _start(self, item: Output) -> Iterator[Event]:
        """Open an item, which ends the one before."""
        if self._open is not None:
            yield from self._open.done("completed")
        self._items.append(item)
        self._open = item
        yield from item.added()

    def _finish(self, cut: bool) -> Iterator[Event]:
        """An answer of nothing is an empty message."""
        if not self._items and not cut:
            yield from self._start(Message(0))
        if self._open is not None:
            yield from self._open.done("incomplete" if cut else "completed")
            self._open = None
        self.status = "incomplete" if cut else "completed"
        self._completed_at = None if cut else int(time.time())

    def _encode(self, events: Iterable[Event]) -> bytes:
        return b"".join([self._event(kind, fields) for kind, fields in events])

    def _event(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        data = event({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        if self._record is not None:
            self._record(data)
        return data
