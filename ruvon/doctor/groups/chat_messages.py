"""What the messages of a chat may be."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import chat, post_chat, refusal, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.probe import Probe

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


async def _answered(probe: Probe, *messages: Any, **fields: Any) -> Any:
    found = await chat(probe, messages=list(messages), **fields)
    expect_shape(found, {"choices": [{"message": {"role": "assistant", "content": str}}]})
    return found


async def system(probe: Probe) -> None:
    """A system message is taken, and its tokens count."""
    system = {"role": "system", "content": "You answer in the words of a sailor of old."}
    found = await _answered(probe, system, *user("Hello"))
    without = await _answered(probe, {"role": "system", "content": "Hi."}, *user("Hello"))
    more = found["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    expect(more, "more prompt tokens", found["usage"])


async def developer(probe: Probe) -> None:
    """A developer message is taken like a system message."""
    await _answered(probe, {"role": "developer", "content": "Be short."}, *user("Hello"))


async def several_turns(probe: Probe) -> None:
    """A conversation of several turns is taken."""
    said = {"role": "assistant", "content": "Hello, who are you?"}
    await _answered(probe, *user("Hi"), said, *user("Guess."))


async def parts(probe: Probe) -> None:
    """Content may be a list of text parts, and means the same as the string."""
    as_text = await _answered(probe, *user("Name a colour."))
    parts = [{"type": "text", "text": "Name a colour."}]
    as_parts = await _answered(probe, {"role": "user", "content": parts})
    expect_equal(as_parts["choices"][0]["message"], as_text["choices"][0]["message"], "the message")


async def name(probe: Probe) -> None:
    """A message may have a name."""
    await _answered(probe, {"role": "user", "name": "ann", "content": "Hello"})


async def unicode(probe: Probe) -> None:
    """Text of any script is taken, with characters beyond the BMP."""
    await _answered(probe, *user("Grüße, こんにちは, مرحبا, \U0001f600\u200d\U0001f525"))


async def control_characters(probe: Probe) -> None:
    """Control characters in a string are text like any other."""
    await _answered(probe, *user("a\u0000b\tc\r\nd\u001b[0m"))


async def empty_content(probe: Probe) -> None:
    """An empty string is a message."""
    await _answered(probe, {"role": "system", "content": ""}, *user("Hello"))


async def tool_result(probe: Probe) -> None:
    """A past call without content, and its result, are part of a conversation."""
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
    await _answered(probe, *user("Call f."), called, result)


async def tool_result_parts(probe: Probe) -> None:
    """A result may be a list of text parts."""
    called = {"role": "assistant", "tool_calls": [CALL]}
    parts = [{"type": "text", "text": "42"}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": parts}
    await _answered(probe, *user("Call f."), called, result)


async def assistant_refusal(probe: Probe) -> None:
    """A past answer may come back as it was given, with refusal and annotations."""
    said: Any = {"role": "assistant", "content": "Hello.", "refusal": None, "annotations": []}
    await _answered(probe, *user("Hi"), said, *user("Go on."))


async def image_refused(probe: Probe) -> None:
    """A model of text refuses an image with a 400; it does not pass it over."""
    url = "data:image/png;base64,iVBORw0KGgo="
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
    reply = await post_chat(probe, messages=[{"role": "user", "content": parts}])
    refusal(reply, 400, 422, 501)


@optional
async def reasoning_accepted(probe: Probe) -> None:
    """A past answer may have reasoning_content."""
    said = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    await _answered(probe, *user("2+2?"), said, *user("3+3?"))


@optional
async def continue_final_message(probe: Probe) -> None:
    """continue_final_message goes on with the last answer."""
    said = {"role": "assistant", "content": "Once upon a time"}
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    await _answered(probe, *user("A story, please."), said, **fields)


CHECKS = collect("chat.messages", globals())
