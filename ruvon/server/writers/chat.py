"""Chat completions: a chunk that names the role, chunks of content, one that ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ruvon.deltas import Delta, TokenLogprobs
from ruvon.engine.types import Job
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.events import DONE, error_event
from ruvon.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from ruvon.server.schemas import ChatRequest
from ruvon.server.state import Service
from ruvon.server.writers.envelope import Envelope
from ruvon.server.writers.logprobs import chat_logprobs, prompt_logprobs


class ChatWriter:
    """Writes the answer to one chat."""

    done = DONE
    error = staticmethod(error_event)

    def __init__(self, request: ChatRequest, job: Job, service: Service) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._envelope = Envelope(request, service, [job], id_prefix="chatcmpl", kind=kind)
        self.id, self.tally = self._envelope.id, self._envelope.tally
        self._request = request
        self._job = job
        self._tokenizer: Tokenizer = service.tokenizer
        self._chunks: list[list[ChatChunkChoice]] = [[self._role(k)] for k in range(job.n)]
        self._prompt_logprobs: Sequence[TokenLogprobs | None] | None = None

    def opening(self) -> bytes:
        extra = {"prompt_token_ids": self._job.prompt} if self._request.return_token_ids else None
        return b"".join([self._envelope.chunk(chunk, extra) for (chunk,) in self._chunks])

    def events(self, delta: Delta) -> bytes:
        return b"".join([self._envelope.chunk(chunk) for chunk in self._fold(delta)])

    def closing(self) -> bytes:
        return self._envelope.closing()

    def feed(self, delta: Delta) -> None:
        self._chunks[delta.index] += self._fold(delta)

    def result(self) -> Mapping[str, object]:
        fields: dict[str, object] = {
            "choices": [self._joined(chunks) for chunks in self._chunks],
            "service_tier": "default",
        }
        if self._prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._prompt_logprobs, self._tokenizer)
        if self._request.return_token_ids:
            fields["prompt_token_ids"] = self._job.prompt
        return self._envelope.whole(fields)

    # ------------------------------------------------------------------ one delta

    def _role(self, index: int) -> ChatChunkChoice:
        """The first chunk. It holds what the answer continues, if that is to be echoed."""
        last = self._request.messages[-1]
        echo = last.text if self._request.echo and last.role == "assistant" else ""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": echo},
            "logprobs": None,
            "finish_reason": None,
        }

    def _fold(self, delta: Delta) -> list[ChatChunkChoice]:
        """The chunks that a delta makes."""
        self.tally.feed(delta)
        if self._prompt_logprobs is None:
            self._prompt_logprobs = delta.prompt_logprobs
        chunks: list[ChatChunkChoice] = []
        wants_ids = bool(self._request.return_token_ids and delta.tokens)
        if delta.text or delta.reasoning or delta.logprobs or wants_ids:
            chunks.append(
                {
                    "index": delta.index,
                    "delta": said(delta),
                    "logprobs": self._logprobs(delta),
                    "finish_reason": None,
                }
            )
            if wants_ids:
                chunks[0]["token_ids"] = delta.tokens
        if delta.finish is not None:
            chunks.append(
                {
                    "index": delta.index,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": delta.finish,
                    "stop_reason": delta.stop_reason,
                }
            )
        return chunks

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return chat_logprobs(delta.logprobs, self._tokenizer) if delta.logprobs else None

    # ------------------------------------------------------------------ the whole

    def _joined(self, chunks: Sequence[ChatChunkChoice]) -> ChatChoice:
        """A choice's chunks put together."""
        last = chunks[-1]
        scores = [entry for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
        choice: ChatChoice = {
            "index": last["index"],
            "message": message([chunk["delta"] for chunk in chunks]),
            "logprobs": {"content": scores, "refusal": None} if scores else None,
            "finish_reason": last["finish_reason"],
            "stop_reason": last["stop_reason"],
        }
        if self._request.return_token_ids:
            choice["token_ids"] = [id for chunk in chunks for id in chunk.get("token_ids", ())]
        return choice


def said(delta: Delta) -> ChatDelta:
    """Reasoning goes under both of the names that clients read."""
    if delta.reasoning:
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
    return {"content": delta.text}


def message(deltas: Sequence[ChatDelta]) -> ChatMessage:
    """A message of its deltas put together."""
    whole: ChatMessage = {
        "role": "assistant",
        "content": "".join([delta.get("content", "") for delta in deltas]),
        "refusal": None,
        "annotations": [],
    }
    reasoning = "".join([delta.get("reasoning", "") for delta in deltas])
    if reasoning:
        whole["reasoning"] = whole["reasoning_content"] = reasoning
    return whole
