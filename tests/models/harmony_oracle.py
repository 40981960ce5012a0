"""What openai-harmony makes of conversations and of answers; it knows nothing of ruvon.

It is run by an interpreter that has openai-harmony and bpe-openai, whose wheel has the vocabulary:
``make clients ARGS=openai-harmony`` makes one, and compares with all of that vocabulary. The other
tests have a small vocabulary, and compare with harmony.json: what this makes of `harmony_chats`.
``build/clients/environments/openai-harmony/bin/python tests/models/harmony_oracle.py`` writes
that anew. With ``-`` it reads other answers, lists of ids, from standard input as JSON, and writes
all that it finds.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import openai_harmony as harmony
from harmony_chats import ANSWERS, CHATS, DATE

GOLDEN = Path(__file__).with_name("harmony.json")
ROLE = harmony.Role


def load() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        if "TIKTOKEN_ENCODINGS_BASE" not in os.environ:
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
            Path(folder, "o200k_base.tiktoken").write_bytes(vocabulary())
        return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def vocabulary() -> bytes:
    """o200k_base in tiktoken's form."""
    spec = importlib.util.find_spec("bpe_openai")
    file = Path(spec.submodule_search_locations[0], "data", "o200k_base.tiktoken.gz")
    return gzip.decompress(file.read_bytes())


# ---------------------------------------------------------------------- prompts


def convert(chat: dict[str, Any]) -> list[Any]:
    """A chat as harmony's messages, by the rules of its documentation."""
    kwargs, tools = chat.get("kwargs", {}), chat.get("tools", [])
    built_in = kwargs.get("builtin_tools", [])
    channels = ["analysis", "commentary", "final"] if tools else ["analysis", "final"]
    first = (
        harmony.SystemContent.new()
        .with_conversation_start_date(chat["date"])
        .with_reasoning_effort(harmony.ReasoningEffort(chat.get("effort", "medium").capitalize()))
        .with_required_channels(channels)
    )
    if "model_identity" in kwargs:
        first = first.with_model_identity(kwargs["model_identity"])
    first = first.with_browser_tool() if "browser" in built_in else first
    first = first.with_python_tool() if "python" in built_in else first
    said = [message(ROLE.SYSTEM, first)]
    messages = list(chat["messages"])
    leading = []
    while messages and messages[0]["role"] in ("system", "developer"):
        leading.append(messages.pop(0)["content"])
    if "schema" in chat and leading and not tools:
        leading.append(response_format(**chat["schema"]))
    contents: list[Any] = []
    if leading or tools:
        content = harmony.DeveloperContent.new()
        content = content.with_instructions("\n\n".join(leading)) if leading else content
        content = content.with_function_tools([*map(describe, tools)]) if tools else content
        contents.append(content)
    if "schema" in chat and not (leading and not tools):
        text = ("\n\n" if contents else "") + response_format(**chat["schema"])
        contents.append(harmony.TextContent(text=text))
    if contents:
        said.append(harmony.Message.from_role_and_contents(ROLE.DEVELOPER, contents))
    finals = [at for at, each in enumerate(messages) if final(each, messages[at + 1 :])]
    names: dict[str, str] = {}
    for at, each in enumerate(messages):
        thinks = not finals or at > finals[-1]
        said += turn(each, thinks, "final" if at in finals else "commentary", names, built_in)
    return said


def response_format(name: str, schema: dict[str, Any], description: str = "") -> str:
    """As docs/format.md has it; the library knows none."""
    comment = "".join(f"// {line}\n" for line in description.split("\n") if line)
    written = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return f"# Response Formats\n\n## {name}\n\n{comment}{written}"


def message(role: Any, content: Any) -> Any:
    return harmony.Message.from_role_and_content(role, content)


def final(each: dict[str, Any], behind: list[dict[str, Any]]) -> bool:
    if each["role"] != "assistant" or not each["content"] or "tool_calls" in each:
        return False
    return not behind or behind[0]["role"] not in ("assistant", "tool")


def describe(tool: dict[str, Any]) -> Any:
    if tool["type"] == "custom":
        text = {"type": "object", "properties": {"input": {"type": "string"}}}
        schema = {**text, "required": ["input"], "additionalProperties": False}
        custom = tool["custom"]
        return harmony.ToolDescription.new(custom["name"], custom["description"], schema)
    function = tool["function"]
    return harmony.ToolDescription.new(
        function["name"], function["description"], function.get("parameters")
    )


def turn(
    each: dict[str, Any], thinks: bool, channel: str, names: dict[str, str], built_in: list[str]
) -> list[Any]:
    content = each["content"] or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    if each["role"] == "user":
        author = harmony.Author(role=ROLE.USER, name=each.get("name"))
        return [harmony.Message.from_author_and_content(author, content)]
    if each["role"] in ("system", "developer"):
        content = harmony.DeveloperContent.new().with_instructions(content)
        return [message(ROLE.DEVELOPER, content)]
    if each["role"] == "tool":
        author = harmony.Author.new(ROLE.TOOL, names[each["tool_call_id"]])
        told = harmony.Message.from_author_and_content(author, content)
        return [told.with_recipient("assistant").with_channel("commentary")]
    said = []
    thought, calls = each.get("reasoning_content"), each.get("tool_calls", [])
    if thought and thinks:
        said.append(message(ROLE.ASSISTANT, thought).with_channel("analysis"))
    if content:
        said.append(message(ROLE.ASSISTANT, content).with_channel(channel))
    return said + [called(call, names, built_in) for call in calls]


def called(call: dict[str, Any], names: dict[str, str], built_in: list[str]) -> Any:
    custom, function = call.get("custom"), call.get("function")
    name = (custom or function)["name"]
    own = name.split(".")[0] in built_in
    names[call["id"]] = recipient = name if own else f"functions.{name}"
    if custom is None:
        text = function["arguments"]
    elif own:
        text = custom["input"]
    else:
        text = json.dumps({"input": custom["input"]}, separators=(",", ":"))
    said = message(ROLE.ASSISTANT, text).with_recipient(recipient)
    if own:
        return said.with_channel("analysis")
    return said.with_channel("commentary").with_content_type("<|constrain|>json")


def render(encoding: Any, chat: dict[str, Any]) -> dict[str, Any]:
    conversation = harmony.Conversation.from_messages(convert(chat))
    keep = harmony.RenderConversationConfig(auto_drop_analysis=False)
    ids = encoding.render_conversation_for_completion(conversation, ROLE.ASSISTANT, config=keep)
    return {"ids": ids, "text": encoding.decode(ids)}


# ---------------------------------------------------------------------- answers


def read(encoding: Any, ids: list[int]) -> list[dict[str, Any]] | None:
    """The messages of an answer, None for one that it does not take."""
    parser = harmony.StreamableParser(encoding, role=ROLE.ASSISTANT)
    try:
        for id in ids:
            parser.process(id)
        parser.process_eos()
    except harmony.HarmonyError:
        return None
    return [
        {
            "channel": each.channel,
            "recipient": each.recipient,
            "text": "".join(part.text for part in each.content),
        }
        for each in parser.messages
    ]


def main() -> None:
    encoding = load()
    prompts = {name: render(encoding, {**CHATS[name], "date": DATE}) for name in CHATS}
    if sys.argv[1:] == ["-"]:
        answers = [read(encoding, ids) for ids in json.load(sys.stdin)]
        json.dump({"prompts": prompts, "answers": answers}, sys.stdout)
        return
    golden = {
        "prompts": {name: prompt["text"] for name, prompt in prompts.items()},
        "answers": [
            read(encoding, encoding.encode(each, allowed_special="all")) for each in ANSWERS
        ],
    }
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
