"""Where ids become deltas: the completions of one request on their way up.

The server, `ruvon.LLM` and `ruvon.AsyncLLM` all come through here, whichever way the engine runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

from ruvon.deltas import Delta
from ruvon.engine.types import Emission, Job, gather
from ruvon.models.chat import Parser, PlainParser
from ruvon.models.text_stream import TextStream

MakeParser: TypeAlias = Callable[[TextStream], Parser]

CONTEXT = 4  # prompt ids that the text continues; a character has at most four bytes


class Texts(Protocol):
    """What is needed of a `Tokenizer`."""

    def stream(
        self,
        *,
        stop: Sequence[str],
        include_stop: bool,
        min_tokens: int,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int],
    ) -> TextStream: ...


class Detokenizer:
    """All completions of one request: ``n`` for each job, numbered through."""

    def __init__(
        self,
        jobs: Sequence[Job],
        tokenizer: Texts,
        parser: MakeParser | Sequence[MakeParser] = PlainParser,
    ) -> None:
        """``parser`` reads each completion: `PlainParser`, or a chat's, or a list of one for each
        job. Raises RequestError for an empty stop string."""
        parsers = parser if isinstance(parser, Sequence) else [parser] * len(jobs)
        self._completions = [
            _Completion(job, tokenizer, make)
            for job, make in zip(jobs, parsers, strict=True)
            for _ in range(job.n)
        ]

    def push(self, emissions: Iterable[Emission], stop: Callable[[int], None]) -> list[Delta]:
        """What the completions gain: at least one delta for each with news that has not ended.

        ``stop`` is called with the sequence of a completion that its text ends, such as a stop
        string: the engine knows nothing of those.
        """
        news: dict[int, Emission] = {}
        gather(news, emissions)
        deltas: list[Delta] = []
        for index, emission in news.items():
            completion = self._completions[index]
            if completion.ended:
                continue
            deltas += completion.push(emission)
            if completion.ended and emission.finish is None:
                stop(emission.seq_id)
        return deltas


class _Completion:
    """One completion; what it said so far is with the writers, not here."""

    __slots__ = ("_include_stop", "_parser", "_stop_ids", "_text", "ended")

    def __init__(self, job: Job, tokenizer: Texts, parser: MakeParser) -> None:
        options = job.text
        self._text = tokenizer.stream(
            stop=options.stop,
            include_stop=options.include_stop,
            min_tokens=job.sampling.min_tokens,
            skip_special_tokens=options.skip_special_tokens,
            prompt_ids=job.prompt[-CONTEXT:],
        )
        self._parser = parser(self._text)
        self._include_stop = options.include_stop
        self._stop_ids = job.sampling.stop_token_ids
        self.ended = False

    def push(self, emission: Emission) -> list[Delta]:
        """The deltas of this completion; the last may end it."""
        tokens, logprobs = emission.tokens, emission.logprobs or ()
        before = self._text.num_tokens
        hidden = emission.stop_token is not None and not self._include_stop
        deltas = self._parser.push(tokens[:-1] if hidden else tokens)
        over = self._text.over
        if over:
            num_taken = self._text.num_tokens - before  # with the one that completed the string
            tokens, logprobs = tokens[:num_taken], logprobs[:num_taken]
        self.ended = over or emission.finish is not None
        if self.ended:
            deltas += self._parser.finish()
        if not deltas:
            deltas = [Delta()]
        if self.ended:
            self._say_why(deltas[-1], emission, over)
        gained = deltas[0]
        gained.tokens, gained.logprobs = tokens, logprobs
        gained.prompt_logprobs = emission.prompt_logprobs
        gained.num_cached = emission.num_cached
        for delta in deltas:
            delta.index = emission.index
        return deltas

    def _say_why(self, delta: Delta, emission: Emission, over: bool) -> None:
        """It ended at a stop string or where the parser had enough (``over``), which is not known
        of one that was cut off, or as the engine says."""
        if over:
            delta.finish, delta.stop_reason = "stop", self._text.stopped
            return
        delta.finish, delta.error = emission.finish, emission.error
        if emission.stop_token in self._stop_ids:
            delta.stop_reason = emission.stop_token
