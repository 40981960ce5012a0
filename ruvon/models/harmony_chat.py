"""Chatting with gpt-oss: what `chat.ChatFormat` does by a template, done by harmony's own rules.

Templates of gpt-oss exist, but they write text, in which a client's words could become special
tokens. Here the prompt is built of ids.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from threading import Lock
from typing import Unpack

from ruvon.errors import RequestError
from ruvon.grammars import Form, Grammar
from ruvon.models.formats.answer import chosen
from ruvon.models.formats.harmony import (
    ANSWER,
    BROWSER,
    FUNCTIONS,
    PYTHON,
    Callee,
    HarmonyParser,
    Mark,
    stop_ids,
)
from ruvon.models.formats.harmony_grammar import Wanted, grammar_of, raw_tool
from ruvon.models.formats.harmony_prompt import (
    BUILT_IN,
    IDENTITY,
    OPENING,
    Parts,
    System,
    conversation,
)
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice, Turn, read_tools
from ruvon.models.messages import Message, plain
from ruvon.models.tokenizer import Tokenizer
from ruvon.models.turn_options import Options, TurnOptions, as_called, check_options

EFFORTS = ("low", "medium", "high")
VARIABLES = ("model_identity", "conversation_start_date", "builtin_tools", "reasoning_effort")
"""What ``chat_template_kwargs`` may say: the names that templates of gpt-oss have."""
KWARGS = "chat_template_kwargs"
MOST_DATES = 4096  # conversations whose date is remembered


class HarmonyChat:
    """A model that speaks harmony."""

    reasons = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        marks: Mapping[str, int],
        today: Callable[[], date] = date.today,
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._special = tokenizer.special_ids | {*tokenizer.eos_ids, *marks.values()}
        self._size = tokenizer.vocab_size  # up to the last token of text
        while self._size - 1 in self._special:
            self._size -= 1
        self._dates = Dates(today)

    def reads(self, variable: str) -> bool:
        return variable in VARIABLES

    def stop_ids(self, declared: Sequence[int]) -> tuple[int, ...]:
        return stop_ids(self._marks, declared)

    def turn(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        response: Grammar | None = None,
        reasoning: Reasoning | None = None,
        **options: Unpack[TurnOptions],
    ) -> Turn:
        """As `ChatFormat.turn`. The tools that gpt-oss was trained with are offered by the variable
        ``builtin_tools``, and called by the names ``browser.search`` and so on, and ``python``,
        which takes text as it is. Where nothing can be called and reasoning is not ``enabled``,
        the answer itself is begun for the model."""
        choice, reasoning = as_called(choice), reasoning or Reasoning()
        callable = chosen(tools, choice)
        system = self._system(messages, reasoning, options)
        form = None if response is None else response.form
        parts = self._parts(messages, tools if callable else (), system, form, options)
        callees = callees_of(callable, choice, system.built_in)
        opened = parts[-2:] == OPENING
        begun = bool(options.get("continue_final_message"))
        if begun and choice.mode == "required":
            raise RequestError("an answer that has begun can be no call", param="tool_choice")
        if reasoning.enabled is False and opened and not callees:
            parts += [Mark.CHANNEL, ANSWER, Mark.MESSAGE]
            begun = True
        wanted = Wanted(callees, choice, response, reasoning.budget, opened, begun)
        parser = partial(
            HarmonyParser,
            marks=self._marks,
            callees=callees,
            parallel=choice.parallel,
            channel=ANSWER if begun else None,
        )
        grammar = grammar_of(wanted, self._marks, self._special, self._size)
        ignored = ("enable_thinking",) if reasoning.enabled is False and not begun else ()
        return Turn(tuple(self._encode(parts)), parser, grammar, ignored)

    def render(self, messages: Sequence[Message], **options: Unpack[Options]) -> str:
        return "".join(self._told(messages, options))

    def encode(self, messages: Sequence[Message], **options: Unpack[Options]) -> list[int]:
        return self._encode(self._told(messages, options))

    # ------------------------------------------------------------------ the prompt

    def _told(self, messages: Sequence[Message], options: Options) -> Parts:
        tools = read_tools(options.get("tools") or ())
        system = self._system(messages, Reasoning(), options)
        return self._parts(messages, tools, system, None, options)

    def _parts(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        system: System,
        form: Form | None,
        options: TurnOptions,
    ) -> Parts:
        adds_prompt = check_options(messages, options)
        continued = bool(options.get("continue_final_message"))
        if options.get("documents"):
            raise RequestError("This model takes no documents.", "documents")
        for tool in tools:
            if tool.name.partition(".")[0] in system.built_in:
                raise RequestError(f"{tool.name!r} is the name of a tool built in", tool.param)
        said = [*conversation(messages, system, tools, form, continued)]
        if continued and said[-1].channel != ANSWER:
            raise RequestError(
                "The last message is no answer that could go on.", "continue_final_message"
            )
        parts = [part for each in said for part in each.parts()]
        return [*parts, *OPENING] if adds_prompt else parts[:-1] if continued else parts

    def _encode(self, parts: Parts) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Mark):
                ids.append(self._marks[part])
            elif part:
                ids += self._tokenizer.encode(part, add_special_tokens=False)
        return ids

    def _system(
        self, messages: Sequence[Message], reasoning: Reasoning, options: TurnOptions
    ) -> System:
        """What the system message says. What the options' ``kwargs`` say counts most."""
        given = plain(options.get("kwargs") or {}, KWARGS)
        effort, param = given.get("reasoning_effort"), f"{KWARGS}.reasoning_effort"
        if effort is None:
            effort, param = reasoning.effort, reasoning.param
        if effort not in (None, *EFFORTS):
            raise RequestError(f"this model's efforts are {', '.join(EFFORTS)}", param)
        built_in = given.get("builtin_tools") or ()
        if not isinstance(built_in, list | tuple) or not BUILT_IN.keys() >= {*map(str, built_in)}:
            raise RequestError(f"it is a list of {', '.join(BUILT_IN)}", f"{KWARGS}.builtin_tools")
        identity = given.get("model_identity", IDENTITY)
        if not isinstance(identity, str):
            raise RequestError("it is a text", f"{KWARGS}.model_identity")
        started = given.get("conversation_start_date")
        day = self._dates.of(messages) if started is None else checked_date(started)
        return System(day, effort or "medium", identity, tuple(map(str, built_in)))


def callees_of(
    tools: Sequence[Tool], choice: ToolChoice, built_in: Sequence[str]
) -> dict[str, Callee]:
    """Who may be called, by the names that headers have."""
    raw = raw_tool(tools, choice)
    callees = {f"{FUNCTIONS}.{tool.name}": Callee(tool, tool is raw) for tool in tools}
    if choice.mode == "none" or choice.names:
        return callees
    if BROWSER in built_in:
        for tool in BUILT_IN[BROWSER][1]:
            name = f"{BROWSER}.{tool.name}"
            callees[name] = Callee(replace(tool, name=name))
    if PYTHON in built_in:
        callees[PYTHON] = Callee(Tool(PYTHON, custom=True), raw=True)
    return callees


def checked_date(text: object) -> str:
    """A date as ISO 8601 has it. Raises RequestError."""
    try:
        return date.fromisoformat(str(text)).isoformat()
    except ValueError:
        where = f"{KWARGS}.conversation_start_date"
        raise RequestError("it is a date, such as 2026-01-31", where) from None


class Dates:
    """The day on which each conversation began. A prompt says it near its beginning, so another day
    would find nothing of the prompt in the prefix cache. In any thread."""

    def __init__(self, today: Callable[[], date]) -> None:
        self._today = today
        self._began: OrderedDict[bytes, str] = OrderedDict()  # the least recent first
        self._lock = Lock()

    def of(self, messages: Sequence[Message]) -> str:
        """A conversation without an answer begins; others are known by what came before that."""
        roles = [message.get("role") for message in messages]
        begins = "assistant" not in roles
        head = messages if begins else messages[: roles.index("assistant")]
        today = self._today().isoformat()
        key = digest(head)
        with self._lock:
            day = today if begins else self._began.get(key, today)
            self._began[key] = day
            self._began.move_to_end(key)
            if len(self._began) > MOST_DATES:
                self._began.popitem(last=False)
        return day


def digest(messages: Sequence[Message]) -> bytes:
    said = [[message.get("role"), message.get("content")] for message in messages]
    return hashlib.sha256(repr(said).encode("utf-8", "replace")).digest()
