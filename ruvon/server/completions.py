"""``POST /v1/completions``: text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiohttp import web

from ruvon.engine.types import Job, TokenLogprobs
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.answers import Answer
from ruvon.server.choices import Piece
from ruvon.server.logprobs import OffsetLogprobs, num_characters, prompt_logprobs
from ruvon.server.parsing import parse
from ruvon.server.requests import prepare_completion
from ruvon.server.schemas import CompletionRequest
from ruvon.server.state import STATE
from ruvon.server.wire import CompletionChoice, CompletionLogprobs


async def completions(http: web.Request) -> web.StreamResponse:
    """Complete one or several prompts."""
    state = http.app[STATE]
    service = state.ready()
    await service.loop.turn()
    request, ignored = parse(CompletionRequest, await http.read(), state.server.strict)
    service.check_model(request.model)
    jobs = await prepare_completion(request, service, state.server.max_logprobs)
    format = CompletionFormat(request, jobs, service.tokenizer)
    return await Answer(request, jobs, format, service).send(http, ignored)


class CompletionFormat:
    """Writes text completions. A chunk has the form of a whole choice, and the first of each
    choice begins with the prompt if that was to be echoed."""

    id_prefix = "cmpl"
    name = chunk_name = "text_completion"

    def __init__(
        self, request: CompletionRequest, jobs: Sequence[Job], tokenizer: Tokenizer
    ) -> None:
        self._request = request
        self._jobs = jobs
        self._tokenizer = tokenizer
        self._per_job = jobs[0].n
        self._begun: set[int] = set()
        self._offsets: dict[int, OffsetLogprobs] = {}
        skip = jobs[0].text.skip_special_tokens
        self._hidden = tokenizer.special_ids if skip else frozenset()

    def opening(self) -> tuple[Sequence[object], None]:
        return (), None

    def chunks(self, piece: Piece) -> Sequence[CompletionChoice]:
        choice = self._choice(piece)
        shows = choice["text"] or choice["logprobs"] or choice["finish_reason"]
        return [choice] if shows or "token_ids" in choice else []

    def whole(self, pieces: Sequence[Piece]) -> Mapping[str, object]:
        kept = [piece for job in range(len(self._jobs)) for piece in self._best(pieces, job)]
        choices = [self._choice(piece) for piece in kept]
        for number, choice in enumerate(choices):
            choice["index"] = number
        return {"choices": choices}

    def _best(self, pieces: Sequence[Piece], job: int) -> Sequence[Piece]:
        """The ``n`` of ``best_of`` completions with the highest log-probability per token."""
        mine = pieces[job * self._per_job : (job + 1) * self._per_job]
        n = self._request.n or 1
        return mine if n == self._per_job else sorted(mine, key=mean_logprob, reverse=True)[:n]

    def _choice(self, piece: Piece) -> CompletionChoice:
        job = self._jobs[piece.index // self._per_job]
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        echo = self._echo(piece) if first and self._request.echo else ""
        choice: CompletionChoice = {
            "index": piece.index,
            "text": echo + piece.text,
            "logprobs": self._logprobs(piece, job, echo),
            "finish_reason": piece.finish,
        }
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = piece.tokens
            if first:
                choice["prompt_token_ids"] = list(job.prompt)
        if self._request.prompt_logprobs is not None and piece.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(piece.prompt_logprobs, self._tokenizer)
        return choice

    def _echo(self, piece: Piece) -> str:
        """The prompt, as it was given or as its ids read."""
        number = piece.index // self._per_job
        given = self._request.prompt[number]
        if isinstance(given, str):
            return given
        return self._tokenizer.decode(given, skip_special_tokens=bool(self._hidden))

    def _logprobs(self, piece: Piece, job: Job, echo: str) -> CompletionLogprobs | None:
        if self._request.logprobs is None:
            return None
        tokens = piece.tokens
        entries: list[TokenLogprobs | None] = [*piece.logprobs]
        if piece.index not in self._offsets:
            start = 0
            if self._request.echo:
                tokens = [*job.prompt, *tokens]
                entries = [*(piece.prompt_logprobs or ()), *entries]
                start = len(echo) - self._num_shown(job.prompt)
            self._offsets[piece.index] = OffsetLogprobs(self._tokenizer, self._hidden, start)
        return self._offsets[piece.index].add(tokens, entries) if tokens else None

    def _num_shown(self, ids: Sequence[int]) -> int:
        """Characters that these ids take in a text. A tokenizer may have put one before it."""
        shown = (self._tokenizer.token_bytes(token) for token in ids if token not in self._hidden)
        return num_characters(b"".join(shown))


def mean_logprob(piece: Piece) -> float:
    """By which OpenAI chooses among ``best_of``."""
    return sum(entry.logprob for entry in piece.logprobs) / max(len(piece.logprobs), 1)
