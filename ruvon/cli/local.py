"""The engine in this very process, as a source of answers: no HTTP and no event loop."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ruvon import telemetry
from ruvon.cli.answers import Answer, Message, Options, Usage
from ruvon.completion import Completion
from ruvon.config import EngineConfig
from ruvon.deltas import Delta
from ruvon.engine.startup import start_engine
from ruvon.engine.types import SamplingParams, TextOptions
from ruvon.errors import RuvonError
from ruvon.llm import LLM
from ruvon.telemetry.logs import configure_logging

COMPLETION_TOKENS = 128  # of `complete` when --max-tokens is not given; a chat may use all


@dataclass(frozen=True, slots=True)
class Local:
    """A loaded model that answers one request at a time."""

    llm: LLM

    @classmethod
    def load(cls, config: EngineConfig) -> Local:
        """Load what ``config`` names, with a progress bar on stderr."""
        configure_logging("warning")
        with loading_bar() as progress:
            return cls(LLM.over(start_engine(config, progress)))

    @property
    def name(self) -> str:
        return self.llm.loaded.checkpoint.name

    @property
    def defaults(self) -> Mapping[str, Any]:
        return self.llm.loaded.defaults

    def chat(self, messages: Sequence[Message], options: Options) -> Answer:
        sampling, text = self._read({"max_tokens": None, **options})
        return counted(self.llm.stream_chat(messages, sampling, text))

    def complete(self, prompt: str, options: Options) -> Answer:
        sampling, text = self._read({"max_tokens": COMPLETION_TOKENS, **options})
        return counted(self.llm.stream(prompt, sampling, text))

    def _read(self, options: Options) -> tuple[SamplingParams, TextOptions]:
        fields = {key: value for key, value in options.items() if key != "stop"}
        text = TextOptions(stop=tuple(options.get("stop", ())))
        return self.llm.default_sampling(**fields), text


def counted(deltas: Generator[Delta, None, Completion]) -> Answer:
    """An answer of these. Raises what was wrong with it, if it fails."""
    completion = yield from deltas
    if completion.error:
        raise RuvonError(completion.error)
    return Usage(completion.num_prompt, len(completion.tokens))


@contextmanager
def loading_bar() -> Iterator[telemetry.Progress]:
    """A bar that shows the phase of loading and goes away when done, where stderr is a terminal."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda phase, share: bar.update(task, description=phase, completed=share)
