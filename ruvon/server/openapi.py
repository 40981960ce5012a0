"""``GET /openapi.json``: what this server speaks, made from the types that requests are parsed to
and answers are written from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias

import orjson
from aiohttp import web
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from ruvon import __version__
from ruvon.server import responses, schemas
from ruvon.server import service_responses as service
from ruvon.server.body import offload
from ruvon.server.decisions import DecisionRequest
from ruvon.server.embeddings import EmbeddingRequest
from ruvon.server.inside import AttentionRequest
from ruvon.server.keys import KEYS, OPEN
from ruvon.server.messages_api import responses as messages
from ruvon.server.messages_api.schemas import CountRequest, MessagesRequest
from ruvon.server.ollama import OllamaRequest, ShowRequest
from ruvon.server.responses_api import answers
from ruvon.server.responses_api import schemas as requests_of_items
from ruvon.server.watch import GateRequest

Schema: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. ``answer`` and ``body`` are types; an answer that is `str` is plain text."""

    tag: str
    summary: str
    answer: Any
    body: Any = None
    streams: bool = False  # whether the answer may come as server-sent events
    queries: Mapping[str, Any] = field(default_factory=dict)  # name → type
    error: Any = responses.ErrorAnswer


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "OpenAI", "Answer a conversation", responses.ChatAnswer, schemas.ChatRequest, streams=True
    ),
    ("POST", "/v1/completions"): Operation(
        "OpenAI", "Continue texts", responses.TextAnswer, schemas.CompletionRequest, streams=True
    ),
    ("POST", "/v1/embeddings"): Operation(
        "OpenAI", "Texts as vectors", service.Embeddings, EmbeddingRequest
    ),
    ("POST", "/v1/decisions"): Operation(
        "OpenAI", "Answer typed questions", service.Answered, DecisionRequest
    ),
    ("POST", "/v1/messages"): Operation(
        "Anthropic",
        "Answer a conversation",
        messages.Message,
        MessagesRequest,
        streams=True,
        error=responses.AnthropicErrorAnswer,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Anthropic",
        "How long a conversation's prompt is",
        messages.TokenCount,
        CountRequest,
        error=responses.AnthropicErrorAnswer,
    ),
    ("POST", "/api/chat"): Operation(
        "Ollama",
        "Answer a conversation",
        dict[str, Any],
        OllamaRequest,
        streams=True,
        error=responses.OllamaErrorAnswer,
    ),
    ("POST", "/api/generate"): Operation(
        "Ollama",
        "Answer a prompt",
        dict[str, Any],
        OllamaRequest,
        streams=True,
        error=responses.OllamaErrorAnswer,
    ),
    ("GET", "/api/tags"): Operation("Ollama", "The served names", dict[str, Any]),
    ("POST", "/api/show"): Operation(
        "Ollama",
        "What a model can do",
        dict[str, Any],
        ShowRequest,
        error=responses.OllamaErrorAnswer,
    ),
    ("GET", "/api/version"): Operation("Ollama", "Ollama's version", service.Version),
    ("GET", "/v1/models"): Operation(
        "OpenAI",
        "The served names; Anthropic's list with the header anthropic-version",
        service.ModelList | messages.ModelPage,
        queries={"limit": int, "after_id": str, "before_id": str},
    ),
    ("GET", "/v1/models/{name}"): Operation(
        "OpenAI", "One served name", service.ModelCard | messages.ModelInfo
    ),
    ("POST", "/v1/responses"): Operation(
        "OpenAI",
        "Answer items",
        answers.ResponseAnswer,
        requests_of_items.ResponsesRequest,
        streams=True,
    ),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "OpenAI",
        "Count a prompt's tokens",
        answers.InputTokens,
        requests_of_items.InputTokensRequest,
    ),
    ("POST", "/v1/responses/compact"): Operation(
        "OpenAI",
        "Sum a conversation up",
        answers.CompactAnswer,
        requests_of_items.CompactRequest,
    ),
    ("GET", "/v1/responses/{id}"): Operation(
        "OpenAI",
        "A response, or its events again",
        answers.ResponseAnswer,
        streams=True,
        queries={"stream": bool, "starting_after": int},
    ),
    ("DELETE", "/v1/responses/{id}"): Operation("OpenAI", "Forget a response", answers.Deleted),
    ("POST", "/v1/responses/{id}/cancel"): Operation(
        "OpenAI", "End a response in the background", answers.ResponseAnswer
    ),
    ("GET", "/v1/responses/{id}/input_items"): Operation(
        "OpenAI",
        "What a response answers",
        answers.InputItemList,
        queries={"limit": int, "order": Literal["asc", "desc"], "after": str},
    ),
    ("POST", "/v1/chat/completions/render"): Operation(
        "tokens", "What a chat gives the model", service.Rendered, schemas.ChatRequest
    ),
    ("POST", "/v1/completions/render"): Operation(
        "tokens",
        "What completions give the model",
        list[service.Rendered],
        schemas.CompletionRequest,
    ),
    ("POST", "/apply-template"): Operation(
        "tokens", "A chat's prompt as text", service.Prompt, schemas.ChatRequest
    ),
    ("POST", "/tokenize"): Operation(
        "tokens",
        "A prompt, or messages, as ids",
        service.Tokens,
        schemas.TokenizeRequest | schemas.TokenizeChatRequest,
    ),
    ("POST", "/detokenize"): Operation(
        "tokens", "Ids as text", service.Detokenized, schemas.DetokenizeRequest
    ),
    ("GET", "/tokenizer_info"): Operation(
        "tokens", "What a tokenizer at the client needs", service.TokenizerInfo
    ),
    ("GET", "/health"): Operation("state", "Whether requests are answered", service.Status),
    ("GET", "/live"): Operation("state", "Whether the process works", service.Status),
    ("GET", "/ready"): Operation("state", "Whether requests are wanted", service.Readiness),
    ("GET", "/load"): Operation("state", "What a router asks", service.Load),
    ("GET", "/version"): Operation("state", "ruvon's version", service.Version),
    ("GET", "/v1/requests/{id}/explain"): Operation(
        "state", "Why a request took so long", service.Explanation
    ),
    ("GET", "/debug/steps"): Operation(
        "state",
        "The last steps in numbers; for admin keys",
        service.Steps,
        queries={"since": int, "limit": int},
    ),
    ("GET", "/about"): Operation("state", "What the page has to know", dict[str, Any]),
    ("GET", "/debug/live"): Operation(
        "state",
        "The engine at work, for the page; for admin keys",
        dict[str, Any],
        streams=True,
    ),
    ("POST", "/debug/gate"): Operation(
        "state", "Slow the engine down, for the page; for admin keys", dict[str, Any], GateRequest
    ),
    ("POST", "/debug/attention"): Operation(
        "state",
        "What a short prompt's heads attend to and its layers would say; for admin keys",
        dict[str, Any],
        AttentionRequest,
    ),
    ("GET", "/debug/trace"): Operation(
        "state", "The last steps as a Chrome trace; for admin keys", dict[str, Any]
    ),
    ("GET", "/debug/recording"): Operation(
        "state",
        "What is scheduled, for ruvon replay, a JSON object a line; for admin keys",
        str,
        queries={"steps": int, "seconds": float, "contents": bool},
    ),
    ("GET", "/metrics"): Operation("state", "Prometheus metrics", str),
    ("GET", "/openapi.json"): Operation("state", "This document", dict[str, Any]),
}
"""Every endpoint, by method and path."""

DIALECTS = ("OpenAI", "Anthropic", "Ollama")
"""Tags of operations that are somebody's API."""


def dialects() -> dict[str, list[str]]:
    """Whose APIs these are, and where: by name, the paths that answers come from."""
    posts = [path for method, path in OPERATIONS if method == "POST"]
    main = [path for path in posts if not any(path.startswith(f"{each}/") for each in posts)]
    return {
        name: [path for path in main if OPERATIONS["POST", path].tag == name] for name in DIALECTS
    }


SECURITY: Schema = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
REFERENCE = "#/components/schemas/{model}"


async def openapi(http: web.Request) -> web.Response:
    """The document."""
    keyed = http.app[KEYS].are_needed
    body = await offload(http.app, True, lambda: render(keyed))
    return web.Response(body=body, content_type="application/json")


@cache
def render(keyed: bool) -> bytes:
    """The document as JSON, for a server with keys or without."""
    return orjson.dumps(document(keyed))


def document(keyed: bool) -> Schema:
    """The document: OpenAPI 3.1, whose schemas are JSON schemas."""
    found, definitions = schemas_of(OPERATIONS)
    paths: dict[str, Schema] = {}
    for (method, path), operation in OPERATIONS.items():
        entry = describe(method, path, operation, found)
        if keyed and path not in OPEN:
            entry["security"] = [{"bearer": []}, {"key": []}]
        paths.setdefault(path, {})[method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "ruvon", "version": __version__, "license": {"name": "MIT"}},
        "paths": paths,
        "components": {"schemas": definitions, "securitySchemes": SECURITY if keyed else {}},
    }


Found: TypeAlias = Mapping[tuple[str, JsonSchemaMode], Schema]
"""The schema of an operation's part, such as ``POST /tokenize body``, by name and mode."""


def schemas_of(operations: Mapping[tuple[str, str], Operation]) -> tuple[Found, Schema]:
    """The schemas of all bodies and answers, and the definitions that they share."""
    inputs: list[tuple[str, JsonSchemaMode, TypeAdapter[Any]]] = []
    for (method, path), operation in operations.items():
        name = f"{method} {path}"
        inputs.append((f"{name} answer", "serialization", TypeAdapter(operation.answer)))
        inputs.append((f"{name} error", "serialization", TypeAdapter(operation.error)))
        if operation.body is not None:
            inputs.append((f"{name} body", "validation", TypeAdapter(operation.body)))
        for query, kind in operation.queries.items():
            inputs.append((f"{name}?{query}", "validation", TypeAdapter(kind)))
    found, shared = TypeAdapter.json_schemas(inputs, ref_template=REFERENCE)
    return found, shared.get("$defs", {})


def describe(method: str, path: str, operation: Operation, found: Found) -> Schema:
    """One operation."""
    name = f"{method} {path}"
    entry: Schema = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", name.lower()).strip("_"),
        "responses": {
            "200": {"description": "OK", "content": contents(name, operation, found)},
            "4XX": failed(name, "What is wrong with the request", found),
            "5XX": failed(name, "Why it cannot be answered now", found),
        },
    }
    if path in ANSWERS_503:  # in the form of the answer, for it is one
        entry["responses"]["503"] = entry["responses"]["200"] | {"description": "No"}
    if parameters := parameters_of(name, path, operation, found):
        entry["parameters"] = parameters
    if operation.body is not None:
        body = {"application/json": {"schema": found[f"{name} body", "validation"]}}
        entry["requestBody"] = {"required": True, "content": body}
    return entry


ANSWERS_503 = frozenset({"/health", "/live", "/load", "/ready"})


def parameters_of(name: str, path: str, operation: Operation, found: Found) -> list[Schema]:
    """What is in the path, and what may follow it."""
    inside: list[Schema] = [
        {"name": each, "in": "path", "required": True, "schema": {"type": "string"}}
        for each in re.findall(r"{(\w+)}", path)
    ]
    behind = [
        {"name": each, "in": "query", "schema": found[f"{name}?{each}", "validation"]}
        for each in operation.queries
    ]
    return inside + behind


def contents(name: str, operation: Operation, found: Found) -> Schema:
    """What an answer may be, by media type."""
    if operation.answer is str:
        return {"text/plain": {"schema": {"type": "string"}}}
    content: Schema = {"application/json": {"schema": found[f"{name} answer", "serialization"]}}
    if operation.streams:
        stream = "application/x-ndjson" if operation.tag == "Ollama" else "text/event-stream"
        content[stream] = {}  # what an event holds, the API's own pages say
    return content


def failed(name: str, description: str, found: Found) -> Schema:
    schema = found[f"{name} error", "serialization"]
    return {"description": description, "content": {"application/json": {"schema": schema}}}
