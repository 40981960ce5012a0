"""What chat completions and completions have in common: an envelope around choices, and usage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any
from uuid import uuid4

import orjson

from ruvon.deltas import Delta
from ruvon.engine.types import Job
from ruvon.server.responses import Timings, Usage
from ruvon.server.schemas import GenerationFields
from ruvon.server.state import Service
from ruvon.telemetry.finished import Finished, last_of


class Tally:
    """A request's token counts so far."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.num_prompt = sum(len(job.prompt) for job in jobs)
        self.num_output = 0
        self.num_reasoning = 0  # of the output
        self.finished: Sequence[Finished] = ()  # completions that are over, as the engine tells
        self._firsts = {0, *accumulate(job.n for job in jobs)}  # of each job, and one past all
        self._cached: dict[int, int] = {}  # by a job's first completion

    @property
    def num_cached(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._cached.values())

    def feed(self, delta: Delta) -> None:
        self.num_output += len(delta.tokens)
        self.num_reasoning += delta.num_reasoning
        if delta.index in self._firsts:
            self._cached.setdefault(delta.index, delta.num_cached)


class Envelope:
    """The fields that all chunks of one answer share, and its whole object has too. In a chunk they
    are written once: only the choice is encoded each time."""

    def __init__(
        self,
        request: GenerationFields,
        service: Service,
        jobs: Sequence[Job],
        *,
        id_prefix: str,
        kind: str,
    ) -> None:
        """``kind`` is what ``object`` says."""
        self.id = f"{id_prefix}-{request.request_id or uuid4().hex}"
        self.tally = Tally(jobs)
        self._fields: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": request.model or service.names[0],
            "system_fingerprint": service.fingerprint,
        }
        self._wants_usage = request.include_usage
        self._wants_usage_so_far = request.continuous_usage
        self._wants_timings = bool(request.timings)
        self._head = b"data: " + orjson.dumps(self._fields)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"

    def chunk(self, choice: object, extra: Mapping[str, object] | None = None) -> bytes:
        """An event with one choice, and more fields if there are any."""
        if extra is None and not self._wants_usage_so_far:
            return self._head + orjson.dumps(choice) + self._tail
        rest: dict[str, object] = {}
        if self._wants_usage_so_far:
            rest["usage"] = usage(self.tally)
        elif self._wants_usage:
            rest["usage"] = None
        rest.update(extra or {})
        return self._head + orjson.dumps(choice) + b"]," + orjson.dumps(rest)[1:] + b"\n\n"

    def closing(self) -> bytes:
        """The event after all choices, if it is wanted."""
        told: dict[str, object] = {"usage": usage(self.tally)} if self._wants_usage else {}
        told |= self._timings()
        return self._head + b"]," + orjson.dumps(told)[1:] + b"\n\n" if told else b""

    def whole(self, fields: Mapping[str, object]) -> dict[str, object]:
        """One object, with the answer's own ``fields``."""
        return {**self._fields, **fields, "usage": usage(self.tally), **self._timings()}

    def _timings(self) -> dict[str, object]:
        last = last_of(self.tally.finished) if self._wants_timings else None
        return {} if last is None else {"timings": timings(last)}


def timings(last: Finished) -> Timings:
    """A completion's times."""
    num_computed = last.num_prompt - last.num_cached
    after_first = max(last.num_output - 1, 0)
    return {
        "cache_n": last.num_cached,
        "prompt_n": num_computed,
        "prompt_ms": round(1000 * last.prefill, 3),
        "prompt_per_token_ms": round(1000 * last.prefill / max(num_computed, 1), 3),
        "prompt_per_second": round(num_computed / last.prefill, 3) if last.prefill else 0.0,
        "predicted_n": last.num_output,
        "predicted_ms": round(1000 * last.decode, 3),
        "predicted_per_token_ms": round(1000 * last.decode / max(after_first, 1), 3),
        "predicted_per_second": round(after_first / last.decode, 3) if last.decode else 0.0,
        "queue_ms": round(1000 * last.queue, 3),
        "total_ms": round(1000 * last.total, 3),
    }


def usage(tally: Tally) -> Usage:
    """Token counts as OpenAI has them."""
    return {
        "prompt_tokens": tally.num_prompt,
        "completion_tokens": tally.num_output,
        "total_tokens": tally.num_prompt + tally.num_output,
        "prompt_tokens_details": {"cached_tokens": tally.num_cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": tally.num_reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }
