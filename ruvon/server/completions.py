"""``POST /v1/completions``: text in, text out."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.errors import RequestError
from ruvon.models.chat import PlainParser
from ruvon.server.constraints import grammar_of
from ruvon.server.conversation import prompt_texts, truncation
from ruvon.server.generation import Generation
from ruvon.server.requests import (
    bounded,
    check_size,
    name_request,
    read_request,
    sampling_params,
    text_options,
)
from ruvon.server.schemas import CompletionRequest
from ruvon.server.state import Service, service_of
from ruvon.server.writers.completions import CompletionsWriter

MOST_COMPLETIONS = 256  # in one request: more would be started in one go
DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(http: web.Request) -> web.StreamResponse:
    """Complete one or several prompts."""
    service = service_of(http)
    request, ignored, jobs = await read_request(http, CompletionRequest, prepare_completion)
    name_request(http, request.request_id)
    told = jobs if request.return_prompt_text or request.echo else []
    writer = CompletionsWriter(request, jobs, service, await prompt_texts(http, told, service))
    generation = Generation(http, service, jobs, writer, PlainParser)
    return await generation.send(stream=bool(request.stream), ignored=ignored)


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
    logprobs = request.logprobs
    if logprobs is None and (request.best_of or 1) > (request.n or 1):
        logprobs = 0  # to find the best
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    max_tokens = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    sampling = sampling_params(
        request,
        service,
        max_tokens=max_tokens,
        logprobs=bounded(logprobs, max_logprobs, "logprobs"),
        logprob_token_ids=request.logprob_token_ids,
        prompt_logprobs=bounded(prompt_logprobs, max_logprobs, "prompt_logprobs"),
    )
    sampling = replace(sampling, grammar=grammar_of(request))
    cut = truncation(request, max_tokens, service)
    prompts = [encode_prompt(prompt, request, service) for prompt in request.prompt]
    return [
        service.prepare(
            Job(
                prompt=prompt if cut is None else cut.of(prompt),
                sampling=sampling,
                text=text_options(request),
                n=n,
                priority=request.priority or 0,
                cache_salt=request.cache_salt or "",
            )
        )
        for prompt in prompts
    ]


def encode_prompt(
    prompt: str | list[int], request: CompletionRequest, service: Service
) -> tuple[int, ...]:
    """One prompt as ids."""
    if not isinstance(prompt, str):
        return tuple(prompt)
    return encode_text(prompt, service, "prompt", request.add_special_tokens is not False)


def encode_text(text: str, service: Service, param: str, special: bool = True) -> tuple[int, ...]:
    """A text as ids. Nothing at all means: begin a document."""
    check_size(len(text), service, param)
    tokenizer = service.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=special)
    start = tokenizer.bos_id
    return tuple(ids) or (() if start is None else (start,))
