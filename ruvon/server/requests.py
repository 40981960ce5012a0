"""A body → a request → jobs: prompts as ids, sampling as the engine takes it.

Everything that can be wrong with a request is found in `parsing`, here, or by the engine before it
queues the jobs: before the first byte of an answer. All of it happens in one function that the
event loop runs itself for a small body, and leaves to a thread for a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from aiohttp import web

from ruvon.engine.types import Job, SamplingParams, TextOptions
from ruvon.errors import ContextLengthError, RequestError
from ruvon.server.body import read
from ruvon.server.parsing import load, parse
from ruvon.server.schemas import (
    ChatRequest,
    CompletionRequest,
    Fields,
    GenerationFields,
    TemplateFields,
)
from ruvon.server.shape import Bounds
from ruvon.server.state import STATE, Service

MOST_COMPLETIONS = 256  # in one request: more would be started in one go
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

PASSED = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "min_tokens", "ignore_eos", "seed",
)  # fmt: skip
"""Fields that mean the same in a request and in `SamplingParams`."""

R = TypeVar("R", bound=Fields)
G = TypeVar("G", bound=GenerationFields)


async def read_jobs(
    http: web.Request, kind: type[G], prepare: Callable[[G, Service, int], list[Job]]
) -> tuple[G, list[str], list[Job]]:
    """The request, the names of its fields without effect, and what the engine is to do."""
    server = http.app[STATE].server

    def understand(body: bytes, service: Service) -> tuple[G, list[str], list[Job]]:
        request, ignored = read_fields(kind, body, service, server.strict)
        return request, ignored, prepare(request, service, server.max_logprobs)

    return await read(http, understand)


def read_fields(
    kind: type[R], body: bytes, service: Service, strict: bool = True
) -> tuple[R, list[str]]:
    """`parse`, with the bounds and the names of the model that is served."""
    data = load(body, Bounds.of_context(service.max_model_len))
    return parse(kind, data, strict, service.check_model)


def prepare_completion(
    request: CompletionRequest, service: Service, max_logprobs: int
) -> list[Job]:
    """A job for each prompt."""
    n = request.best_of or request.n or 1
    if n * len(request.prompt) > MOST_COMPLETIONS:
        raise RequestError(
            f"A request may ask for at most {MOST_COMPLETIONS} completions of all its prompts, not "
            f"{n * len(request.prompt)}.",
            "n" if request.best_of is None else "best_of",
        )
    special = request.add_special_tokens is not False
    prompts = [_encode(prompt, special, service) for prompt in request.prompt]
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    logprobs = request.logprobs
    if logprobs is None and (request.best_of or 1) > (request.n or 1):
        logprobs = 0  # to find the best
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    sampling = sampling_params(
        request,
        service,
        max_tokens=max_tokens,
        logprobs=bounded(logprobs, max_logprobs, "logprobs"),
        prompt_logprobs=bounded(prompt_logprobs, max_logprobs, "prompt_logprobs"),
    )
    return [_job(request, prompt, sampling, n, service, "prompt") for prompt in prompts]


def prepare_chat(request: ChatRequest, service: Service, max_logprobs: int) -> list[Job]:
    """The one job of a chat."""
    prompt = encode_chat(request, service)
    max_tokens = request.max_completion_tokens or request.max_tokens
    sampling = sampling_params(
        request,
        service,
        max_tokens=max_tokens,
        logprobs=bounded(request.top_logprobs or 0, max_logprobs, "top_logprobs")
        if request.logprobs
        else None,
        prompt_logprobs=bounded(request.prompt_logprobs, max_logprobs, "prompt_logprobs"),
    )
    return [_job(request, prompt, sampling, request.n or 1, service, "messages")]


def encode_chat(request: TemplateFields, service: Service) -> list[int]:
    """Messages → the ids that the model reads, through its own chat template."""
    messages = [message.for_template() for message in request.messages]
    check_size(sum(len(message["content"]) for message in messages), service, "messages")
    return service.chat.encode(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        kwargs=request.chat_template_kwargs,
    )


def _encode(prompt: str | list[int], special: bool, service: Service) -> list[int]:
    """One prompt as ids. Nothing at all means: begin a document."""
    if not isinstance(prompt, str):
        return prompt
    check_size(len(prompt), service, "prompt")
    tokenizer = service.tokenizer
    ids = tokenizer.encode(prompt, add_special_tokens=special)
    start = tokenizer.bos_id
    return ids or ([] if start is None else [start])


def _job(
    request: GenerationFields,
    prompt: Sequence[int],
    sampling: SamplingParams,
    n: int,
    service: Service,
    param: str,
) -> Job:
    job = Job(
        prompt=tuple(prompt),
        sampling=sampling,
        text=TextOptions(
            stop=tuple(request.stop or ()),
            include_stop=bool(request.include_stop_str_in_output),
            skip_special_tokens=request.skip_special_tokens is not False,
        ),
        n=n,
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        param=param,
    )
    return service.generator.prepare(job)


def sampling_params(
    request: GenerationFields,
    service: Service,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
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
            f"This model's maximum context length is {limit} tokens. However, your {param} has"
            f" {num_characters} characters. Please reduce the length of the {param}.",
            param,
        )
