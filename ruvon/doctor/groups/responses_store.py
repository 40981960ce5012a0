"""Responses that are kept: gone on with, read again, cancelled, deleted."""

from __future__ import annotations

import asyncio
from typing import Any

from ruvon.doctor.ask import STORY, answer, events, refusal, user
from ruvon.doctor.check import collect
from ruvon.doctor.expect import Skipped, expect, expect_equal, expect_shape
from ruvon.doctor.groups.responses import PATH, post, respond, text_of
from ruvon.doctor.probe import Probe


async def _stored(probe: Probe, again: int = 0, **fields: Any) -> Any:
    """A response that the server keeps; skipped where it keeps none."""
    made = await respond(probe, again=20 + again, store=True, **fields)
    if (await probe.get(f"{PATH}/{made['id']}")).status in (404, 405, 501):
        raise Skipped("the server keeps no responses")
    return made


async def get(probe: Probe) -> None:
    """GET /v1/responses/{id} is the response."""
    made = await _stored(probe)
    found = answer(await probe.get(f"{PATH}/{made['id']}"))
    expect_equal(found, made, "the response")


async def kept_by_default(probe: Probe) -> None:
    """A response is kept unless store is false."""
    await _stored(probe)
    made = await respond(probe)
    answer(await probe.get(f"{PATH}/{made['id']}"))


async def not_kept(probe: Probe) -> None:
    """With store false it is not."""
    made = await respond(probe, store=False)
    expect_equal((await probe.get(f"{PATH}/{made['id']}")).status, 404, "status")


async def unknown(probe: Probe) -> None:
    """An unknown id is a 404 with an error object."""
    await _stored(probe)
    refusal(await probe.get(f"{PATH}/resp_0123456789"), 404)


async def previous(probe: Probe) -> None:
    """previous_response_id goes on with a conversation: its tokens are part of the prompt."""
    made = await _stored(probe)
    more = await respond(probe, input="Go on.", previous_response_id=made["id"])
    expect_equal(more["previous_response_id"], made["id"], "previous_response_id")
    least = made["usage"]["input_tokens"] + made["usage"]["output_tokens"]
    expect(more["usage"]["input_tokens"] > least, f"more than {least} input tokens", more["usage"])


async def previous_as_items(probe: Probe) -> None:
    """It means the same as sending all items again."""
    made = await _stored(probe)
    more = await respond(probe, input="Go on.", previous_response_id=made["id"])
    items = [*user(STORY), *made["output"], *user("Go on.")]
    expect_equal(text_of(more), text_of(await respond(probe, input=items)), "the text")


async def previous_instructions(probe: Probe) -> None:
    """Instructions do not carry over."""
    long = "Answer as a sailor of old would, who has seen every harbour of the wide world."
    made = await _stored(probe, instructions=long)
    plain = await _stored(probe)
    counts = [
        (await respond(probe, input="Go on.", previous_response_id=each["id"]))["usage"]
        for each in (made, plain)
    ]
    spread = abs(counts[0]["input_tokens"] - counts[1]["input_tokens"])
    expect(spread <= 16, "no instructions in the prompt", counts)


async def previous_unknown(probe: Probe) -> None:
    """An unknown previous_response_id is a 400 or 404 that names it."""
    await respond(probe)
    reply = await post(probe, previous_response_id="resp_0123456789")
    refusal(reply, 400, 404, names="previous_response_id")


async def previous_not_kept(probe: Probe) -> None:
    """So is one that was not kept."""
    made = await respond(probe, store=False, again=3)
    reply = await post(probe, previous_response_id=made["id"])
    refusal(reply, 400, 404, names="previous_response_id")


async def input_items(probe: Probe) -> None:
    """GET …/input_items lists what went in."""
    made = await _stored(probe)
    found = answer(await probe.get(f"{PATH}/{made['id']}/input_items"))
    item = {"id": str, "type": "message", "role": "user", "content": list}
    expect_shape(found, {"object": "list", "data": [item], "has_more": bool})


async def delete(probe: Probe) -> None:
    """DELETE takes it away: GET is a 404 then."""
    made = await _stored(probe, 1)
    gone = answer(await probe.ask("DELETE", f"{PATH}/{made['id']}"))
    expect_shape(gone, {"id": made["id"], "deleted": True})
    reply = await probe.ask("GET", f"{PATH}/{made['id']}", again=1)
    expect_equal(reply.status, 404, "status after it")


async def delete_twice(probe: Probe) -> None:
    """A second DELETE is a 404."""
    made = await _stored(probe, 2)
    path = f"{PATH}/{made['id']}"
    answer(await probe.ask("DELETE", path))
    expect_equal((await probe.ask("DELETE", path, again=1)).status, 404, "status")


async def _background(probe: Probe, again: int, tokens: int) -> Any:
    return await respond(probe, again, background=True, store=True, max_output_tokens=tokens)


async def background(probe: Probe) -> None:
    """A response in the background is queued or in progress, and completed later."""
    made = await _background(probe, 30, 16)
    expect(made["status"] in ("queued", "in_progress"), "queued or in_progress", made["status"])
    for again in range(200):
        found = answer(await probe.ask("GET", f"{PATH}/{made['id']}", again=again))
        if found["status"] not in ("queued", "in_progress"):
            break
        await asyncio.sleep(0.05)
    expect(found["status"] in ("completed", "incomplete"), "an end", found["status"])
    expect_equal(found["usage"]["output_tokens"], 16, "output_tokens")


async def background_needs_store(probe: Probe) -> None:
    """In the background and not kept is a 400."""
    await _background(probe, 30, 16)
    refusal(await post(probe, background=True, store=False))


async def cancel(probe: Probe) -> None:
    """POST …/cancel ends one in the background."""
    made = await _background(probe, 31, 1500)
    answer(await probe.post(f"{PATH}/{made['id']}/cancel", None))
    for again in range(100):
        found = answer(await probe.ask("GET", f"{PATH}/{made['id']}", again=again))
        if found["status"] not in ("queued", "in_progress"):
            break
        await asyncio.sleep(0.05)
    expect_equal(found["status"], "cancelled", "status")


async def cancel_finished(probe: Probe) -> None:
    """One that was not made in the background cannot be cancelled: a 400, or nothing changes."""
    made = await _stored(probe)
    reply = await probe.post(f"{PATH}/{made['id']}/cancel", None)
    if reply.status != 200:
        refusal(reply, 400, 409)


async def stream_again(probe: Probe) -> None:
    """GET …?stream=true&starting_after=N resumes a stream after event N."""
    reply = await post(probe, 32, stream=True, store=True, background=True)
    first = events(reply, ["stream", "background"])
    made = first[0]["response"]["id"]
    path = f"{PATH}/{made}?stream=true&starting_after=3"
    again = events(await probe.get(path))
    expect_equal(again, [e for e in first if e["sequence_number"] > 3], "events")


CHECKS = collect("responses.store", globals())
