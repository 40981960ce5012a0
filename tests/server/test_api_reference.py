"""docs/reference/api.md against the parser, field by field."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ruvon
from ruvon import errors
from ruvon.errors import RequestError
from ruvon.server import constraints
from ruvon.server.app import ROUTES
from ruvon.server.chat import BUDGETS
from ruvon.server.decisions import DecisionRequest
from ruvon.server.embeddings import EmbeddingRequest
from ruvon.server.fields import HARMLESS, INSTEAD, UNSERVED
from ruvon.server.generation import REQUESTS_FAULT
from ruvon.server.messages_api.schemas import MessagesRequest
from ruvon.server.ollama import OllamaRequest
from ruvon.server.parsing import parse
from ruvon.server.requests import PASSED
from ruvon.server.responses_api.input import ITEM_KINDS
from ruvon.server.responses_api.schemas import ResponsesRequest
from ruvon.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    Message,
    SamplingFields,
    TokenizeChatRequest,
    TokenizeRequest,
)

PENALTIES = {"presence_penalty", "frequency_penalty", "repetition_penalty"}
SOURCE = Path(ruvon.__file__).parent
TEXT = (SOURCE.parent / "docs" / "reference" / "api.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)}
NAME = re.compile(r"`([\w.]+)`")

USER = {"role": "user", "content": "Hi"}
CHAT = {"messages": [USER]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
EXAMPLES = {
    "model": "org/fake", "n": 2, "stream": False, "temperature": 0.5, "top_p": 0.5, "top_k": 5,
    "min_p": 0.1, "typical_p": 0.5, "presence_penalty": 1, "frequency_penalty": 1,
    "repetition_penalty": 1.1, "logit_bias": {"97": 1}, "seed": 1, "stop": ["x"],
    "include_stop_str_in_output": True, "stop_token_ids": [98], "min_tokens": 1,
    "ignore_eos": True, "allowed_token_ids": [97], "bad_words": ["x"],
    "skip_special_tokens": False, "prompt_logprobs": 1, "return_token_ids": True, "echo": True,
    "priority": 1, "cache_salt": "x", "max_tokens": 3, "truncate_prompt_tokens": 9,
    "request_id": "me", "return_prompt_text": True, "return_tokens_as_token_ids": True,
    "timeout": 9, "timings": True,
    "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a+"},
    "guided_json": {"type": "object"}, "guided_regex": "a+", "guided_choice": ["a", "b"],
    "guided_grammar": 'start: "a"', "json_schema": "{}", "regex": "a", "ebnf": 'root ::= "a"',
    "grammar": 'root ::= "a"',
}  # fmt: skip
OF_CHAT = EXAMPLES | {
    "max_completion_tokens": 3, "logprobs": True, "add_generation_prompt": True,
    "tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False, "metadata": {"a": "b"},
    "include_reasoning": False, "separate_reasoning": False, "reasoning_format": "none",
}  # fmt: skip
OF_COMPLETIONS = EXAMPLES | {"logprobs": 1, "best_of": 2, "add_special_tokens": False}
BESIDE_OTHERS = {
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "top_logprobs": {"logprobs": True, "top_logprobs": 1},
    "truncation_side": {"truncate_prompt_tokens": 9, "truncation_side": "right"},
    "logprob_token_ids": {"logprobs": 1, "logprob_token_ids": [97]},
    "continue_final_message": {
        "messages": [USER, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
    },
}


OF_SOME_MODELS = {
    "chat_template_kwargs", "documents", "enable_thinking", "reasoning_budget", "reasoning_effort",
    "thinking_budget", "thinking_token_budget",
}  # fmt: skip


HOLDS_WITHOUT_IT = {"stream_options", "cache_control"}  # usage is told, prefixes are cached anyway
OF_THEIR_OWN = {
    "Messages": MessagesRequest,
    "Ollama": OllamaRequest,
    "Embeddings": EmbeddingRequest,
    "Decisions": DecisionRequest,
}


def named(section: str, column: int = 1) -> list[str]:
    """The names in one column of a section's tables."""
    rows = [line.split("|") for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    return [name for row in rows for name in NAME.findall(row[column])]


def test_what_is_served_is_what_is_declared():
    both = set(GenerationFields.model_fields)
    assert set(named("Fields of both")) == both
    assert set(named("Completions")) == set(CompletionRequest.model_fields) - both
    chat = set(ChatRequest.model_fields) - both
    assert set(named("Chat")) == chat | set(Message.model_fields)
    sampling = set(SamplingFields.model_fields)
    items = set(ITEM_KINDS) - set(ResponsesRequest.model_fields)
    assert set(named("Responses")) - items == set(ResponsesRequest.model_fields) - sampling
    assert sampling - PENALTIES <= set(NAME.findall(SECTIONS["Responses"]))
    for section, kind in OF_THEIR_OWN.items():
        assert set(named(section)) == set(kind.model_fields), section
    tokens = [TokenizeRequest, TokenizeChatRequest, DetokenizeRequest]
    assert set(named("Tokens")) == {name for kind in tokens for name in kind.model_fields}


def test_what_is_declared_is_read():
    """By something beside the schema that declares it."""
    read = {*PASSED, *constraints.KINDS, *BUDGETS}
    for path in (SOURCE / "server").rglob("*.py"):
        if path.parent.name != "schemas":
            nodes = ast.walk(ast.parse(path.read_text()))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for kind in (
        ChatRequest,
        CompletionRequest,
        ResponsesRequest,
        TokenizeRequest,
        DetokenizeRequest,
        *OF_THEIR_OWN.values(),
    ):
        assert set(kind.model_fields) - HOLDS_WITHOUT_IT <= read


async def test_what_is_served_is_taken(serve):
    server = await serve("aaa")
    for path, base, examples in (
        ("/v1/chat/completions", CHAT, OF_CHAT),
        ("/v1/completions", {"prompt": "Hi"}, OF_COMPLETIONS),
    ):
        each = [{name: value} for name, value in examples.items()]
        fields = named("Chat" if base is CHAT else "Completions")
        each += [more for name, more in BESIDE_OTHERS.items() if name in fields]
        for body in [*each, BESIDE_OTHERS["stream_options"]]:
            reply = await server.post(path, base | body)
            assert reply.status == 200, (body, reply.body)
            assert "X-Ruvon-Ignored" not in reply.headers, body
    tried = {*OF_CHAT, *OF_COMPLETIONS, *BESIDE_OTHERS, *OF_SOME_MODELS, "messages", "prompt"}
    assert tried == {*ChatRequest.model_fields, *CompletionRequest.model_fields}


def refused() -> list[str]:
    """The names in the table of what is refused, without those to use instead."""
    section = re.sub(r"\(here `\w+`\)", "", SECTIONS["Fields that are refused"])
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [name for row in rows for name in NAME.findall(row)]


def test_what_is_refused_is_listed():
    assert sorted(refused()) == sorted(UNSERVED)
    told = re.findall(r"`(\w+)` \(here `(\w+)`\)", TEXT)
    assert dict(told) == INSTEAD
    served = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert set(INSTEAD.values()) <= served


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_refused(name):
    for kind, base in ((ChatRequest, CHAT), (CompletionRequest, {"prompt": "Hi"})):
        if name in kind.model_fields:
            continue
        with pytest.raises(RequestError) as error:
            parse(kind, base | {name: "anything"})
        assert (error.value.param, error.value.code) == (name, "unsupported_parameter")
        assert INSTEAD.get(name, "") in error.value.message
        for neutral in (None, "", [], {}, *UNSERVED[name]):
            assert parse(kind, base | {name: neutral})[1] == []


def test_what_has_no_effect_is_listed_taken_and_reported():
    listed = SECTIONS["Fields without effect"].partition(":\n")[2].partition("\n\n")[0]
    assert set(NAME.findall(listed)) == HARMLESS
    for name in HARMLESS - {"stream_options.include_obfuscation"}:
        assert parse(ChatRequest, CHAT | {name: "x"}, strict=True)[1] == [name]


def test_no_field_is_in_two_classes():
    served = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    of_one = {"best_of", "add_special_tokens", "tools", "tool_choice", "documents"}
    of_one |= {"logprob_token_ids"}  # not of responses
    assert served & UNSERVED.keys() == of_one
    assert not served & HARMLESS
    assert not HARMLESS & UNSERVED.keys()


def test_every_endpoint_is_listed():
    rows = re.findall(r"`(GET|POST|DELETE) (/[\w/{}.-]*)`", TEXT)
    nameless = re.compile(r"{[^}]*}")
    routes = {(route.method, nameless.sub("{}", route.path)) for route in ROUTES}
    assert {(method, nameless.sub("{}", path)) for method, path in rows} == routes


def test_every_code_is_listed():
    codes = set(REQUESTS_FAULT.values()) | {
        value.code
        for value in vars(errors).values()
        if isinstance(value, type) and isinstance(getattr(value, "code", None), str)
    }
    for path in [*(SOURCE / "server").rglob("*.py"), *(SOURCE / "models").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "RequestError":
                given = [*node.args[2:], *(k.value for k in node.keywords if k.arg == "code")]
                codes |= {arg.value for arg in given if isinstance(arg, ast.Constant)}
    rows = re.findall(r"^\| \d+ \|([^|]*)\|", SECTIONS["Errors"], re.MULTILINE)
    listed = {name for row in rows for name in NAME.findall(row)}
    assert codes - {None} <= listed
    assert listed - codes <= {"internal_error", "unknown_url", "method_not_allowed", "invalid_type"}
