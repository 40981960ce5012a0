"""A whole gpt-oss, tiny and of random weights: found by its files, held to harmony by grammars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, models

from ruvon import LLM, SamplingParams
from ruvon.grammars import json_schema
from ruvon.models.byte_level import BYTE_OF
from ruvon.models.formats.harmony import Mark
from ruvon.models.formats.tools import Reasoning
from ruvon.models.harmony_chat import HarmonyChat
from ruvon.models.vocab import byte_level_backend

sys.path.append(str(Path(__file__).parent / "models"))
from tiny_gpt_oss import save_gpt_oss

USER = [{"role": "user", "content": "Hi"}]
FLAG = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "switch", "parameters": FLAG}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    save_gpt_oss(folder)
    backend = byte_level_backend(models.BPE(BYTE_OF, []))
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in Mark])
    backend.save(str(folder / "tokenizer.json"))
    with LLM(str(folder), max_model_len=2048, kv_cache_memory="64MiB", dtype="float32") as made:
        yield made


def test_it_is_found_by_its_vocabulary_and_stops_where_harmony_does(llm):
    assert isinstance(llm.loaded.chat, HarmonyChat)
    ids = llm.loaded.tokenizer.added_ids
    assert {ids[Mark.RETURN], ids[Mark.CALL]} <= {*llm.loaded.eos_token_ids}
    assert ids[Mark.END] not in llm.loaded.eos_token_ids


def test_it_calls_what_it_must(llm):
    ((answer,),) = llm.chat(
        [USER],
        SamplingParams(temperature=1, seed=1, max_tokens=256),
        tools=[TOOL],
        tool_choice="required",
        reasoning=Reasoning(budget=8),
    )
    (call,) = answer.tool_calls
    assert (call.name, answer.text) == ("switch", "")
    assert type(json.loads(call.arguments)["on"]) is bool
    assert answer.finish_reason == "stop"


def test_it_answers_in_a_form(llm):
    ((answer,),) = llm.chat(
        [USER],
        SamplingParams(temperature=1, seed=2, max_tokens=256, grammar=json_schema(FLAG)),
        reasoning=Reasoning(budget=8),
    )
    assert type(json.loads(answer.text)["on"]) is bool


def test_whatever_it_writes_is_read(llm):
    """Random weights write no harmony at all: that is content."""
    answers = llm.chat([USER], SamplingParams(temperature=1, seed=3, max_tokens=64), n=4)
    assert all(answer.finish_reason in ("stop", "length") for answer in answers[0])
