"""A body → a request → what an API prepares of it; sampling as the engine takes it.

Everything that can be wrong with a request is found in `parsing`, in an API's ``prepare``, or by
the engine before it queues the jobs: before the first byte of an answer. All of it happens in one
function that the event loop runs itself for a small body, and leaves to a thread for a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import structlog
from aiohttp import web

from ruvon.engine.types import SamplingParams, TextOptions
from ruvon.errors import ContextLengthError, RequestError
from ruvon.server.body import read
from ruvon.server.deadlines import limit_time
from ruvon.server.middleware import FACTS
from ruvon.server.parsing import load, parse
from ruvon.server.schemas import Fields, SamplingFields
from ruvon.server.shape import Bounds
from ruvon.server.state import STATE, Service

PASSED = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "ignore_eos", "seed",
)  # fmt: skip
"""Fields that mean the same in a request and in `SamplingParams`."""

R = TypeVar("R", bound=Fields)
T = TypeVar("T")


async def read_request(
    http: web.Request,
    kind: type[R],
    prepare: Callable[[R, Service, int], T],
    *,
    always_aside: bool = False,
) -> tuple[R, list[str], T]:
    """The request, the names of its fields without effect, and what ``prepare`` makes of it, the
    service and the most log-probabilities that it may ask for. ``always_aside``: that may take
    long of a small body, too."""
    server = http.app[STATE].server

    def understand(body: bytes, service: Service) -> tuple[R, list[str], T]:
        request, ignored = read_fields(kind, body, service, server.strict)
        return request, ignored, prepare(request, service, server.max_logprobs)

    request, ignored, prepared = await read(http, understand, always_aside=always_aside)
    limit_time(http, getattr(request, "timeout", None))
    return request, ignored, prepared


def name_request(http: web.Request, request_id: str | None) -> None:
    """Call the request as its body says, in the response and in the log."""
    if request_id is not None:
        http[FACTS]["request_id"] = request_id
        structlog.contextvars.bind_contextvars(request_id=request_id)


def read_fields(
    kind: type[R], body: bytes, service: Service, strict: bool = True
) -> tuple[R, list[str]]:
    """`parse`, with the bounds and the names of the model that is served."""
    data = load(body, Bounds.of_context(service.max_model_len))
    return parse(kind, data, strict, service.check_model)


def text_options(request: SamplingFields) -> TextOptions:
    """What happens to the text."""
    return TextOptions(
        stop=tuple(request.stop or ()),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def sampling_params(
    request: SamplingFields,
    service: Service,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    logprob_token_ids: Iterable[int] | None = None,
) -> SamplingParams:
    """What the request says, over the model's defaults, over the engine's."""
    given = {name: getattr(request, name) for name in PASSED}
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)  # -1 is another way to say off
    values = dict(service.defaults) | {k: v for k, v in given.items() if v is not None}
    allowed = request.allowed_token_ids
    if allowed is not None and len(allowed) > (size := service.generator.vocab_size):
        raise RequestError(f"There are {size} tokens to allow, at most.", "allowed_token_ids")
    return SamplingParams(
        **values,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logprob_token_ids=tuple(logprob_token_ids or ()),
        logit_bias=request.logit_bias or {},
        stop_token_ids=tuple(request.stop_token_ids or ()),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words=tuple(_spellings(request.bad_words or (), service)),
    )


def _spellings(words: Iterable[str], service: Service) -> Iterator[tuple[int, ...]]:
    """The id sequences that spell each word: at a text's beginning, and after a space."""
    for word in words:
        for text in dict.fromkeys((word, " " + word.lstrip(" "))):
            yield tuple(service.tokenizer.encode(text, add_special_tokens=False))


def bounded(value: int | None, limit: int, name: str) -> int | None:
    """``value``, or a `RequestError` if it is above the server's limit."""
    if value is not None and value > limit:
        raise RequestError(f"{name} must be at most {limit} on this server, not {value}.", name)
    return value


def check_size(num_characters: int, service: Service, param: str) -> None:
    """Raise for a text that cannot fit the context whatever its tokens are: to encode it would
    take seconds."""
    limit = service.max_model_len
    if num_characters > limit and num_characters > limit * service.tokenizer.longest:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens. However, your {param}"
            f" resulted in {num_characters} characters. Please reduce the length of the {param}.",
            param,
        )
