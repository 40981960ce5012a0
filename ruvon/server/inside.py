"""Inside the model, for one short prompt: attention and the logit lens."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated

import orjson
from aiohttp import web
from pydantic import Field

from ruvon.engine.lens import Look
from ruvon.errors import RequestError, UnavailableError
from ruvon.server.receive import receive
from ruvon.server.requests import read_fields
from ruvon.server.schemas import Fields
from ruvon.server.state import Service, service_of

LINGER = 300.0  # seconds after which the copy of the weights is given back


class AttentionRequest(Fields):
    """``POST /debug/attention``."""

    model: str | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=4096)]
    add_special_tokens: bool | None = None


async def attention(http: web.Request) -> web.Response:
    """What each layer's heads attend to, and what each layer would say next."""
    service = service_of(http)
    lens = service.lens
    if lens is None:
        raise RequestError("This model cannot be looked into.")
    request, _ = read_fields(AttentionRequest, b"".join(await receive(http)), service)
    if lens.is_busy:
        raise UnavailableError("Another prompt is being looked at.", retry_after=1.0)
    body = await asyncio.to_thread(look, request, service)
    asyncio.get_running_loop().call_later(LINGER, lens.forget)
    return web.Response(body=body, content_type="application/json")


def look(request: AttentionRequest, service: Service) -> bytes:
    """The answer; takes a second or so, and more the first time."""
    special = request.add_special_tokens is not False
    tokens = service.tokenizer.encode(request.prompt, add_special_tokens=special)
    assert service.lens is not None
    return told(service.lens.look(tokens), tokens)


def told(seen: Look, tokens: list[int]) -> bytes:
    """``attention`` is base64 of a byte in 255ths for each layer, head, query and key."""
    layers, heads, _, _ = seen.attention.shape
    return orjson.dumps(
        {
            "tokens": tokens,
            "num_layers": layers,
            "num_heads": heads,
            "attention": base64.b64encode(seen.attention.numpy().tobytes()).decode(),
            "top_ids": seen.top_ids.tolist(),
            "top_probs": seen.top_probs.numpy().round(4).tolist(),
        }
    )
