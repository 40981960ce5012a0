"""Large bodies, and a client that sends them from a process of its own."""

from __future__ import annotations

import http.client

CONTEXT = 8192
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
RESPOND = "/v1/responses"
MESSAGES, COUNT, OLLAMA = "/v1/messages", "/v1/messages/count_tokens", "/api/chat"

WORDS = b"hello wo" * (1 << 20)
EMPTY = b'{"role":"user","content":""},'
PART = b'{"type":"text","text":"a"},'
ITEM = b'{"type":"message","role":"user","content":""},'
CALLED = b'{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},'
TOOL = b'{"type":"function","name":"f%d","parameters":{"type":"object"}}'
RESULT = b'{"type":"tool_result","tool_use_id":"t","content":[{"type":"text","text":"a"}]},'
MESSAGES_TOOL = b'{"name":"f%d","input_schema":{"type":"object"}}'
CALL = b'{"type":"function","function":{"name":"f","arguments":"{}"}},'


def user(content: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":%s}],"max_tokens":1}' % content


def messages(one: bytes, count: int, more: bytes = b"") -> bytes:
    return b'{"messages":[%s%s],"max_tokens":1%s}' % (one * (count - 1), EMPTY[:-1], more)


def items(one: bytes, count: int, more: bytes = b"") -> bytes:
    return b'{"input":[%s%s],"max_output_tokens":1%s}' % (one * (count - 1), ITEM[:-1], more)


def functions(count: int) -> bytes:
    """As the Responses API has them."""
    return b',"tools":[%s]' % b",".join(TOOL % number for number in range(count))


def prompt(value: bytes, more: bytes = b"") -> bytes:
    return b'{"prompt":%s,"max_tokens":1%s}' % (value, more)


def text(size: int) -> bytes:
    return b'"%s"' % WORDS[:size]


def ids(count: int) -> bytes:
    return b"[%s97]" % (b"97," * (count - 1))


def several(one: bytes, count: int) -> bytes:
    return b"[%s]" % b",".join([one] * count)


def distinct(count: int) -> bytes:
    """So many texts, none of which is the beginning of another."""
    return b"[%s]" % b",".join(b'"%dx"' % number for number in range(count))


def biases(count: int) -> bytes:
    return b"{%s}" % b",".join(b'"%d":1' % number for number in range(count))


def message(role: bytes, field: bytes, value: bytes) -> bytes:
    return b'{"role":"%s","%s":%s},' % (role, field, value)


def questions(count: int) -> bytes:
    one = b'{"type":"predicate","instructions":"a"}'
    return b'{"input":%s,"questions":%s}' % (text(3000), several(one, count))


def offered(count: int, more: bytes = b"") -> bytes:
    """A chat with so many tools."""
    each = (b'{"type":"function","function":{"name":"f%d"%s}}' % (n, more) for n in range(count))
    return b'"tools":[%s]' % b",".join(each)


def schema(body: bytes) -> bytes:
    return b',"json_schema":' + body


def chain(count: int) -> bytes:
    """A grammar whose every rule is the next one, but for the last, which is missing."""
    return b"\\n".join(b"r%d: r%d" % (number, number + 1) for number in range(count))


def properties(count: int) -> bytes:
    each = b",".join(b'"key%d":{"type":"integer"}' % number for number in range(count))
    return b'{"type":"object","properties":{%s}}' % each


def messages_tools(count: int) -> bytes:
    return b"[%s]" % b",".join(MESSAGES_TOOL % number for number in range(count))


BODIES = {
    # what is taken
    "a chat that fills the context": (CHAT, user(text(8000)), 200),
    "a small schema that takes for ever": (
        COMPLETE,
        prompt(b'"a"', schema(b'{"type":"integer","multipleOf":1000003}')),
        400,
    ),
    "rules that end the process that compiles them": (
        COMPLETE,
        prompt(b'"a"', b',"grammar":"start: r0\\n%s"' % chain(9000)),
        400,
    ),
    "a prompt that fills the context": (COMPLETE, prompt(text(8000)), 200),
    "ids that fill the context": (COMPLETE, prompt(ids(CONTEXT - 1)), 200),
    "several of them": (COMPLETE, prompt(ids(CONTEXT - 1), b',"n":128'), 200),
    "all prompts": (COMPLETE, prompt(several(b'"a"', 256)), 200),
    "all completions": (COMPLETE, prompt(several(b'"a"', 128), b',"n":2'), 200),
    "scores": (COMPLETE, prompt(ids(8000), b',"echo":true,"logprobs":20'), 200),
    "scores beside a chat": (CHAT, messages(EMPTY, 200, b',"prompt_logprobs":20'), 200),
    "texts to embed": ("/v1/embeddings", b'{"input":%s}' % several(text(40), 2000), 200),
    "more texts than are taken": ("/v1/embeddings", b'{"input":%s}' % several(b'"a"', 9000), 400),
    "questions": ("/v1/decisions", questions(128), 200),
    "more questions than are taken": ("/v1/decisions", questions(300), 400),
    "a chat to be rendered": (CHAT + "/render", user(text(8000)), 200),
    "ids to be rendered": (COMPLETE + "/render", prompt(ids(CONTEXT - 1)), 200),
    "as many characters as may fit": (
        "/tokenize",
        b'{"prompt":%s,"return_token_strs":true}' % text(CONTEXT * 12),
        200,
    ),
    "as many messages as are taken": ("/tokenize", messages(EMPTY, 4096)[:-16] + b"}", 200),
    "as many ids as are taken": ("/detokenize", b'{"tokens":%s}' % ids(80_000), 200),
    "all biases": (COMPLETE, prompt(b'"a"', b',"logit_bias":' + biases(260)), 200),
    "bad words": (COMPLETE, prompt(b'"a"', b',"bad_words":' + several(text(128), 256)), 200),
    "stops": (COMPLETE, prompt(b'"a"', b',"stop":' + several(text(1024), 64)), 200),
    "tool calls": (
        CHAT,
        messages(message(b"assistant", b"tool_calls", several(CALL[:-1], 128)), 2),
        200,
    ),
    "template variables": (
        CHAT,
        messages(EMPTY, 1, b',"chat_template_kwargs":{"a":%s}' % ids(80_000)),
        200,
    ),
    "tools that none may call": (
        CHAT,
        messages(EMPTY, 1, b',"tool_choice":"none",' + offered(1024)),
        200,
    ),
    "tools": (CHAT, messages(EMPTY, 1, b"," + offered(60)), 200),
    "one of many must be called": (
        CHAT,
        messages(EMPTY, 1, b',"tool_choice":"required",' + offered(40, b',"strict":true')),
        200,
    ),
    "choices": (COMPLETE, prompt(b'"a"', b',"guided_choice":' + distinct(2000)), 200),
    "a schema with many keys": (COMPLETE, prompt(b'"a"', schema(properties(120))), 200),
    "a schema with many values": (
        COMPLETE,
        prompt(b'"a"', schema(b'{"enum":%s}' % distinct(2000))),
        200,
    ),
    "a conversation that fills the context": (MESSAGES, user(text(8000)), 200),
    "all neighbours of one role": (COUNT, messages(EMPTY, 4096)[:-16] + b"}", 200),
    "results of tools": (
        MESSAGES,
        messages(message(b"user", b"content", several(RESULT[:-1], 200)), 2),
        200,
    ),
    "calls and results": (
        OLLAMA,
        messages(
            message(
                b"assistant",
                b"tool_calls",
                several(b'{"function":{"name":"f","arguments":{"a":1}}}', 100),
            ),
            2,
        ),
        200,
    ),
    "unknown fields": (CHAT, messages(EMPTY, 1, b"," + biases(250)[1:-1]), 200),
    "items that fill the context": (RESPOND, items(ITEM, 250), 200),
    "one item that fills the context": (
        RESPOND,
        b'{"input":%s,"max_output_tokens":1}' % text(8000),
        200,
    ),
    "items that are counted": (RESPOND + "/input_tokens", items(ITEM, 4096)[:-23] + b"}", 200),
    "calls in one turn": (RESPOND, items(CALLED, 100), 200),
    "items that mean nothing": (RESPOND, items(b'{"type":"mcp_call"},', 4096), 200),
    "metadata": (RESPOND, items(ITEM, 1, b',"metadata":{"a":"%s"}' % (b"x" * 512)), 200),
    # what is refused after a look at it
    "items that do not fit": (RESPOND, items(ITEM, 4096), 400),
    "items that cannot be made to fit": (
        RESPOND,
        items(ITEM, 2000, b',"truncation":"auto","instructions":' + text(8190)),
        400,
    ),
    "too many items": (RESPOND, items(ITEM, 16_000), 400),
    "instructions": (RESPOND, items(ITEM, 1, b',"instructions":' + text(4_000_000)), 400),
    "tools without end": (RESPOND, items(ITEM, 1, functions(5000)), 400),
    "more tools than fit": (RESPOND, items(ITEM, 1, functions(1024)), 400),
    "one text": (CHAT, user(text((4 << 20) - 100)), 400),
    "one text of escapes": (CHAT, user(b'"%s' % (b"\\n" * 520_000) + text(3_000_000)[1:]), 400),
    "letters beyond ASCII": (COMPLETE, prompt('"{}"'.format("é" * 2_000_000).encode()), 400),
    "messages that do not fit": (CHAT, messages(EMPTY, 4096), 400),
    "too many messages": (CHAT, messages(EMPTY, 16_000), 400),
    "far too many messages": (CHAT, messages(EMPTY, 140_000), 400),
    "parts": (
        CHAT,
        messages(message(b"user", b"content", several(PART[:-1], 1024)), 16),
        400,
    ),
    "tool calls that do not fit": (
        CHAT,
        messages(message(b"assistant", b"tool_calls", several(CALL[:-1], 128)), 30),
        400,
    ),
    "tools that do not fit": (CHAT, messages(EMPTY, 1, b"," + offered(1024)), 400),
    "too many tools": (CHAT, messages(EMPTY, 1, b"," + offered(5000)), 400),
    "tools that are none": (CHAT, messages(EMPTY, 1, b',"tools":' + ids(80_000)), 400),
    "a tool of one text": (
        CHAT,
        messages(EMPTY, 1, b"," + offered(1, b',"description":' + text(4_000_000))),
        400,
    ),
    "a schema of far too many keys": (COMPLETE, prompt(b'"a"', schema(properties(15_000))), 400),
    "a schema of one text": (
        COMPLETE,
        prompt(b'"a"', schema(b'{"const":%s}' % text(4_000_000))),
        400,
    ),
    "a schema in a text": (
        COMPLETE,
        prompt(b'"a"', b',"guided_json":"%s"' % (b"[" * 2_000_000)),
        400,
    ),
    "schemas in schemas": (
        COMPLETE,
        prompt(b'"a"', schema(b'{"items":' * 500 + b"{}" + b"}" * 500)),
        400,
    ),
    "too many choices": (COMPLETE, prompt(b'"a"', b',"guided_choice":' + distinct(60_000)), 400),
    "a long regular expression": (
        COMPLETE,
        prompt(b'"a"', b',"guided_regex":' + text(4_000_000)),
        400,
    ),
    "a long grammar": (
        COMPLETE,
        prompt(b'"a"', b',"guided_grammar":"start: /a/%s"' % (b"\\nA: /a/" * 200_000)),
        400,
    ),
    "a long grammar of the other kind": (
        COMPLETE,
        prompt(b'"a"', b',"grammar":"root ::= a%s"' % (b"\\na ::= [a]" * 200_000)),
        400,
    ),
    "blocks": (MESSAGES, messages(message(b"user", b"content", several(PART[:-1], 1024)), 15), 400),
    "results of tools that do not fit": (
        MESSAGES,
        messages(message(b"user", b"content", several(RESULT[:-1], 1000)), 5),
        400,
    ),
    "Anthropic's tools that do not fit": (
        MESSAGES,
        messages(EMPTY, 1, b',"tools":' + messages_tools(1024)),
        400,
    ),
    "lines that the model is not told": (
        COUNT,
        messages(EMPTY, 1, b',"system":"%s"' % (b"x-anthropic-\\n" * 250_000)),
        400,
    ),
    "foreign blocks": (
        MESSAGES,
        messages(message(b"user", b"content", several(b'{"type":"x"}', 1000)), 15),
        200,
    ),
    "a request in Ollama's words": (OLLAMA, user(text((4 << 20) - 100)), 400),
    "fields without end": (CHAT, messages(EMPTY, 1, b"," + biases(80_000)[1:-1]), 400),
    "another model's": (CHAT, messages(EMPTY, 16_000, b',"model":"x"'), 404),
    "ids that do not fit": (COMPLETE, prompt(ids(80_000)), 400),
    "far too many ids": (COMPLETE, prompt(ids(1_300_000)), 400),
    "prompts": (COMPLETE, prompt(several(b'"hello"', 80_000)), 400),
    "prompts of ids": (COMPLETE, prompt(several(b"[1,2,3]", 16_000)), 400),
    "too many biases": (COMPLETE, prompt(b'"a"', b',"logit_bias":' + biases(80_000)), 400),
    "far too many biases": (COMPLETE, prompt(b'"a"', b',"logit_bias":' + biases(370_000)), 400),
    "allowed ids": (COMPLETE, prompt(b'"a"', b',"allowed_token_ids":' + ids(80_000)), 400),
    "ids that stop": (COMPLETE, prompt(b'"a"', b',"stop_token_ids":' + ids(80_000)), 400),
    "too many stops": (COMPLETE, prompt(b'"a"', b',"stop":' + several(b'"b"', 80_000)), 400),
    "lists in lists": (COMPLETE, prompt(b"[" * 500_000), 400),
    "quotes": (COMPLETE, b'"' * (4 << 20), 400),
    "backslashes": (COMPLETE, b'{"prompt":"%s' % (b"\\" * 4_000_000), 400),
    "zeros": (COMPLETE, bytes(4 << 20), 400),
}
"""What → path, body, status."""


def post(address: str, name: str) -> int:
    """Send one of the bodies; returns the status."""
    path, body, _ = BODIES[name]
    connection = http.client.HTTPConnection(address)
    connection.request("POST", path, body)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status
