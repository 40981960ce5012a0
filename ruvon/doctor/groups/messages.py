"""Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from ruvon.doctor.ask import STORY, answer, error_of, user
from ruvon.doctor.check import Check, collect
from ruvon.doctor.expect import Failed, Skipped, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.tools import SCHEMAS, check_arguments
from ruvon.doctor.probe import Probe, Reply

PATH = "/v1/messages"
HEADERS: Mapping[str, str] = {"anthropic-version": "2023-06-01"}
STOPS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal")
TOOLS = [
    {"name": name, "description": f"Calls {name}.", "input_schema": schema}
    for name, schema in SCHEMAS.items()
]
ANY: dict[str, Any] = {
    "messages": user("What is the weather in Lisbon?"), "tools": TOOLS, "max_tokens": 160,
    "tool_choice": {"type": "any"},
}  # fmt: skip


async def post(probe: Probe, again: int = 0, path: str = PATH, **fields: Any) -> Reply:
    """A short greedy message."""
    body = {"model": probe.model, "messages": user(STORY), "max_tokens": 8, "temperature": 0}
    return await probe.post(path, body | fields, HEADERS, again=again)


async def say(probe: Probe, again: int = 0, **fields: Any) -> Any:
    """The message."""
    return answer(await post(probe, again, **fields), fields)


def text_of(message: Any) -> str:
    """All text blocks."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def num_input(usage: Any) -> int:
    """Tokens of the prompt: Anthropic counts those of the cache apart."""
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(usage.get(name) or 0 for name in names)


def uses_of(message: Any) -> list[Any]:
    """Blocks that call tools; there must be some."""
    found = [block for block in message["content"] if block["type"] == "tool_use"]
    expect(found, "a block tool_use", message["content"])
    return found


async def shape(probe: Probe) -> None:
    """A message has id, type, role, model and content."""
    found = await say(probe)
    fields = {"id": not_empty, "type": "message", "role": "assistant", "content": list}
    expect_shape(found, fields | {"model": probe.model})


async def id_prefix(probe: Probe) -> None:
    """Its id begins with msg_."""
    found = (await say(probe))["id"]
    expect(found.startswith("msg_"), "msg_…", found)


async def content(probe: Probe) -> None:
    """Its content is a list of blocks with text."""
    found = [block for block in (await say(probe))["content"] if block["type"] == "text"]
    expect_shape(found, [{"type": "text", "text": not_empty}], "content")


async def stop_reason(probe: Probe) -> None:
    """It has a stop_reason, and a stop_sequence, which is null."""
    expect_shape(await say(probe), {"stop_reason": STOPS, "stop_sequence": None})


async def max_tokens(probe: Probe) -> None:
    """max_tokens is honoured, and named as the reason."""
    found = await say(probe)
    reason = found["stop_reason"], found["usage"]["output_tokens"]
    expect_equal(reason, ("max_tokens", 8), "stop_reason and output_tokens")


async def usage(probe: Probe) -> None:
    """usage has input_tokens and output_tokens, and tells what was cached."""
    cached = {"cache_read_input_tokens?": (int, None), "cache_creation_input_tokens?": (int, None)}
    shape = {"input_tokens": int, "output_tokens": int} | cached
    expect_shape((await say(probe))["usage"], shape, "usage")


async def greedy_repeats(probe: Probe) -> None:
    """Temperature 0 twice is the same text."""
    first, second = await say(probe), await say(probe, again=1)
    expect_equal(text_of(second), text_of(first), "the second text")


async def blocks(probe: Probe) -> None:
    """Content may be blocks, and means the same as the string."""
    content = [{"type": "text", "text": STORY, "cache_control": {"type": "ephemeral"}}]
    found = await say(probe, messages=[{"role": "user", "content": content}])
    expect_equal(text_of(found), text_of(await say(probe)), "the text")


async def system(probe: Probe) -> None:
    """system is part of the prompt."""
    plain = await say(probe, system="Hi.")
    long = await say(probe, system="Answer in the words of a sailor of old, as they were spoken.")
    more = num_input(long["usage"]) > num_input(plain["usage"])
    expect(more, "more input tokens", long["usage"])


async def system_blocks(probe: Probe) -> None:
    """system may be blocks with cache_control."""
    block = {"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}
    await say(probe, system=[block])


async def changing_system_block(probe: Probe) -> None:
    """A block x-anthropic-billing-header, new in every request, is not part of the prompt."""
    kept = {"type": "text", "text": "Be short."}
    counts = []
    for words in ("cch=1", "cch=1234567890abcdef; cc_version=2.1.0; cc_entrypoint=cli"):
        block = {"type": "text", "text": f"x-anthropic-billing-header: {words}"}
        counts.append(num_input((await say(probe, system=[block, kept]))["usage"]))
    expect_equal(counts[0], counts[1], "input tokens")


async def stop_sequence(probe: Probe) -> None:
    """A stop sequence ends the text before it, and is named."""
    text = text_of(await say(probe, max_tokens=16))
    if len(text) < 16:
        raise Skipped(f"the model says too little to stop it: {text!r}")
    stop = text[6:14]
    found = await say(probe, max_tokens=16, stop_sequences=[stop])
    expect_equal(text_of(found).rstrip(), text[: text.index(stop)].rstrip(), "the text")
    reason = found["stop_reason"], found["stop_sequence"]
    expect_equal(reason, ("stop_sequence", stop), "the reason")


async def sampling(probe: Probe) -> None:
    """top_p and top_k are taken."""
    await say(probe, temperature=1, top_p=0.9, top_k=5)


async def prefill(probe: Probe) -> None:
    """A last message of the assistant is gone on with."""
    await say(probe, messages=[*user("Count."), {"role": "assistant", "content": "One, two,"}])


async def tool_use(probe: Probe) -> None:
    """A call is a block with id, name and input, an object."""
    shape = {"type": "tool_use", "id": not_empty, "name": not_empty, "input": dict}
    expect_shape(uses_of(await say(probe, **ANY)), [shape], "content")


async def tool_use_id(probe: Probe) -> None:
    """Its id begins with toolu_ or call_."""
    for block in uses_of(await say(probe, **ANY)):
        expect(block["id"].startswith(("toolu_", "call_")), "toolu_…", block["id"])


async def tool_use_reason(probe: Probe) -> None:
    """The stop_reason is tool_use then."""
    expect_equal((await say(probe, **ANY))["stop_reason"], "tool_use", "stop_reason")


async def tool_input(probe: Probe) -> None:
    """The input fits the tool's schema."""
    for block in uses_of(await say(probe, **ANY)):
        check_arguments(block["name"], orjson.dumps(block["input"]).decode())


async def tool_named(probe: Probe) -> None:
    """A tool that tool_choice names is called."""
    choice = {"type": "tool", "name": "take_note"}
    found = uses_of(await say(probe, **(ANY | {"tool_choice": choice})))
    expect_equal({block["name"] for block in found}, {"take_note"}, "names")


async def tool_none(probe: Probe) -> None:
    """tool_choice none calls nothing."""
    fields = ANY | {"tool_choice": {"type": "none"}, "max_tokens": 16}
    kinds = [block["type"] for block in (await say(probe, **fields))["content"]]
    expect("tool_use" not in kinds, "no tool_use", kinds)


async def tool_not_parallel(probe: Probe) -> None:
    """disable_parallel_tool_use gives one call."""
    choice = {"type": "any", "disable_parallel_tool_use": True}
    found = uses_of(await say(probe, **(ANY | {"tool_choice": choice})))
    expect_equal(len(found), 1, "calls")


def _turn(content: Any) -> dict[str, Any]:
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather",
           "input": {"city": "Lisbon", "unit": "celsius"}}  # fmt: skip
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content}
    return {"tools": TOOLS, "messages": [
        *user("What is the weather in Lisbon?"), {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]}]}  # fmt: skip


async def tool_result(probe: Probe) -> None:
    """A result goes back as a block."""
    await say(probe, **_turn("21 degrees"))


async def tool_result_blocks(probe: Probe) -> None:
    """A result may be blocks of text, and an error."""
    await say(probe, **_turn([{"type": "text", "text": "21 degrees"}]))


async def thinking_accepted(probe: Probe) -> None:
    """thinking is taken, and thinking blocks with a signature come back."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "abc"}
    said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Hello."}]}
    await say(
        probe, messages=[*user("Hi"), said, *user("Go on.")], max_tokens=1100,
        thinking={"type": "enabled", "budget_tokens": 1024}, stop_sequences=["e", "a", "o"],
    )  # fmt: skip


async def claude_code_request(probe: Probe) -> None:
    """A request as Claude Code sends it is answered."""
    await say(
        probe, path=f"{PATH}?beta=true", metadata={"user_id": "u"}, max_tokens=8,
        system=[{"type": "text", "text": "You are an agent.",
                 "cache_control": {"type": "ephemeral"}}],
        tools=TOOLS, thinking={"type": "adaptive"}, context_management={"edits": []},
        output_config={"effort": "medium"},
    )  # fmt: skip


async def _refused(probe: Probe, status: int, **fields: Any) -> dict[str, Any]:
    """The error of a wrong request, in Anthropic's shape."""
    await say(probe)
    reply = await post(probe, **fields)
    if reply.status != status:
        raise Failed(f"expected {status}; got {reply.status}: {reply.body[:200]!r}")
    inner = {"type": str, "message": not_empty}
    expect_shape(reply.json, {"type": "error", "error": inner})
    return error_of(reply)


async def error_shape(probe: Probe) -> None:
    """An error has type error, and within it type and message."""
    await _refused(probe, 400, messages="Hi")


async def error_type(probe: Probe) -> None:
    """Its type is invalid_request_error."""
    error = await _refused(probe, 400, temperature="hot")
    expect_equal(error["type"], "invalid_request_error", "type")


async def max_tokens_missing(probe: Probe) -> None:
    """max_tokens is required: a 400 that names it."""
    error = await _refused(probe, 400, max_tokens=None)
    expect("max_tokens" in error["message"], "max_tokens", error)


async def role_unknown(probe: Probe) -> None:
    """A message of another role is a 400."""
    await _refused(probe, 400, messages=[{"role": "king", "content": "Hi"}])


async def messages_empty(probe: Probe) -> None:
    """No messages are a 400."""
    await _refused(probe, 400, messages=[])


async def model_unknown(probe: Probe) -> None:
    """An unknown model is a 404 of type not_found_error."""
    error = await _refused(probe, 404, model="no-such-model")
    expect_equal(error["type"], "not_found_error", "type")


async def image_refused(probe: Probe) -> None:
    """A model of text refuses an image."""
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    block = {"type": "image", "source": source}
    await _refused(probe, 400, messages=[{"role": "user", "content": [block]}])


async def count_tokens(probe: Probe) -> None:
    """count_tokens counts what usage counts."""
    body = {"model": probe.model, "messages": user(STORY)}
    found = answer(await probe.post(f"{PATH}/count_tokens", body, HEADERS))
    expect_shape(found, {"input_tokens": int})
    used = num_input((await say(probe))["usage"])
    expect_equal(found["input_tokens"], used, "input_tokens")


async def count_tokens_with_tools(probe: Probe) -> None:
    """Tools and system count."""
    body: dict[str, Any] = {"model": probe.model, "messages": user(STORY)}
    plain = answer(await probe.post(f"{PATH}/count_tokens", body, HEADERS))["input_tokens"]
    more = body | {"tools": TOOLS, "system": "Be very short, please."}
    found = answer(await probe.post(f"{PATH}/count_tokens", more, HEADERS))["input_tokens"]
    expect(found > plain, f"more than {plain}", found)


CHECKS = [
    Check(check.id, check.title, check.ask, optional=True)
    for check in collect("messages", globals())
]
