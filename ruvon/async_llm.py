"""AsyncLLM: the server's engine in a program of one's own, for many requests at once.

::

    async with AsyncLLM() as llm:
        async for delta in llm.stream("Once upon a time", SamplingParams(max_tokens=8)):
            print(delta.text, end="")
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Unpack

from ruvon.completion import (
    PLAIN_TEXT,
    ChatOptions,
    Completion,
    CompletionWriter,
    Conversation,
    Prompt,
    encode_prompt,
    take_turn,
)
from ruvon.config import EngineConfig
from ruvon.deltas import Delta
from ruvon.engine.detokenizer import Detokenizer, MakeParser
from ruvon.engine.loop import EngineLoop
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.engine.types import Job, SamplingParams, TextOptions
from ruvon.models.chat import PlainParser
from ruvon.telemetry import silent
from ruvon.telemetry.metrics import Metrics


class AsyncLLM:
    """A model in this process and event loop. Requests made at once are computed together; a
    task that is cancelled, or leaves a stream early, ends its request.

    Everything raises RequestError for what cannot run, QueueFullError when too many are waiting,
    EngineDeadError if a step failed for good, and RuntimeError once this is closed.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        """Says what to load, as `LLM` has it; ``async with`` loads it. Raises ConfigError."""
        config = EngineConfig(model=model, **settings)
        self._start: Callable[[], LoadedEngine] = lambda: start_engine(config, silent)
        self._loop: EngineLoop | None = None  # while this is open
        self._closed = False

    @classmethod
    def over(cls, loaded: LoadedEngine) -> AsyncLLM:
        """An AsyncLLM over an engine that has been started already, and is now this one's to
        close."""
        llm = cls()
        llm._start = lambda: loaded
        return llm

    async def __aenter__(self) -> AsyncLLM:
        """Load, in a thread. Raises ConfigError or LoadError."""
        self._check_not_closed()
        self.loaded = await asyncio.to_thread(self._start)
        engine = self.loaded.engine
        self._loop = EngineLoop(engine, Metrics("model", engine.max_model_len))
        self._loop.watch(self.loaded.failed)
        self._loop.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Abort what is running, whose readers get a RuntimeError, and end the engine's thread."""
        self._closed = True
        if self._loop is not None:
            loop, self._loop = self._loop, None
            await loop.stop(0)
            self.loaded.close()

    # ------------------------------------------------------------------ what people call

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
    ) -> AsyncGenerator[Delta]:
        """One completion of a text or of token ids, delta by delta; the last has ``finish``.

        A reader who is slow gets larger deltas. Whoever leaves early and keeps the generator should
        close it (``contextlib.aclosing``): that ends the work.
        """
        job = await self._job(partial(self._encode, prompt), sampling, text)
        async with aclosing(self._run(job, PlainParser)) as deltas:
            async for delta in deltas:
                yield delta

    async def stream_chat(
        self,
        messages: Conversation,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[Delta]:
        """The answer to a conversation, as `stream` gives it."""
        job, parser = await self._turn(messages, sampling, text, 1, **options)
        async with aclosing(self._run(job, parser)) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
        *,
        n: int = 1,
    ) -> list[Completion]:
        """``n`` completions of one prompt. For several prompts call it several times at once, such
        as with ``asyncio.gather``."""
        job = await self._job(partial(self._encode, prompt), sampling, text, n)
        return await self._finish(job, PlainParser)

    async def chat(
        self,
        messages: Conversation,
        sampling: SamplingParams | None = None,
        text: TextOptions = PLAIN_TEXT,
        *,
        n: int = 1,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]:
        """``n`` answers to one conversation, as `LLM.chat` gives them."""
        job, parser = await self._turn(messages, sampling, text, n, **options)
        return await self._finish(job, parser)

    def default_sampling(self, **fields: Any) -> SamplingParams:
        """What the model asks for by itself, with ``fields`` of `SamplingParams` over it."""
        return SamplingParams(**{**self.loaded.defaults, **fields})

    # ------------------------------------------------------------------ jobs in, deltas out

    def _check_not_closed(self) -> None:
        if self._closed:
            raise RuntimeError("this AsyncLLM is closed")

    def _open_loop(self) -> EngineLoop:
        self._check_not_closed()
        if self._loop is None:
            raise RuntimeError("this AsyncLLM is not open yet: `async with` opens it")
        return self._loop

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        return encode_prompt(prompt, self.loaded.tokenizer)

    async def _job(
        self,
        encode: Callable[[], Sequence[int]],
        sampling: SamplingParams | None,
        text: TextOptions,
        n: int = 1,
    ) -> Job:
        """A job for what ``encode`` gives; made in a thread, for a long prompt takes long."""
        engine, wanted = self._open_loop().engine, sampling or self.default_sampling()
        return await asyncio.to_thread(
            lambda: engine.prepare(Job(tuple(encode()), wanted, text, n))
        )

    async def _turn(
        self,
        messages: Conversation,
        sampling: SamplingParams | None,
        text: TextOptions,
        n: int,
        **options: Unpack[ChatOptions],
    ) -> tuple[Job, MakeParser]:
        """The job of an answer, and what reads it; made in a thread, as in `_job`."""
        engine, wanted = (
            self._open_loop().engine,
            sampling or self.default_sampling(max_tokens=None),
        )

        def make() -> tuple[Job, MakeParser]:
            turn, params = take_turn(self.loaded.chat, messages, wanted, **options)
            return engine.prepare(Job(turn.prompt, params, text, n)), turn.parser

        return await asyncio.to_thread(make)

    async def _finish(self, job: Job, parser: MakeParser) -> list[Completion]:
        writer = CompletionWriter([job])
        async with aclosing(self._run(job, parser)) as deltas:
            async for delta in deltas:
                writer.feed(delta)
        return writer.result()

    async def _run(self, job: Job, parser: MakeParser) -> AsyncGenerator[Delta]:
        """Run a job to its end. However it ends, nothing of it stays in the engine."""
        loop = self._open_loop()
        detokenizer = Detokenizer([job], self.loaded.tokenizer, parser)
        async with aclosing(loop.generate([job])) as stream:
            async for emissions in stream:
                for delta in detokenizer.push(emissions, stream.stop):
                    if delta.finish == "abort":  # nothing but `close` does that
                        self._check_not_closed()
                    yield delta
