"""Hermes, Qwen and many others: ``<tool_call>``, a JSON object, ``</tool_call>`` for each call.

SmolLM2 and its like write a list of such objects between one pair of tags.
"""

from __future__ import annotations

from ruvon.models.formats.format import Format
from ruvon.models.formats.grammar import CallGrammar, json_body
from ruvon.models.formats.json_calls import read_json_calls

START, END = "<tool_call>", "</tool_call>"

HERMES = Format(
    "hermes",
    starts=(START,),
    marks=(END,),
    read=read_json_calls(END),
    grammar=CallGrammar(START, json_body("\n", ("\n", END)), joint="\n"),
)
SMOLLM = Format(
    "smollm",
    starts=(START,),
    marks=(END,),
    read=read_json_calls(END),
    grammar=CallGrammar(START, json_body("", ("", END), listed='"["')),
)
