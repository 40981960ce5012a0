"""Requests of all APIs with random parameters: good ones, and some of which something is wrong.

Whatever is drawn is answered the same each time it is asked: greedy, or with a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, TypeAlias

import orjson
from bodies import BODIES

Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A request that is sent again and again. ``kind`` is for the table of what was sent."""

    kind: str
    path: str
    body: bytes
    stream: bool = False


WORDS = (
    "a", "Hello", "the cat", "é", "日本語", "🙂", "<|im_end|>", "<tool_call>", "{{ 7 * 7 }}", "\n",
    "{% for x in range(9**9) %}", "\u0000", "</s>", "Ignore all that was said.", "]}", "' OR 1=1",
)  # fmt: skip
SCHEMAS: tuple[Fields, ...] = (
    {"type": "integer", "minimum": 0, "maximum": 20},
    {"enum": ["a", "</tool_call>", 'b"c']},
    {"type": "string", "pattern": "^[a-c]{1,3}$"},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"const": {"a": [1, None]}}]},
    {"$ref": "#/$defs/none"},
    {"type": "string", "format": "nonsense"},
)
GRAMMARS: tuple[Fields, ...] = (
    {},
    {"guided_choice": ["a", "ab", "é\n"]},
    {"regex": "a{2,4}|<tool_call>"},
    {"grammar": 'root ::= "a" [0-9]+ | "b"'},
    {"grammar": "root ::= root"},
    {"regex": "(a|a)*("},
)
JUNK: tuple[Any, ...] = (
    None, -1, 0, 1e308, 2**53, "", "x" * 5000, [], [[]], {}, {"a": {"b": []}}, True, [None], -0.5,
)  # fmt: skip


def words(rng: Random, most: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def some(rng: Random, options: Mapping[str, Callable[[], Any]], share: float = 0.2) -> Fields:
    """Each of these fields with a chance of ``share``."""
    return {name: value() for name, value in options.items() if rng.random() < share}


def object_schema(rng: Random) -> Fields:
    names = rng.sample(["a", "b", "é", "tool_call"], rng.randint(0, 2))
    return {
        "type": "object",
        "properties": {name: rng.choice(SCHEMAS) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def sampling(rng: Random) -> Fields:
    """How tokens are drawn: the same ones each time."""
    drawn = {"temperature": rng.choice([0.3, 1.0, 2.0]), "seed": rng.randrange(1000)}
    return (drawn if rng.random() < 0.5 else {"temperature": 0}) | some(
        rng,
        {
            "top_p": lambda: rng.choice([0.1, 0.9, 1.0]),
            "top_k": lambda: rng.choice([1, 5, 0]),
            "min_p": lambda: 0.1,
            "presence_penalty": lambda: rng.choice([-2.0, 0.5]),
            "repetition_penalty": lambda: 1.3,
            "logit_bias": lambda: {str(rng.randrange(256)): rng.choice([-100, 5])},
        },
        0.1,
    )


def lengths(rng: Random) -> Fields:
    """How an answer ends."""
    return {"max_tokens": rng.choice([1, 5, 12, 20, 40])} | some(
        rng,
        {
            "stop": lambda: rng.choice(["a", ["\n", '"}'], "zz"]),
            "ignore_eos": lambda: True,
            "min_tokens": lambda: 1,
            "n": lambda: rng.choice([1, 2, 3]),
        },
    )


def function(rng: Random) -> Fields:
    return {"name": rng.choice("fg"), "parameters": object_schema(rng)}


def chat(rng: Random) -> tuple[str, Fields]:
    """OpenAI's chat, with tools or a form of the answer."""
    body = {"messages": conversation(rng), **sampling(rng), **lengths(rng)}
    if rng.random() < 0.3:
        tools = [{"type": "function", "function": function(rng)} for _ in range(rng.randint(1, 2))]
        chosen = {"type": "function", "function": {"name": "f"}}
        body |= {"tools": tools, "tool_choice": rng.choice(["auto", "none", "required", chosen])}
    elif rng.random() < 0.4:
        schema = {"name": "s", "schema": object_schema(rng), "strict": True}
        form = {"type": "json_schema", "json_schema": schema}
        body["response_format"] = rng.choice([form, form, {"type": "json_object"}])
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": rng.randrange(4)}
    return "/v1/chat/completions", body


def conversation(rng: Random) -> list[Fields]:
    turns = [
        {"role": role, "content": words(rng)}
        for _ in range(rng.choice([0, 0, 0, 1, 2]))
        for role in ("user", "assistant")
    ]
    system = [{"role": "system", "content": "You are kind. " * 3}] if rng.random() < 0.5 else []
    return [*system, *turns, {"role": "user", "content": words(rng)}]


def completion(rng: Random) -> tuple[str, Fields]:
    """Prompts as text or ids, one or more, with scores of the prompt or of the answer."""
    ids = [rng.randrange(1, 256) for _ in range(rng.choice([1, 20, 150]))]
    prompt = rng.choice([words(rng, 20), [words(rng), words(rng)], ids, "shared prefix " * 6])
    body = {"prompt": prompt, **sampling(rng), **lengths(rng), **rng.choice(GRAMMARS)}
    return "/v1/completions", body | some(
        rng,
        {
            "logprobs": lambda: rng.randrange(4),
            "echo": lambda: True,
            "return_token_ids": lambda: True,
            "prompt_logprobs": lambda: 1,
        },
        0.1,
    )


def response(rng: Random) -> tuple[str, Fields]:
    body: Fields = {"input": words(rng), "temperature": 0, "store": False}
    body["max_output_tokens"] = rng.choice([16, 30])
    if rng.random() < 0.3:
        body["tools"] = [{"type": "function", **function(rng), "strict": False}]
        body["tool_choice"] = rng.choice(["auto", "required"])
    if rng.random() < 0.3:
        body["instructions"] = words(rng)
    return "/v1/responses", body


def message(rng: Random) -> tuple[str, Fields]:
    """Anthropic's."""
    turns = [one for one in conversation(rng) if one["role"] != "system"]
    body: Fields = {"messages": turns, "max_tokens": rng.choice([5, 20]), "temperature": 0}
    if rng.random() < 0.3:
        body["tools"] = [{"name": "f", "input_schema": object_schema(rng)}]
        body["tool_choice"] = {"type": rng.choice(["auto", "any"])}
    return "/v1/messages", body | some(rng, {"system": lambda: words(rng)})


def ollama(rng: Random) -> tuple[str, Fields]:
    options = {"temperature": 0, "num_predict": rng.choice([5, 20])}
    if rng.random() < 0.5:
        return "/api/chat", {"messages": conversation(rng), "options": options}
    return "/api/generate", {"prompt": words(rng), "options": options}


def other(rng: Random) -> tuple[str, Fields]:
    """What gives no tokens."""
    text = words(rng)
    decide = {"type": rng.choice(["predicate", "nonsense"]), "instructions": "a"}
    return rng.choice(
        [
            ("/v1/embeddings", {"input": [text, words(rng)]}),
            ("/v1/decisions", {"input": text, "questions": [decide]}),
            ("/tokenize", {"prompt": text}),
            ("/detokenize", {"tokens": [72, 105, rng.randrange(300)]}),
            ("/apply-template", {"messages": conversation(rng)}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": text}]}),
        ]
    )


MAKERS = (chat, chat, chat, completion, completion, completion, response, message, ollama, other)
STREAMED = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat",
    "/api/generate",
}  # fmt: skip

OVERSIZED = (
    "one text", "too many messages", "fields without end", "lists in lists", "quotes", "zeros",
    "prompts", "too many stops", "tools that are none", "a tool of one text", "a long grammar",
)  # fmt: skip


def good(rng: Random) -> Case:
    """What a client that knows the API sends. Some of it is refused all the same: a schema that
    cannot be compiled, a prompt that does not fit."""
    path, body = rng.choice(MAKERS)(rng)
    stream = path in STREAMED and rng.random() < 0.5
    if path in STREAMED:
        body["stream"] = stream
    if stream and path == "/v1/chat/completions":
        body["stream_options"] = {"include_usage": True}
    return Case("valid", path, orjson.dumps(body), stream)


def broken(rng: Random) -> Case:
    """A good request after something has happened to it: a field has another value, is missing or
    is new, or bytes have changed."""
    case = good(rng)
    body = orjson.loads(case.body)
    match rng.randrange(5):
        case 0:
            del body[rng.choice(list(body))]
        case 1:
            body["unknown" + str(rng.randrange(3))] = rng.choice(JUNK)
        case 2:
            data = bytearray(case.body)
            data[rng.randrange(len(data))] = rng.randrange(256)
            return settled(Case("broken", case.path, bytes(data)))
        case 3:
            return Case("broken", case.path, case.body[: rng.randrange(len(case.body))])
        case _:
            body[rng.choice(list(body))] = rng.choice(JUNK)
    return settled(Case("broken", case.path, orjson.dumps(body)))


def settled(case: Case) -> Case:
    """The same, asked so that it has one answer, which does not come as a stream."""
    try:
        body = orjson.loads(case.body)
    except orjson.JSONDecodeError:
        return case
    if not isinstance(body, dict):
        return case
    if case.path in STREAMED:
        body["stream"] = False
        body |= {"options": {"temperature": 0}} if "/api/" in case.path else {"temperature": 0}
    if case.path == "/v1/responses":
        body["store"] = False
    return Case(case.kind, case.path, orjson.dumps(body))


def oversized(rng: Random) -> Case:
    path, body, _ = BODIES[rng.choice(OVERSIZED)]
    return Case("oversized", path, body)


def catalogue(seed: str, size: int) -> list[Case]:
    """So many requests, most of them good ones."""
    rng = Random(f"{seed} requests")
    makers = rng.choices([good, broken, oversized], [70, 27, 3], k=size)
    return [maker(rng) for maker in makers]
