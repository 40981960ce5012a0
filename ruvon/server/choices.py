"""From ids to text: the completions of one request on their way up.

`Choices.push` turns a list of emissions into `Piece`s, one for each choice with news. A stream
writes pieces as they come; a whole answer folds the same pieces into one for each choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice

from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Job, TokenLogprobs
from ruvon.errors import GenerationError, NotReadyError
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.wire import Usage

CONTEXT = 8  # prompt ids that the text continues; a character has at most four bytes


@dataclass(slots=True)
class Piece:
    """What one choice gained: text, the tokens behind it, and at the end why it ended."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: str | None = None
    stop_reason: str | int | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    first, last = pieces[0], pieces[-1]
    return Piece(
        first.index,
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        logprobs=[entry for piece in pieces for entry in piece.logprobs],
        prompt_logprobs=first.prompt_logprobs,
        finish=last.finish,
        stop_reason=last.stop_reason,
    )


class Choice:
    """One completion: its text so far is with the client or in a folded piece, not here."""

    __slots__ = ("done", "include_stop", "num_tokens", "stop_ids", "text")

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        options = job.text
        self.text = tokenizer.stream(
            prompt_ids=job.prompt[-CONTEXT:],
            stop=options.stop,
            include_stop=options.include_stop,
            min_tokens=job.sampling.min_tokens,
            skip_special_tokens=options.skip_special_tokens,
        )
        self.include_stop = options.include_stop
        self.stop_ids = job.sampling.stop_token_ids
        self.num_tokens = 0
        self.done = False

    def push(self, index: int, emissions: Sequence[Emission]) -> Piece:
        """What this choice, the request's ``index``-th, gains; a stop string may end it here."""
        first, last = emissions[0], emissions[-1]
        tokens = first.tokens
        if len(emissions) > 1:
            tokens = tuple(chain.from_iterable([emission.tokens for emission in emissions]))
        hidden = last.stop_token is not None and not self.include_stop
        before = self.text.num_tokens
        piece = Piece(index, self.text.push(tokens[:-1] if hidden else tokens))
        if self.text.stopped is not None:
            tokens = tokens[: self.text.num_tokens - before]
            piece.finish, piece.stop_reason = "stop", self.text.stopped
        elif last.finish is not None:
            self._finish(last, piece)
        piece.tokens += tokens
        if first.logprobs is not None:
            scores = chain.from_iterable([emission.logprobs or () for emission in emissions])
            piece.logprobs += islice(scores, len(tokens))
        piece.prompt_logprobs = first.prompt_logprobs
        self.num_tokens += len(tokens)
        self.done = piece.finish is not None
        return piece

    def _finish(self, emission: Emission, piece: Piece) -> None:
        if emission.finish == "error":
            raise GenerationError(emission.error or "This completion could not be computed.")
        if emission.finish == "abort":
            raise NotReadyError("The server is shutting down.", retry_after=1.0)
        piece.text += self.text.finish()
        piece.finish = emission.finish
        if emission.stop_token in self.stop_ids:
            piece.stop_reason = emission.stop_token


class Choices:
    """All completions of one request: ``n`` for each job, numbered through."""

    def __init__(self, jobs: Sequence[Job], tokenizer: Tokenizer) -> None:
        self._choices = [Choice(job, tokenizer) for job in jobs for _ in range(job.n)]
        self._firsts = {0, *accumulate(job.n for job in jobs)}  # of each job, and one past all
        self._cached: dict[int, int] = {}  # first choice of a job → its cached prompt tokens
        self._num_prompt = sum(len(job.prompt) for job in jobs)

    def push(self, emissions: Iterable[Emission], stream: Stream) -> list[Piece]:
        """A piece for each choice with news. Choices that a stop string ended leave the engine.

        Raises `UnavailableError` when the engine gave a sequence up.
        """
        news: dict[int, list[Emission]] = {}
        for emission in emissions:
            news.setdefault(emission.index, []).append(emission)
        pieces = []
        for index, mine in news.items():
            choice = self._choices[index]
            if choice.done:
                continue
            if index in self._firsts:
                self._cached.setdefault(index, mine[0].num_cached)
            pieces.append(choice.push(index, mine))
            if choice.done and mine[-1].finish is None:
                stream.stop(mine[-1].seq_id)
        return pieces

    def usage(self) -> Usage:
        """Token counts so far."""
        num_output = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": num_output,
            "total_tokens": self._num_prompt + num_output,
            "prompt_tokens_details": {
                "cached_tokens": sum(self._cached.values()),
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }
