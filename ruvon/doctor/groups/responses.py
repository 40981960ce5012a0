"""The Responses API, not streamed: the object, its items, what goes in and what is refused."""

from __future__ import annotations

import time
from typing import Any

from ruvon.doctor.ask import STORY, answer, parse, refusal, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Failed, Skipped, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.tools import SCHEMAS
from ruvon.doctor.probe import Probe, Reply
from ruvon.doctor.schema import violation
from ruvon.doctor.schemas import ADDRESS, closed

PATH = "/v1/responses"
STATUS = ("completed", "incomplete", "in_progress", "failed", "cancelled", "queued")
USAGE = {
    "input_tokens": int,
    "input_tokens_details": {"cached_tokens": int},
    "output_tokens": int,
    "output_tokens_details": {"reasoning_tokens": int},
    "total_tokens": int,
}
TEXT = {"type": "output_text", "text": str, "annotations": list}
MESSAGE = {
    "id": not_empty,
    "type": "message",
    "role": "assistant",
    "status": ("completed", "incomplete"),
    "content": [TEXT],
}
TOOLS = [
    {"type": "function", "name": name, "description": f"Calls {name}.", "parameters": schema}
    for name, schema in SCHEMAS.items()
]


async def post(probe: Probe, again: int = 0, **fields: Any) -> Reply:
    """A short greedy response."""
    body = {"model": probe.model, "input": STORY, "max_output_tokens": 16, "temperature": 0}
    return await probe.post(PATH, body | fields, again=again)


async def respond(probe: Probe, again: int = 0, **fields: Any) -> Any:
    """The response object."""
    return answer(await post(probe, again, **fields), fields)


def text_of(response: Any) -> str:
    """All text that is shown."""
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])


async def object(probe: Probe) -> None:
    """`object` is response, and the id begins with resp_."""
    found = await respond(probe)
    expect_shape(found, {"object": "response", "id": not_empty})
    expect(found["id"].startswith("resp_"), "resp_…", found["id"])


async def created_at(probe: Probe) -> None:
    """created_at is the time in seconds."""
    found = (await respond(probe))["created_at"]
    expect_shape(found, float, "created_at")
    expect(abs(found - time.time()) < 86400, "the time in seconds", found)


async def required_fields(probe: Probe) -> None:
    """It has what the SDK needs: model, output, parallel_tool_calls, tool_choice, tools."""
    shape = {"model": probe.model, "output": list, "parallel_tool_calls": bool,
             "tool_choice": (str, dict), "tools": list}  # fmt: skip
    expect_shape(await respond(probe), shape)


async def nullable_fields(probe: Probe) -> None:
    """It has the others too, null where they say nothing."""
    shape = {
        "status": STATUS, "error": None, "incomplete_details": (dict, None),
        "instructions": (str, list, None), "metadata": (dict, None),
        "max_output_tokens": (int, None), "previous_response_id": None,
        "temperature": (float, None), "top_p": (float, None), "text": dict,
        "truncation": (str, None), "usage": USAGE,
    }  # fmt: skip
    expect_shape(await respond(probe), shape)


async def echoes_settings(probe: Probe) -> None:
    """Settings of the request come back."""
    fields: Any = {"max_output_tokens": 17, "temperature": 0.5, "top_p": 0.75, "seed": 1}
    found = await respond(probe, instructions="Be short.", metadata={"k": "v"}, **fields)
    wanted = {"max_output_tokens": 17, "temperature": 0.5, "top_p": 0.75,
              "instructions": "Be short.", "metadata": {"k": "v"}}  # fmt: skip
    expect_equal({name: found[name] for name in wanted}, wanted, "settings")


async def message(probe: Probe) -> None:
    """An output item is a message with output_text, annotations and status."""
    found = [item for item in (await respond(probe))["output"] if item["type"] == "message"]
    expect(found, "a message", found)
    expect_shape(found, [MESSAGE], "output")


async def message_id(probe: Probe) -> None:
    """Its id begins with msg_."""
    for item in (await respond(probe))["output"]:
        if item["type"] == "message":
            expect(item["id"].startswith("msg_"), "msg_…", item["id"])


async def usage(probe: Probe) -> None:
    """usage has all its fields and adds up."""
    found = (await respond(probe))["usage"]
    expect_shape(found, USAGE, "usage")
    expect_equal(found["total_tokens"], found["input_tokens"] + found["output_tokens"], "total")


async def max_output_tokens(probe: Probe) -> None:
    """max_output_tokens is honoured."""
    found = (await respond(probe))["usage"]["output_tokens"]
    expect_equal(found, 16, "output_tokens")


async def incomplete(probe: Probe) -> None:
    """A response that it cuts off is incomplete, and says why."""
    found = await respond(probe)
    expect_equal(found["status"], "incomplete", "status")
    expect_equal(found["incomplete_details"], {"reason": "max_output_tokens"}, "the details")


async def completed(probe: Probe) -> None:
    """One that ends by itself is completed."""
    schema = {"type": "json_schema", "name": "a", "schema": closed(ok={"type": "boolean"})}
    found = await respond(probe, text={"format": schema | {"strict": True}})
    expect_shape(found, {"status": "completed", "incomplete_details": None})


async def greedy_repeats(probe: Probe) -> None:
    """Temperature 0 twice is the same text."""
    first, second = await respond(probe), await respond(probe, again=1)
    expect_equal(text_of(second), text_of(first), "the second text")


async def ids_unique(probe: Probe) -> None:
    """Two responses share no id."""
    first, second = await respond(probe), await respond(probe, again=1)
    ids = [each for r in (first, second) for each in (r["id"], *(i["id"] for i in r["output"]))]
    expect_equal(len(set(ids)), len(ids), "different ids")


async def input_items(probe: Probe) -> None:
    """Input as a list of messages means the same as the text."""
    as_items = await respond(probe, input=user(STORY))
    expect_equal(text_of(as_items), text_of(await respond(probe)), "the text")


async def input_parts(probe: Probe) -> None:
    """Content may be parts of type input_text, with type message or without."""
    content = [{"type": "input_text", "text": STORY}]
    item = {"type": "message", "role": "user", "content": content}
    expect_equal(text_of(await respond(probe, input=[item])), text_of(await respond(probe)), "text")


async def instructions(probe: Probe) -> None:
    """Instructions are part of the prompt."""
    plain = (await respond(probe))["usage"]["input_tokens"]
    words = "Answer in the words of a sailor of old who has seen every harbour of the world."
    more = (await respond(probe, instructions=words))["usage"]["input_tokens"]
    expect(more != plain, "another number of input tokens", more)


async def developer(probe: Probe) -> None:
    """Developer messages are taken, also after others."""
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]}
    items = [*user("Hi"), said, {"role": "developer", "content": "Be short."}, *user("Go on.")]
    await respond(probe, input=items)


async def text_json_schema(probe: Probe) -> None:
    """text.format with a schema gives what the schema says."""
    schema = {"type": "json_schema", "name": "person", "strict": True, "schema": ADDRESS}
    found = await respond(probe, text={"format": schema}, max_output_tokens=96)
    if found["status"] == "completed" and (wrong := violation(parse(text_of(found)), ADDRESS)):
        raise Failed(wrong)


async def text_json_object(probe: Probe) -> None:
    """text.format json_object gives an object."""
    fields: Any = {"input": "A person in JSON.", "max_output_tokens": 64}
    found = await respond(probe, text={"format": {"type": "json_object"}}, **fields)
    expect(text_of(found).lstrip().startswith("{"), "{…", text_of(found))


async def text_format_wrong(probe: Probe) -> None:
    """An unknown format is a 400 that names it."""
    await respond(probe)
    refusal(await post(probe, text={"format": {"type": "yaml"}}), names="format")


async def verbosity(probe: Probe) -> None:
    """text.verbosity is taken."""
    await respond(probe, text={"verbosity": "low"})


async def output_as_input(probe: Probe) -> None:
    """What came out goes in again, item for item."""
    first = await respond(probe)
    await respond(probe, input=[*user(STORY), *first["output"], *user("Go on.")])


async def reasoning_as_input(probe: Probe) -> None:
    """A reasoning item is taken back."""
    thought: Any = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}
    await respond(probe, input=[*user("Hi"), thought, *user("Go on.")])


async def codex_request(probe: Probe) -> None:
    """A request as Codex sends it is answered."""
    await respond(
        probe, instructions="You are a coding agent.", tools=TOOLS, tool_choice="auto",
        parallel_tool_calls=False, reasoning={"effort": "medium", "summary": "auto"}, store=False,
        include=["reasoning.encrypted_content"], prompt_cache_key="k", client_metadata={"a": "b"},
        text={"verbosity": "low"},
        input=[{"type": "message", "role": "user",
                "content": [{"type": "input_text", "text": "Hello"}]}],
    )  # fmt: skip


async def include_logprobs(probe: Probe) -> None:
    """include message.output_text.logprobs tells logprobs of the text."""
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = await respond(probe, **fields)
    parts = [part for item in found["output"] for part in item.get("content", [])]
    entry = {"token": str, "logprob": float, "top_logprobs": list}
    expect_shape(parts[0], {"logprobs": [entry]}, "content[0]")
    expect(parts[0]["logprobs"], "some", parts[0])


async def _refused(probe: Probe, names: str, **fields: Any) -> None:
    await respond(probe)
    refusal(await post(probe, **fields), names=names)


async def input_missing(probe: Probe) -> None:
    """No input is a 400 that names it."""
    await _refused(probe, "input", input=None)


async def input_type(probe: Probe) -> None:
    """Input that is neither text nor items is a 400."""
    await _refused(probe, "input", input=5)


async def item_unknown(probe: Probe) -> None:
    """An item of an unknown type is passed over or refused by name; it is no server error."""
    await respond(probe)
    reply = await post(probe, input=[*user("Hi"), {"type": "telepathy"}])
    if reply.status != 200:
        refusal(reply, 400)


async def temperature(probe: Probe) -> None:
    """A wrong temperature is a 400 that names it."""
    await _refused(probe, "temperature", temperature=9)


async def max_output_tokens_wrong(probe: Probe) -> None:
    """A wrong max_output_tokens is a 400 that names it."""
    await _refused(probe, "max_output_tokens", max_output_tokens=-1)


async def model_unknown(probe: Probe) -> None:
    """An unknown model is a 404."""
    await respond(probe)
    refusal(await post(probe, model="no-such-model"), 404, code="model_not_found")


async def context_length(probe: Probe) -> None:
    """Too long an input is a 400 with the code context_length_exceeded."""
    await respond(probe)
    refusal(await post(probe, input="word " * 140_000), code="context_length_exceeded")


async def image_refused(probe: Probe) -> None:
    """A model of text refuses an image."""
    await respond(probe)
    part = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    refusal(await post(probe, input=[{"role": "user", "content": [part]}]), 400, 422, 501)


async def input_tokens(probe: Probe) -> None:
    """POST /v1/responses/input_tokens counts without answering."""
    reply = await probe.post(f"{PATH}/input_tokens", {"model": probe.model, "input": STORY})
    found = answer(reply)
    expect_shape(found, {"object": "response.input_tokens", "input_tokens": int})
    used = (await respond(probe))["usage"]["input_tokens"]
    expect_equal(found["input_tokens"], used, "input_tokens")


async def compact(probe: Probe) -> None:
    """POST /v1/responses/compact gives items to go on with."""
    body = {"model": probe.model, "input": [*user(STORY), *user("Go on.")]}
    found = answer(await probe.post(f"{PATH}/compact", body))
    expect_shape(found, {"output": list})
    await respond(probe, input=[*found["output"], *user("Go on.")])


@optional
async def sampling_extensions(probe: Probe) -> None:
    """top_k, seed and the like are taken here too."""
    await respond(probe, top_k=5, min_p=0.05, seed=3)


@optional
async def reasoning_item(probe: Probe) -> None:
    """Reasoning is an item of its own, before the message."""
    kinds = [item["type"] for item in (await respond(probe, max_output_tokens=64))["output"]]
    if "reasoning" not in kinds:
        raise Skipped("the model does not reason")
    expect_equal(kinds[0], "reasoning", "the first item")


CHECKS = collect("responses", globals())
