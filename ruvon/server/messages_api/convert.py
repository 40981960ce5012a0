"""Anthropic's turns of blocks → a `Conversation` of OpenAI's messages.

A turn of the user may hold results of tools, which are messages of their own, and a turn of the
assistant text, thinking and calls, which are one message. What some clients change with every
request, so that no prefix of it would ever be found in the cache, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, TypeAlias

import orjson

from ruvon.errors import RequestError
from ruvon.grammars import Grammar, json_schema
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice
from ruvon.server.constraints import two_wishes
from ruvon.server.conversation import Conversation
from ruvon.server.messages_api.schemas import (
    Foreign,
    Message,
    PromptFields,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from ruvon.server.sealed import SIGNATURE, seal, unseal
from ruvon.server.tools import distinct

BILLING = "x-anthropic-"  # begins lines for Anthropic's own servers, such as a checksum
MAX_HEADERS = 8  # in one block
COUNTDOWN = "<total_tokens>"  # begins a note on what is left of the client's budget
MAX_COUNTDOWN = 100  # characters

Mode: TypeAlias = Literal["none", "auto", "required"]

MODES: Mapping[str, Mode] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}
THINKS: Mapping[str, bool | None] = {
    "enabled": True,
    "adaptive": None,  # as the model's template has it
    "disabled": False,
    "between_tools": False,
}


@dataclass(slots=True)
class LeftOut:
    """What of a request the model is not told, by the names of the fields."""

    foreign: list[str] = field(default_factory=list)  # blocks and tools of Anthropic's servers
    volatile: list[str] = field(default_factory=list)  # what changes with every request


def convert(request: PromptFields) -> tuple[Conversation, LeftOut]:
    """What the model is told, and what not. Raises RequestError for what cannot be served."""
    left_out = LeftOut()
    tools = distinct(list(_tools(request, left_out)))
    messages = [*_system(request.system or (), left_out), *_turns(request.messages, left_out)]
    going_on = request.messages[-1].role == "assistant"
    if going_on and messages[-1].get("tool_calls"):
        raise RequestError(
            "A last message of role assistant is continued, and calls of tools cannot be.",
            f"messages[{len(request.messages) - 1}].content",
        )
    conversation = Conversation(
        messages=messages,
        tools=tools,
        choice=_choice(request, tools),
        response=_response(request),
        reasoning=_reasoning(request),
        continue_final_message=going_on,
        at_most=True,  # clients ask for what they would take of any model
    )
    return conversation, left_out


# ---------------------------------------------------------------------- system


def _system(blocks: Iterable[TextBlock], left_out: LeftOut) -> Iterator[dict[str, Any]]:
    texts = [_stable(block.text, f"system[{i}]", left_out) for i, block in enumerate(blocks)]
    if text := "\n".join(filter(None, texts)):
        yield {"role": "system", "content": text}


def _stable(text: str, where: str, left_out: LeftOut) -> str:
    """The text without what changes with every request: lines in front that are not meant for the
    model, and at the end how many tokens the client takes to be left."""
    for _ in range(MAX_HEADERS):
        if not text.startswith(BILLING):
            break
        header, _, text = text.partition("\n")
        left_out.volatile.append(f"{where}.{header.partition(':')[0][:60]}")
    at = text.rfind(COUNTDOWN, -MAX_COUNTDOWN)
    if at >= 0 and text.rstrip().endswith(("</total_tokens>", "tokens left")):
        left_out.volatile.append(f"{where}.total_tokens")
        text = text[:at].rstrip()
    return text


# ---------------------------------------------------------------------- turns


Placed: TypeAlias = tuple[str, object]
"""A block, and the name of its field."""


def _turns(messages: Sequence[Message], left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """Neighbours of the same role are one turn."""
    for role, group in groupby(enumerate(messages), lambda pair: pair[1].role):
        blocks = [
            (f"messages[{i}].content[{k}]", block)
            for i, message in group
            for k, block in enumerate(message.content)
        ]
        known = _known(blocks, left_out)
        if role == "assistant":
            yield _assistant([block for _, block in known])
        else:
            yield from _others(role, known, left_out)


def _known(blocks: Iterable[Placed], left_out: LeftOut) -> list[Placed]:
    """Those that are not foreign."""
    known = []
    for where, block in blocks:
        if isinstance(block, Foreign):
            left_out.foreign.append(f"{where}.{block.type[:60]}")
        else:
            known.append((where, block))
    return known


def _assistant(blocks: Sequence[object]) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": _joined(block for block in blocks if isinstance(block, TextBlock)),
    }
    thoughts = [_thought(block) for block in blocks if isinstance(block, ThinkingBlock)]
    if thinking := "\n".join(filter(None, thoughts)):
        message["reasoning_content"] = thinking
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    if calls:
        message["tool_calls"] = calls
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = orjson.dumps(block.input).decode()
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _others(role: str, blocks: Sequence[Placed], left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """A turn of the user: what came of each call, and the text between."""
    for is_text, group in groupby(blocks, lambda placed: isinstance(placed[1], TextBlock)):
        if is_text:
            yield {"role": role, "content": _joined(block for _, block in group)}
            continue
        for where, block in group:
            if isinstance(block, ToolResultBlock):
                yield _result(where, block, left_out)


def _result(where: str, block: ToolResultBlock, left_out: LeftOut) -> dict[str, Any]:
    """Templates know no failed calls, so the text says it."""
    parts = [(f"{where}.content[{k}]", part) for k, part in enumerate(block.content or ())]
    text = _joined(part for _, part in _known(parts, left_out))
    if block.is_error:
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _joined(blocks: Iterable[Any]) -> str:
    """Blocks of text, on lines of their own."""
    return "\n".join(block.text for block in blocks)


def sign(thinking: str) -> str:
    """The signature of a block whose text is not shown: it holds the text, for the next turn."""
    return seal(thinking, SIGNATURE)


def _thought(block: ThinkingBlock) -> str:
    """What was thought. The signatures of others say nothing to us."""
    return block.thinking or unseal(block.signature, SIGNATURE) or ""


# ---------------------------------------------------------------------- tools and the answer's form


def _tools(request: PromptFields, left_out: LeftOut) -> Iterator[Tool]:
    for i, tool in enumerate(request.tools or ()):
        where = f"tools[{i}]"
        if isinstance(tool, Foreign):
            left_out.foreign.append(f"{where}.{tool.type[:60]}")
        else:
            yield Tool(
                name=tool.name,
                description=tool.description,
                parameters=tool.input_schema,
                strict=bool(tool.strict),
                param=f"{where}.input_schema",
            )


def _choice(request: PromptFields, tools: Sequence[Tool]) -> ToolChoice:
    choice = request.tool_choice
    if choice is None:
        return ToolChoice()
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError("A name goes with the type tool, and only there.", "tool_choice.name")
    if choice.name is not None and choice.name not in {tool.name for tool in tools}:
        raise RequestError(f"There is no tool '{choice.name[:100]}'.", "tool_choice.name")
    if choice.type == "any" and not tools:
        raise RequestError("There are no tools to choose from.", "tool_choice")
    return ToolChoice(
        mode=MODES[choice.type],
        names=() if choice.name is None else (choice.name,),
        parallel=not choice.disable_parallel_tool_use,
    )


def _response(request: PromptFields) -> Grammar | None:
    config = request.output_config
    if config is not None and config.format is not None:
        if request.output_format is not None:
            raise two_wishes("output_config.format", "output_format")
        return json_schema(config.format.json_schema, param="output_config.format.schema")
    if request.output_format is not None:
        return json_schema(request.output_format.json_schema, param="output_format.schema")
    return None


def _reasoning(request: PromptFields) -> Reasoning:
    thinking, config = request.thinking, request.output_config
    return Reasoning(
        budget=thinking.budget_tokens if thinking else None,
        enabled=THINKS[thinking.type] if thinking else None,
        effort=config.effort if config else None,
        param="output_config.effort",
    )
