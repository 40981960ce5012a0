"""Models whose template knows no tools: they are told of them in words, in the style of Hermes.

What the model is to read goes into messages that every template takes: the tools into the system
message, calls into the assistant's text, results into the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ruvon.models.formats.format import Messages, Tools
from ruvon.models.formats.hermes import END, HERMES, START

INTRODUCTION = f"""# Tools

You may call one or more functions. You are given their signatures within <tools></tools>:
<tools>
%s
</tools>

To call a function, write a JSON object with its name and arguments within {START}{END}:
{START}
{{"name": "function-name", "arguments": {{"argument": "value"}}}}
{END}"""


def in_words(messages: Messages, tools: Tools, system: bool) -> Messages:
    """Messages of text only, in which no two neighbours with results have the same role."""
    told: list[tuple[dict[str, Any], list[str]]] = []  # messages, and the parts of their texts
    mergeable = False  # whether the last of them is the user's, with results
    for message in messages:
        text, results = _as_text(message), message.get("role") == "tool"
        users = text.get("role") == "user"
        if users and told and told[-1][0].get("role") == "user" and (results or mergeable):
            told[-1][1].append(text["content"])
            mergeable = True
        else:
            told.append((text, [text["content"]]))
            mergeable = results
    merged = [{**message, "content": "\n".join(parts)} for message, parts in told]
    return introduced(merged, tools, system)


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    written = [message["content"], *map(_written, calls)]
    content = "\n".join(part for part in written if part)
    return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content}


def _written(call: Any) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    return f"{START}\n{json.dumps(function or call, ensure_ascii=False)}\n{END}"


def introduced(messages: Messages, tools: Tools, system: bool) -> Messages:
    """The messages with the tools in the first of them: the system's, or else the user's."""
    if not tools:
        return messages
    listed = "\n".join([json.dumps(tool, ensure_ascii=False) for tool in tools])
    first = messages[0]
    system = system or first.get("role") == "system"  # its template says what is wrong with that
    introduction, role = INTRODUCTION % listed, "system" if system else "user"
    if first.get("role") != role:
        return [{"role": role, "content": introduction}, *messages]
    parts = [first["content"], introduction] if system else [introduction, first["content"]]
    return [{**first, "content": "\n\n".join(filter(None, parts))}, *messages[1:]]


UNTAUGHT = replace(HERMES, name="untaught", adapt=in_words)
UNTOLD = replace(HERMES, name="untold", adapt=introduced)  # it does know calls
