"""The formats, and how one is found: by what a model's own template writes around calls."""

from __future__ import annotations

from ruvon.models.formats.format import Format
from ruvon.models.formats.hermes import HERMES, SMOLLM
from ruvon.models.formats.llama import LLAMA
from ruvon.models.formats.mistral import MISTRAL, MISTRAL_NAMED
from ruvon.models.formats.qwen_coder import QWEN_CODER
from ruvon.models.formats.untaught import UNTAUGHT, UNTOLD

FORMATS: tuple[tuple[tuple[str, ...], Format], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_NAMED),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<function=", "<parameter="), QWEN_CODER),
    (("<tool_call>[",), SMOLLM),
    (("<tool_call>",), HERMES),
    (("<|python_tag|>",), LLAMA),
    (("<|start_header_id|>",), LLAMA),
)
"""What a template that renders tools must contain, all of it, and the format it is then of."""


def find_format(template: str, knows_tools: bool) -> Format:
    """The format of a template, given by its source and whether it looks at tools."""
    if not knows_tools:
        return UNTOLD if "tool_calls" in template else UNTAUGHT
    found = (form for marks, form in FORMATS if all(mark in template for mark in marks))
    return next(found, HERMES)
