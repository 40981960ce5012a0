"""``POST …/render``: what the model would be given for a request, without asking it.

The request is read as for its answer, in full: the same prompt, the same sampling, the same errors.
"""

from __future__ import annotations

from dataclasses import asdict

import orjson
from aiohttp import web

from ruvon.engine.types import Job
from ruvon.server.chat import prepare_chat
from ruvon.server.completions import prepare_completion
from ruvon.server.generation import ignored_header
from ruvon.server.requests import read_request
from ruvon.server.schemas import ChatRequest, CompletionRequest
from ruvon.server.service_responses import Rendered
from ruvon.server.state import Service


async def render_chat(http: web.Request) -> web.Response:
    """A chat's prompt, as text and ids, and what is asked of the model then."""
    _, ignored, body = await read_request(http, ChatRequest, _chat)
    return _json(body, ignored)


async def render_completions(http: web.Request) -> web.Response:
    """The same of every prompt to be completed, in a list."""
    _, ignored, body = await read_request(http, CompletionRequest, _completions)
    return _json(body, ignored)


async def apply_template(http: web.Request) -> web.Response:
    """A chat's prompt as text: llama.cpp's."""
    _, ignored, body = await read_request(http, ChatRequest, _template)
    return _json(body, ignored)


def _json(body: bytes, ignored: list[str]) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers=ignored_header(ignored))


def _chat(request: ChatRequest, service: Service, max_logprobs: int) -> bytes:
    job, _ = prepare_chat(request, service, max_logprobs)
    return orjson.dumps(rendered(job, service), option=orjson.OPT_NON_STR_KEYS)


def _completions(request: CompletionRequest, service: Service, max_logprobs: int) -> bytes:
    jobs = prepare_completion(request, service, max_logprobs)
    return orjson.dumps([rendered(job, service) for job in jobs], option=orjson.OPT_NON_STR_KEYS)


def _template(request: ChatRequest, service: Service, max_logprobs: int) -> bytes:
    job, _ = prepare_chat(request, service, max_logprobs)
    return orjson.dumps({"prompt": text_of(job, service)})


def rendered(job: Job, service: Service) -> Rendered:
    """A job as clients read it."""
    grammar = job.sampling.grammar
    token_text = service.tokenizer.token_text
    return {
        "model": service.names[0],
        "prompt": text_of(job, service),
        "token_ids": job.prompt,
        "token_strs": [token_text(token) for token in job.prompt],
        "sampling_params": {
            **asdict(job.sampling),
            **asdict(job.text),
            "n": job.n,
            "grammar": None if grammar is None else grammar.lark(),
        },
    }


def text_of(job: Job, service: Service) -> str:
    """The prompt's text, special tokens spelled out."""
    return service.tokenizer.decode(job.prompt, skip_special_tokens=False)
