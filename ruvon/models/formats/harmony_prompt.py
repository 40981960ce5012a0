"""What gpt-oss reads: a conversation as harmony's messages, in openai-harmony's own words.

A prompt is a list of parts: texts, which are encoded each by itself and as mere text, and marks,
which are tokens. So nothing that a client writes becomes a special token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ruvon.errors import RequestError
from ruvon.grammars import Form
from ruvon.models.formats.harmony import (
    ANALYSIS,
    ANSWER,
    BROWSER,
    COMMENTARY,
    FUNCTIONS,
    PYTHON,
    Mark,
)
from ruvon.models.formats.tools import Tool, arguments_schema, describe
from ruvon.models.formats.typescript import lines_of, type_of
from ruvon.models.messages import Message, plain, text_of

Parts: TypeAlias = list[str | Mark]

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
CUTOFF = "2024-06"
ROLES = ("system", "developer", "user", "assistant", "tool")
OPENING: Parts = [Mark.START, "assistant"]
"""What the answer follows."""
JSON = "json"

CURSOR = {"type": "number", "default": -1}
BUILT_IN = {
    BROWSER: (
        "Tool for browsing.\n"
        "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
        "Cite information from the tool using the following format:\n"
        "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
        "Do not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)",
        (
            Tool(
                "search",
                "Searches for information related to `query` and displays `topn` results.",
                {
                    "type": "object",
                    "properties": {
                        "query": {"type": "string"},
                        "topn": {"type": "number", "default": 10},
                        "source": {"type": "string"},
                    },
                    "required": ["query"],
                },
            ),
            Tool(
                "open",
                "Opens the link `id` from the page indicated by `cursor` starting at line number"
                " `loc`, showing `num_lines` lines.\n"
                "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
                "If `cursor` is not provided, the most recent page is implied.\n"
                "If `id` is a string, it is treated as a fully qualified URL associated with"
                " `source`.\n"
                "If `loc` is not provided, the viewport will be positioned at the beginning of the"
                " document or centered on the most relevant passage, if available.\n"
                "Use this function without `id` to scroll to a new location of an opened page.",
                {
                    "type": "object",
                    "properties": {
                        "id": {"type": ["number", "string"], "default": -1},
                        "cursor": CURSOR,
                        "loc": CURSOR,
                        "num_lines": CURSOR,
                        "view_source": {"type": "boolean", "default": False},
                        "source": {"type": "string"},
                    },
                },
            ),
            Tool(
                "find",
                "Finds exact matches of `pattern` in the current page, or the page given by"
                " `cursor`.",
                {
                    "type": "object",
                    "properties": {"pattern": {"type": "string"}, "cursor": CURSOR},
                    "required": ["pattern"],
                },
            ),
        ),
    ),
    PYTHON: (
        "Use this tool to execute Python code in your chain of thought. The code will not be shown"
        " to the user. This tool should be used for internal reasoning, but not for code that is"
        " intended to be visible to the user (e.g. when creating plots, tables, or files).\n\n"
        "When you send a message containing Python code to python, it will be executed in a"
        " stateful Jupyter notebook environment. python will respond with the output of the"
        " execution or time out after 120.0 seconds. The drive at '/mnt/data' can be used to save"
        " and persist user files. Internet access for this session is UNKNOWN. Depends on the"
        " cluster.",
        (),
    ),
}
"""The tools that gpt-oss was trained with: a description of each, and its functions."""


@dataclass(frozen=True, slots=True)
class System:
    """What the system message says."""

    date: str
    effort: str = "medium"
    identity: str = IDENTITY
    built_in: Sequence[str] = ()  # names of `BUILT_IN`


@dataclass(frozen=True, slots=True)
class Said:
    """One of harmony's messages: who says what, where, to whom, and in what form."""

    author: str
    text: str
    channel: str | None = None
    recipient: str | None = None
    form: str | None = None
    name: str | None = None

    def parts(self) -> Iterator[str | Mark]:
        """As it is written; the header in the pieces in which openai-harmony encodes it."""
        yield from (Mark.START, self.author)
        yield from [f":{self.name}"] if self.name else []
        yield from [f" to={self.recipient}"] if self.recipient else []
        yield from (Mark.CHANNEL, self.channel) if self.channel else ()
        yield from (" ", Mark.CONSTRAIN, self.form) if self.form else ()
        yield from (Mark.MESSAGE, self.text)
        called = self.author == "assistant" and self.recipient is not None
        yield Mark.CALL if called else Mark.END


# ---------------------------------------------------------------------- system and developer


def system_text(system: System, calls_functions: bool) -> str:
    """The system message. Where there are no functions the channel for calling them is not offered:
    models have put answers there that nobody was shown."""
    top = (system.identity, f"Knowledge cutoff: {CUTOFF}", f"Current date: {system.date}")
    sections = ["\n".join(top), f"Reasoning: {system.effort}"]
    if system.built_in:
        sections.append(
            tools_text([(name, *BUILT_IN[name]) for name in sorted(set(system.built_in))])
        )
    names = "analysis, commentary, final" if calls_functions else "analysis, final"
    channels = f"# Valid channels: {names}. Channel must be included for every message."
    if calls_functions:
        channels += f"\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'."
    return "\n\n".join([*sections, channels])


def developer_text(instructions: str | None, tools: Sequence[Tool], form: Form | None) -> str:
    """The developer message; empty if there is nothing to say."""
    sections = [] if instructions is None else ["# Instructions", instructions]
    if tools:
        sections.append(tools_text([(FUNCTIONS, "", tools)]))
    if form is not None:
        schema = json.dumps(form.schema, ensure_ascii=False, separators=(",", ":"))
        lines = [f"// {line}" for line in lines_of(form.description)] if form.description else []
        sections.append("\n".join([f"# Response Formats\n\n## {form.name}\n", *lines, schema]))
    return "\n\n".join(sections)


def tools_text(namespaces: Iterable[tuple[str, str, Sequence[Tool]]]) -> str:
    """Namespaces of tools: (name, description, functions)."""
    sections = ["# Tools"]
    for name, description, functions in namespaces:
        comment = "// " if functions else ""
        lines = [f"## {name}\n", *(comment + line for line in lines_of(description))]
        if functions:
            lines.append(f"namespace {name} {{\n")
            for tool in functions:
                lines += [f"// {line}" for line in lines_of(describe(tool))]
                lines.append(f"type {tool.name} = {_signature(tool)} => any;\n")
            lines.append(f"}} // namespace {name}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _signature(tool: Tool) -> str:
    takes_any = tool.parameters is None and not tool.custom
    return "()" if takes_any else f"(_: {type_of(plain(arguments_schema(tool), tool.param))})"


# ---------------------------------------------------------------------- the conversation


def conversation(
    messages: Sequence[Message],
    system: System,
    tools: Sequence[Tool],
    form: Form | None,
    continued: bool,
) -> Iterator[Said]:
    """All messages. If the last is ``continued``, what was thought before it is a part of this
    turn. Raises RequestError."""
    told = [_prepared(message, f"messages[{index}]") for index, message in enumerate(messages)]
    num_leading = next(
        (at for at, each in enumerate(told) if each["role"] not in ("system", "developer")),
        len(told),
    )
    leading = [each["content"] for each in told[:num_leading]]
    yield Said("system", system_text(system, bool(tools)))
    text = developer_text("\n\n".join(leading) if leading else None, tools, form)
    if text:
        yield Said("developer", text)
    yield from _turns(told[num_leading:], num_leading, continued, system.built_in)


def _prepared(message: Message, where: str) -> dict[str, Any]:
    """A message as plain data, its content as text."""
    prepared: dict[str, Any] = plain(message, where)
    if prepared.get("role") not in ROLES:
        raise RequestError(f"the role must be one of {', '.join(ROLES)}", f"{where}.role")
    prepared["content"] = text_of(prepared.get("content"), f"{where}.content")
    return prepared


def _turns(
    messages: Sequence[Mapping[str, Any]], first: int, continued: bool, built_in: Sequence[str]
) -> Iterator[Said]:
    """The messages from the ``first`` that is no instruction on. What was thought before the last
    final answer is left out."""
    finals = [at for at in range(len(messages)) if is_final(messages, at)]
    current = len(messages) - continued  # the message that goes on
    answered = max([-1, *(at for at in finals if at < current)])
    names: dict[Any, str] = {}  # of the calls so far, by their ids
    for at, message in enumerate(messages):
        where = f"messages[{first + at}]"
        match message["role"]:
            case "assistant":
                if at <= answered:
                    message = {**message, "reasoning_content": None, "reasoning": None}
                channel = ANSWER if at in finals or at == current else COMMENTARY
                yield from _assistant(message, where, channel, names, built_in)
            case "tool":
                author = _caller(message, where, names, built_in)
                yield Said(author, message["content"], COMMENTARY, "assistant")
            case "user":
                yield Said("user", message["content"], name=message.get("name"))
            case _:
                yield Said("developer", developer_text(message["content"], (), None))


def is_final(messages: Sequence[Mapping[str, Any]], at: int) -> bool:
    """Whether a message is the assistant's answer: text, and behind it neither calls nor more of
    its own."""
    message, behind = messages[at], messages[at + 1 : at + 2]
    says = message["role"] == "assistant" and message["content"] and not message.get("tool_calls")
    return bool(says) and all(each["role"] not in ("assistant", "tool") for each in behind)


def _assistant(
    message: Mapping[str, Any],
    where: str,
    channel: str,
    names: dict[Any, str],
    built_in: Sequence[str],
) -> Iterator[Said]:
    """What was thought; what was said, on its ``channel``; and the calls."""
    text, calls = message["content"], message.get("tool_calls") or ()
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        yield Said("assistant", str(thought), ANALYSIS)
    if text or channel == ANSWER:
        yield Said("assistant", text, channel)
    for number, call in enumerate(calls):
        name, arguments = _call(call, f"{where}.tool_calls[{number}]", built_in)
        names[call.get("id")] = name
        recipient = recipient_of(name, built_in)
        if recipient == name:  # of those built in, which are called while thinking
            yield Said("assistant", arguments, ANALYSIS, recipient)
        else:
            yield Said("assistant", arguments, COMMENTARY, recipient, JSON)


def _call(call: Any, where: str, built_in: Sequence[str]) -> tuple[str, str]:
    """(the name of what is called, what it is called with as the model wrote it)"""
    call = call if isinstance(call, Mapping) else {}
    custom = call.get("custom")
    called = call.get("function") if custom is None else custom
    if not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
        raise RequestError("a call names a function or a custom tool", where)
    name = called["name"]
    if custom is not None:
        text = str(called.get("input") or "")
        return name, text if name in built_in else _json({"input": text})
    arguments = called.get("arguments")
    return name, arguments if isinstance(arguments, str) else _json(arguments or {})


def _caller(
    message: Mapping[str, Any], where: str, names: Mapping[Any, str], built_in: Sequence[str]
) -> str:
    """Who a tool's result is from. Raises RequestError for one that no call asked for."""
    known = names.get(message.get("tool_call_id")) or message.get("name")
    if known is None and "tool_call_id" not in message and names:
        known = [*names.values()][-1]
    if known is None:
        raise RequestError("no call before it has this id", f"{where}.tool_call_id")
    return recipient_of(str(known), built_in)


def recipient_of(name: str, built_in: Sequence[str]) -> str:
    """To whom a call of ``name`` goes."""
    return name if name.partition(".")[0] in built_in else f"{FUNCTIONS}.{name}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
