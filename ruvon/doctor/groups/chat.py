"""Chat completions, not streamed: the object, and what the usual fields do."""

from __future__ import annotations

import time
from typing import Any

from ruvon.doctor.ask import STORY, chat, post_chat, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Skipped, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.probe import Probe

FINISH = ("stop", "length", "tool_calls", "content_filter", "function_call")
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
CREATIVE: dict[str, Any] = {"temperature": 1, "top_p": 1, "max_tokens": 16}

NULLS: dict[str, Any] = dict.fromkeys((
    "stop", "n", "seed", "logit_bias", "stream", "tools", "tool_choice", "top_p", "user",
    "response_format", "logprobs", "top_logprobs", "stream_options", "presence_penalty",
))  # fmt: skip


async def _choice(probe: Probe, **fields: Any) -> Any:
    return (await chat(probe, **fields))["choices"][0]


async def _text(probe: Probe, again: int = 0, **fields: Any) -> str:
    return str((await chat(probe, again, **fields))["choices"][0]["message"]["content"])


async def id(probe: Probe) -> None:
    """`id` is a string with something in it."""
    expect_shape(await chat(probe), {"id": not_empty})


async def id_prefix(probe: Probe) -> None:
    """`id` begins with chatcmpl-."""
    found = (await chat(probe))["id"]
    expect(found.startswith("chatcmpl-"), "chatcmpl-…", found)


async def id_unique(probe: Probe) -> None:
    """Two answers have two ids."""
    first, second = await chat(probe), await chat(probe, again=1)
    expect(first["id"] != second["id"], "another id", second["id"])


async def object(probe: Probe) -> None:
    """`object` is chat.completion."""
    expect_shape(await chat(probe), {"object": "chat.completion"})


async def created(probe: Probe) -> None:
    """`created` is the time, in whole seconds."""
    found = (await chat(probe))["created"]
    expect_shape(found, int, "created")
    expect(abs(found - time.time()) < 86400, "the time in seconds", found)


async def model(probe: Probe) -> None:
    """`model` is what was asked for."""
    expect_shape(await chat(probe), {"model": probe.model})


async def choices(probe: Probe) -> None:
    """There is one choice, with index 0."""
    expect_shape(await chat(probe), {"choices": [{"index": 0}]})
    expect_equal(len((await chat(probe))["choices"]), 1, "choices")


async def message(probe: Probe) -> None:
    """The message has the role assistant and a string as content."""
    expect_shape(await _choice(probe), {"message": {"role": "assistant", "content": str}})


async def refusal_null(probe: Probe) -> None:
    """The message has a refusal, which is null."""
    expect_shape(await _choice(probe), {"message": {"refusal": None}})


async def no_empty_tool_calls(probe: Probe) -> None:
    """A message without calls has no tool_calls, not even an empty list."""
    found = (await _choice(probe))["message"]
    expect("tool_calls" not in found, "no tool_calls", found)


async def logprobs_null(probe: Probe) -> None:
    """`logprobs` of a choice is there, and null unless asked for."""
    expect_shape(await _choice(probe), {"logprobs": None})


async def finish_reason(probe: Probe) -> None:
    """finish_reason is one of OpenAI's five."""
    expect_shape(await _choice(probe), {"finish_reason": FINISH})


async def usage(probe: Probe) -> None:
    """usage has three counts, whole numbers above 0."""
    found = (await chat(probe))["usage"]
    expect_shape(found, USAGE, "usage")
    expect(all(found[name] > 0 for name in USAGE), "counts above 0", found)


async def usage_adds_up(probe: Probe) -> None:
    """total_tokens is the sum of the others."""
    found = (await chat(probe))["usage"]
    total = found["prompt_tokens"] + found["completion_tokens"]
    expect_equal(found["total_tokens"], total, "total_tokens")


async def usage_cached(probe: Probe) -> None:
    """usage tells cached_tokens, at most as many as the prompt has."""
    found = (await chat(probe))["usage"]
    expect_shape(found, {"prompt_tokens_details": {"cached_tokens": int}}, "usage")
    cached = found["prompt_tokens_details"]["cached_tokens"]
    expect(0 <= cached <= found["prompt_tokens"], "at most prompt_tokens", cached)


async def usage_reasoning(probe: Probe) -> None:
    """usage tells reasoning_tokens, at most as many as the answer has."""
    found = (await chat(probe))["usage"]
    expect_shape(found, {"completion_tokens_details": {"reasoning_tokens": int}}, "usage")
    reasoning = found["completion_tokens_details"]["reasoning_tokens"]
    expect(0 <= reasoning <= found["completion_tokens"], "at most completion_tokens", reasoning)


async def fingerprint(probe: Probe) -> None:
    """system_fingerprint is a string, the same in two answers."""
    first, second = await chat(probe), await chat(probe, again=1)
    expect_shape(first, {"system_fingerprint": not_empty})
    expect_equal(second["system_fingerprint"], first["system_fingerprint"], "system_fingerprint")


async def max_tokens(probe: Probe) -> None:
    """An answer that max_tokens ends has that many tokens and the finish_reason length."""
    found = await chat(probe)
    expect_equal(found["choices"][0]["finish_reason"], "length", "finish_reason")
    expect_equal(found["usage"]["completion_tokens"], 8, "completion_tokens")


async def max_completion_tokens(probe: Probe) -> None:
    """max_completion_tokens is the same limit."""
    found = await chat(probe, max_tokens=None, max_completion_tokens=5)
    expect_equal(found["usage"]["completion_tokens"], 5, "completion_tokens")


async def max_tokens_one(probe: Probe) -> None:
    """One token is possible."""
    found = await chat(probe, max_tokens=1)
    expect_equal(found["usage"]["completion_tokens"], 1, "completion_tokens")


async def n(probe: Probe) -> None:
    """n choices come with the indices 0 to n-1."""
    found = await chat(probe, n=3, **CREATIVE)
    expect_equal([choice["index"] for choice in found["choices"]], [0, 1, 2], "indices")


async def n_usage(probe: Probe) -> None:
    """With n the prompt counts once and all answers count."""
    one, three = await chat(probe), await chat(probe, n=3, max_tokens=8)
    expect_equal(three["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"], "prompt_tokens")
    expect_equal(three["usage"]["completion_tokens"], 24, "completion_tokens")


async def n_differ(probe: Probe) -> None:
    """n choices at temperature 1 are not all the same."""
    found = await chat(probe, n=3, seed=11, **CREATIVE)
    texts = {choice["message"]["content"] for choice in found["choices"]}
    expect(len(texts) > 1, "different texts", texts)


async def greedy_repeats(probe: Probe) -> None:
    """Temperature 0 twice is the same text."""
    first, second = await _text(probe, max_tokens=16), await _text(probe, 1, max_tokens=16)
    expect_equal(second, first, "the second text")


async def seed_repeats(probe: Probe) -> None:
    """The same seed at temperature 1 is the same text."""
    first, second = [await _text(probe, k, seed=1234, **CREATIVE) for k in range(2)]
    expect_equal(second, first, "the second text")


async def seeds_differ(probe: Probe) -> None:
    """Three seeds at temperature 1 do not all give the same text."""
    texts = {await _text(probe, seed=seed, **CREATIVE) for seed in (1, 2, 3)}
    expect(len(texts) > 1, "different texts", texts)


async def no_seed_differs(probe: Probe) -> None:
    """Without a seed three texts at temperature 1 are not all the same."""
    texts = {await _text(probe, again, **CREATIVE) for again in range(3)}
    expect(len(texts) > 1, "different texts", texts)


async def top_p_zero_is_greedy(probe: Probe) -> None:
    """The smallest top_p at temperature 1 is as good as temperature 0."""
    greedy = await _text(probe, max_tokens=16)
    narrow = await _text(probe, max_tokens=16, temperature=1, top_p=1e-6)
    expect_equal(narrow, greedy, "the text")


async def _stops(probe: Probe) -> tuple[str, str]:
    """A greedy text and a piece of it that begins and ends within words."""
    text = await _text(probe, max_tokens=16)
    if len(text) < 16:
        raise Skipped(f"the model says too little to stop it: {text!r}")
    return text, text[6:14]


async def stop(probe: Probe) -> None:
    """A stop string ends the text before it, also where it spans tokens."""
    text, stop = await _stops(probe)
    choice = await _choice(probe, max_tokens=16, stop=stop)
    expect_equal(choice["message"]["content"], text[: text.index(stop)], "the text")


async def stop_finish(probe: Probe) -> None:
    """It makes the finish_reason stop."""
    _, stop = await _stops(probe)
    choice = await _choice(probe, max_tokens=16, stop=stop)
    expect_equal(choice["finish_reason"], "stop", "finish_reason")


async def stop_list(probe: Probe) -> None:
    """Of several stop strings the one that comes first counts."""
    text, stop = await _stops(probe)
    choice = await _choice(probe, max_tokens=16, stop=["\u2603", stop, "\u2604"])
    expect_equal(choice["message"]["content"], text[: text.index(stop)], "the text")


async def stop_absent(probe: Probe) -> None:
    """A stop string that does not come changes nothing, not even when its beginning comes last."""
    text, _ = await _stops(probe)
    found = await _text(probe, max_tokens=16, stop=[f"{text[-3:]}\u2603"])
    expect_equal(found, text, "the text")


async def logit_bias_forces(probe: Probe) -> None:
    """A bias of 100 makes a token certain."""
    fields = {"logit_bias": {"65": 100}, "logprobs": True, "max_tokens": 4}
    choice = await _choice(probe, **fields)
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    expect(len(set(tokens)) == 1 and len(tokens) > 1, "the same token each time", tokens)


async def presence_penalty(probe: Probe) -> None:
    """Penalties are taken, and change nothing about the shape."""
    fields = {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    expect_shape(await _choice(probe, **fields), {"message": {"content": str}})


async def null_fields(probe: Probe) -> None:
    """null is as good as nothing for every optional field."""
    await chat(probe, **NULLS)


async def harmless_fields(probe: Probe) -> None:
    """Fields that change nothing here are taken: user, metadata, store, prompt_cache_key, …"""
    await chat(
        probe, user="u", metadata={"a": "b"}, store=False, service_tier="auto",
        prompt_cache_key="k", safety_identifier="s", parallel_tool_calls=True,
    )  # fmt: skip


async def unknown_field(probe: Probe) -> None:
    """An unknown field is passed over or refused by name; it is no server error."""
    reply = await post_chat(probe, no_such_field=1)
    named = "no_such_field" in reply.body.decode(errors="replace")
    expect(reply.status == 200 or (reply.status == 400 and named), "200 or 400", reply.status)


@optional
async def unknown_field_reported(probe: Probe) -> None:
    """An unknown field is not passed over in silence: a header or an error names it."""
    reply = await post_chat(probe, no_such_field=1)
    told = f"{dict(reply.headers)} {reply.body.decode(errors='replace')}"
    expect("no_such_field" in told, "no_such_field in a header or an error", "silence")


@optional
async def service_tier(probe: Probe) -> None:
    """service_tier is told."""
    expect_shape(await chat(probe), {"service_tier": (str, None)})


@optional
async def prefix_cached(probe: Probe) -> None:
    """The same long prompt twice is found in the prefix cache."""
    messages = user(f"{STORY} " * 24 + "Begin.")
    await chat(probe, messages=messages, max_tokens=2)
    found = await chat(probe, again=1, messages=messages, max_tokens=2)
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    expect(cached > 0, "cached_tokens above 0", found["usage"])


CHECKS = collect("chat", globals())
