"""Streamed completions."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import complete, completion_chunks, post_completion, refusal
from ruvon.doctor.check import collect
from ruvon.doctor.expect import Skipped, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.chat import USAGE
from ruvon.doctor.groups.chat_stream import WITH_USAGE, choices_of
from ruvon.doctor.groups.completions import PROMPTS
from ruvon.doctor.probe import Probe


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice, put together."""
    return "".join(c["text"] for c in choices_of(chunks) if c["index"] == index)


async def object(probe: Probe) -> None:
    """Every chunk is a text_completion."""
    expect_shape(await completion_chunks(probe), [{"object": "text_completion"}])


async def fields(probe: Probe) -> None:
    """Every chunk has id, created, model and choices."""
    shape = {"id": not_empty, "created": int, "model": probe.model, "choices": list}
    expect_shape(await completion_chunks(probe), [shape])


async def id_stable(probe: Probe) -> None:
    """All chunks have one id."""
    expect_equal(len({c["id"] for c in await completion_chunks(probe)}), 1, "different ids")


async def choice(probe: Probe) -> None:
    """Every choice has text, index, finish_reason and logprobs, which are null."""
    ends = (None, "stop", "length")
    shape = {"text": str, "index": int, "logprobs": None, "finish_reason": ends}
    expect_shape(choices_of(await completion_chunks(probe)), [shape], "choices")


async def no_role(probe: Probe) -> None:
    """There is no delta and no role."""
    for found in choices_of(await completion_chunks(probe)):
        expect("delta" not in found, "no delta", found)


async def text_as_whole(probe: Probe) -> None:
    """At temperature 0 the pieces are the whole answer's text."""
    whole = (await complete(probe))["choices"][0]["text"]
    expect_equal(text_of(await completion_chunks(probe)), whole, "the text")


async def finish_once(probe: Probe) -> None:
    """One chunk has a finish_reason, the last."""
    reasons = [choice["finish_reason"] for choice in choices_of(await completion_chunks(probe))]
    expect(reasons[-1] and not any(reasons[:-1]), "one finish_reason, the last", reasons)


async def no_usage(probe: Probe) -> None:
    """No chunk tells usage unless asked for."""
    for chunk in await completion_chunks(probe):
        expect(chunk.get("usage") is None and chunk["choices"], "no usage", chunk)


async def usage_last(probe: Probe) -> None:
    """With include_usage a last chunk without choices tells it, null before."""
    chunks = await completion_chunks(probe, **WITH_USAGE)
    expect_shape(chunks[-1], {"usage": USAGE}, "the last chunk")
    expect_equal(chunks[-1]["choices"], [], "its choices")
    expect_shape(chunks[:-1], [{"usage": None}], "chunks")


async def usage_as_whole(probe: Probe) -> None:
    """The counts are those of the whole answer."""
    whole = (await complete(probe))["usage"]
    last = (await completion_chunks(probe, **WITH_USAGE))[-1]["usage"]
    expect_equal({n: last[n] for n in USAGE}, {n: whole[n] for n in USAGE}, "usage")


async def several_prompts(probe: Probe) -> None:
    """Chunks of several prompts are told apart by their index."""
    chunks = await completion_chunks(probe, prompt=PROMPTS)
    whole = await complete(probe, prompt=PROMPTS)
    texts = [text_of(chunks, index) for index in range(3)]
    expect_equal(texts, [choice["text"] for choice in whole["choices"]], "the texts")


async def several_prompts_finish(probe: Probe) -> None:
    """Each of them ends once."""
    ended = [c["index"] for c in choices_of(await completion_chunks(probe, prompt=PROMPTS))
             if c["finish_reason"]]  # fmt: skip
    expect_equal(sorted(ended), [0, 1, 2], "indices that end")


async def echo(probe: Probe) -> None:
    """echo comes first."""
    whole = (await complete(probe, echo=True))["choices"][0]["text"]
    expect_equal(text_of(await completion_chunks(probe, echo=True)), whole, "the text")


async def logprobs_as_whole(probe: Probe) -> None:
    """Logprobs of all chunks, put together, are those of the whole answer."""
    whole = (await complete(probe, logprobs=2))["choices"][0]["logprobs"]
    parts = [c["logprobs"] for c in choices_of(await completion_chunks(probe, logprobs=2))]
    for name in ("tokens", "text_offset"):
        joined = [item for part in parts if part for item in part[name]]
        expect_equal(joined, whole[name], name)


async def stop_not_leaked(probe: Probe) -> None:
    """No piece of a stop string comes, even where it spans tokens."""
    text = text_of(await completion_chunks(probe, max_tokens=16))
    if len(text) < 16:
        raise Skipped(f"the model says too little to stop it: {text!r}")
    found = text_of(await completion_chunks(probe, max_tokens=16, stop=text[5:12]))
    expect_equal(found, text[: text.index(text[5:12])], "the text")


async def best_of_refused(probe: Probe) -> None:
    """best_of above n cannot be streamed: a 400 that names it."""
    refusal(await post_completion(probe, stream=True, best_of=2), names="best_of")


CHECKS = collect("completions.stream", globals())
