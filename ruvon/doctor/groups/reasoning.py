"""Reasoning: apart from the answer, under the names that clients read."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import chat, chat_chunks, post_chat, refusal, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Skipped, expect, expect_equal, expect_shape
from ruvon.doctor.groups.chat_stream import choices_of
from ruvon.doctor.probe import Probe

ASK: dict[str, Any] = {"messages": user("What is 7 times 8?"), "max_tokens": 64}


async def _reasoned(probe: Probe, **fields: Any) -> Any:
    """An answer with reasoning."""
    found = await chat(probe, **(ASK | fields))
    message = found["choices"][0]["message"]
    if not (message.get("reasoning") or message.get("reasoning_content")):
        raise Skipped("the model does not reason")
    return found


async def effort(probe: Probe) -> None:
    """reasoning_effort is taken, whether the model reasons or not."""
    for value in ("low", "high"):
        await chat(probe, **(ASK | {"max_tokens": 4}), reasoning_effort=value)


async def effort_wrong(probe: Probe) -> None:
    """An effort that is none is a 400 that names it."""
    reply = await post_chat(probe, **ASK, reasoning_effort="heroic")
    refusal(reply, names="reasoning_effort")


async def effort_type(probe: Probe) -> None:
    """So is a number."""
    refusal(await post_chat(probe, **ASK, reasoning_effort=5), names="reasoning_effort")


async def tags_not_in_content(probe: Probe) -> None:
    """The content of an answer holds no tags of reasoning."""
    found = await _reasoned(probe)
    text = found["choices"][0]["message"]["content"] or ""
    expect("think>" not in text, "no tags", text)


async def tokens_counted(probe: Probe) -> None:
    """usage counts its tokens."""
    usage = (await _reasoned(probe))["usage"]
    expect(usage["completion_tokens_details"]["reasoning_tokens"] > 0, "above 0", usage)


async def before_content(probe: Probe) -> None:
    """In a stream it comes before the content."""
    await _reasoned(probe)
    deltas = [choice["delta"] for choice in choices_of(await chat_chunks(probe, **ASK))]
    kinds = ["content" if delta.get("content") else "reasoning" for delta in deltas
             if delta.get("content") or delta.get("reasoning_content")]  # fmt: skip
    expect_equal(kinds, sorted(kinds, reverse=True), "kinds of deltas")


@optional
async def both_names(probe: Probe) -> None:
    """It is there as `reasoning` and as `reasoning_content`."""
    message = (await _reasoned(probe))["choices"][0]["message"]
    expect_equal(message.get("reasoning"), message.get("reasoning_content"), "reasoning")


@optional
async def template_arguments(probe: Probe) -> None:
    """chat_template_kwargs with enable_thinking is taken."""
    fields = ASK | {"max_tokens": 4, "chat_template_kwargs": {"enable_thinking": False}}
    await chat(probe, **fields)


@optional
async def include_reasoning(probe: Probe) -> None:
    """include_reasoning false leaves it out."""
    found = await chat(probe, **(ASK | {"max_tokens": 16}), include_reasoning=False)
    message = found["choices"][0]["message"]
    expect(not message.get("reasoning_content"), "no reasoning", message)


@optional
async def budget(probe: Probe) -> None:
    """thinking_token_budget is taken."""
    found = await chat(probe, **(ASK | {"max_tokens": 16}), thinking_token_budget=4)
    details = {"completion_tokens_details": {"reasoning_tokens": int}}
    expect_shape(found["usage"], details, "usage")
    spent = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
    expect(spent <= 8, "few tokens of reasoning", spent)


@optional
async def absent_is_absent(probe: Probe) -> None:
    """An answer without reasoning has no empty field of it."""
    message = (await chat(probe))["choices"][0]["message"]
    found = message.get("reasoning_content", None)
    expect(found != "", "null or none", found)


CHECKS = collect("reasoning", globals())
