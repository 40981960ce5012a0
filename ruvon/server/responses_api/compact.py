"""A conversation made short: what the user said stays, and the model sums up all of it."""

from __future__ import annotations

import time
from typing import Any

import orjson

from ruvon.deltas import Delta
from ruvon.engine.types import Job
from ruvon.models.chat import Turn
from ruvon.models.formats.tools import Reasoning
from ruvon.server.conversation import Conversation, prepare_conversation
from ruvon.server.events import error_event
from ruvon.server.requests import sampling_params
from ruvon.server.responses_api.answers import CompactAnswer
from ruvon.server.responses_api.input import MessageItem
from ruvon.server.responses_api.items import stored
from ruvon.server.responses_api.output import new_id
from ruvon.server.responses_api.prepare import Context, all_items, transcribe
from ruvon.server.responses_api.schemas import CompactRequest
from ruvon.server.responses_api.writer import usage
from ruvon.server.schemas import SamplingFields
from ruvon.server.sealed import seal
from ruvon.server.state import Service
from ruvon.server.writers.envelope import Tally

MAX_TOKENS = 1024  # of a summary
REQUEST = (
    "Summarize our conversation so far, so that it can be continued from your summary alone: what "
    "was asked, what was decided, what was done and found, and what remains to be done."
)


def prepare_summary(
    request: CompactRequest, context: Context, service: Service
) -> tuple[Job, Turn, list[dict[str, Any]], list[str]]:
    """The job that writes the summary, the user's messages, and the names of items that mean
    nothing here. Raises RequestError."""
    items = all_items(request, context)
    transcript = transcribe(request, items)
    asked = Conversation(
        [*transcript.messages, {"role": "user", "content": REQUEST}],
        reasoning=Reasoning(enabled=False),
        param="input",
        at_most=True,
    )
    sampling = sampling_params(SamplingFields(), service, max_tokens=MAX_TOKENS)
    job, turn = prepare_conversation(asked, sampling, service)
    said = [one for one, _ in items if isinstance(one, MessageItem) and one.role == "user"]
    kept = [kept for one in said if (kept := stored(one)) is not None]
    return job, turn, kept, transcript.skipped


class CompactWriter:
    """Writes a compaction, which is not streamed."""

    done = b""
    error = staticmethod(error_event)

    def __init__(self, job: Job, items: list[dict[str, Any]]) -> None:
        self.id = new_id("resp")
        self.tally = Tally([job])
        self._items = items
        self._texts: list[str] = []

    def opening(self) -> bytes:
        return b""

    def events(self, delta: Delta) -> bytes:
        self.feed(delta)
        return b""

    def closing(self) -> bytes:
        return orjson.dumps(self.result())

    def feed(self, delta: Delta) -> None:
        self.tally.feed(delta)
        self._texts.append(delta.text)

    def result(self) -> CompactAnswer:
        summary = {
            "id": new_id("cmp"),
            "type": "compaction",
            "encrypted_content": seal("".join(self._texts)),
        }
        return {
            "id": self.id,
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*self._items, summary],
            "usage": usage(self.tally),
        }
