"""Messages: a stream opens, fills and closes content blocks; an answer is those blocks at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias
from uuid import uuid4

from pydantic_core import from_json

from ruvon.deltas import Delta, ToolCall
from ruvon.engine.types import Job
from ruvon.server.events import KEEP_ALIVE, event
from ruvon.server.failures import anthropic_error
from ruvon.server.messages_api.convert import sign
from ruvon.server.messages_api.schemas import MessagesRequest
from ruvon.server.state import Service
from ruvon.server.writers.envelope import Tally

Event: TypeAlias = dict[str, Any]

PING = event({"type": "ping"}, "ping")
PIECES = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
"""Where the pieces of a block hold their text."""


class MessagesWriter:
    """Writes the answer to one request."""

    done = b""

    def __init__(
        self, request: MessagesRequest, job: Job, service: Service, request_id: str
    ) -> None:
        self.id = f"msg_{uuid4().hex[:24]}"
        self.tally = Tally([job])
        self._request = request
        self._request_id = request_id
        self._model = request.model or service.names[0]
        # As far as the context goes, whatever the request's limit.
        self._room = service.max_model_len - len(job.prompt)
        self._blocks = Blocks(shows_thinking=not hides_thinking(request))
        self._begun = False
        self._content: list[Event] = []  # of the whole
        self._pieces: list[str] = []  # of its last block
        self._end: Event = {}

    # ------------------------------------------------------------------ the stream

    def beat(self) -> bytes:
        """A sign of life; a stream's first event is no ping."""
        return PING if self._begun else KEEP_ALIVE

    def opening(self) -> bytes:
        """Nothing yet: the first event says how much of the prompt was found in the cache, which
        the first delta tells."""
        return b""

    def events(self, delta: Delta) -> bytes:
        return b"".join([event(data, data["type"]) for data in self._fold(delta)])

    def closing(self) -> bytes:
        return b""

    def error(self, error: Exception) -> bytes:
        return event(anthropic_error(error, self._request_id), "error")

    # ------------------------------------------------------------------ the whole

    def feed(self, delta: Delta) -> None:
        for data in self._fold(delta):
            self._put(data)

    def result(self) -> Mapping[str, object]:
        return self._message(self._content, self._end)

    def _put(self, data: Event) -> None:
        """Put an event where a client would."""
        match data["type"]:
            case "content_block_start":
                self._content.append(data["content_block"])
                self._pieces = []
            case "content_block_delta":
                kind = data["delta"]["type"]
                if kind == "signature_delta":
                    self._content[-1]["signature"] = data["delta"]["signature"]
                else:
                    self._pieces.append(data["delta"][PIECES[kind]])
            case "content_block_stop":
                self._content[-1] |= joined(self._content[-1]["type"], "".join(self._pieces))
            case "message_delta":
                self._end = data["delta"]

    # ------------------------------------------------------------------ one delta

    def _fold(self, delta: Delta) -> Iterator[Event]:
        """The events that a delta makes."""
        self.tally.feed(delta)
        if not self._begun:
            self._begun = True
            yield {"type": "message_start", "message": self._message([], {})}
        yield from self._blocks.push(delta)
        if delta.finish is not None:
            yield from self._blocks.close()
            yield {"type": "message_delta", "delta": self._why(delta), "usage": self._usage()}
            yield {"type": "message_stop"}

    def _why(self, delta: Delta) -> Event:
        """Why the answer ended."""
        sequence = None
        if delta.finish == "length":
            full = self.tally.num_output >= self._room
            reason = "model_context_window_exceeded" if full else "max_tokens"
        elif isinstance(delta.stop_reason, str):
            reason, sequence = "stop_sequence", delta.stop_reason
        else:
            reason = "tool_use" if self._blocks.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _message(self, content: list[Event], end: Event) -> Event:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            **end,
            "usage": self._usage(),
        }

    def _usage(self) -> Event:
        """Every prefix is cached at no cost, so none counts as written to the cache."""
        tally = self.tally
        return {
            "input_tokens": tally.num_prompt - tally.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": tally.num_cached,
            "output_tokens": tally.num_output,
            "output_tokens_details": {"thinking_tokens": tally.num_reasoning},
            "service_tier": "standard",
        }


class Blocks:
    """Deltas → events of content blocks, of which one is open at a time.

    White space is held back until something follows it in the same block: models put line breaks
    between thoughts, words and calls, and a block of nothing else is an error to Anthropic where a
    client sends it back.
    """

    def __init__(self, *, shows_thinking: bool) -> None:
        self.num_calls = 0
        self._shows_thinking = shows_thinking
        self._kind = ""  # of the block that is open or about to be
        self._call = -1  # the index of its call
        self._index = -1
        self._open = False
        self._held: list[str] = []  # white space, or thoughts that are not shown

    def push(self, delta: Delta) -> Iterator[Event]:
        if delta.reasoning:
            yield from self._say("thinking", delta.reasoning)
        if delta.text:
            yield from self._say("text", delta.text)
        if delta.tool_call is not None:
            yield from self._use(delta.tool_call)

    def close(self) -> Iterator[Event]:
        """End the block that is open."""
        if self._open and self._kind == "thinking":
            signature = sign("".join(self._held))
            yield self._delta({"type": "signature_delta", "signature": signature})
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
        self._kind, self._open, self._held = "", False, []

    def _say(self, kind: str, text: str) -> Iterator[Event]:
        if self._kind != kind:
            yield from self.close()
            self._kind = kind
        if text.isspace() and not self._open:
            self._held.append(text)
            return
        if not self._open:
            text, self._held = "".join([*self._held, text]), []
            signature = {"signature": ""} if kind == "thinking" else {}
            yield self._start({"type": kind, kind: "", **signature})
        if kind == "thinking" and not self._shows_thinking:
            self._held.append(text)
        else:
            yield self._delta({"type": f"{kind}_delta", kind: text})

    def _use(self, call: ToolCall) -> Iterator[Event]:
        if self._kind != "tool_use" or call.index != self._call:
            yield from self.close()
            self._kind, self._call = "tool_use", call.index
            self.num_calls += 1
            id = (call.id or uuid4().hex[:24]).removeprefix("call_")
            name = call.name or ""
            yield self._start({"type": "tool_use", "id": f"toolu_{id}", "name": name, "input": {}})
        if call.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _start(self, block: Event) -> Event:
        self._open = True
        self._index += 1
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def joined(kind: str, text: str) -> Event:
    """What the pieces of a block are together."""
    return {"input": read_input(text)} if kind == "tool_use" else {kind: text}


def read_input(text: str) -> Event:
    """A call's input; of one that broke off, the members that are whole. What is no object counts
    as an empty one, for an answer has no other place for it."""
    try:
        value = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def hides_thinking(request: MessagesRequest) -> bool:
    return request.thinking is not None and request.thinking.display == "omitted"
