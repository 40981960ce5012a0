"""Streamed chat completions."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import chat, chat_chunks, post_chat, refusal
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Skipped, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.chat import FINISH, USAGE
from ruvon.doctor.probe import Probe

WITH_USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The content of one choice, put together."""
    deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


def choices_of(chunks: list[Any]) -> list[Any]:
    """The choices of all chunks."""
    return [choice for chunk in chunks for choice in chunk["choices"]]


async def object(probe: Probe) -> None:
    """Every chunk is a chat.completion.chunk."""
    expect_shape(await chat_chunks(probe), [{"object": "chat.completion.chunk"}])


async def fields(probe: Probe) -> None:
    """Every chunk has id, created, model and choices."""
    shape = {"id": not_empty, "created": int, "model": str, "choices": list}
    expect_shape(await chat_chunks(probe), [shape])


async def id_stable(probe: Probe) -> None:
    """All chunks have one id."""
    expect_equal(len({chunk["id"] for chunk in await chat_chunks(probe)}), 1, "different ids")


async def created_stable(probe: Probe) -> None:
    """All chunks have one time."""
    times = {chunk["created"] for chunk in await chat_chunks(probe)}
    expect_equal(len(times), 1, "different times")


async def model(probe: Probe) -> None:
    """All chunks name the model that was asked for."""
    expect_equal({chunk["model"] for chunk in await chat_chunks(probe)}, {probe.model}, "models")


async def fingerprint(probe: Probe) -> None:
    """All chunks have the fingerprint that the whole answer has."""
    whole = await chat(probe)
    found = {chunk["system_fingerprint"] for chunk in await chat_chunks(probe)}
    expect_equal(found, {whole["system_fingerprint"]}, "fingerprints")


async def choice_fields(probe: Probe) -> None:
    """Every choice has index, delta and finish_reason."""
    shape = {"index": int, "delta": dict, "finish_reason": (None, *FINISH)}
    expect_shape(choices_of(await chat_chunks(probe)), [shape], "choices")


async def one_choice_a_chunk(probe: Probe) -> None:
    """A chunk has one choice."""
    numbers = {len(chunk["choices"]) for chunk in await chat_chunks(probe)}
    expect_equal(numbers, {1}, "choices in a chunk")


async def role_first(probe: Probe) -> None:
    """The first chunk's delta names the role."""
    first = choices_of(await chat_chunks(probe))[0]
    expect_shape(first, {"delta": {"role": "assistant"}}, "the first choice")


async def role_with_empty_content(probe: Probe) -> None:
    """That delta has an empty string as content."""
    first = choices_of(await chat_chunks(probe))[0]
    expect_equal(first["delta"].get("content"), "", "the first content")


async def role_once(probe: Probe) -> None:
    """No later delta names it."""
    later = choices_of(await chat_chunks(probe))[1:]
    expect(not any("role" in choice["delta"] for choice in later), "no role", later)


async def content_is_text(probe: Probe) -> None:
    """Content, where there is some, is a string that is not empty, but for the first."""
    for choice in choices_of(await chat_chunks(probe))[1:]:
        expect_shape(choice["delta"], {"content?": not_empty}, "delta")


async def finish_once(probe: Probe) -> None:
    """One chunk has a finish_reason."""
    reasons = [choice["finish_reason"] for choice in choices_of(await chat_chunks(probe))]
    expect_equal(sum(reason is not None for reason in reasons), 1, "chunks with a finish_reason")


async def finish_last(probe: Probe) -> None:
    """It is the last with a choice."""
    last = choices_of(await chat_chunks(probe))[-1]
    expect_shape(last, {"finish_reason": FINISH}, "the last choice")


async def finish_separate(probe: Probe) -> None:
    """Its delta is empty: the last text has a chunk of its own."""
    last = choices_of(await chat_chunks(probe))[-1]
    expect_equal(last["delta"], {}, "the last delta")


async def finish_as_whole(probe: Probe) -> None:
    """The finish_reason is that of the whole answer."""
    whole = (await chat(probe))["choices"][0]["finish_reason"]
    last = choices_of(await chat_chunks(probe))[-1]["finish_reason"]
    expect_equal(last, whole, "finish_reason")


async def text_as_whole(probe: Probe) -> None:
    """At temperature 0 the pieces are the whole answer's text."""
    whole = (await chat(probe))["choices"][0]["message"]["content"]
    expect_equal(text_of(await chat_chunks(probe)), whole, "the text")


async def seed_as_whole(probe: Probe) -> None:
    """With a seed they are so at temperature 1 too."""
    fields = {"temperature": 1, "seed": 77, "max_tokens": 12}
    whole = (await chat(probe, **fields))["choices"][0]["message"]["content"]
    expect_equal(text_of(await chat_chunks(probe, **fields)), whole, "the text")


async def in_pieces(probe: Probe) -> None:
    """Eight tokens come in several chunks, not in one."""
    deltas = [choice["delta"] for choice in choices_of(await chat_chunks(probe))]
    expect(sum(bool(d.get("content")) for d in deltas) > 2, "several chunks of text", deltas)


async def unbroken_text(probe: Probe) -> None:
    """No chunk has a broken character, but for one that max_tokens breaks."""
    fields: Any = {
        "messages": [{"role": "user", "content": "Only emoji: 😀🎉🌊"}],
        "max_tokens": 24,
    }
    text = text_of(await chat_chunks(probe, **fields))
    expect("\ufffd" not in text[:-1], "no U+FFFD", text)


async def no_usage(probe: Probe) -> None:
    """No chunk tells usage, and none is without choices, unless asked for."""
    for chunk in await chat_chunks(probe):
        expect(chunk.get("usage") is None and chunk["choices"], "no usage", chunk)


async def usage_last(probe: Probe) -> None:
    """With include_usage a last chunk without choices tells it."""
    last = (await chat_chunks(probe, **WITH_USAGE))[-1]
    expect_shape(last, {"usage": USAGE, "choices": list}, "the last chunk")
    expect_equal(last["choices"], [], "its choices")


async def usage_once(probe: Probe) -> None:
    """No other chunk tells usage then."""
    chunks = await chat_chunks(probe, **WITH_USAGE)
    expect_equal(sum(bool(chunk.get("usage")) for chunk in chunks), 1, "chunks with usage")


async def usage_null_before(probe: Probe) -> None:
    """All others say that usage is null."""
    chunks = await chat_chunks(probe, **WITH_USAGE)
    expect_shape(chunks[:-1], [{"usage": None}], "chunks")


async def usage_as_whole(probe: Probe) -> None:
    """The counts are those of the whole answer."""
    whole = (await chat(probe))["usage"]
    last = (await chat_chunks(probe, **WITH_USAGE))[-1]["usage"]
    expect_equal({name: last[name] for name in USAGE}, {n: whole[n] for n in USAGE}, "usage")


async def usage_false(probe: Probe) -> None:
    """include_usage false is as good as none."""
    for chunk in await chat_chunks(probe, stream_options={"include_usage": False}):
        expect(chunk.get("usage") is None and chunk["choices"], "no usage", chunk)


async def usage_empty_options(probe: Probe) -> None:
    """Empty stream_options ask for no usage."""
    for chunk in await chat_chunks(probe, stream_options={}):
        expect(chunk.get("usage") is None and chunk["choices"], "no usage", chunk)


async def options_need_stream(probe: Probe) -> None:
    """stream_options without stream are a 400 that names them."""
    refusal(await post_chat(probe, **WITH_USAGE), names="stream_options")


async def obfuscation_accepted(probe: Probe) -> None:
    """include_obfuscation is taken."""
    await chat_chunks(probe, stream_options={"include_obfuscation": False})


async def n(probe: Probe) -> None:
    """With n each choice has a role, a text and an end."""
    chunks = await chat_chunks(probe, n=2)
    for index in (0, 1):
        mine = [choice for choice in choices_of(chunks) if choice["index"] == index]
        ends = [c["finish_reason"] for c in mine if c["finish_reason"]]
        expect_equal((mine[0]["delta"].get("role"), len(ends)), ("assistant", 1), f"choice {index}")


async def n_as_whole(probe: Probe) -> None:
    """At temperature 0 each has the text of one alone."""
    alone = (await chat(probe))["choices"][0]["message"]["content"]
    chunks = await chat_chunks(probe, n=2)
    expect_equal([text_of(chunks, index) for index in (0, 1)], [alone, alone], "the texts")


async def logprobs_as_whole(probe: Probe) -> None:
    """The tokens of all chunks' logprobs are those of the whole answer's."""
    fields = {"logprobs": True, "top_logprobs": 2}
    whole = (await chat(probe, **fields))["choices"][0]["logprobs"]["content"]
    parts = [choice.get("logprobs") for choice in choices_of(await chat_chunks(probe, **fields))]
    joined = [entry for part in parts if part for entry in part["content"]]
    expect_equal([e["token"] for e in joined], [e["token"] for e in whole], "tokens")


async def stop_not_leaked(probe: Probe) -> None:
    """No piece of a stop string comes, even where it spans tokens."""
    text = text_of(await chat_chunks(probe, max_tokens=16))
    if len(text) < 16:
        raise Skipped(f"the model says too little to stop it: {text!r}")
    stop = text[6:14]
    found = text_of(await chat_chunks(probe, max_tokens=16, stop=stop))
    expect_equal(found, text[: text.index(stop)], "the text")


async def stop_held_back(probe: Probe) -> None:
    """What looks like the beginning of a stop string comes after all when it is none."""
    text = text_of(await chat_chunks(probe, max_tokens=16))
    found = await chat_chunks(probe, max_tokens=16, stop=[f"{text[-4:]}\u2603"])
    expect_equal(text_of(found), text, "the text")


async def error_before(probe: Probe) -> None:
    """A bad request gets a 400 and JSON, not a stream that says so."""
    refusal(await post_chat(probe, stream=True, temperature="hot"), names="temperature")


@optional
async def continuous_usage(probe: Probe) -> None:
    """continuous_usage_stats tells usage in every chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chat_chunks(probe, stream_options=options)
    expect_shape(chunks, [{"usage": USAGE}], "chunks")


CHECKS = collect("chat.stream", globals())
