"""Text completions. A chunk has the form of a whole choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ruvon.deltas import Delta, TokenLogprobs
from ruvon.engine.types import Job
from ruvon.server.events import DONE, error_event
from ruvon.server.responses import CompletionChoice, CompletionLogprobs
from ruvon.server.schemas import CompletionRequest
from ruvon.server.state import Service
from ruvon.server.writers.envelope import Envelope
from ruvon.server.writers.logprobs import (
    OffsetLogprobs,
    as_token_id,
    join_logprobs,
    num_characters,
    prompt_logprobs,
)

NONE_HIDDEN: frozenset[int] = frozenset()


class CompletionsWriter:
    """Writes the completions of one or several prompts, ``n`` (or ``best_of``) of each."""

    done = DONE
    error = staticmethod(error_event)

    def __init__(
        self,
        request: CompletionRequest,
        jobs: Sequence[Job],
        service: Service,
        prompts: Sequence[str] = (),
    ) -> None:
        """``prompts`` are the texts that the model reads, if they are to be told."""
        self._envelope = Envelope(request, service, jobs, id_prefix="cmpl", kind="text_completion")
        self.id, self.tally = self._envelope.id, self._envelope.tally
        self._request = request
        self._jobs = jobs
        self._prompts = prompts
        self._is_whole = request.truncate_prompt_tokens is None
        self._tokenizer = service.tokenizer
        self._name = as_token_id if request.return_tokens_as_token_ids else None
        self._per_job = jobs[0].n
        num = self._per_job * len(jobs)
        self._chunks: list[list[CompletionChoice]] = [[] for _ in range(num)]
        self._scores: list[list[TokenLogprobs]] = [[] for _ in range(num)]  # to find the best
        self._begun = [False] * num
        self._offsets: dict[int, OffsetLogprobs] = {}
        skip = jobs[0].text.skip_special_tokens
        self._hidden = self._tokenizer.special_ids if skip else NONE_HIDDEN

    def opening(self) -> bytes:
        return b""

    def events(self, delta: Delta) -> bytes:
        chunk = self._fold(delta)
        shows = chunk["text"] or chunk["logprobs"] or chunk["finish_reason"]
        return self._envelope.chunk(chunk) if shows or "token_ids" in chunk else b""

    def closing(self) -> bytes:
        return self._envelope.closing()

    def feed(self, delta: Delta) -> None:
        self._chunks[delta.index].append(self._fold(delta))
        if self._chooses:
            self._scores[delta.index] += delta.logprobs

    def result(self) -> Mapping[str, object]:
        kept = [index for job in range(len(self._jobs)) for index in self._best(job)]
        choices = [joined(self._chunks[index]) for index in kept]
        for number, choice in enumerate(choices):
            choice["index"] = number
        return self._envelope.whole({"choices": choices})

    # ------------------------------------------------------------------ one delta

    def _fold(self, delta: Delta) -> CompletionChoice:
        """The chunk that a delta makes. The first of a choice begins with the prompt, if that is to
        be echoed."""
        self.tally.feed(delta)
        request = self._request
        first, self._begun[delta.index] = not self._begun[delta.index], True
        job = delta.index // self._per_job
        echo = self._echo(job) if first and request.echo else ""
        chunk: CompletionChoice = {
            "index": delta.index,
            "text": echo + delta.text,
            "logprobs": None if request.logprobs is None else self._logprobs(delta, echo),
            "finish_reason": delta.finish,
        }
        if delta.finish is not None:
            chunk["stop_reason"] = delta.stop_reason
        if request.return_token_ids:
            chunk["token_ids"] = delta.tokens
            if first:
                chunk["prompt_token_ids"] = self._jobs[job].prompt
        if first and request.return_prompt_text:
            chunk["prompt_text"] = self._prompts[job]
        if request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            chunk["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._tokenizer)
        return chunk

    def _echo(self, job: int) -> str:
        """A prompt as it was given, or as all of its ids read."""
        given = self._request.prompt[job]
        return given if isinstance(given, str) and self._is_whole else self._prompts[job]

    def _logprobs(self, delta: Delta, echo: str) -> CompletionLogprobs | None:
        """Those of the delta's tokens, and with the first those of an echoed prompt before them."""
        parts = []
        offsets = self._offsets.get(delta.index)
        if offsets is None:
            offsets = self._offsets[delta.index] = OffsetLogprobs(self._tokenizer, self._name)
            if self._request.echo:
                parts.append(self._prompt_part(offsets, delta, echo))
        if delta.tokens:
            parts.append(offsets.add(delta.tokens, delta.logprobs, self._hidden))
        return join_logprobs(parts) if parts else None

    def _prompt_part(self, offsets: OffsetLogprobs, delta: Delta, echo: str) -> CompletionLogprobs:
        """A text's ids may begin with some that it does not show, such as BOS, and with a space
        that a tokenizer has put before it; ids that were given are all shown."""
        number = delta.index // self._per_job
        prompt = self._jobs[number].prompt
        is_text = isinstance(self._request.prompt[number], str) and self._is_whole
        hidden = self._tokenizer.special_ids if is_text else NONE_HIDDEN
        shown = [self._tokenizer.token_bytes(token) for token in prompt if token not in hidden]
        offsets.move(len(echo) - num_characters(b"".join(shown)))
        return offsets.add(prompt, delta.prompt_logprobs or (), hidden)

    # ------------------------------------------------------------------ the whole

    @property
    def _chooses(self) -> bool:
        return self._per_job != (self._request.n or 1)

    def _best(self, job: int) -> Sequence[int]:
        """The ``n`` of ``best_of`` completions with the highest log-probability per token."""
        mine = range(job * self._per_job, (job + 1) * self._per_job)
        if not self._chooses:
            return mine
        likeliest = sorted(mine, key=lambda index: mean_logprob(self._scores[index]), reverse=True)
        return likeliest[: self._request.n or 1]


def joined(chunks: Sequence[CompletionChoice]) -> CompletionChoice:
    """A choice's chunks put together."""
    scores = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    whole: CompletionChoice = {
        **chunks[0],
        "text": "".join([chunk["text"] for chunk in chunks]),
        "logprobs": join_logprobs(scores) if scores else None,
        "finish_reason": chunks[-1]["finish_reason"],
        "stop_reason": chunks[-1]["stop_reason"],
    }
    if "token_ids" in whole:
        whole["token_ids"] = [id for chunk in chunks for id in chunk["token_ids"]]
    return whole


def mean_logprob(entries: Sequence[TokenLogprobs]) -> float:
    """By which OpenAI chooses among ``best_of``."""
    return sum(entry.logprob for entry in entries) / max(len(entries), 1)
