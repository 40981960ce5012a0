"""``POST /v1/embeddings``: texts as vectors, of a model that was made to write.

A vector is the mean of the final hidden states of a text's tokens, or the last token's, scaled to
length 1. docs/reference/api.md says what such vectors are worth.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from aiohttp import web
from pydantic import Field, PlainValidator

from ruvon.engine.types import Emission, Job, SamplingParams
from ruvon.errors import RequestError
from ruvon.server.body import offload
from ruvon.server.collect import collect
from ruvon.server.completions import encode_text
from ruvon.server.generation import ignored_header
from ruvon.server.middleware import FACTS
from ruvon.server.requests import read_request
from ruvon.server.schemas import Fields
from ruvon.server.schemas.base import Int, Timeout
from ruvon.server.schemas.completions import as_prompts
from ruvon.server.service_responses import Embeddings
from ruvon.server.state import Service, service_of

MOST_TEXTS = 2048  # OpenAI's
AT_ONCE = 64  # of them in the engine's queue, so that others' requests are not refused

NOTHING_DRAWN = SamplingParams(max_tokens=0)


def as_texts(value: object) -> list[str | list[int]]:
    return as_prompts(value, MOST_TEXTS)


Texts = Annotated[
    list[str | list[int]],
    PlainValidator(as_texts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class EmbeddingRequest(Fields):
    """``POST /v1/embeddings``."""

    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] | None = None
    timeout: Timeout | None = None


async def embeddings(http: web.Request) -> web.Response:
    """Texts as vectors."""
    service = service_of(http)
    request, ignored, jobs = await read_request(http, EmbeddingRequest, prepare, always_aside=True)
    emissions: list[Emission] = []
    for first in range(0, len(jobs), AT_ONCE):
        emissions += await collect(http, service, jobs[first : first + AT_ONCE])
    num_prompt = sum(len(job.prompt) for job in jobs)
    http[FACTS].update(
        prompt_tokens=num_prompt, cached_tokens=sum(each.num_cached for each in emissions)
    )
    body = await offload(http.app, True, lambda: render(request, service, emissions, num_prompt))
    return web.Response(body=body, content_type="application/json", headers=ignored_header(ignored))


def prepare(request: EmbeddingRequest, service: Service, max_logprobs: int) -> list[Job]:
    """A job for each text."""
    texts = [
        encode_text(text, service, "input") if isinstance(text, str) else tuple(text)
        for text in request.input
    ]
    return [
        service.prepare(
            Job(prompt, NOTHING_DRAWN, pooling=request.pooling or "mean", param="input")
        )
        for prompt in texts
    ]


def render(
    request: EmbeddingRequest, service: Service, emissions: Sequence[Emission], num_prompt: int
) -> bytes:
    """The answer as JSON."""
    encode = as_base64 if request.encoding_format == "base64" else as_is
    vectors = [vector_of(emission, request.dimensions) for emission in emissions]
    body: Embeddings = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(vectors)
        ],
        "model": request.model or service.names[0],
        "usage": {"prompt_tokens": num_prompt, "total_tokens": num_prompt},
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def vector_of(emission: Emission, dimensions: int | None) -> np.ndarray[Any, Any]:
    """float32, of length 1: the first ``dimensions`` of the direction that a sum has."""
    assert emission.pooled is not None
    if dimensions is not None and dimensions > emission.pooled.size:
        raise RequestError(
            f"This model's embeddings have {emission.pooled.size} dimensions.", "dimensions"
        )
    sum_C = emission.pooled[:dimensions]
    length = float(np.linalg.norm(sum_C))
    vector: np.ndarray[Any, Any] = (sum_C / (length or 1.0)).astype("<f4")
    return vector


def as_base64(vector: np.ndarray[Any, Any]) -> str:
    """Its bytes, little-endian: what OpenAI's SDK asks for unless told otherwise."""
    return base64.b64encode(vector.tobytes()).decode()


def as_is(vector: np.ndarray[Any, Any]) -> Any:
    return vector
