"""Ollama's API, for clients that speak nothing else: OpenAI's in other words, as lines of JSON."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar

import orjson
from aiohttp import web

from ruvon.deltas import Delta, ToolCall
from ruvon.engine.detokenizer import MakeParser
from ruvon.engine.types import Job
from ruvon.errors import RequestError
from ruvon.models.chat import PlainParser
from ruvon.server.body import read
from ruvon.server.chat import prepare_chat
from ruvon.server.completions import prepare_completion
from ruvon.server.events import Media
from ruvon.server.failures import ollama_error
from ruvon.server.fields import EMPTY
from ruvon.server.generation import Generation
from ruvon.server.messages_api.writer import read_input
from ruvon.server.middleware import FACTS, json_response
from ruvon.server.parsing import MAX_IGNORED, load, parse, refuse_ignored
from ruvon.server.requests import bounded
from ruvon.server.schemas import ChatRequest, CompletionRequest, SamplingFields
from ruvon.server.schemas.base import missing
from ruvon.server.shape import Bounds
from ruvon.server.state import STATE, Service
from ruvon.server.writers.envelope import Tally

T = TypeVar("T")
Fields: TypeAlias = dict[str, Any]
Understood: TypeAlias = tuple[Fields, Sequence[str], Job | None, MakeParser]

VERSION = "0.12.11"  # clients ask for one that is new enough
LINES = Media("application/x-ndjson", lambda: b"")
KINDS = {dict: "an object", str: "a text", bool: "true or false", int: "a whole number"}
OPTIONS = {"repeat_penalty": "repetition_penalty", "num_predict": "max_tokens"}
DRAWING = {"max_tokens", "mirostat", "repeat_last_n", "tfs_z", *SamplingFields.model_fields}
OF_MESSAGES = {"thinking": "reasoning_content", "tool_name": "name"}
CHAT = {"format", "think", "options", "messages"}  # what is read of a request, in other words
GENERATE = {"format", "think", "options", "prompt", "system", "raw"}
RAW = {"format", "options", "prompt", "raw"}
SAME = {"model", "tools", "keep_alive", "suffix", "template", "images", "context", "stream"}


async def tags(http: web.Request) -> web.Response:
    """The served names."""
    service = http.app[STATE].ready()
    listed = [{"name": n, "model": n, **_card(n, service)} for n in service.names]
    return json_response({"models": listed})


async def show(http: web.Request) -> web.Response:
    """One of them, with what clients look for: the context's length, and what it can do."""

    def shown(body: bytes, service: Service) -> Fields:
        data = load(body, Bounds.of_context(service.max_model_len))
        name, family = data.get("model") or data.get("name"), service.architecture
        if not isinstance(name, str):
            raise missing("model")
        service.check_model(name.removesuffix(":latest"))
        length = {f"{family}.context_length": service.max_model_len}
        return _card(name, service) | {
            "capabilities": ["completion", "tools", *["thinking"] * service.chat.reasons],
            "model_info": {"general.architecture": family, **length},
            "parameters": "\n".join(f"{key} {value}" for key, value in service.defaults.items()),
        }

    return json_response(await read(http, shown))


def _card(name: str, service: Service) -> Fields:
    kind, family = "gguf" if service.root.endswith(".gguf") else "safetensors", service.architecture
    unknown = dict.fromkeys(("parent_model", "parameter_size", "quantization_level"), "")
    return {
        "modified_at": _time(datetime.fromtimestamp(service.created, UTC)),
        "size": service.weight_bytes,
        "digest": hashlib.sha256(f"{service.fingerprint}{name}".encode()).hexdigest(),
        "details": {"format": kind, "family": family, "families": [family], **unknown},
    }


async def version(http: web.Request) -> web.Response:
    """The version of Ollama whose API this is."""
    return json_response({"version": VERSION})


async def answer(http: web.Request) -> web.StreamResponse:
    """``POST /api/chat`` and ``/api/generate``. Who asks nothing wants the model to be loaded."""
    server, is_chat = http.app[STATE].server, http.path == "/api/chat"

    def understand(body: bytes, service: Service) -> Understood:
        data = load(body, Bounds.of_context(service.max_model_len))
        fields, lost = as_openai(data, service, is_chat)
        if not fields.get("prompt", fields.get("messages")):
            return data, lost, None, PlainParser
        if "prompt" in fields:
            text, ignored = parse(CompletionRequest, fields, server.strict)
            (job,) = prepare_completion(text, service, server.max_logprobs)
            return data, [*ignored, *lost], job, PlainParser
        request, ignored = parse(ChatRequest, fields, server.strict)
        job, turn = prepare_chat(request, service, server.max_logprobs)
        return data, [*ignored, *turn.ignored, *lost], job, turn.parser

    service = http.app[STATE].ready()
    data, ignored, job, parser = await read(http, understand)
    refuse_ignored(ignored, server.strict)
    model = str(data.get("model") or service.names[0])
    writer = OllamaWriter(http[FACTS]["request_id"], model, job, is_chat=is_chat)
    if job is None:
        return json_response(writer.line({}, {"done_reason": "load"}))
    generation = Generation(http, service, [job], writer, parser)
    stream = data.get("stream") is not False
    return await generation.send(stream=stream, ignored=ignored, media=LINES)


def as_openai(data: Fields, service: Service, is_chat: bool) -> tuple[Fields, list[str]]:
    """A request in OpenAI's words, a chat's or of a raw prompt, and what there are none for."""
    options, prompt = given(data, "options", dict) or {}, given(data, "prompt", str) or ""
    is_raw = bool(given(data, "raw", bool)) and not is_chat
    ours = {OPTIONS.get(name, name): options[name] for name in options if name != "num_ctx"}
    known = SAME | (CHAT if is_chat else RAW if is_raw else GENERATE)
    lost = [name for name in data if name not in known and data[name] not in EMPTY]
    lost += [f"options.{name}"[:100] for name in ours if name not in DRAWING]
    fields = {name: data[name] for name in SAME.intersection(data)}
    fields |= {name: ours[name] for name in DRAWING.intersection(ours)}
    if isinstance(most := fields.get("max_tokens"), int) and most < 0:
        del fields["max_tokens"]  # as many as the context holds
    bounded(given(options, "num_ctx", int), service.max_model_len, "num_ctx")
    if isinstance(name := data.get("model"), str):
        fields["model"] = name.removesuffix(":latest")
        service.check_model(fields["model"])
    if form := data.get("format"):
        kind = {"type": "json_schema", "json_schema": {"name": "format", "schema": form}}
        fields["response_format"] = {"type": "json_object"} if form == "json" else kind
    if is_raw:
        return fields | {"prompt": prompt}, lost[:MAX_IGNORED]
    if isinstance(think := data.get("think"), str):
        fields["reasoning_effort"], think = think, True
    said = {"system": data.get("system"), "user": prompt}
    turns = [{"role": role, "content": said[role]} for role in said if prompt and said[role]]
    messages = data.get("messages") if is_chat else turns
    if isinstance(messages, list):
        messages = [
            message_as_openai(each) if isinstance(each, dict) else each for each in messages
        ]
    return fields | {"enable_thinking": think, "messages": messages}, lost[:MAX_IGNORED]


def given(data: Fields, name: str, kind: type[T]) -> T | None:
    """A field's value. Raises RequestError if it is of another kind."""
    value = data.get(name)
    if value in EMPTY:
        return None
    if type(value) is kind:
        return value
    raise RequestError(f"'{name}' should be {KINDS[kind]}.", name, "invalid_type")


def message_as_openai(message: Fields) -> Fields:
    fields = {OF_MESSAGES.get(name, name): value for name, value in message.items()}
    if isinstance(calls := message.get("tool_calls"), list):
        fields["tool_calls"] = [call_as_openai(call, index) for index, call in enumerate(calls)]
    return fields | {"content": message.get("content") or ""}


def call_as_openai(call: Any, index: int) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = orjson.dumps(function.get("arguments") or {}).decode()
    return {"id": f"call_{index}", **call, "function": {**function, "arguments": arguments}}


class OllamaWriter:
    """Writes lines: what is gained, and at last how long it took."""

    done = b""

    def __init__(self, id: str, model: str, job: Job | None, *, is_chat: bool) -> None:
        self.id, self.tally = id, Tally([] if job is None else [job])
        self._model, self._is_chat = model, is_chat
        self._began = self._first = time.monotonic_ns()
        self._call: list[ToolCall] = []  # the pieces of one that has begun
        self._gained: list[Fields] = []  # of the whole
        self._end: Fields = {}

    def opening(self) -> bytes:
        return b""

    closing = opening

    def error(self, error: Exception) -> bytes:
        return orjson.dumps(ollama_error(error)) + b"\n"

    def events(self, delta: Delta) -> bytes:
        gained = self._fold(delta)
        lines = [self.line(gained)] if gained else []
        lines += [self.line({}, self._end)] if self._end else []
        return b"".join([orjson.dumps(each) + b"\n" for each in lines])

    def feed(self, delta: Delta) -> None:
        self._gained.append(self._fold(delta))

    def result(self) -> Mapping[str, object]:
        parts = self._gained
        said = {n: "".join([part.get(n, "") for part in parts]) for n in ("content", "thinking")}
        calls = [call for part in parts for call in part.get("tool_calls", ())]
        return self.line({n: v for n, v in {**said, "tool_calls": calls}.items() if v}, self._end)

    def line(self, gained: Fields, end: Fields | None = None) -> Fields:
        """What is gained, or the ``end``."""
        said = {"content": "", **gained}
        if self._is_chat:
            said = {"message": {"role": "assistant", **said}}
        else:
            said["response"] = said.pop("content")
        head = {"model": self._model, "created_at": _time(datetime.now(UTC))}
        return {**head, **said, "done": end is not None, **(end or {})}

    def _fold(self, delta: Delta) -> Fields:
        """What a delta adds: text as it comes, a call once it is whole."""
        now, call = time.monotonic_ns(), delta.tool_call
        if not self.tally.num_output:
            self._first = now
        self.tally.feed(delta)
        said = {"content": delta.text, "thinking": delta.reasoning}
        gained: Fields = {name: text for name, text in said.items() if text}
        if self._call and (delta.finish or (call and call.index != self._call[0].index)):
            gained["tool_calls"], self._call = [_whole(self._call)], []
        if call:
            self._call.append(call)
        if delta.finish:
            self._end = {
                "done_reason": "length" if delta.finish == "length" else "stop",
                "total_duration": now - self._began,  # nanoseconds
                "load_duration": 0,
                "prompt_eval_count": self.tally.num_prompt,
                "prompt_eval_duration": self._first - self._began,
                "eval_count": self.tally.num_output,
                "eval_duration": now - self._first,
            }
        return gained


def _whole(pieces: Sequence[ToolCall]) -> Fields:
    """A call of its pieces."""
    arguments = read_input("".join([piece.arguments for piece in pieces]))
    return {"id": pieces[0].id, "function": {"name": pieces[0].name, "arguments": arguments}}


def _time(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
