"""Scripts for a model that speaks harmony: it reads its prompt as one that speaks Hermes would, and
says the same in its own way, thinking before each call and each answer, and calling one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

MESSAGE = re.compile(
    r"<\|start\|>(?P<author>[^<]+)(?:<\|channel\|>(?P<channel>[^<]+))?(?:<\|constrain\|>json)?"
    r"<\|message\|>(?P<text>.*?)<\|(?:end|call)\|>",
    re.DOTALL,
)
NAME = re.compile(r"^type (\S+) = ", re.MULTILINE)
CALL = re.compile(r'<tool_call>\n{"name": "(.+?)", "arguments": (.*?)}\n</tool_call>', re.DOTALL)
ON = "<|end|><|start|>assistant"


def speaking(script: Callable[[str], str]) -> Callable[[str], str]:
    """The script of a Hermes model, spoken in harmony."""

    def speak(prompt: str) -> str:
        messages = [found.groupdict() for found in MESSAGE.finditer(prompt)]
        users = [at for at, each in enumerate(messages) if each["author"] == "user"]
        asked = messages[: users[-1] + 1] if users else messages
        results = sum(is_result(each) for each in messages[len(asked) :])
        calls = CALL.findall(script(as_hermes(asked)))
        if results < len(calls):
            return as_call(*calls[results])
        said = script(as_hermes(messages))
        return as_call(*CALL.findall(said)[0]) if CALL.search(said) else as_answer(said)

    return speak


def is_result(message: dict[str, str]) -> bool:
    return message["author"].endswith(" to=assistant")


def as_hermes(messages: list[dict[str, str]]) -> str:
    """What is thought is no part of it."""
    said = []
    for each in messages:
        author, text = each["author"].partition(" ")[0], each["text"]
        if is_result(each):
            author, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        elif " to=" in each["author"]:
            name = each["author"].rpartition(".")[2]
            text = f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'
        elif author == "developer" and (names := NAME.findall(text)):
            listed = "\n".join(json.dumps({"name": name}) for name in names)
            text = f"{text}\n<tools>\n{listed}\n</tools>"
        if each["channel"] != "analysis":
            said.append(f"<|im_start|>{author}\n{text}<|im_end|>\n")
    return "".join([*said, "<|im_start|>assistant\n"])


def as_call(name: str, arguments: str) -> str:
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"<|channel|>analysis<|message|>I need {name}.{ON}{header}{arguments}<|call|>"


def as_answer(text: str) -> str:
    thought = f"<|channel|>analysis<|message|>I know what to say.{ON}"
    return f"{thought}<|channel|>final<|message|>{text}<|return|>"
