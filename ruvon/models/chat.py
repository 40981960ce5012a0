"""From a conversation to the answer to be given: what the model reads, must write, and has written.

The prompt is rendered by the model's own Jinja template; special tokens in what a client writes
stay text (`guard`). How calls and reasoning are written follows from that template and from the
vocabulary (`ruvon.models.formats`), so nobody has to say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import jinja2

from ruvon.errors import ConfigError, RequestError
from ruvon.grammars import Grammar
from ruvon.models.formats import find_format
from ruvon.models.formats.answer import Answer, Thinking, chosen
from ruvon.models.formats.harmony import find_marks
from ruvon.models.formats.plain import PlainParser as PlainParser
from ruvon.models.formats.tools import Parser as Parser
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice, openai_form
from ruvon.models.formats.tools import Turn as Turn
from ruvon.models.guard import Guard
from ruvon.models.harmony_chat import HarmonyChat
from ruvon.models.messages import CALL_STYLES, CALLED, CallStyle, Message, a_call, plain, prepare
from ruvon.models.template import (
    Template,
    compile_own,
    compile_template,
    render_template,
)
from ruvon.models.tokenizer import Tokenizer
from ruvon.models.turn_options import Chat as Chat
from ruvon.models.turn_options import Options as Options
from ruvon.models.turn_options import TurnOptions as TurnOptions
from ruvon.models.turn_options import as_called, check_options

FINAL = chr(0xFFFFD)  # follows the final message's text when it is to be continued
THINK_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch of reasoning
EFFORT = "reasoning_effort"


NOTHING_ELSE: Mapping[str, Any] = {
    "tools": None,
    "documents": None,
    "add_generation_prompt": False,
    "continue_final_message": False,
}


def load_chat(tokenizer: Tokenizer, template: str | None = None) -> Chat:
    """How to chat with a model. ``template`` is a Jinja source to use instead of its own.

    Raises ConfigError if that is none, and for a model that speaks harmony. If the model's own is
    none, chatting raises RequestError.
    """
    if (marks := find_marks(tokenizer.added_ids)) is not None:
        if template is not None:
            raise ConfigError("chat_template: this model speaks harmony, which is no template's")
        return HarmonyChat(tokenizer, marks)
    if template is None:
        own = tokenizer.chat_templates
        compiled = {name: compile_own(name, source) for name, source in own.items()}
        return ChatFormat(tokenizer, own, compiled)
    try:
        given = {"default": compile_template(template)}
    except jinja2.TemplateSyntaxError as error:
        where = f"line {error.lineno}: {error.message}"
        raise ConfigError(f"chat_template: not a Jinja template, {where}") from None
    return ChatFormat(tokenizer, {"default": template}, given)


def read_template(path: str) -> str:
    """The file that ``--chat-template`` names. Raises ConfigError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path}: {error}") from None


class ChatFormat:
    """One model's way of chatting."""

    def __init__(
        self, tokenizer: Tokenizer, sources: Mapping[str, str], templates: Mapping[str, Template]
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = templates
        self._guard = Guard(tokenizer, sources.values())
        named = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
        declared = {name: tokenizer.token_text(id) for name, id in named.items() if id is not None}
        self._named = {**declared, **tokenizer.named_tokens}
        self._knows_developer = any("developer" in source for source in sources.values())
        self._used = frozenset[str]().union(*(each.variables for each in templates.values()))
        with_tools = sources.get("tool_use") or sources.get("default", "")
        self._format = find_format(with_tools, "tool_use" in sources or "tools" in self._used)
        self._tags = _find_tags("".join(sources.values()), tokenizer)

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
        """The answer to a conversation: its prompt, its parser and its grammar.

        ``response`` is the form of an answer that calls no tool. Raises RequestError as `encode`
        does, and for a choice of tools that cannot be met.
        """
        choice, reasoning = as_called(choice), reasoning or Reasoning()
        callable = chosen(tools, choice)
        shown = [openai_form(tool) for tool in tools] if callable else None
        kwargs, ignored = self._wishes(options.get("kwargs"), reasoning)
        rendering: Options = {**options, "tools": shown, "kwargs": kwargs}
        variables = self._variables(messages, **rendering)
        prompt, text = self._encode(variables)
        thinking = self._thinking(text) if variables["add_generation_prompt"] else None
        if reasoning.budget is not None:
            if thinking is not None and self._limits(thinking):
                thinking = replace(thinking, budget=reasoning.budget)
            elif thinking is not None or self._tags is None:
                ignored = (*ignored, "thinking_token_budget")
        answer = Answer(
            self._format,
            callable,
            choice,
            response,
            thinking,
            self._tokenizer.added_ids,
            self._tokenizer.special_ids | {*self._tokenizer.eos_ids},
            self._tokenizer.vocab_size,
        )
        return Turn(tuple(prompt), answer.parser(), answer.grammar(), ignored)

    def stop_ids(self, declared: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end an answer: those that the model's files declare."""
        return tuple(declared)

    @property
    def reasons(self) -> bool:
        """Whether the model marks what it thinks before it answers."""
        return self._tags is not None

    def reads(self, variable: str) -> bool:
        """Whether a template looks at ``variable``; others have no effect."""
        return variable in self._used

    def render(self, messages: Sequence[Message], **options: Unpack[Options]) -> str:
        """The prompt as text.

        Raises RequestError for what the template refuses and for options that contradict.
        """
        return self._render(self._variables(messages, **options))

    def encode(self, messages: Sequence[Message], **options: Unpack[Options]) -> list[int]:
        """The prompt as ids, errors as in `render`. Special tokens that the request spells stay
        text."""
        return self._encode(self._variables(messages, **options))[0]

    # ------------------------------------------------------------------ the prompt

    def _encode(self, variables: dict[str, Any]) -> tuple[list[int], str]:
        """(the prompt's ids, its text as it was rendered)"""
        guarded, stand_ins = self._guard.guard(variables)
        text = self._render(guarded)
        if stand_ins:
            return self._tokenizer.encode_guarded(text, stand_ins), text
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=True), text

    def _variables(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[TurnOptions],
    ) -> dict[str, Any]:
        """What the template is told, as plain data."""
        adds_prompt = check_options(messages, options)
        continues = bool(options.get("continue_final_message"))
        listed = plain(tools, "tools") or None
        prepared = self._format.adapt(
            [prepare(message, i, self._knows_developer) for i, message in enumerate(messages)],
            listed,
            bool(listed) and self._takes_system,
        )
        if any("tool_calls" in message for message in prepared):
            self._call_style.apply(prepared)
        if continues:
            prepared[-1]["content"] = (prepared[-1]["content"] or "") + FINAL + " "
        return {
            **plain(options.get("kwargs") or {}, "chat_template_kwargs"),
            "messages": prepared,
            "tools": listed,
            "documents": plain(options.get("documents"), "documents") or None,
            "add_generation_prompt": adds_prompt,
            "continue_final_message": continues,
        }

    def _render(self, variables: Mapping[str, Any]) -> str:
        wants_tools = variables["tools"] is not None and "tool_use" in self._templates
        template = self._templates.get("tool_use" if wants_tools else "default")
        if template is None:
            raise RequestError(
                "This model has no chat template. Give one with --chat-template, or use "
                "completions.",
                param="messages",
                code="unsupported_value",
            )
        given = dict(variables)
        going_on = given.pop("continue_final_message")
        text = render_template(template, self._named | given)
        return _cut_after_final(text) if going_on else text

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template renders a system message."""
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        return self._tried(messages) is not None

    @cached_property
    def _call_style(self) -> CallStyle:
        """How the template wants past calls: it is tried with one."""
        return next((style for style in CALL_STYLES if self._shows_call(style)), CALL_STYLES[0])

    def _shows_call(self, style: CallStyle) -> bool:
        messages = a_call()
        style.apply(messages)
        written = self._tried(messages) or ""
        return CALLED in written and f"'{CALLED}'" not in written  # which is Python's, not JSON

    def _tried(self, messages: Sequence[dict[str, Any]]) -> str | None:
        """What the template makes of messages; None if it refuses them."""
        try:
            return self._render({**NOTHING_ELSE, "messages": messages})
        except RequestError:
            return None

    # ------------------------------------------------------------------ reasoning

    def _wishes(
        self, kwargs: Mapping[str, Any] | None, reasoning: Reasoning
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """(the template's variables, with those that tell it how to reason; the wishes that it has
        no variable for). What ``kwargs`` say counts more."""
        told: dict[str, Any] = {}
        ignored: list[str] = []
        switch = next((name for name in SWITCHES if name in self._used), None)
        enabled, effort = reasoning.enabled, reasoning.effort
        if effort == "none" and switch is not None:
            enabled = False if enabled is None else enabled
        elif effort is not None and EFFORT in self._used:
            told[EFFORT] = effort
        elif effort is not None:
            ignored.append(EFFORT)
        if enabled is not None and switch is not None:
            told[switch] = enabled
        elif enabled is not None:
            ignored.append("enable_thinking")
        return {**told, **(kwargs or {})}, tuple(ignored)

    def _thinking(self, prompt: str) -> Thinking | None:
        """How the answer to a prompt begins; None if it has no reasoning, or is over it."""
        prompt = prompt.rstrip()
        if self._tags is None or prompt.endswith(self._tags[1]):
            return None
        return Thinking(self._tags, opened=prompt.endswith(self._tags[0]))

    def _limits(self, thinking: Thinking) -> bool:
        """Whether the end of reasoning can be forced: where it is a token."""
        return all(tag in self._tokenizer.added_ids for tag in thinking.tags)


def _find_tags(source: str, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """What encloses reasoning: tags that a template writes, or that are tokens."""
    for tags in THINK_TAGS:
        if tags[1] in source or all(tag in tokenizer.added_ids for tag in tags):
            return tags
    return None


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
