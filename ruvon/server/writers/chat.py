"""Chat completions: a chunk that names the role, chunks of what is said, one that ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ruvon.deltas import Delta, TokenLogprobs
from ruvon.engine.types import Job
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.events import DONE, error_event
from ruvon.server.responses import ChatChoice, ChatChunkChoice, ChatDelta
from ruvon.server.schemas import ChatRequest
from ruvon.server.state import Service
from ruvon.server.writers.envelope import Envelope
from ruvon.server.writers.logprobs import as_token_id, chat_logprobs, prompt_logprobs
from ruvon.server.writers.message import Speaker, message, place_of_reasoning


class ChatWriter:
    """Writes the answer to one chat."""

    done = DONE
    error = staticmethod(error_event)

    def __init__(
        self, request: ChatRequest, job: Job, service: Service, prompt_text: str | None = None
    ) -> None:
        """``prompt_text`` is the prompt as the model reads it, if it is to be told."""
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._envelope = Envelope(request, service, [job], id_prefix="chatcmpl", kind=kind)
        self.id, self.tally = self._envelope.id, self._envelope.tally
        self._request = request
        self._tokenizer: Tokenizer = service.tokenizer
        self._name = as_token_id if request.return_tokens_as_token_ids else None
        self._prompt: dict[str, object] = {}
        if request.return_token_ids:
            self._prompt["prompt_token_ids"] = job.prompt
        if prompt_text is not None:
            self._prompt["prompt_text"] = prompt_text
        self._speakers = [Speaker(place_of_reasoning(request)) for _ in range(job.n)]
        self._chunks: list[list[ChatChunkChoice]] = [[self._role(k)] for k in range(job.n)]
        self._prompt_logprobs: Sequence[TokenLogprobs | None] | None = None

    def opening(self) -> bytes:
        """A chunk for each choice; the first of all tells of the prompt."""
        first, *others = [chunk for (chunk,) in self._chunks]
        data = self._envelope.chunk(first, self._prompt or None)
        return data + b"".join([self._envelope.chunk(chunk) for chunk in others])

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
        if self._request.metadata is not None:
            fields["metadata"] = self._request.metadata
        if self._prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._prompt_logprobs, self._tokenizer)
        return self._envelope.whole(fields | self._prompt)

    # ------------------------------------------------------------------ one delta

    def _role(self, index: int) -> ChatChunkChoice:
        """The first chunk. It holds what the answer continues, if that is to be echoed."""
        last = self._request.messages[-1]
        echo = last.text if self._request.echo and last.role == "assistant" else ""
        return chunk(index, {"role": "assistant", "content": echo})

    def _fold(self, delta: Delta) -> list[ChatChunkChoice]:
        """The chunks that a delta makes."""
        self.tally.feed(delta)
        if self._prompt_logprobs is None:
            self._prompt_logprobs = delta.prompt_logprobs
        speaker = self._speakers[delta.index]
        said = speaker.say(delta)
        wants_ids = bool(self._request.return_token_ids and delta.tokens)
        if not said and (delta.logprobs or wants_ids):
            said = [{"content": ""}]
        chunks = [chunk(delta.index, each) for each in said]
        if delta.logprobs:
            chunks[0]["logprobs"] = chat_logprobs(delta.logprobs, self._tokenizer, self._name)
        if wants_ids:
            chunks[0]["token_ids"] = delta.tokens
        if delta.finish is not None:
            end = chunk(delta.index, {})
            called = delta.finish == "stop" and speaker.called
            end["finish_reason"] = "tool_calls" if called else delta.finish
            end["stop_reason"] = delta.stop_reason
            chunks.append(end)
        return chunks

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


def chunk(index: int, delta: ChatDelta) -> ChatChunkChoice:
    """A chunk that says ``delta``."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
