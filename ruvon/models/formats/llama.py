"""Llama 3: a JSON object of name and parameters, alone or after ``<|python_tag|>``."""

from __future__ import annotations

from ruvon.models.formats.format import Format
from ruvon.models.formats.grammar import CallGrammar, json_body
from ruvon.models.formats.json_calls import read_json_calls

START = "<|python_tag|>"

LLAMA = Format(
    "llama",
    starts=(START,),
    marks=(),
    read=read_json_calls(joints=";,"),
    grammar=CallGrammar(START, json_body(arguments="parameters"), bare=True),
)
