"""Ollama's answers: a line of JSON for what is gained, and at last one of how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import orjson

from ruvon.deltas import Delta
from ruvon.engine.types import Job
from ruvon.server.failures import ollama_error
from ruvon.server.messages_api.writer import read_input
from ruvon.server.responses import ChatDelta, ChatToolCall
from ruvon.server.writers.envelope import Tally
from ruvon.server.writers.message import Speaker, message
from ruvon.telemetry.finished import last_of

Line: TypeAlias = dict[str, Any]


class OllamaWriter:
    """Writes the answer to a chat or a prompt: text as it comes, calls when all are whole."""

    done = b""

    def __init__(self, id: str, model: str, jobs: Sequence[Job], *, is_chat: bool) -> None:
        self.id, self.tally = id, Tally(jobs)
        self._model, self._is_chat = model, is_chat
        self._speaker = Speaker("apart")
        self._said: list[ChatDelta] = []  # that is not told yet
        self._end: Line | None = None

    def opening(self) -> bytes:
        return b""

    closing = opening

    def error(self, error: Exception) -> bytes:
        return joined([ollama_error(error)])

    def events(self, delta: Delta) -> bytes:
        self.feed(delta)
        if self._end is not None:
            told = [self.line(self._said)] if self._said else []
            return joined([*told, self.line([], self._end)])
        calls = [each for each in self._said if "tool_calls" in each]
        told = [self.line([each]) for each in self._said if "tool_calls" not in each]
        self._said = calls
        return joined(told)

    def feed(self, delta: Delta) -> None:
        self.tally.feed(delta)
        self._said += self._speaker.say(delta)
        if delta.finish is not None:
            self._end = ending("length" if delta.finish == "length" else "stop", self.tally)

    def result(self) -> Mapping[str, object]:
        return self.line(self._said, self._end)

    def line(self, said: Sequence[ChatDelta], end: Line | None = None) -> Line:
        """What is ``said``, or the ``end``, or both."""
        whole = message(said)
        told: Line = {"content": whole["content"] or ""}
        if "reasoning" in whole:
            told["thinking"] = whole["reasoning"]
        if "tool_calls" in whole:
            told["tool_calls"] = [call_of(each) for each in whole["tool_calls"]]
        if self._is_chat:
            told = {"message": {"role": "assistant", **told}}
        else:
            told["response"] = told.pop("content")
        head = {"model": self._model, "created_at": timestamp(datetime.now(UTC))}
        return {**head, **told, "done": end is not None, **(end or {})}


def joined(lines: Sequence[Mapping[str, object]]) -> bytes:
    return b"".join([orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines])


def ending(reason: str, tally: Tally) -> Line:
    """Why an answer ended, and how long it took, in nanoseconds."""
    last = last_of(tally.finished)
    total, decode = (last.total, last.decode) if last else (0.0, 0.0)
    return {
        "done_reason": reason,
        "total_duration": round(1e9 * total),
        "load_duration": 0,
        "prompt_eval_count": tally.num_prompt,
        "prompt_eval_duration": round(1e9 * (total - decode)),
        "eval_count": tally.num_output,
        "eval_duration": round(1e9 * decode),
    }


def call_of(call: ChatToolCall) -> Line:
    """A call, whose arguments are an object here; a custom tool's input is one of them."""
    if "custom" in call:
        name, arguments = call["custom"]["name"], {"input": call["custom"]["input"]}
    else:
        name = call["function"]["name"]
        arguments = read_input(call["function"]["arguments"])
    return {"id": call["id"], "function": {"name": name, "arguments": arguments}}


def timestamp(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
