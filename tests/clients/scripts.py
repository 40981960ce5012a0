"""What scripted models say: functions of the prompt, as the model's text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harmony_script import speaking

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
TOOL = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
COMMAND = re.compile(r"^(say|call): ", re.MULTILINE)


def turns(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of each message; the last is the assistant's, to be written."""
    return TURN.findall(prompt)


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def call(name: str, arguments: Mapping[str, Any] | str = "{}") -> str:
    """A tool call as Hermes writes it. Arguments are as compact as grammars want them."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    return f'<tool_call>\n{{"name": "{name}", "arguments": {compact(value)}}}\n</tool_call>'


def asked(prompt: str) -> str:
    """The last thing that a user, or a tool, said."""
    return ["", *(text for role, text in turns(prompt) if role in ("user", "tool"))][-1]


def obedient(prompt: str) -> str:
    """Says what it is told to: ``say: Hello``, or ``call: add {"a":1,"b":2}``, once a call. What a
    tool answers it repeats."""
    text = asked(prompt) if turns(prompt) else prompt
    if results := TOOL.findall(text):
        return f"It says {results[-1]}"
    commands = COMMAND.split(text)[1:]  # verb, rest, verb, rest ...
    if not commands:
        return "Hello"
    if commands[0] == "say":
        return commands[1].strip()
    return "\n".join(call(*rest.strip().split(" ", 1)) for rest in commands[1::2])


def langchain(prompt: str) -> str:
    """Answers what langchain-tests' standard tests ask."""
    text = asked(prompt)
    if "<tool_response>" in text:
        return obedient(prompt)
    if named := re.search(r"customer named '(.+?)'", text):
        return call("unicode_customer", {"customer_name": named[1], "description": "A company"})
    if "joke" in text:
        joke = {"setup": "Why did the cat sit?", "punchline": "It was tired."}
        name = re.search(r'"name": ?"(Joke\w*)"', prompt)
        return call(name[1], joke) if name else compact(joke)
    answers = {
        "magic_function_no_args()": ("magic_function_no_args", {}),
        "magic_function(3)": ("magic_function", {"input": 3}),
        "Hello!": ("magic_function", {"input": 3}),
        "Pirate": ("greeting_generator", {"answer_style": "Pirate"}),
        "What is 3 + 4": ("my_adder_tool", {"a": 3, "b": 4}),
        "weather in San": ("get_weather", {"location": "San Francisco, CA"}),
    }
    for part, (name, arguments) in answers.items():
        if part in text and "<tools>" in prompt:
            return call(name, arguments)
    return "Hello, I am fine."


# ---------------------------------------------------------------------------- coding agents

BROKEN, MENDED = "    return a - b", "    return a + b"
TASK = re.compile(r"Mend add in (\S+?calc\.py)")
DONE = re.compile(r"Steps done: (\d+)")
Step = tuple[str, str, dict[str, Any]]  # what the last result must hold, a tool, its arguments


def loop(prompt: str, steps: list[Step]) -> str:
    """The next step of a loop of tool calls, told by how many results there are; at the end Done.
    A result other than awaited ends it, so it must come back whole. A prompt without tools asks for
    a title, or for a summary of results that the prompts after it have no more."""
    results, summaries = TOOL.findall(prompt), DONE.findall(prompt)
    done = len(results) + int(summaries[-1] if summaries else 0)
    if "<tools>" not in prompt:
        return f"Steps done: {done}"
    awaited, *rest = [*steps, (MENDED.strip(), "", {})][min(done, len(steps))]
    if results and awaited not in results[-1]:
        return f"Unexpected: {results[-1]}"
    return call(*rest) if rest[0] else "Done: add adds."


def task(prompt: str) -> str:
    """The path of the file to be mended."""
    found = TASK.search(prompt)
    return found[1] if found else ""


def editing(read: Step, edit: Step) -> list[Step]:
    """Read the file, edit it, look at it again."""
    return [read, edit, ("", *read[1:])]


def codex(prompt: str) -> str:
    """Patches with the tool for that where it is offered, which takes text, else in the shell."""
    patch, cat = apply_patch("calc.py"), ("exec_command", {"cmd": "cat calc.py"})
    edit = ("exec_command", {"cmd": f"apply_patch <<'EOF'\n{patch}EOF\n"})
    if re.search(r'"name": ?"apply_patch"', prompt):
        edit = ("apply_patch", {"input": patch})
    return loop(prompt, editing(("", *cat), (BROKEN.strip(), *edit)))


def apply_patch(path: str) -> str:
    """The edit as Codex's own tool takes it."""
    return (
        f"*** Begin Patch\n*** Update File: {path}\n@@ def add(a, b):\n-{BROKEN}\n+{MENDED}\n"
        "*** End Patch\n"
    )


def claude_code(prompt: str) -> str:
    path = task(prompt)
    edit = {"file_path": path, "old_string": BROKEN, "new_string": MENDED}
    steps = editing(("", "Read", {"file_path": path}), (BROKEN.strip(), "Edit", edit))
    return loop(prompt, steps)


def opencode(prompt: str) -> str:
    path = task(prompt)
    edit = {"filePath": path, "oldString": BROKEN, "newString": MENDED}
    return loop(prompt, editing(("", "read", {"filePath": path}), (BROKEN.strip(), "edit", edit)))


def aider(prompt: str) -> str:
    if BROKEN not in prompt:
        return "Unexpected: the file is not in the prompt."
    return (
        "Here is the change:\n\ncalc.py\n```python\n<<<<<<< SEARCH\n"
        f"{BROKEN}\n=======\n{MENDED}\n>>>>>>> REPLACE\n```\n"
    )


def compatibility(prompt: str) -> str:
    """Answers OpenAI's compatibility test for servers of gpt-oss, whose cases.jsonl
    ``COMPATIBILITY_CASES`` names."""
    if results := TOOL.findall(prompt):
        return f"It says {results[-1]}"
    lines = Path(os.environ["COMPATIBILITY_CASES"]).read_text().splitlines()
    cases = [json.loads(line) for line in lines if line]
    found = next(case for case in cases if case["input"].strip() == asked(prompt).strip())
    return call(found["tool_name"], found["expected_arguments"])


HARMONY = "-harmony"
"""Ends the names of scripts whose model speaks it."""

SCRIPTS: dict[str, Callable[[str], str]] = {
    "obedient": obedient,
    "langchain": langchain,
    "codex": codex,
    "claude-code": claude_code,
    "opencode": opencode,
    "aider": aider,
    "compatibility": compatibility,
}
SCRIPTS |= {f"{name}{HARMONY}": speaking(script) for name, script in SCRIPTS.items()}
