"""A chat in the terminal: read, stream the answer, obey /commands.

Ctrl-C stops the answer that is coming; at the prompt it clears the line. Ctrl-D leaves.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ruvon.cli.answers import Answer, Message, Source, Usage
from ruvon.deltas import Delta
from ruvon.errors import RuvonError

with contextlib.suppress(ImportError):  # line editing and history, where the platform has them
    import readline  # noqa: F401

FENCE = '"""'
SETTABLE: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_tokens": int,
    "seed": int,
}


@dataclass(frozen=True, slots=True)
class Stats:
    """How an answer went; seconds. A source counts tokens at the end, so of an answer that was
    stopped only the deltas are known."""

    num_prompt: int
    num_output: int
    first: float
    total: float

    def __str__(self) -> str:
        decode = self.total - self.first
        rate = (self.num_output - 1) / decode if decode > 0 and self.num_output > 1 else 0.0
        prompt = f"{self.num_prompt} prompt tokens, " if self.num_prompt else ""
        return (
            f"{prompt}first token after {self.first * 1e3:.0f} ms, "
            f"{self.num_output} tokens in {self.total:.2f} s ({rate:.1f} tok/s)"
        )


class Stopwatch:
    """Sees an answer go by."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first: float | None = None
        self._num_deltas = 0
        self._usage = Usage()

    def over(self, answer: Answer) -> Generator[Delta]:
        """The answer itself; the counts at its end are kept."""
        self._usage = yield from answer

    def see(self, delta: Delta) -> None:
        if delta.text or delta.reasoning:
            self._num_deltas += 1
            if self._first is None:
                self._first = time.perf_counter() - self._started

    def stats(self) -> Stats:
        total = time.perf_counter() - self._started
        return Stats(
            num_prompt=self._usage.num_prompt or 0,
            num_output=self._usage.num_output or self._num_deltas,
            first=total if self._first is None else self._first,
            total=total,
        )


@dataclass(slots=True)
class Conversation:
    """What was said, and how answers are drawn."""

    source: Source
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    turns: list[Message] = field(default_factory=list)
    stats: Stats | None = None

    @property
    def messages(self) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def ask(self, text: str, show: Callable[[Delta], None]) -> None:
        """Stream one answer. What has come before an interruption or error is kept as the answer;
        if nothing has, the question is forgotten too.

        Raises:
            KeyboardInterrupt: the user stopped it.
        """
        question = {"role": "user", "content": text}
        said: list[str] = []
        try:
            self._stream([*self.messages, question], said, show)
        finally:
            if any(said):
                self.turns += [question, {"role": "assistant", "content": "".join(said)}]

    def _stream(
        self, messages: list[Message], said: list[str], show: Callable[[Delta], None]
    ) -> None:
        watch = Stopwatch()
        try:
            answer = watch.over(self.source.chat(messages, self.options))
            with contextlib.closing(answer) as deltas:
                for delta in deltas:
                    watch.see(delta)
                    said.append(delta.text)
                    show(delta)
        finally:
            self.stats = watch.stats()


def run(conversation: Conversation, console: Console) -> None:
    """Talk until the user leaves."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is an answer's error
    defaults = conversation.source.defaults.items()
    drawn = "".join(f"{escape(name)} {value}; " for name, value in defaults)
    console.print(
        f"[bold]{escape(conversation.source.name)}[/]  [dim]{drawn}/help lists commands[/]"
    )
    while True:
        try:
            text = read_message()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]/exit or Ctrl-D leaves[/]")
            continue
        if text.startswith("/"):
            if not obey(text, conversation, console):
                return
        elif text:
            answer(text, conversation, console)


def read_message() -> str:
    """One message. A line that ends with a backslash goes on; a line that starts with three
    quotes opens a block that ends with three quotes."""
    line = input(">>> ").strip()
    if line.startswith(FENCE):
        return _read_block(line.removeprefix(FENCE))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("... "))
    return "\n".join(lines)


def _read_block(line: str) -> str:
    lines = []
    while not line.rstrip().endswith(FENCE):
        lines.append(line)
        line = input("... ")
    lines.append(line.rstrip().removesuffix(FENCE))
    return "\n".join(lines).strip("\n")


def answer(text: str, conversation: Conversation, console: Console) -> None:
    """Ask, and print the answer as it comes."""
    try:
        conversation.ask(text, Printer(console).show)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]", end="")
    except RuvonError as error:
        console.print(f"[red]{escape(str(error))}[/]", end="")
    console.print("\n")


class Printer:
    """Prints deltas as they are, nothing read as markup: the reasoning dimmed, then the answer."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._reasoned = False

    def show(self, delta: Delta) -> None:
        if delta.reasoning:
            self._console.out(delta.reasoning, style="dim italic", end="", highlight=False)
            self._reasoned = True
        if delta.text:
            apart = "\n\n" if self._reasoned else ""
            self._console.out(apart + delta.text, end="", highlight=False)
            self._reasoned = False


def obey(line: str, conversation: Conversation, console: Console) -> bool:
    """Carry out a /command; False means leave."""
    name, _, argument = line[1:].partition(" ")
    if name in ("exit", "quit"):
        return False
    command = COMMANDS.get(name)
    if command is None:
        reply = f"/{name} is not a command; /help lists them"
    else:
        reply = command[0](conversation, argument.strip())
    console.out(reply, style="dim", highlight=False)
    return True


def _help(conversation: Conversation, argument: str) -> str:
    rows = [*((usage, text) for _, usage, text in COMMANDS.values()), ("/exit", "leave")]
    lines = [f"{usage:<24}{text}" for usage, text in rows]
    notes = ['A line ending in \\ goes on; """ opens and closes a block. Ctrl-C stops an answer.']
    return "\n".join(lines + notes)


def _reset(conversation: Conversation, argument: str) -> str:
    conversation.turns.clear()
    return "The conversation starts anew."


def _system(conversation: Conversation, argument: str) -> str:
    if argument:
        conversation.system = argument
        conversation.turns.clear()
        return "System message set; the conversation starts anew."
    return conversation.system or "There is no system message."


def _set(conversation: Conversation, argument: str) -> str:
    name, _, text = argument.partition(" ")
    if not name:
        given = [f"{name} {value}" for name, value in conversation.options.items()]
        return "\n".join(given) or f"Nothing is set. Settable: {', '.join(SETTABLE)}"
    if name not in SETTABLE:
        return f"{name} cannot be set. Settable: {', '.join(SETTABLE)}"
    if text in ("", "default"):
        conversation.options.pop(name, None)
        return f"{name} is the model's default."
    try:
        conversation.options[name] = SETTABLE[name](text)
    except ValueError:
        return f"{text!r} is not a number"
    return f"{name} is {conversation.options[name]}."


def _stats(conversation: Conversation, argument: str) -> str:
    return str(conversation.stats or "There is no answer yet.")


def _save(conversation: Conversation, argument: str) -> str:
    if not argument:
        return "Where to? /save FILE"
    content = {"model": conversation.source.name, "messages": conversation.messages}
    try:
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        Path(argument).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        return f"Not saved: {error}"
    return f"Saved {len(conversation.messages)} messages to {argument}."


COMMANDS: dict[str, tuple[Callable[[Conversation, str], str], str, str]] = {
    "help": (_help, "/help", "this list"),
    "reset": (_reset, "/reset", "forget the conversation"),
    "system": (_system, "/system [TEXT]", "show or set the system message"),
    "set": (_set, "/set [NAME [VALUE]]", "show or set temperature, top_p, max_tokens, seed ..."),
    "stats": (_stats, "/stats", "speed of the last answer"),
    "save": (_save, "/save FILE", "write the conversation as JSON"),
}
