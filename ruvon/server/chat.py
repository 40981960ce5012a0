"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.models.chat import ChatFormat, Delta
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.answers import Answer
from ruvon.server.choices import Piece
from ruvon.server.logprobs import chat_logprobs, prompt_logprobs
from ruvon.server.parsing import parse
from ruvon.server.requests import prepare_chat
from ruvon.server.schemas import ChatRequest
from ruvon.server.state import STATE
from ruvon.server.wire import ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprobs, ChatMessage


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    state = http.app[STATE]
    service = state.ready()
    await service.loop.turn()
    request, ignored = parse(ChatRequest, await http.read(), state.server.strict)
    service.check_model(request.model)
    jobs = await prepare_chat(request, service, state.server.max_logprobs)
    format = ChatCompletionFormat(request, jobs[0], service.tokenizer, service.chat)
    return await Answer(request, jobs, format, service).send(http, ignored)


class ChatCompletionFormat:
    """Writes chat completions: a chunk that names the role, chunks of content, one that ends."""

    id_prefix = "chatcmpl"
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, request: ChatRequest, job: Job, tokenizer: Tokenizer, chat: ChatFormat
    ) -> None:
        self._parsers = [chat.parser() for _ in range(job.n)]
        self._request = request
        self._job = job
        self._tokenizer = tokenizer
        last = request.messages[-1]
        self._echo = last.text if request.echo and last.role == "assistant" else ""

    def opening(self) -> tuple[Sequence[ChatChunkChoice], Mapping[str, object] | None]:
        extra = {"prompt_token_ids": self._job.prompt} if self._request.return_token_ids else None
        return [
            {
                "index": index,
                "delta": {"role": "assistant", "content": self._echo},
                "logprobs": None,
                "finish_reason": None,
            }
            for index in range(self._job.n)
        ], extra

    def chunks(self, piece: Piece) -> Sequence[ChatChunkChoice]:
        logprobs = self._logprobs(piece)
        wants_ids = bool(self._request.return_token_ids and piece.tokens)
        deltas: list[ChatDelta] = [_delta(delta) for delta in self._parse(piece)]
        if not deltas and (logprobs is not None or wants_ids):
            deltas = [{"content": ""}]
        chunks: list[ChatChunkChoice] = [
            {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]
        if chunks:  # what a step's tokens say goes with the first of its chunks
            chunks[0]["logprobs"] = logprobs
            if wants_ids:
                chunks[0]["token_ids"] = piece.tokens
        if piece.finish is not None:
            chunks.append(
                {
                    "index": piece.index,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": piece.finish,
                    "stop_reason": piece.stop_reason,
                }
            )
        return chunks

    def _parse(self, piece: Piece) -> list[Delta]:
        parser = self._parsers[piece.index]
        deltas = parser.push(piece.text)
        return deltas if piece.finish is None else [*deltas, *parser.finish()]

    def whole(self, pieces: Sequence[Piece]) -> Mapping[str, object]:
        fields: dict[str, object] = {
            "choices": [self._choice(piece) for piece in pieces],
            "service_tier": "default",
        }
        asked = pieces[0].prompt_logprobs
        if asked is not None:
            fields["prompt_logprobs"] = prompt_logprobs(asked, self._tokenizer)
        if self._request.return_token_ids:
            fields["prompt_token_ids"] = self._job.prompt
        return fields

    def _choice(self, piece: Piece) -> ChatChoice:
        choice: ChatChoice = {
            "index": piece.index,
            "message": self._message(piece),
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
            "stop_reason": piece.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = piece.tokens
        return choice

    def _message(self, piece: Piece) -> ChatMessage:
        deltas = self._parse(piece)
        message: ChatMessage = {
            "role": "assistant",
            "content": self._echo + "".join(delta.text for delta in deltas),
            "refusal": None,
            "annotations": [],
        }
        reasoning = "".join(delta.reasoning for delta in deltas)
        if reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        return message

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(piece.logprobs, self._tokenizer) if piece.logprobs else None


def _delta(delta: Delta) -> ChatDelta:
    """Reasoning goes under both of the names that clients read."""
    if delta.reasoning:
        return {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning}
    return {"content": delta.text}
