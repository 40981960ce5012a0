"""From messages to a prompt, and from a model's ids to what a client is told.

A format is a renderer and a parser. ``plain`` renders with the model's own Jinja template and
takes all ids for text; formats whose models write tool calls or reasoning add a row to `FORMATS`.

Nothing a client writes can become a special token. A string of the request that spells one, such
as ``<|im_end|>``, is rendered with a private-use character in place of its first: templates still
see text of the same length that starts, ends, strips and compares as before, but the spelling is
gone, so whatever special tokens the prompt then holds are the template's own. The characters are
put back before encoding. The one thing a template cannot do is look for a special token in a
message. A request without such strings is rendered and encoded with no detour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import jinja2

from ruvon.deltas import Delta
from ruvon.errors import ConfigError, RequestError
from ruvon.grammars import Grammar
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice
from ruvon.models.messages import Message, map_strings, plain, prepare, strings
from ruvon.models.template import Template, compile_own, compile_template, render_template
from ruvon.models.text_stream import TextStream
from ruvon.models.tokenizer import Tokenizer

STAND_INS = range(0xF0000, 0xFFFFD)  # private use, plane 15
FINAL = chr(0xFFFFD)  # follows the final message's text when it is to be continued


class Options(TypedDict, total=False):
    """How to render messages. The generation prompt opens the assistant's turn; it is added unless
    told otherwise or the final message is to be continued. ``kwargs`` are further variables of the
    template."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    kwargs: Mapping[str, Any] | None


RESERVED = frozenset({"messages", *Options.__annotations__} - {"kwargs"})


class Parser(Protocol):
    """Reads one completion's ids as they come; any chunking of the same ids adds up to the same.

    It is made with the `TextStream` through which all its ids become text, that it may hold back
    what is undecided, and end at a stop string. It says what the completion says (text, reasoning,
    tool calls) and leaves the other fields of a `Delta` alone.
    """

    def push(self, ids: Sequence[int]) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What was held back, once no more ids come."""


class PlainParser:
    """All output is the answer's text."""

    def __init__(self, text: TextStream) -> None:
        self._text = text

    def push(self, ids: Sequence[int]) -> list[Delta]:
        text = self._text.push(ids)
        return [Delta(text=text)] if text else []

    def finish(self) -> list[Delta]:
        text = self._text.finish()
        return [Delta(text=text)] if text else []


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer to be given: what the model reads, and how what it writes is read."""

    prompt: tuple[int, ...]
    parser: Callable[[TextStream], Parser]  # made once for each completion
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models is talked to. ``render`` takes the model's template, or None if it
    has none, and the template's variables."""

    render: Callable[[Template | None, Mapping[str, Any]], str]
    parser: Callable[[TextStream], Parser]


def _render_plain(template: Template | None, variables: Mapping[str, Any]) -> str:
    if template is None:
        raise RequestError(
            "This model has no chat template. Give one with --chat-template, or use completions.",
            param="messages",
            code="unsupported_value",
        )
    return render_template(template, variables)


FORMATS: Mapping[str, Format] = {"plain": Format(_render_plain, PlainParser)}


def load_chat(tokenizer: Tokenizer, template: str | None = None) -> ChatFormat:
    """The chat format of a model. ``template`` is a Jinja source to use instead of its own.

    Raises ConfigError if that is none. If the model's own is none, chatting raises RequestError.
    """
    if template is None:
        own = tokenizer.chat_templates
        compiled = {name: compile_own(name, source) for name, source in own.items()}
        return ChatFormat(tokenizer, own, compiled, FORMATS["plain"])
    try:
        given = {"default": compile_template(template)}
    except jinja2.TemplateSyntaxError as error:
        where = f"line {error.lineno}: {error.message}"
        raise ConfigError(f"chat_template: not a Jinja template, {where}") from None
    return ChatFormat(tokenizer, {"default": template}, given, FORMATS["plain"])


def read_template(path: str) -> str:
    """The file that ``--chat-template`` names. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path}: {error}") from None


class ChatFormat:
    """One model's way of chatting."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: Mapping[str, str],
        templates: Mapping[str, Template],
        format: Format,
    ) -> None:
        self._tokenizer = tokenizer
        self._format = format
        self._sources = sources
        self._templates = templates
        named = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
        declared = {name: tokenizer.token_text(id) for name, id in named.items() if id is not None}
        self._named = {**declared, **tokenizer.named_tokens}
        self._knows_developer = any("developer" in source for source in sources.values())
        texts = tokenizer.special_texts
        self._beginnings = frozenset(text[:size] for text in texts for size in range(1, len(text)))
        self._first = frozenset(text[0] for text in texts)
        self._longest = max(map(len, texts), default=0)

    def parser(self, text: TextStream) -> Parser:
        """A parser for one completion, whose ids become text through ``text``."""
        return self._format.parser(text)

    def turn(  # noqa: PLR0913
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        choice: ToolChoice = ToolChoice(),  # noqa: B008 - a frozen value
        response: Grammar | None = None,
        reasoning: Reasoning = Reasoning(),  # noqa: B008
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Turn:
        """The answer to come: errors as in `render`."""
        prompt = self.encode(
            messages,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
        )
        return Turn(tuple(prompt), self._format.parser, response)

    def render(self, messages: Sequence[Message], **options: Unpack[Options]) -> str:
        """The prompt as text.

        Raises RequestError for what the template refuses and for options that contradict.
        """
        return self._render(self._variables(messages, **options))

    def encode(self, messages: Sequence[Message], **options: Unpack[Options]) -> list[int]:
        """The prompt as ids, errors as in `render`. Special tokens that the request spells stay
        text."""
        variables, stand_ins = self._guard(self._variables(messages, **options))
        text = self._render(variables)
        if not stand_ins:
            return self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return self._tokenizer.encode_guarded(text, stand_ins)

    def _variables(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What the template is told, as plain data."""
        if taken := RESERVED.intersection(kwargs or ()):
            raise RequestError(f"{min(taken)} is a field of its own", param="chat_template_kwargs")
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other",
                param="continue_final_message",
            )
        if not messages:
            raise RequestError("there must be at least one message", param="messages")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        prepared = [
            prepare(message, i, self._knows_developer) for i, message in enumerate(messages)
        ]
        if continue_final_message:
            prepared[-1]["content"] += FINAL + " "
        return {
            **plain(kwargs or {}, "chat_template_kwargs"),
            "messages": prepared,
            "tools": plain(tools, "tools") or None,
            "documents": plain(documents, "documents") or None,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }

    def _render(self, variables: Mapping[str, Any]) -> str:
        wants_tools = variables["tools"] is not None and "tool_use" in self._templates
        template = self._templates.get("tool_use" if wants_tools else "default")
        given = dict(variables)
        going_on = given.pop("continue_final_message")
        text = self._format.render(template, self._named | given)
        return _cut_after_final(text) if going_on else text

    def _guard(self, variables: dict[str, Any]) -> tuple[dict[str, Any], dict[int, str]]:
        """(``variables`` with a stand-in for a character of every spelling of a special token,
        what each stand-in, by code point, stands for)."""
        places = {text: found for text in set(strings(variables)) if (found := self._spells(text))}
        if not places:
            return variables, {}
        originals = sorted({text[at] for text, found in places.items() for at in found})
        used = set().union(*strings(variables), *self._sources.values())
        free = (chr(code) for code in STAND_INS if chr(code) not in used)
        stand_ins = dict(zip(originals, islice(free, len(originals)), strict=True))
        guarded = {text: _replace(text, found, stand_ins) for text, found in places.items()}
        return (
            map_strings(variables, lambda text: guarded.get(text, text)),
            {ord(stand_in): original for original, stand_in in stand_ins.items()},
        )

    def _spells(self, text: str) -> set[int]:
        """Where ``text`` spells a special token, or ends in the beginning of one that a string
        after it might complete."""
        if not any(char in text for char in self._first):
            return set()
        found: set[int] = set()
        rest = text
        while spans := self._tokenizer.special_spans(rest):  # again, for one within another
            starts = {start for start, _ in spans}
            found |= starts
            rest = _replace(rest, starts, {rest[start]: chr(STAND_INS.stop) for start in starts})
        ends = range(max(0, len(text) - self._longest), len(text))
        return found | {at for at in ends if text[at:] in self._beginnings}


def _replace(text: str, places: set[int], stand_ins: Mapping[str, str]) -> str:
    characters = list(text)
    for at in places:
        characters[at] = stand_ins[characters[at]]
    return "".join(characters)


def _cut_after_final(text: str) -> str:
    """Up to the end of the final message. It was followed by ``FINAL`` and a space: if the space
    is gone, the template strips messages, so the message is stripped here too."""
    at = text.rfind(FINAL)
    if at < 0:
        raise RequestError(
            "The chat template leaves out the final message, so it cannot be continued.",
            param="continue_final_message",
        )
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()
