"""Requests that are wrong: the status, the error object, and the field it names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ruvon.doctor.ask import CHAT, post_chat, post_completion, refusal
from ruvon.doctor.check import Check, Question, collect
from ruvon.doctor.expect import expect, expect_shape
from ruvon.doctor.probe import Probe, Reply


async def nested(probe: Probe) -> None:
    """An error is an object under the key `error`, not flat and not a list."""
    reply = await post_chat(probe, temperature="hot")
    expect_shape(reply.json, {"error": {"message": str}})


async def fields(probe: Probe) -> None:
    """It has message, type, param and code."""
    error = refusal(await post_chat(probe, temperature="hot"))
    shape = {"message": str, "type": str, "param": (str, None), "code": (str, None)}
    expect_shape(error, shape, "error")


async def type(probe: Probe) -> None:
    """The type of what the client did wrong is invalid_request_error."""
    error = refusal(await post_chat(probe, temperature="hot"))
    expect(error["type"] == "invalid_request_error", "invalid_request_error", error)


async def param(probe: Probe) -> None:
    """`param` is the path of the field."""
    error = refusal(await post_chat(probe, messages=[{"role": "king", "content": "Hi"}]))
    expect(error.get("param") == "messages[0].role", "param messages[0].role", error)


async def content_type(probe: Probe) -> None:
    """An error is JSON by its Content-Type too."""
    kind = (await post_chat(probe, temperature="hot")).headers.get("Content-Type", "none")
    expect(kind.startswith("application/json"), "application/json", kind)


async def short(probe: Probe) -> None:
    """An error does not repeat a large value."""
    reply = await post_chat(probe, temperature="x" * 20_000)
    refusal(reply)
    expect(len(reply.body) < 4_000, "a short error", f"{len(reply.body)} bytes")


async def unknown_model(probe: Probe) -> None:
    """An unknown model is a 404 with the code model_not_found."""
    refusal(await post_chat(probe, model="no-such-model"), 404, code="model_not_found")


async def unknown_model_completions(probe: Probe) -> None:
    """So it is for completions."""
    refusal(await post_completion(probe, model="no-such-model"), 404, code="model_not_found")


async def unknown_model_named(probe: Probe) -> None:
    """The error names the model."""
    error = refusal(await post_chat(probe, model="no-such-model"), 404)
    expect("no-such-model" in error["message"], "the model's name", error)


async def unknown_url(probe: Probe) -> None:
    """An unknown path is a 404 with an error object."""
    refusal(await probe.post("/v1/no-such-endpoint", {}), 404)


async def get_chat(probe: Probe) -> None:
    """GET where POST is wanted is a 405, or a 404, with an error object."""
    refusal(await probe.get(CHAT), 404, 405)


async def not_json(probe: Probe) -> None:
    """A body that is no JSON is a 400."""
    refusal(await probe.post(CHAT, b'{"messages": ['))


async def empty_body(probe: Probe) -> None:
    """No body is a 400."""
    refusal(await probe.ask("POST", CHAT, b"", {"Content-Type": "application/json"}), 400, 411)


async def not_an_object(probe: Probe) -> None:
    """A list is no request: a 400."""
    refusal(await probe.post(CHAT, b"[1, 2]"))


async def not_utf8(probe: Probe) -> None:
    """A body that is no UTF-8 is a 400."""
    refusal(await probe.post(CHAT, b'{"messages": "\xff\xfe"}'))


async def nan(probe: Probe) -> None:
    """NaN is no JSON and no temperature: a 400."""
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}'
    refusal(await probe.post(CHAT, body))


async def lone_surrogate(probe: Probe) -> None:
    """Half of a surrogate pair is refused or replaced; it is no server error."""
    body = b'{"messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 1}'
    reply = await probe.post(CHAT, body)
    expect(reply.status in (200, 400), "200 or 400", reply.status)


async def context_length(probe: Probe) -> None:
    """A prompt beyond the context is a 400 with the code context_length_exceeded."""
    reply = await post_chat(probe, messages=[{"role": "user", "content": "word " * 140_000}])
    refusal(reply, 400, code="context_length_exceeded")


async def context_length_words(probe: Probe) -> None:
    """It says the words that clients look for: maximum context length."""
    reply = await post_chat(probe, messages=[{"role": "user", "content": "word " * 140_000}])
    error = refusal(reply, 400)
    expect("maximum context length" in error["message"], "maximum context length", error)


async def max_tokens_beyond(probe: Probe) -> None:
    """More max_tokens than the context has are a 400, or as many as fit."""
    reply = await post_chat(probe, max_tokens=10**9, stop=["e"])
    if reply.status != 200:
        refusal(reply, 400)


CHAT_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("temperature-type", "temperature", "hot"),
    ("temperature-negative", "temperature", -1),
    ("temperature-above-2", "temperature", 2.5),
    ("top-p-type", "top_p", [0.5]),
    ("top-p-above-1", "top_p", 1.5),
    ("top-p-negative", "top_p", -0.5),
    ("n-zero", "n", 0),
    ("n-type", "n", "two"),
    ("n-fraction", "n", 1.5),
    ("max-tokens-negative", "max_tokens", -5),
    ("max-tokens-type", "max_tokens", "many"),
    ("max-tokens-fraction", "max_tokens", 4.5),
    ("max-completion-tokens-negative", "max_completion_tokens", -5),
    ("stop-type", "stop", 5),
    ("stop-items", "stop", ["a", 5]),
    ("seed-type", "seed", "lucky"),
    ("presence-penalty-range", "presence_penalty", 3),
    ("frequency-penalty-range", "frequency_penalty", -3),
    ("frequency-penalty-type", "frequency_penalty", {}),
    ("logit-bias-type", "logit_bias", [1]),
    ("logit-bias-value", "logit_bias", {"5": "high"}),
    ("logit-bias-range", "logit_bias", {"5": 1000}),
    ("logit-bias-key", "logit_bias", {"word": 5}),
    ("logprobs-type", "logprobs", "yes"),
    ("stream-type", "stream", "yes"),
    ("stream-options-type", "stream_options", "usage"),
    ("messages-type", "messages", "Hi"),
    ("messages-empty", "messages", []),
    ("messages-null", "messages", None),
    ("tools-type", "tools", "f"),
    ("response-format-type", "response_format", "json"),
    ("model-type", "model", 5),
)  # name, field, its value in a chat

MESSAGES: tuple[tuple[str, str, Any], ...] = (
    ("role-unknown", "messages[0].role", {"role": "king", "content": "Hi"}),
    ("role-missing", "messages[0].role", {"content": "Hi"}),
    ("role-type", "messages[0].role", {"role": 1, "content": "Hi"}),
    ("content-missing", "messages[0].content", {"role": "user"}),
    ("content-type", "messages[0].content", {"role": "user", "content": 5}),
    ("content-part-type", "messages[0].content", {"role": "user", "content": [{"type": "smell"}]}),
    ("content-part-text", "messages[0].content", {"role": "user", "content": [{"type": "text"}]}),
    ("message-type", "messages[0]", "Hi"),
)  # name, field, the first message

COMPLETION_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("prompt-type", "prompt", 5),
    ("prompt-null", "prompt", None),
    ("max-tokens", "max_tokens", -1),
    ("echo-type", "echo", "yes"),
    ("temperature", "temperature", "hot"),
    ("n", "n", 0),
    ("best-of-type", "best_of", "all"),
    ("stop-type", "stop", {}),
)

Post = Callable[..., Awaitable[Reply]]


def _refused(post: Post, field: str, **body: Any) -> Question:
    async def ask(probe: Probe) -> None:
        refusal(await post(probe, **body), names=field)

    return ask


def _rows(group: str, post: Post, rows: Iterable[tuple[str, str, Any]]) -> list[Check]:
    """A check for each value of a field that must be refused."""
    return [
        Check(f"{group}.{name}", f"It is a 400 that names {field}.", _refused(post, field, **body))
        for name, field, value in rows
        for body in [{"messages": [value]} if field.startswith("messages[") else {field: value}]
    ]


CHECKS = [
    *collect("errors", globals()),
    *_rows("errors.chat", post_chat, CHAT_FIELDS),
    *_rows("errors.message", post_chat, MESSAGES),
    *_rows("errors.completions", post_completion, COMPLETION_FIELDS),
]
