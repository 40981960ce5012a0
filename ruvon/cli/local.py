"""The engine in this very process, as a source of answers: no HTTP and no event loop."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ruvon import telemetry
from ruvon.cli.answers import Message, Options, Piece
from ruvon.config import EngineConfig
from ruvon.engine.startup import start_engine
from ruvon.engine.types import TextOptions
from ruvon.errors import RuvonError
from ruvon.llm import LLM, Completion, Prompt
from ruvon.models.chat import Delta, Parser, PlainParser
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
        return self.llm.started.checkpoint.name

    @property
    def defaults(self) -> Mapping[str, Any]:
        return self.llm.started.defaults

    def chat(self, messages: Sequence[Message], options: Options) -> Generator[Piece]:
        prompt, parser = self.llm.encode_chat(messages), self.llm.started.chat.parser()
        return self._answer(prompt, parser, {"max_tokens": None, **options})

    def complete(self, prompt: str, options: Options) -> Generator[Piece]:
        return self._answer(prompt, PlainParser(), {"max_tokens": COMPLETION_TOKENS, **options})

    def _answer(self, prompt: Prompt, parser: Parser, options: Options) -> Generator[Piece]:
        fields: dict[str, Any] = {key: value for key, value in options.items() if key != "stop"}
        text = TextOptions(stop=tuple(options.get("stop", ())))
        with closing(self.llm.stream(prompt, self.llm.default_sampling(**fields), text)) as pieces:
            completion = yield from parse(pieces, parser)
        if completion.error:
            raise RuvonError(completion.error)
        yield Piece(
            finish=completion.finish_reason,
            num_prompt=completion.num_prompt,
            num_output=len(completion.tokens),
        )


def parse(
    pieces: Generator[str, None, Completion], parser: Parser
) -> Generator[Piece, None, Completion]:
    """Text → what it means in this model's format; the value is the whole completion."""
    while True:
        try:
            deltas = parser.push(next(pieces))
        except StopIteration as end:
            yield from map(_piece, parser.finish())
            return end.value  # type: ignore[no-any-return]
        yield from map(_piece, deltas)


def _piece(delta: Delta) -> Piece:
    return Piece(text=delta.text, reasoning=delta.reasoning)


@contextmanager
def loading_bar() -> Iterator[telemetry.Progress]:
    """A bar that shows the phase of loading and goes away when done, where stderr is a terminal."""
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda phase, share: bar.update(task, description=phase, completed=share)
