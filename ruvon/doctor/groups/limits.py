"""Requests that ask for too much: each is refused, and the server goes on."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import CHAT, answer, post_chat, post_completion, refusal, user
from ruvon.doctor.check import alone, collect, optional
from ruvon.doctor.expect import expect
from ruvon.doctor.probe import Probe, Reply


async def _goes_on(probe: Probe, reply: Reply) -> None:
    """No server error, and a next request is answered."""
    expect(reply.status < 500, "no server error", f"{reply.status} {reply.body[:200]!r}")
    answer(await post_chat(probe, again=100 + reply.status, max_tokens=1))


async def large_body(probe: Probe) -> None:
    """A body of 64 MB is a 413, or a 400, and not a server error."""
    padding = b" " * (64 << 20)
    try:
        reply = await probe.fetch("POST", CHAT, b"{" + padding + b"}", {})
    except OSError:
        return  # closed before the end: it was told in time, but we were still talking
    refusal(reply, 400, 413)


async def deep_nesting(probe: Probe) -> None:
    """JSON nested 100,000 deep is a 400."""
    deep = b"[" * 100_000 + b"]" * 100_000
    reply = await probe.post(CHAT, b'{"messages": ' + deep + b"}")
    refusal(reply, 400)


async def many_fields(probe: Probe) -> None:
    """A thousand unknown fields are no server error."""
    await _goes_on(probe, await post_chat(probe, **{f"field_{k}": k for k in range(1000)}))


async def huge_n(probe: Probe) -> None:
    """A million choices are a 400 that names n."""
    refusal(await post_chat(probe, n=1_000_000), names="n")


async def huge_best_of(probe: Probe) -> None:
    """So are a million to choose from."""
    refusal(await post_completion(probe, best_of=1_000_000), names="best_of")


@alone
async def many_prompts(probe: Probe) -> None:
    """Two thousand prompts are no server error."""
    reply = await post_completion(probe, prompt=["a"] * 2_000, max_tokens=1)
    await _goes_on(probe, reply)


async def many_stops(probe: Probe) -> None:
    """Ten thousand stop strings are a 400 that names them."""
    refusal(await post_chat(probe, stop=[f"s{k}" for k in range(10_000)]), names="stop")


async def long_stop(probe: Probe) -> None:
    """A stop string of 100,000 characters is no server error."""
    await _goes_on(probe, await post_chat(probe, stop="x" * 100_000))


async def many_biases(probe: Probe) -> None:
    """A hundred thousand biases are no server error."""
    bias = {str(k): 1 for k in range(100_000)}
    await _goes_on(probe, await post_chat(probe, logit_bias=bias))


async def bias_out_of_range(probe: Probe) -> None:
    """A bias for a token that the model does not have is no server error."""
    await _goes_on(probe, await post_chat(probe, logit_bias={"99999999": 5}))


async def huge_numbers(probe: Probe) -> None:
    """Numbers beyond 64 bits are refused or taken; they are no server error."""
    await _goes_on(probe, await post_chat(probe, seed=2**63 - 1, max_tokens=2))
    await _goes_on(probe, await probe.post(CHAT, b'{"messages": [], "seed": 1e400}'))


async def big_seed(probe: Probe) -> None:
    """A seed beyond 64 bits is no server error."""
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "seed": %d}'
    await _goes_on(probe, await probe.post(CHAT, body % 10**30))


async def many_messages(probe: Probe) -> None:
    """Five thousand messages are no server error."""
    await _goes_on(probe, await post_chat(probe, messages=user("a") * 5_000))


async def long_model_name(probe: Probe) -> None:
    """A model's name of 100,000 characters is not repeated in full."""
    reply = await post_chat(probe, model="m" * 100_000)
    expect(len(reply.body) < 10_000, "a short answer", f"{len(reply.body)} bytes")


async def long_path(probe: Probe) -> None:
    """A path of 20,000 characters is a client's error."""
    reply = await probe.get(f"/v1/models/{'x' * 20_000}")
    expect(400 <= reply.status < 500, "a status from 400 to 499", reply.status)


async def long_header(probe: Probe) -> None:
    """A header of 100,000 characters is a client's error, or the connection's end."""
    try:
        reply = await probe.get("/v1/models", {"X-Long": "x" * 100_000})
    except Exception as error:  # the server may hang up in the middle of it
        expect("Server" in type(error).__name__ or isinstance(error, OSError), "an end", error)
        return
    expect(reply.status < 500, "no server error", reply.status)


@alone
@optional
async def queue_full(probe: Probe) -> None:
    """What the queue has no room for is a 503 or 429 with Retry-After."""
    fields: dict[str, Any] = {"prompt": ["a b c"] * 40, "n": 50, "max_tokens": 1}
    reply = await post_completion(probe, **fields)
    if reply.status in (503, 429):
        expect("Retry-After" in reply.headers, "Retry-After", dict(reply.headers))
    elif reply.status != 400:
        answer(reply, fields)


CHECKS = collect("limits", globals())
