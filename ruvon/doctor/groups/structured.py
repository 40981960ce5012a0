"""Structured output: the answer is what the request says, whatever the model would say."""

from __future__ import annotations

import re
from typing import Any

from ruvon.doctor.ask import chat, chat_chunks, complete, parse, post_chat, refusal, user
from ruvon.doctor.check import Check, Question, collect, optional
from ruvon.doctor.expect import Failed, Skipped, expect, expect_equal
from ruvon.doctor.groups.chat_stream import choices_of, text_of
from ruvon.doctor.probe import Probe
from ruvon.doctor.schema import violation
from ruvon.doctor.schemas import ADDRESS, SCHEMAS, closed

ASK: dict[str, Any] = {
    "messages": user("Answer in JSON: a person who lives by the sea."),
    "max_tokens": 64,
}


def as_format(schema: Any, *, strict: bool = True, name: str = "answer") -> dict[str, Any]:
    """``response_format`` of a schema."""
    body = {"name": name, "strict": strict, "schema": schema}
    return {"type": "json_schema", "json_schema": body}


def check_valid(text: str, finish: str, schema: Any) -> None:
    """Valid JSON, or an answer that max_tokens cut off."""
    if finish == "length":
        return
    if wrong := violation(parse(text), schema):
        raise Failed(f"{wrong} in {text}")


async def _text(probe: Probe, **fields: Any) -> str:
    """A whole text; skipped where max_tokens cut it off."""
    choice = (await chat(probe, **(ASK | fields)))["choices"][0]
    if choice["finish_reason"] == "length":
        raise Skipped("the model found no end within max_tokens")
    return str(choice["message"]["content"])


def _schema(schema: Any, strict: bool) -> Question:
    async def ask(probe: Probe) -> None:
        fields = ASK | {"response_format": as_format(schema, strict=strict)}
        choice = (await chat(probe, **fields))["choices"][0]
        check_valid(choice["message"]["content"], choice["finish_reason"], schema)

    return ask


async def text(probe: Probe) -> None:
    """The format text changes nothing."""
    plain = (await chat(probe))["choices"][0]["message"]["content"]
    found = (await chat(probe, response_format={"type": "text"}))["choices"][0]
    expect_equal(found["message"]["content"], plain, "the text")


async def json_object(probe: Probe) -> None:
    """The format json_object gives an object."""
    found = await chat(probe, **ASK, response_format={"type": "json_object"})
    choice = found["choices"][0]
    check_valid(choice["message"]["content"], choice["finish_reason"], {"type": "object"})


async def json_object_begins(probe: Probe) -> None:
    """Cut off or not, it begins with a brace."""
    found = await chat(probe, **ASK, response_format={"type": "json_object"})
    text = found["choices"][0]["message"]["content"]
    expect(text.lstrip().startswith("{"), "{…", text)


async def finish(probe: Probe) -> None:
    """An answer that is complete ends with stop."""
    found = await chat(probe, **ASK, response_format=as_format(closed(ok={"type": "boolean"})))
    expect_equal(found["choices"][0]["finish_reason"], "stop", "finish_reason")


async def max_tokens(probe: Probe) -> None:
    """One that max_tokens cuts off ends with length, and is the beginning of one."""
    fields = ASK | {"max_tokens": 3}
    choice = (await chat(probe, **fields, response_format=as_format(ADDRESS)))["choices"][0]
    expect_equal(choice["finish_reason"], "length", "finish_reason")
    expect(choice["message"]["content"].lstrip().startswith("{"), "{…", choice)


async def stream(probe: Probe) -> None:
    """A stream's pieces are valid together."""
    chunks = await chat_chunks(probe, **ASK, response_format=as_format(ADDRESS))
    check_valid(text_of(chunks), choices_of(chunks)[-1]["finish_reason"], ADDRESS)


async def stream_as_whole(probe: Probe) -> None:
    """At temperature 0 they are the whole answer."""
    whole = await chat(probe, **ASK, response_format=as_format(ADDRESS))
    chunks = await chat_chunks(probe, **ASK, response_format=as_format(ADDRESS))
    expect_equal(text_of(chunks), whole["choices"][0]["message"]["content"], "the text")


async def hot(probe: Probe) -> None:
    """At temperature 2 every one of 4 choices is valid."""
    fields = ASK | {"temperature": 2, "n": 4, "seed": 1, "max_tokens": 48}
    found = await chat(probe, **fields, response_format=as_format(ADDRESS))
    for choice in found["choices"]:
        check_valid(choice["message"]["content"], choice["finish_reason"], ADDRESS)


async def seed_repeats(probe: Probe) -> None:
    """The same seed is the same answer."""
    fields = ASK | {"temperature": 1, "seed": 5, "response_format": as_format(ADDRESS)}
    first, second = [await chat(probe, again, **fields) for again in range(2)]
    texts = [found["choices"][0]["message"]["content"] for found in (first, second)]
    expect_equal(texts[1], texts[0], "the second text")


async def logprobs(probe: Probe) -> None:
    """Logprobs of tokens are finite, also where most tokens are forbidden."""
    fields = ASK | {"logprobs": True, "top_logprobs": 5, "max_tokens": 24}
    found = await chat(probe, **fields, response_format=as_format(ADDRESS))
    entries = found["choices"][0]["logprobs"]["content"]
    values = [each["logprob"] for entry in entries for each in (entry, *entry["top_logprobs"])]
    expect(all(isinstance(value, float | int) for value in values), "numbers", values)


async def stop_string_within(probe: Probe) -> None:
    """A stop string ends it as it ends any text."""
    fields = ASK | {"stop": ":"}
    choice = (await chat(probe, **fields, response_format=as_format(ADDRESS)))["choices"][0]
    expect(":" not in choice["message"]["content"], "no colon", choice)


async def not_strict(probe: Probe) -> None:
    """Without strict a schema need not close its objects."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    fields = ASK | {"max_tokens": 32}
    choice = await chat(probe, **fields, response_format=as_format(schema, strict=False))
    text = choice["choices"][0]["message"]["content"]
    check_valid(text, choice["choices"][0]["finish_reason"], schema)


async def _refused(probe: Probe, response_format: Any, names: str) -> None:
    await json_object_begins(probe)  # skips where no format is served
    error = refusal(await post_chat(probe, response_format=response_format))
    told = f"{error.get('param')} {error['message']}"
    expect(re.search(names, told), f"an error that names {names}", error)


async def strict_needs_closed_objects(probe: Probe) -> None:
    """Strict without additionalProperties false is a 400 that names the keyword."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    await _refused(probe, as_format(schema), "additionalProperties")


async def strict_needs_all_required(probe: Probe) -> None:
    """Strict with a property that is not required is a 400 that names it."""
    schema = closed(a={"type": "string"}) | {"required": []}
    await _refused(probe, as_format(schema), "required")


async def strict_needs_an_object(probe: Probe) -> None:
    """Strict with a root that is no object is a 400."""
    await _refused(probe, as_format({"type": "array", "items": {"type": "string"}}), "object|type")


async def schema_missing(probe: Probe) -> None:
    """json_schema without a schema is a 400."""
    await _refused(probe, {"type": "json_schema"}, "json_schema")


async def name_wrong(probe: Probe) -> None:
    """A name of other characters than letters, digits, - and _ is a 400."""
    await _refused(probe, as_format(ADDRESS, name="no name!"), "name")


async def type_unknown(probe: Probe) -> None:
    """An unknown type of format is a 400 that names it."""
    await _refused(probe, {"type": "yaml"}, "response_format|yaml")


async def type_of_schema_unknown(probe: Probe) -> None:
    """A schema with a type that does not exist is a 400."""
    await _refused(probe, as_format(closed(a={"type": "strin"})), "strin|type|schema")


async def keyword_unsupported(probe: Probe) -> None:
    """A keyword that is not supported is a 400 that names it, not passed over."""
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    reply = await post_chat(probe, **ASK, response_format=as_format(schema, strict=False))
    if reply.status == 200:
        choice = reply.json["choices"][0]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            expect(not isinstance(parse(text).get("a"), str), "no string under a", text)
    else:
        expect("not" in refusal(reply)["message"], "an error that names not", reply.json)


async def remote_reference(probe: Probe) -> None:
    """A $ref to another server is a 400; nothing is fetched."""
    schema = closed(a={"$ref": "http://127.0.0.1:9/schema.json"})
    await _refused(probe, as_format(schema, strict=False), r"\$ref|ref|schema")


async def reference_to_nothing(probe: Probe) -> None:
    """A $ref to a definition that is not there is a 400."""
    await _refused(probe, as_format(closed(a={"$ref": "#/$defs/x"}), strict=False), "ref|defs")


async def pattern_broken(probe: Probe) -> None:
    """A pattern that is no regular expression is a 400."""
    schema = closed(a={"type": "string", "pattern": "(["})
    await _refused(probe, as_format(schema, strict=False), "pattern|regex|schema")


async def pattern_expensive(probe: Probe) -> None:
    """An expensive pattern is served or refused, soon, and nothing breaks."""
    schema = closed(a={"type": "string", "pattern": "^((a?){1000}){1000}$"})
    reply = await post_chat(probe, **ASK, response_format=as_format(schema, strict=False))
    expect(reply.status in (200, 400), "200 or 400", reply.status)


async def large_schema(probe: Probe) -> None:
    """A schema of 20,000 properties is served or refused, and nothing breaks."""
    schema = closed(**{f"p{k}": {"type": "string"} for k in range(20_000)})
    fields = ASK | {"max_tokens": 4}
    reply = await post_chat(probe, **fields, response_format=as_format(schema, strict=False))
    expect(reply.status in (200, 400, 413), "200 or 400", reply.status)


async def deep_schema(probe: Probe) -> None:
    """A schema nested 100 deep is served or refused, and nothing breaks."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        schema = closed(a=schema)
    fields = ASK | {"max_tokens": 4}
    reply = await post_chat(probe, **fields, response_format=as_format(schema, strict=False))
    expect(reply.status in (200, 400), "200 or 400", reply.status)


async def after_a_bad_schema(probe: Probe) -> None:
    """After refused schemas a good one is served."""
    for _ in range(3):
        await post_chat(probe, response_format=as_format({"type": "strin"}))
    parse(await _text(probe, response_format=as_format(closed(ok={"type": "boolean"}))))


@optional
async def compact(probe: Probe) -> None:
    """JSON is compact: no line breaks that a model could go on writing for ever."""
    text = await _text(probe, response_format=as_format(closed(ok={"type": "boolean"})))
    expect("\n" not in text, "no line break", text)


@optional
async def on_completions(probe: Probe) -> None:
    """Completions take response_format too."""
    schema = closed(ok={"type": "boolean"})
    found = await complete(probe, max_tokens=32, response_format=as_format(schema))
    choice = found["choices"][0]
    check_valid(choice["text"], choice["finish_reason"], schema)


async def _extension(probe: Probe, pattern: str, **fields: Any) -> None:
    """The whole text is as the pattern says, which leaves no room to be cut off."""
    text = (await chat(probe, **(ASK | fields)))["choices"][0]["message"]["content"]
    expect(re.fullmatch(pattern, text), f"a text like {pattern}", text)


@optional
async def structured_outputs_regex(probe: Probe) -> None:
    """structured_outputs: a regex."""
    await _extension(probe, "[a-c]{3}-[0-9]{2}", structured_outputs={"regex": "[a-c]{3}-[0-9]{2}"})


@optional
async def structured_outputs_choice(probe: Probe) -> None:
    """structured_outputs: one of several texts."""
    await _extension(probe, "left|right", structured_outputs={"choice": ["left", "right"]})


@optional
async def structured_outputs_unicode(probe: Probe) -> None:
    """structured_outputs: texts of any script come whole."""
    await _extension(probe, "日本語|😀🎉", structured_outputs={"choice": ["日本語", "😀🎉"]})


@optional
async def structured_outputs_json(probe: Probe) -> None:
    """structured_outputs: a JSON schema."""
    schema = closed(ok={"type": "boolean"})
    text = await _text(probe, structured_outputs={"json": schema})
    check_valid(text, "stop", schema)


@optional
async def structured_outputs_grammar(probe: Probe) -> None:
    """structured_outputs: a grammar in Lark."""
    grammar = 'start: "go " ("left" | "right")\n'
    await _extension(probe, "go (left|right)", structured_outputs={"grammar": grammar})


@optional
async def guided_json(probe: Probe) -> None:
    """guided_json, an older name."""
    schema = closed(ok={"type": "boolean"})
    check_valid(await _text(probe, guided_json=schema), "stop", schema)


@optional
async def guided_regex(probe: Probe) -> None:
    """guided_regex, an older name."""
    await _extension(probe, "[0-9]{4}", guided_regex="[0-9]{4}")


@optional
async def guided_choice(probe: Probe) -> None:
    """guided_choice, an older name."""
    await _extension(probe, "yes|no", guided_choice=["yes", "no"])


@optional
async def regex_broken(probe: Probe) -> None:
    """A regex that is none is a 400."""
    refusal(await post_chat(probe, structured_outputs={"regex": "(["}), names="structured_outputs")


@optional
async def two_constraints(probe: Probe) -> None:
    """Two constraints in one request are a 400."""
    both = {"regex": "a", "choice": ["b"]}
    refusal(await post_chat(probe, structured_outputs=both), names="structured_outputs")


CHECKS = [
    *collect("structured", globals()),
    *(
        Check(f"structured.schema.{name}", f"A schema: {title}.", _schema(schema, strict))
        for name, title, schema, strict in SCHEMAS
    ),
]
