"""The framing of server-sent events, byte for byte."""

from __future__ import annotations

import re

from ruvon.doctor.ask import check_answered, post_chat, post_completion
from ruvon.doctor.check import collect
from ruvon.doctor.expect import expect, expect_equal
from ruvon.doctor.probe import Probe, Reply


async def _stream(probe: Probe) -> Reply:
    reply = await post_chat(probe, stream=True)
    check_answered(reply, ["stream"])
    return reply


async def content_type(probe: Probe) -> None:
    """A stream is text/event-stream."""
    kind = (await _stream(probe)).headers.get("Content-Type", "none")
    expect(kind.startswith("text/event-stream"), "text/event-stream", kind)


async def not_cached(probe: Probe) -> None:
    """Cache-Control keeps it out of caches."""
    control = (await _stream(probe)).headers.get("Cache-Control", "none")
    expect(re.search("no-cache|no-store", control), "no-cache or no-store", control)


async def not_buffered(probe: Probe) -> None:
    """X-Accel-Buffering: no lets it pass through nginx at once."""
    found = (await _stream(probe)).headers.get("X-Accel-Buffering", "none")
    expect(found == "no", "X-Accel-Buffering: no", found)


async def no_length(probe: Probe) -> None:
    """There is no Content-Length: it is sent as it comes."""
    headers = (await _stream(probe)).headers
    expect("Content-Length" not in headers, "no Content-Length", dict(headers))


async def request_id(probe: Probe) -> None:
    """It has an X-Request-Id."""
    headers = (await _stream(probe)).headers
    expect("X-Request-Id" in headers, "X-Request-Id", dict(headers))


async def frames(probe: Probe) -> None:
    """Every event is one line `data: …` and an empty line; comments may stand between."""
    for frame in (await _stream(probe)).frames:
        lines = frame.raw.split(b"\n")
        fits = len(lines) == 1 and lines[0].startswith((b"data: ", b":"))
        expect(fits, "one line of data", frame.raw.decode(errors="replace"))


async def ends_with_an_empty_line(probe: Probe) -> None:
    """The last event is complete: an empty line follows."""
    body = (await _stream(probe)).body
    expect(body.endswith((b"\n\n", b"\r\n\r\n")), "an empty line", body[-40:].decode())


async def no_event_names(probe: Probe) -> None:
    """Chat and completions have no event names."""
    names = {frame.event for frame in (await _stream(probe)).frames}
    expect_equal(names, {None}, "event names")


async def done_last(probe: Probe) -> None:
    """The last event is [DONE]."""
    texts = [frame.data for frame in (await _stream(probe)).frames if frame.data]
    expect(texts[-1] == "[DONE]", "[DONE]", texts[-1])


async def done_once(probe: Probe) -> None:
    """It comes once."""
    texts = [frame.data for frame in (await _stream(probe)).frames]
    expect_equal(texts.count("[DONE]"), 1, "[DONE]")


async def done_of_completions(probe: Probe) -> None:
    """Streams of completions end with it too."""
    reply = await post_completion(probe, stream=True)
    check_answered(reply, ["stream"])
    texts = [frame.data for frame in reply.frames if frame.data]
    expect(texts[-1] == "[DONE]", "[DONE]", texts[-1])


async def utf8(probe: Probe) -> None:
    """The bytes are UTF-8."""
    reply = await post_chat(probe, stream=True, max_tokens=24, messages=[
        {"role": "user", "content": "Only emoji: 😀🎉🌊"}])  # fmt: skip
    check_answered(reply)
    reply.body.decode()


async def no_raw_line_breaks(probe: Probe) -> None:
    """JSON within an event holds no line break of its own."""
    for frame in (await _stream(probe)).frames:
        expect(b"\r" not in frame.raw, "no carriage return", frame.raw.decode())


async def as_it_comes(probe: Probe) -> None:
    """Events come one after the other, not all at the end."""
    reply = await post_chat(probe, stream=True, max_tokens=24, temperature=1, seed=1)
    check_answered(reply)
    expect(len(reply.arrivals) > 2, "several pieces", f"{len(reply.arrivals)} piece")


async def ends_the_response(probe: Probe) -> None:
    """The response ends right after [DONE]: no wait for the connection's end."""
    reply = await _stream(probe)
    wait = reply.seconds - reply.arrivals[-1]
    expect(wait < 2, "an end within 2 s", f"{wait:.1f} s")


CHECKS = collect("sse", globals())
