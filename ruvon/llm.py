"""LLM: the offline front door. The server's engine, driven by a plain loop.

::

    with LLM() as llm:
        for (completion,) in llm.generate(["Once upon a time", "The capital of France is"]):
            print(completion.text)
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias, Unpack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ruvon.config import EngineConfig
from ruvon.engine.engine import Pending
from ruvon.engine.startup import Started, start_engine
from ruvon.engine.types import (
    Emission,
    FinishReason,
    Job,
    SamplingParams,
    TextOptions,
    TokenLogprobs,
)
from ruvon.errors import EngineDeadError, QueueFullError, RequestError
from ruvon.models.chat import Options
from ruvon.models.text_stream import TextStream
from ruvon.telemetry import silent

Prompt: TypeAlias = str | Sequence[int]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages as the OpenAI API has them: role, content ..."""

PLAIN_TEXT = TextOptions()


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of one prompt."""

    index: int  # among the prompt's n
    text: str
    tokens: tuple[int, ...]  # all that were drawn, one that stopped it included
    finish_reason: FinishReason
    stop_reason: str | int | None  # the stop string or stop token id that ended it
    error: str | None  # why it failed, where finish_reason is "error"
    logprobs: tuple[TokenLogprobs, ...] | None  # one a token, if asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None  # None for the first token
    num_prompt: int
    num_cached: int  # prompt tokens found in the prefix cache


@dataclass(slots=True)
class Growing:
    """A completion on its way."""

    job: Job
    index: int
    stream: TextStream
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached: int = 0
    finish: FinishReason | None = None
    stop: str | int | None = None
    error: str | None = None

    def push(self, emission: Emission) -> str:
        """Take in an emission; returns the text it adds. A stop string finishes it here."""
        tokens, self.num_cached = emission.tokens, emission.num_cached
        self.tokens += tokens
        if emission.logprobs:
            self.logprobs += emission.logprobs
        if emission.prompt_logprobs:
            self.prompt_logprobs = emission.prompt_logprobs
        hidden = emission.stop_token is not None and not self.job.text.include_stop
        piece = self.stream.push(tokens[:-1] if hidden else tokens)
        if self.stream.stopped is not None:
            self.finish, self.stop = "stop", self.stream.stopped
        elif emission.finish is not None:
            piece += self._finish(emission)
        self.text += piece
        return piece

    def _finish(self, emission: Emission) -> str:
        """Note how the engine finished it; returns the rest of its text."""
        self.finish, self.error = emission.finish, emission.error
        if emission.stop_token in self.job.sampling.stop_token_ids:
            self.stop = emission.stop_token
        return self.stream.finish()

    def completion(self) -> Completion:
        assert self.finish is not None, "still growing"
        return Completion(
            index=self.index,
            text=self.text,
            tokens=tuple(self.tokens),
            finish_reason=self.finish,
            stop_reason=self.stop,
            error=self.error,
            logprobs=None if self.job.sampling.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            num_prompt=len(self.job.prompt),
            num_cached=self.num_cached,
        )


class LLM:
    """A model in this process. Not for use from several threads at once."""

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        """Load a folder, a GGUF file, a hub id or the default; ``settings`` are the fields of
        `EngineConfig`. Raises ConfigError or LoadError."""
        self._take(start_engine(EngineConfig(model=model, **settings), silent))

    @classmethod
    def over(cls, started: Started) -> LLM:
        """An LLM over an engine that has been started already, and is now this one's to close."""
        llm = cls.__new__(cls)
        llm._take(started)
        return llm

    def _take(self, started: Started) -> None:
        self.engine = started.engine
        self.tokenizer = started.tokenizer
        self.started = started
        self._closed = False

    def close(self) -> None:
        """End the engine's thread; nothing can be generated any more. The memory goes with the
        object."""
        self._closed = True
        self.started.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ what people call

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        text: TextOptions = PLAIN_TEXT,
        *,
        n: int = 1,
        use_tqdm: bool = True,
    ) -> list[list[Completion]]:
        """Complete prompts, given as text or token ids: a list of ``n`` completions for each.

        One ``sampling`` is for all prompts, a list has one for each; without it the model's own
        defaults hold. ``use_tqdm`` shows a progress bar on a terminal. Raises RequestError, before
        anything is computed, for what cannot run.
        """
        encoded = [self._encode(prompt) for prompt in _listed(prompts)]
        return self._finish(self._jobs(encoded, sampling, text, n), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        text: TextOptions = PLAIN_TEXT,
        *,
        n: int = 1,
        use_tqdm: bool = True,
        **template: Unpack[Options],
    ) -> list[list[Completion]]:
        """Answer one conversation or several, rendered with the model's chat template and its
        options. Without ``sampling`` the model's own defaults hold, and answers are as long as
        it likes."""
        encoded = [self.encode_chat(talk, **template) for talk in _listed_talks(messages)]
        sampling = sampling or self.default_sampling(max_tokens=None)
        return self._finish(self._jobs(encoded, sampling, text, n), use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
    ) -> Generator[str, None, Completion]:
        """One completion, its text piece by piece; the generator's value is the whole. Closing it
        stops the work. Raises RequestError, before anything is computed, for what cannot run."""
        return self._pieces(self._jobs([self._encode(prompt)], sampling, text, 1))

    def _pieces(self, jobs: Sequence[Job]) -> Generator[str, None, Completion]:
        growing = self._grow(jobs)
        with closing(self._run(jobs)) as emissions:
            for emission in emissions:
                yield self._push(growing, emission)
        return growing[0].completion()

    def default_sampling(self, **fields: Any) -> SamplingParams:
        """What the model asks for by itself, with ``fields`` of `SamplingParams` over it."""
        return SamplingParams(**{**self.started.defaults, **fields})

    def encode_chat(self, messages: Conversation, **template: Unpack[Options]) -> list[int]:
        """The token ids that a conversation becomes."""
        return self.started.chat.encode(messages, **template)

    # ------------------------------------------------------------------ jobs in

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        start = self.tokenizer.bos_id
        return self.tokenizer.encode(prompt) or ([] if start is None else [start])

    def _jobs(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        text: TextOptions,
        n: int,
    ) -> list[Job]:
        """Jobs that the engine will take, sooner or later."""
        self._check_open()
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or self.default_sampling()] * len(prompts)
        if len(sampling) != len(prompts):
            raise RequestError(f"{len(sampling)} sampling for {len(prompts)} prompts", "sampling")
        jobs = [
            Job(tuple(ids), params, text, n) for ids, params in zip(prompts, sampling, strict=True)
        ]
        for job in jobs:
            self.engine.validate(job)
        return jobs

    def _grow(self, jobs: Sequence[Job]) -> list[Growing]:
        """A place for each completion, where `Emission.index` finds it."""
        return [
            Growing(
                job,
                k,
                self.tokenizer.stream(
                    stop=job.text.stop,
                    include_stop=job.text.include_stop,
                    min_tokens=job.sampling.min_tokens,
                    skip_special_tokens=job.text.skip_special_tokens,
                    prompt_ids=job.prompt[-4:],
                ),
            )
            for job in jobs
            for k in range(job.n)
        ]

    # ------------------------------------------------------------------ tokens out

    def _finish(self, jobs: Sequence[Job], use_tqdm: bool) -> list[list[Completion]]:
        growing = self._grow(jobs)
        began, num_tokens = time.monotonic(), 0
        with progress_bar(use_tqdm) as bar, closing(self._run(jobs)) as emissions:
            task = bar.add_task("generating", total=len(growing), rate="")
            for emission in emissions:
                self._push(growing, emission)
                num_tokens += len(emission.tokens)
                if growing[emission.index].finish is not None:
                    rate = num_tokens / (time.monotonic() - began)
                    bar.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")
        done = iter(growing)
        return [[next(done).completion() for _ in range(job.n)] for job in jobs]

    def _push(self, growing: Sequence[Growing], emission: Emission) -> str:
        one = growing[emission.index]
        piece = one.push(emission)
        if one.finish is not None and emission.finish is None:
            self.engine.abort([emission.seq_id])  # a stop string, of which the engine knows nothing
        return piece

    def _run(self, jobs: Sequence[Job]) -> Generator[Emission]:
        """Run jobs to their end. However it ends, nothing of them stays in the engine."""
        self._check_idle()
        waiting, first = deque(jobs), 0
        seq_ids: list[int] = []
        pending: deque[Pending] = deque()
        try:
            while waiting or self.engine.has_work:
                while waiting and (added := self._add(waiting[0], first)):
                    first += waiting.popleft().n
                    seq_ids += added
                self._check_open()  # between pieces of a stream anything may happen
                while (step := self.engine.launch(time.monotonic())) is not None:
                    pending.append(step)
                emissions = self.engine.collect(pending[0])
                pending.popleft()
                yield from emissions
        finally:
            self.engine.abort(seq_ids)
            self._settle(pending)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this LLM is closed")

    def _check_idle(self) -> None:
        self._check_open()
        self.engine.check_alive()
        if self.engine.has_work:
            raise RuntimeError("this LLM is in the middle of another generation")

    def _add(self, job: Job, first: int) -> list[int]:
        """Sequence ids; none if the queue is full for now."""
        try:
            return self.engine.add(job, time.monotonic(), first)
        except QueueFullError:
            return []

    def _settle(self, pending: Iterable[Pending]) -> None:
        """Wait for the steps that an end before time left under way, so that blocks are freed."""
        with suppress(EngineDeadError):  # whoever comes next is told
            for step in pending:
                self.engine.collect(step)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts, or the one that a text or token ids are."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [item for item in prompts if isinstance(item, int)]
    several = [item for item in prompts if not isinstance(item, int)]
    if ids and several:
        raise RequestError("prompts must not mix token ids with texts and lists", "prompts")
    return [ids] if ids else several


def _listed_talks(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Several conversations, or the one that messages are."""
    one = [item for item in messages if isinstance(item, Mapping)]
    several = [item for item in messages if not isinstance(item, Mapping)]
    if one and several:
        raise RequestError("messages must not mix messages with conversations", "messages")
    return [one] if one else several


def progress_bar(shown: bool) -> Progress:
    """Completions done and tokens per second, on standard error if that is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not (shown and sys.stderr.isatty()),
    )
