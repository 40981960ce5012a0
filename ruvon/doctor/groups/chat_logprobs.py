"""Log-probabilities of chat completions."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import chat, post_chat, refusal
from ruvon.doctor.check import collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.probe import Probe

BYTES = ([int], None)
TOKEN = {"token": str, "logprob": float, "bytes": BYTES}
ENTRY = {**TOKEN, "top_logprobs": [TOKEN]}


async def _entries(probe: Probe, **fields: Any) -> list[Any]:
    found = await chat(probe, logprobs=True, **fields)
    content: list[Any] = found["choices"][0]["logprobs"]["content"]
    return content


async def shape(probe: Probe) -> None:
    """`content` has token, bytes, logprob and top_logprobs for each token."""
    expect_shape(await _entries(probe, top_logprobs=2), [ENTRY], "logprobs.content")


async def refusal_null(probe: Probe) -> None:
    """`refusal` is beside it, null."""
    found = await chat(probe, logprobs=True, top_logprobs=2)
    expect_shape(found["choices"][0]["logprobs"], {"refusal": None}, "logprobs")


async def every_token(probe: Probe) -> None:
    """There are as many entries as completion tokens."""
    found = await chat(probe, logprobs=True, top_logprobs=2)
    entries = found["choices"][0]["logprobs"]["content"]
    expect_equal(len(entries), found["usage"]["completion_tokens"], "entries")


async def finite(probe: Probe) -> None:
    """Every logprob is a finite number, at most 0."""
    for entry in await _entries(probe, top_logprobs=5):
        for each in (entry, *entry["top_logprobs"]):
            expect_shape(each["logprob"], float, "logprob")
            expect(each["logprob"] <= 0, "at most 0", each)


async def bytes_are_the_text(probe: Probe) -> None:
    """The bytes of all tokens are the content in UTF-8."""
    found = await chat(probe, logprobs=True, top_logprobs=2)
    choice = found["choices"][0]
    joined = bytes(b for entry in choice["logprobs"]["content"] for b in entry["bytes"] or ())
    text = choice["message"]["content"]
    expect_equal(joined.decode(errors="replace"), text, "the bytes")


async def top_number(probe: Probe) -> None:
    """There are top_logprobs of them."""
    numbers = {len(entry["top_logprobs"]) for entry in await _entries(probe, top_logprobs=5)}
    expect_equal(numbers, {5}, "alternatives of each token")


async def top_sorted(probe: Probe) -> None:
    """The likeliest come first."""
    for entry in await _entries(probe, top_logprobs=5):
        values = [each["logprob"] for each in entry["top_logprobs"]]
        expect_equal(values, sorted(values, reverse=True), "top_logprobs")


async def top_distinct(probe: Probe) -> None:
    """No alternative is there twice."""
    for entry in await _entries(probe, top_logprobs=5):
        pairs = [(each["token"], tuple(each["bytes"] or ())) for each in entry["top_logprobs"]]
        expect_equal(len(set(pairs)), len(pairs), "different alternatives")


async def top_sum(probe: Probe) -> None:
    """Probabilities of alternatives add up to 1 at most."""
    for entry in await _entries(probe, top_logprobs=5):
        total = sum(2.718281828459045 ** each["logprob"] for each in entry["top_logprobs"])
        expect(total <= 1.001, "a sum of at most 1", total)


async def greedy_is_first(probe: Probe) -> None:
    """At temperature 0 the token is the first alternative, with the same logprob."""
    for entry in await _entries(probe, top_logprobs=2):
        first = entry["top_logprobs"][0]
        expect_equal(first["token"], entry["token"], "the first alternative")
        expect(abs(first["logprob"] - entry["logprob"]) < 1e-3, "an equal logprob", entry)


async def none_on_top(probe: Probe) -> None:
    """logprobs without top_logprobs gives an empty list of alternatives."""
    numbers = {len(entry["top_logprobs"]) for entry in await _entries(probe)}
    expect_equal(numbers, {0}, "alternatives of each token")


async def temperature_does_not_matter(probe: Probe) -> None:
    """Logprobs are the model's: temperature does not change those of the first token."""
    cold = (await _entries(probe, top_logprobs=2))[0]["top_logprobs"][0]
    fields = {"temperature": 1.5, "seed": 5, "max_tokens": 1}
    warm = (await _entries(probe, top_logprobs=2, **fields))[0]["top_logprobs"][0]
    close = cold["token"] == warm["token"] and abs(cold["logprob"] - warm["logprob"]) < 0.02
    expect(close, f"the same alternative as at temperature 0, {cold}", warm)


async def top_without_logprobs(probe: Probe) -> None:
    """top_logprobs without logprobs is a 400."""
    refusal(await post_chat(probe, top_logprobs=2), names="top_logprobs")


async def too_many(probe: Probe) -> None:
    """Too many top_logprobs are a 400 that names the field."""
    refusal(await post_chat(probe, logprobs=True, top_logprobs=100_000), names="top_logprobs")


async def negative(probe: Probe) -> None:
    """Fewer than none are a 400."""
    refusal(await post_chat(probe, logprobs=True, top_logprobs=-3), names="top_logprobs")


CHECKS = collect("chat.logprobs", globals())
