"""``GET /v1/requests/{id}/explain``: why a request took so long, in a sentence and in numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping

from aiohttp import web

from ruvon.errors import RequestNotFoundError
from ruvon.server.keys import KEYS, TENANT
from ruvon.server.middleware import json_response
from ruvon.server.service_responses import Explanation
from ruvon.server.state import Service, service_of
from ruvon.server.work import REQUESTS, Remembered
from ruvon.telemetry.finished import Finished, last_of

WAITED_FOR: Mapping[str, str] = {
    "step": "the step under way to end",
    "places": "a place among those that run",
    "blocks": "room in the KV cache",
    "prefix": "another request to compute the same beginning",
    "prompts": "others' prompts",
}
ENDINGS: Mapping[str, str] = {
    "abort": " until nobody waited for it any more",
    "deadline": " until its time was up",
    "error": " until it failed",
}
TELLING = 0.01  # of the whole time; what took less is left out of the sentence


async def explain(http: web.Request) -> web.Response:
    """Of a request of the same key; an admin's key sees all."""
    service = service_of(http)
    name = http.match_info["id"]
    tenant = None if http.app[KEYS].is_admin(http) else http[TENANT]
    entry = http.app[REQUESTS].find(name, tenant)
    if entry is None:
        raise RequestNotFoundError(f"There is no request '{name[:100]}', or not any more.", "id")
    return json_response(explanation(name, entry, service))


def explanation(name: str, entry: Remembered, service: Service) -> Explanation:
    """What is known of a request now."""
    finished = [ended for stream in entry.streams for ended in stream.finished]
    last = last_of(finished)
    running = next((stream for stream in entry.streams if stream.open), None)
    if running is not None or last is None:
        since = time.monotonic() - entry.came_at
        progress = "" if running is None else service.generator.progress(running)
        return {
            "object": "request.explanation",
            "id": name,
            "status": "queued" if progress.startswith("queued") else "running",
            "explanation": so_far(progress, since),
            "seconds": {"total": round(since, 6)},
        }
    return {
        "object": "request.explanation",
        "id": name,
        "status": "finished",
        "explanation": sentence(last, len(finished)),
        "seconds": {
            "total": round(last.total, 6),
            "queue": round(last.queue, 6),
            "prefill": round(last.prefill, 6),
            "decode": round(last.decode, 6),
        },
        "waited_for": {reason: round(seconds, 6) for reason, seconds in last.waits.items()},
        "started_before": last.num_before,
        "prompt_tokens": last.num_prompt,
        "cached_tokens": last.num_cached,
        "prompt_steps": last.num_chunks,
        "output_tokens": last.num_output,
        "preemptions": last.num_preempted,
        "completions": len(finished),
        "finish_reason": last.reason,
    }


def so_far(progress: str, since: float) -> str:
    """Of a request that is not over; ``progress`` as `EngineLoop.progress` says it."""
    what, _, number = progress.partition(" ")
    if what == "queued":
        return f"It has been queued for {spell(since)}, now behind {count(int(number), 'other')}."
    if what == "prefill":
        done, _, of = number.partition("/")
        return (
            f"{spell(since)} after it came, {done} of the {of} tokens of its prompt are computed."
        )
    return f"It is being answered, and came {spell(since)} ago."


def sentence(last: Finished, num_completions: int) -> str:
    """Of a completion that is over, the one that its request waited for."""
    which = f", as the last of {num_completions} completions" if num_completions > 1 else ""
    parts = [queueing(last), prompting(last), answering(last)]
    told = "; ".join(part for part in parts if part)
    again = ""
    if last.num_preempted:
        again = f"; it had to make room {count(last.num_preempted, 'time')}, and to begin again"
    return f"It took {spell(last.total)}{ENDINGS.get(last.reason, '')}{which}: {told}{again}."


def queueing(last: Finished) -> str:
    """What it waited for, the longest first."""
    for_what = [
        (seconds, f"{spell(seconds)} for {WAITED_FOR[reason]}")
        for reason, seconds in last.waits.items()
        if seconds >= TELLING * last.total
    ]
    words = [said for _, said in sorted(for_what, reverse=True)]
    behind = f" behind {count(last.num_before, 'other')}" if last.num_before else ""
    why = f" ({', '.join(words)})" if words else ""
    return f"{spell(last.queue)} in the queue{behind}{why}"


def prompting(last: Finished) -> str:
    if not last.num_chunks:
        return ""
    cached = f", {last.num_cached:,} of them cached," if last.num_cached else ""
    tokens = f"a prompt of {count(last.num_prompt, 'token')}{cached}"
    return f"{spell(last.prefill)} for {tokens} in {count(last.num_chunks, 'step')}"


def answering(last: Finished) -> str:
    if not last.num_output:
        return ""
    after = last.num_output - 1
    rate = f" ({after / last.decode:,.1f} a second)" if after and last.decode else ""
    return f"{spell(last.decode)} for {count(after, 'token')} after the first{rate}"


def spell(seconds: float) -> str:
    """``0.0123`` → ``12.3 ms``."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:,.2f} s"


def count(number: int, what: str) -> str:
    """``(1234, "token")`` → ``1,234 tokens``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
