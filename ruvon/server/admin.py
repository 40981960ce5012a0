"""Everything beside generation: models, health, readiness, versions, metrics, tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from ruvon import __version__
from ruvon.engine.validation import check_ids
from ruvon.errors import RequestError
from ruvon.server.body import read
from ruvon.server.chat import conversation_of
from ruvon.server.conversation import take_turn
from ruvon.server.failures import speaks_anthropic
from ruvon.server.messages_api.responses import ModelInfo, ModelPage
from ruvon.server.middleware import json_response
from ruvon.server.parsing import load, parse
from ruvon.server.rate_limits import LIMITS
from ruvon.server.requests import check_size, read_fields
from ruvon.server.schemas import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from ruvon.server.service_responses import Detokenized, ModelCard, TokenizerInfo
from ruvon.server.shape import Bounds
from ruvon.server.state import STATE, Service, State, service_of


async def models(http: web.Request) -> web.Response:
    """The served names, as OpenAI or as Anthropic lists them."""
    service = service_of(http)
    if speaks_anthropic(http):
        return json_response(_page(http, service))
    return json_response({"object": "list", "data": [_card(n, service) for n in service.names]})


async def model(http: web.Request) -> web.Response:
    """One served name, which may contain slashes."""
    service = service_of(http)
    name = http.match_info["name"]
    service.check_model(name)
    if speaks_anthropic(http):
        return json_response(_anthropic_card(name, service))
    return json_response(_card(name, service))


def _page(http: web.Request, service: Service) -> ModelPage:
    """A page of the names, between ``after_id`` and ``before_id`` and of ``limit`` at most."""
    names, query = list(service.names), http.query
    begin = _place(names, query.get("after_id"), "after_id", -1) + 1
    end = _place(names, query.get("before_id"), "before_id", len(names))
    limit = query.get("limit", "20")
    if not re.fullmatch(r"[1-9]\d{0,2}|1000", limit):
        raise RequestError("limit must be from 1 to 1000.", "limit")
    wanted = names[begin:end]
    last = "before_id" in query
    shown = wanted[-int(limit) :] if last else wanted[: int(limit)]
    return {
        "data": [_anthropic_card(name, service) for name in shown],
        "has_more": len(shown) < len(wanted),
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
    }


def _place(names: Sequence[str], name: str | None, param: str, otherwise: int) -> int:
    if name is None:
        return otherwise
    if name not in names:
        raise RequestError(f"There is no model '{name[:100]}'.", param)
    return names.index(name)


def _anthropic_card(name: str, service: Service) -> ModelInfo:
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": _time(service.created),
        "lifecycle": "active",
        "max_input_tokens": service.max_model_len - 1,
        "max_tokens": service.max_model_len - 1,
    }


def _card(name: str, service: Service) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "ruvon",
        "root": service.root,
        "parent": None,
        "max_model_len": service.max_model_len,
        "default_sampling": service.defaults,
    }


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


async def live(http: web.Request) -> web.Response:
    """Whether the process works at all: 503 asks for a restart."""
    state = http.app[STATE]
    if state.service is not None and state.service.generator.dead is not None:
        return json_response({"status": "dead"}, 503)
    if is_stuck(state):
        return json_response({"status": "stuck"}, 503)
    return json_response({"status": "alive"})


def is_stuck(state: State) -> bool:
    """Whether no step has ended for longer than the watchdog waits, though there is work."""
    stalled = 0.0 if state.service is None else state.service.generator.stalled_for
    return 0 < state.server.watchdog_timeout < stalled


async def health(http: web.Request) -> web.Response:
    """Whether requests are being answered: true while draining, false while loading."""
    state = http.app[STATE]
    ok = state.service is not None and state.service.generator.dead is None
    return json_response({"status": "ok" if ok else _status(state)}, 200 if ok else 503)


async def ready(http: web.Request) -> web.Response:
    """Whether new requests are wanted, and while loading, how far it is."""
    state = http.app[STATE]
    status = _status(state)
    phase = state.phase if status == "loading" else status
    body = {"status": status, "phase": phase, "percent": round(100 * state.share)}
    if status == "ready":
        return json_response(body)
    return json_response(body, 503, {"Retry-After": "1"})


async def load_report(http: web.Request) -> web.Response:
    """What a router asks: how it is, what it has to do, what its prefix cache has lost, and, where
    that router limits tokens, what was spent. The ``epoch`` is another one when all that was cached
    is gone; what is before its hyphen, when the process is another one."""
    state = http.app[STATE]
    status = _status(state)
    body: dict[str, object] = {"status": status, "epoch": state.epoch}
    if state.service is not None:
        generator = state.service.generator
        running, waiting, usage = generator.load
        cache = generator.prefix_cache
        body = {
            "status": "dead" if is_stuck(state) else status,
            "epoch": f"{state.epoch}-{cache.num_forgotten}",
            "running": running,
            "waiting": waiting,
            "kv_cache_usage": round(usage, 4),
            "cache_tokens": cache.num_tokens,
            "evicted_tokens": cache.num_evicted,
        }
    if (ledger := http.app[LIMITS].ledger) is not None:
        body["spent"] = ledger.totals
    return json_response(body, 200 if body["status"] == "ready" else 503)


def _status(state: State) -> str:
    if state.draining:
        return "draining"
    if state.service is None:
        return "loading"
    return "ready" if state.service.generator.dead is None else "dead"


async def version(http: web.Request) -> web.Response:
    """ruvon's version."""
    return json_response({"version": __version__})


async def metrics(http: web.Request) -> web.Response:
    """Prometheus text; before the model is loaded, that of HTTP alone."""
    state = http.app[STATE]
    body = state.http.render()
    if state.service is not None:
        state.service.metrics.set_load(*state.service.generator.load)
        body += state.service.metrics.render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def tokenize(http: web.Request) -> web.Response:
    """A prompt, or messages through the chat template, as ids."""
    return _json(await read(http, _tokenize))


def _tokenize(body: bytes, service: Service) -> bytes:
    data = load(body, Bounds.of_context(service.max_model_len))
    tokens, wants_strings = (_chat_ids if "messages" in data else _prompt_ids)(data, service)
    token_text = service.tokenizer.token_text
    return orjson.dumps(
        {
            "count": len(tokens),
            "max_model_len": service.max_model_len,
            "tokens": tokens,
            "token_strs": [token_text(token) for token in tokens] if wants_strings else None,
        }
    )


def _chat_ids(data: dict[str, Any], service: Service) -> tuple[Sequence[int], bool]:
    request, _ = parse(TokenizeChatRequest, data, True, service.check_model)
    return take_turn(conversation_of(request), service).prompt, bool(request.return_token_strs)


def _prompt_ids(data: dict[str, Any], service: Service) -> tuple[Sequence[int], bool]:
    request, _ = parse(TokenizeRequest, data, True, service.check_model)
    check_size(len(request.prompt), service, "prompt")
    special = request.add_special_tokens is not False
    tokens = service.tokenizer.encode(request.prompt, add_special_tokens=special)
    return tokens, bool(request.return_token_strs)


async def tokenizer_info(http: web.Request) -> web.Response:
    """What a tokenizer at the client needs."""
    tokenizer = service_of(http).tokenizer
    bos, eos = tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)
    info: TokenizerInfo = {
        "bos_token": None if bos is None else tokenizer.token_text(bos),
        "eos_token": None if eos is None else tokenizer.token_text(eos),
        "chat_template": tokenizer.chat_template,
    }
    return json_response(info)


async def detokenize(http: web.Request) -> web.Response:
    """Ids as text, special tokens included."""
    return _json(await read(http, _detokenize))


def _detokenize(body: bytes, service: Service) -> bytes:
    request, _ = read_fields(DetokenizeRequest, body, service)
    check_ids(request.tokens, service.generator.vocab_size, "tokens")
    tokenizer = service.tokenizer
    text = tokenizer.decode(request.tokens, skip_special_tokens=False)
    answer: Detokenized = {"prompt": text}
    if request.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(token) for token in request.tokens]
    return orjson.dumps(answer)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
