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
from numbers import Integral
from types import TracebackType
from typing import Any, Unpack

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ruvon.completion import (
    PLAIN_TEXT,
    ChatOptions,
    Completion,
    CompletionWriter,
    Conversation,
    Prompt,
    check_messages,
    encode_prompt,
    take_turn,
)
from ruvon.config import EngineConfig
from ruvon.deltas import Delta
from ruvon.engine.detokenizer import Detokenizer, MakeParser
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.engine.steps import Pending
from ruvon.engine.types import Emission, Job, SamplingParams, TextOptions, gather
from ruvon.errors import EngineDeadError, QueueFullError, RequestError
from ruvon.models.chat import Options, PlainParser
from ruvon.telemetry import silent

log = structlog.get_logger(__name__)

GATHERED = 16  # steps whose tokens become text at once, which costs less than one by one


class LLM:
    """A model in this process. Not for use from several threads at once."""

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        """Load a folder, a GGUF file, a hub id or the default; ``settings`` are the fields of
        `EngineConfig`. Raises ConfigError or LoadError."""
        self._take(start_engine(EngineConfig(model=model, **settings), silent))

    @classmethod
    def over(cls, loaded: LoadedEngine) -> LLM:
        """An LLM over an engine that has been started already, and is now this one's to close."""
        llm = cls.__new__(cls)
        llm._take(loaded)
        return llm

    def _take(self, loaded: LoadedEngine) -> None:
        self.engine = loaded.engine
        self.tokenizer = loaded.tokenizer
        self.loaded = loaded
        self._closed = False

    def close(self) -> None:
        """End the engine's thread; nothing can be generated any more. The memory goes with the
        object."""
        self._closed = True
        self.loaded.close()

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
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in _listed(prompts)]
        jobs = self._jobs(encoded, sampling, text, n)
        return self._finish(jobs, [PlainParser] * len(jobs), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        text: TextOptions = PLAIN_TEXT,
        *,
        n: int = 1,
        use_tqdm: bool = True,
        **options: Unpack[ChatOptions],
    ) -> list[list[Completion]]:
        """Answer one conversation or several, rendered with the model's chat template. Without
        ``sampling`` the model's own defaults hold, and answers are as long as it likes. With
        ``tools`` an answer may have ``tool_calls``."""
        jobs, parsers = self._turns(_listed_talks(messages), sampling, text, n, **options)
        return self._finish(jobs, parsers, use_tqdm)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
    ) -> Generator[Delta, None, Completion]:
        """One completion, delta by delta; the generator's value is the whole. Closing it stops the
        work. Raises RequestError, before anything is computed, for what cannot run."""
        ids = encode_prompt(prompt, self.tokenizer)
        return self._stream(self._jobs([ids], sampling, text, 1), [PlainParser])

    def stream_chat(
        self,
        messages: Conversation,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
        **options: Unpack[ChatOptions],
    ) -> Generator[Delta, None, Completion]:
        """The answer to a conversation, as `stream` gives it."""
        jobs, parsers = self._turns([messages], sampling, text, 1, **options)
        return self._stream(jobs, parsers)

    def default_sampling(self, **fields: Any) -> SamplingParams:
        """What the model asks for by itself, with ``fields`` of `SamplingParams` over it."""
        return SamplingParams(**{**self.loaded.defaults, **fields})

    def encode_chat(self, messages: Conversation, **template: Unpack[Options]) -> list[int]:
        """The token ids that a conversation becomes."""
        return self.loaded.chat.encode(messages, **template)

    # ------------------------------------------------------------------ jobs in

    def _jobs(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        text: TextOptions,
        n: int,
    ) -> list[Job]:
        """Jobs that the engine will take, sooner or later."""
        self._check_open()
        each = _for_each(sampling or self.default_sampling(), len(prompts))
        return [
            self.engine.prepare(Job(tuple(ids), params, text, n))
            for ids, params in zip(prompts, each, strict=True)
        ]

    def _turns(
        self,
        talks: Sequence[Conversation],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        text: TextOptions,
        n: int,
        **options: Unpack[ChatOptions],
    ) -> tuple[list[Job], list[MakeParser]]:
        """A job for each conversation, and what reads its answers."""
        self._check_open()
        each = _for_each(sampling or self.default_sampling(max_tokens=None), len(talks))
        turns = [
            take_turn(self.loaded.chat, talk, params, **options)
            for talk, params in zip(talks, each, strict=True)
        ]
        prompts, params = [turn.prompt for turn, _ in turns], [params for _, params in turns]
        return self._jobs(prompts, params, text, n), [turn.parser for turn, _ in turns]

    # ------------------------------------------------------------------ deltas out

    def _finish(
        self, jobs: Sequence[Job], parsers: Sequence[MakeParser], use_tqdm: bool
    ) -> list[list[Completion]]:
        writer = CompletionWriter(jobs)
        began, num_tokens = time.monotonic(), 0
        # What may end a text has to be found at once; else nobody looks at one before its end.
        free = not any(job.text.stop for job in jobs) and {*parsers} == {PlainParser}
        every = GATHERED if free else 1
        with progress_bar(use_tqdm) as bar, closing(self._deltas(jobs, parsers, every)) as deltas:
            task = bar.add_task("generating", total=sum(job.n for job in jobs), rate="")
            for delta in deltas:
                writer.feed(delta)
                num_tokens += len(delta.tokens)
                if delta.finish is not None:
                    rate = num_tokens / (time.monotonic() - began)
                    bar.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")
        done = iter(writer.result())
        return [[next(done) for _ in range(job.n)] for job in jobs]

    def _stream(
        self, jobs: Sequence[Job], parsers: Sequence[MakeParser]
    ) -> Generator[Delta, None, Completion]:
        writer = CompletionWriter(jobs)
        with closing(self._deltas(jobs, parsers)) as deltas:
            for delta in deltas:
                writer.feed(delta)
                yield delta
        return writer.result()[0]

    def _deltas(
        self, jobs: Sequence[Job], parsers: Sequence[MakeParser], every: int = 1
    ) -> Generator[Delta]:
        """Run jobs to their end, and give their deltas after every few steps."""
        detokenizer = Detokenizer(jobs, self.tokenizer, parsers)
        news: dict[int, Emission] = {}
        with closing(self._run(jobs)) as steps:
            for number, emissions in enumerate(steps, 1):
                gather(news, emissions)
                if number % every == 0:
                    yield from detokenizer.push(news.values(), self._stop)
                    news.clear()
            yield from detokenizer.push(news.values(), self._stop)

    def _run(self, jobs: Sequence[Job]) -> Generator[list[Emission]]:
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
                self._check_open()  # between deltas of a stream anything may happen
                while (step := self.engine.launch(time.monotonic())) is not None:
                    pending.append(step)
                emissions = self.engine.collect(pending[0])
                pending.popleft()
                if self.engine.failure is not None:
                    log.error("step_failed", exc_info=self.engine.failure)
                yield emissions
        finally:
            self.engine.abort(seq_ids)
            self._settle(pending)

    def _stop(self, seq_id: int) -> None:
        self.engine.abort([seq_id])

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


def _for_each(
    sampling: SamplingParams | Sequence[SamplingParams], number: int
) -> Sequence[SamplingParams]:
    """One for each prompt, or the same for all."""
    if not isinstance(sampling, Sequence):
        return [sampling] * number
    if len(sampling) != number:
        raise RequestError(f"{len(sampling)} sampling for {number} prompts", "sampling")
    return sampling


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts, or the one that a text or token ids are."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]  # the last three of which are refused
    ids, several = _parted(prompts, Integral)
    if ids and several:
        raise RequestError("prompts must not mix token ids with texts and lists", "prompts")
    return [ids] if ids else several


def _listed_talks(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Several conversations, or the one that messages are."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        check_messages(messages)
    one, several = _parted(messages, Mapping)
    if one and several:
        raise RequestError("messages must not mix messages with conversations", "messages")
    return [one] if one else several


def _parted(items: Iterable[Any], kind: type) -> tuple[list[Any], list[Any]]:
    """Those of a kind, and the others; they are looked at once, as a generator's have to be."""
    given = list(items)
    others = [item for item in given if not isinstance(item, kind)]
    return [item for item in given if isinstance(item, kind)], others


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
