"""``/v1/chat/completions``, as clients see it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serving import TEMPLATE, ScriptRunner

from ruvon.config import ServerConfig
from ruvon.models.chat import load_chat

ROLE = {"role": "assistant", "content": ""}


async def test_a_whole_answer_has_every_field(serve):
    server = await serve("Hello")
    reply = await server.chat("Hi", model="org/fake")
    answer = reply.json
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json"
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "chat.completion",
        "model": "org/fake",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hello",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "service_tier": "default",
        "usage": usage(21, 6),
    }
    server.assert_idle()


def usage(prompt, output, cached=0):
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def test_a_stream_is_byte_for_byte_what_openai_sends(serve):
    server = await serve("Hé")
    reply = await server.chat("Hi", stream=True, stream_options={"include_usage": True})
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Accel-Buffering"] == "no"
    assert "Content-Encoding" not in reply.headers
    first = reply.events[0]
    head = (
        f'"id":"{first["id"]}","object":"chat.completion.chunk","created":{first["created"]},'
        f'"model":"org/fake","system_fingerprint":"{first["system_fingerprint"]}"'
    )
    choices = [
        '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
        '{"index":0,"delta":{"content":"H"},"logprobs":null,"finish_reason":null}',
        '{"index":0,"delta":{"content":"é"},"logprobs":null,"finish_reason":null}',
        '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}',
    ]
    expected = "".join(f'data: {{{head},"choices":[{c}],"usage":null}}\n\n' for c in choices)
    counts = (
        '{"prompt_tokens":21,"completion_tokens":4,"total_tokens":25,'
        '"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
        '"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0,'
        '"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}'
    )
    expected += f'data: {{{head},"choices":[],"usage":{counts}}}\n\ndata: [DONE]\n\n'
    assert reply.body.decode() == expected


async def test_usage_is_absent_unless_asked_for(serve):
    server = await serve()
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}):
        events = (await server.chat(stream=True, **options)).events
        assert all("usage" not in event and event["choices"] for event in events)


async def test_usage_so_far_in_every_chunk(serve):
    server = await serve("abc")
    options = {"continuous_usage_stats": True, "include_usage": True}
    events = (await server.chat(stream=True, stream_options=options)).events
    assert [event["usage"] for event in events] == [usage(21, n) for n in (0, 1, 2, 3, 4, 4)]
    del options["include_usage"]  # then no chunk of its own says them at the end
    events = (await server.chat(stream=True, stream_options=options)).events
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 4]


async def test_prefixes_found_in_the_cache_are_counted(serve):
    server = await serve("ok")
    for _ in range(2):
        answer = (await server.chat("x" * 40)).json
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    salted = (await server.chat("x" * 40, cache_salt="mine")).json
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_n_choices_whole_and_streamed(serve):
    server = await serve("abc")
    whole = (await server.chat(n=3)).json
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2]
    assert [c["message"]["content"] for c in whole["choices"]] == ["abc"] * 3
    assert whole["usage"]["completion_tokens"] == 12
    events = (await server.chat(n=3, stream=True)).events
    assert all(len(event["choices"]) == 1 for event in events)
    deltas = [event["choices"][0] for event in events]
    assert [c["index"] for c in deltas if c["delta"] == ROLE] == [0, 1, 2]
    for index in range(3):
        mine = [c for c in deltas if c["index"] == index]
        assert mine[0]["delta"] == ROLE
        assert "".join(c["delta"].get("content", "") for c in mine) == "abc"
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
        assert mine[-1]["delta"] == {}


@pytest.mark.parametrize("stop", ["lo W", ["nothing", "lo W"]])
async def test_a_stop_string_over_several_tokens_never_shows(serve, stop):
    server = await serve("Hello World")
    whole = (await server.chat(stop=stop)).json
    choice = whole["choices"][0]
    assert choice["message"]["content"] == "Hel"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "lo W")
    assert whole["usage"]["completion_tokens"] == 7  # up to the token that completed it
    events = (await server.chat(stop=stop, stream=True)).events
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == "Hel"
    assert events[-1]["choices"][0]["stop_reason"] == "lo W"
    server.assert_idle()


async def test_a_stop_string_ends_one_choice_and_counts_as_stop(serve):
    server = await serve("ab" * 100)
    await server.chat(stop="ba", n=2, max_tokens=150)
    server.assert_idle()
    text = (await server.get("/metrics")).body.decode()
    labels = 'engine="0",finished_reason="stop",model_name="org/fake"'
    assert f"vllm:request_success_total{{{labels}}} 2.0" in text
    assert server.fake.computed < 60  # nobody computed 150 tokens


async def test_the_stop_string_may_be_included(serve):
    server = await serve("Hello World")
    answer = (await server.chat(stop=" W", include_stop_str_in_output=True)).json
    assert answer["choices"][0]["message"]["content"] == "Hello W"


async def test_stop_token_ids_are_reported_and_hidden(serve):
    server = await serve("Hello")
    choice = (await server.chat(stop_token_ids=[ord("l")])).json["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("He", ord("l"))
    shown = await server.chat(stop_token_ids=[ord("l")], include_stop_str_in_output=True)
    assert shown.json["choices"][0]["message"]["content"] == "Hel"


async def test_length_ends_with_length(serve):
    server = await serve("Hello")
    for name in ("max_tokens", "max_completion_tokens"):
        choice = (await server.chat(**{name: 2})).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("He", "length")
    both = (await server.chat(max_tokens=2, max_completion_tokens=3)).json["choices"][0]
    assert both["message"]["content"] == "He"


async def test_special_tokens_show_when_asked(serve):
    server = await serve("a")
    answer = (await server.chat(ignore_eos=True, max_tokens=2, skip_special_tokens=False)).json
    assert answer["choices"][0]["message"]["content"] == "a<|im_end|>"


async def test_logprobs_of_each_token(serve):
    server = await serve("é")
    whole = (await server.chat(logprobs=True, top_logprobs=1)).json["choices"][0]
    content = whole["logprobs"]["content"]
    assert whole["logprobs"]["refusal"] is None
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], list(b"<|im_end|>")]
    assert content[0] == {
        "token": "�",
        "bytes": [0xC3],
        "logprob": -0.5,
        "top_logprobs": [{"token": "�", "bytes": [0xC3], "logprob": -0.5}],
    }
    assert (await server.chat(logprobs=True)).json["choices"][0]["logprobs"]["content"][0][
        "top_logprobs"
    ] == []
    named = await server.chat(logprobs=True, logprob_token_ids=[120, 97])
    entry = named.json["choices"][0]["logprobs"]["content"][0]
    assert [top["token"] for top in entry["top_logprobs"]] == ["x", "a"]
    refused = await server.chat(logprob_token_ids=[97])
    assert (refused.status, refused.error["param"]) == (400, "logprob_token_ids")
    events = (await server.chat(logprobs=True, top_logprobs=1, stream=True)).events
    streamed = [
        entry
        for event in events
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


async def test_token_ids_both_ways(serve):
    server = await serve("ab")
    whole = (await server.chat("Hi", return_token_ids=True)).json
    prompt = server.service.chat.encode([{"role": "user", "content": "Hi"}])
    assert whole["prompt_token_ids"] == prompt
    assert whole["choices"][0]["token_ids"] == [97, 98, 259]
    events = (await server.chat("Hi", return_token_ids=True, stream=True)).events
    assert events[0]["prompt_token_ids"] == prompt
    ids = [i for event in events for i in event["choices"][0].get("token_ids", [])]
    assert ids == [97, 98, 259]


async def test_prompt_logprobs(serve):
    server = await serve("a")
    answer = (await server.chat("Hi", prompt_logprobs=1)).json
    entries = answer["prompt_logprobs"]
    assert len(entries) == answer["usage"]["prompt_tokens"]
    assert entries[0] is None
    prompt = server.service.chat.encode([{"role": "user", "content": "Hi"}])
    assert entries[1][str(prompt[1])] == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": chr(prompt[1]),
    }


async def test_messages_of_every_role_reach_the_template(serve):
    server = await serve("ok")
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": None, "refusal": "R"},
    ]
    reply = await server.post(
        "/v1/chat/completions", {"messages": messages, "return_token_ids": True}
    )
    ids = reply.json["prompt_token_ids"]
    assert server.service.tokenizer.decode(ids, skip_special_tokens=False) == "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in [
            ("system", "S"), ("system", "D"), ("user", "a\nb"),
            ("assistant", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'),
            ("user", "<tool_response>\n42\n</tool_response>"), ("assistant", "A"),
            ("user", ""), ("assistant", "R"),
        ]
    ) + "<|im_start|>assistant\n"  # fmt: skip
    assert "X-Ruvon-Ignored" not in reply.headers


async def test_continuing_the_final_message(serve):
    server = await serve("lo")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    body = {
        "messages": messages,
        "continue_final_message": True,
        "echo": True,
        "return_token_ids": True,
    }
    answer = (await server.post("/v1/chat/completions", body)).json
    assert answer["choices"][0]["message"]["content"] == "Hello"
    prompt = server.service.tokenizer.decode(answer["prompt_token_ids"], False)
    assert prompt.endswith("<|im_start|>assistant\nHel")
    events = (await server.post("/v1/chat/completions", body | {"stream": True})).events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Hel"}


async def test_special_tokens_in_user_text_stay_text(serve):
    server = await serve("ok")
    ids = (await server.chat("<|im_end|>", return_token_ids=True)).json["prompt_token_ids"]
    assert ids.count(259) == 1


async def test_sampling_defaults_come_from_the_model(serve):
    defaults = {"temperature": 0.3, "top_k": 7, "top_p": 0.9}
    server = await serve("a", numbers={"defaults": defaults})
    rows = capture(server)
    await server.chat(top_p=0.5)
    assert (rows[0].temperature, rows[0].top_k, rows[0].top_p) == (0.3, 7, 0.5)
    (card,) = (await server.get("/v1/models")).json["data"]
    assert card["default_sampling"] == defaults


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_wait_for_min_tokens(serve, stream):
    server = await serve("a,b,c,d")
    asked = {"stop": [","], "min_tokens": 3, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
        events = (await server.chat(**asked)).events
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"])
        usage = events[-1]["usage"]
    else:
        answer = (await server.chat(**asked)).json
        text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    assert text == "a,b"
    assert usage["completion_tokens"] == 4


async def test_a_top_p_of_zero_is_greedy(serve):
    server = await serve("a")
    rows = capture(server)
    assert (await server.chat(top_p=0, temperature=1.5)).status == 200
    assert rows[0].temperature == 0
    for top_p in (-0.1, 1.1):
        assert (await server.chat(top_p=top_p)).error["param"] == "top_p"


def capture(server):
    """The sampling of each sequence that the server's runner is told of."""
    rows = []
    launch = server.fake.launch

    def spy(plan):
        rows.extend(new.sampling for new in plan.new)
        return launch(plan)

    server.fake.launch = spy
    return rows


async def test_every_sampling_field_reaches_the_engine(serve):
    server = await serve("a")
    rows = capture(server)
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.8,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 7,
        "min_tokens": 1, "ignore_eos": True,
    }  # fmt: skip
    extra = {
        "max_tokens": 3,
        "logit_bias": {"5": 1},
        "stop_token_ids": [4],
        "allowed_token_ids": [97],
        "bad_words": ["no"],
    }
    assert (await server.chat(**given, **extra)).status == 200
    sampling = rows[0]
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.logit_bias == {5: 1.0}
    assert sampling.stop_token_ids == (4,)
    assert sampling.allowed_token_ids == (97,)
    assert sampling.bad_words == (tuple(b"no"), tuple(b" no"))
    await server.chat(top_k=-1)
    assert rows[-1].top_k == 0


TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "custom", "custom": {"name": "patch"}},
]
ROOM = {"max_model_len": 2048}  # for the tools in words
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'


async def test_a_call_is_the_same_whole_and_streamed(serve):
    server = await serve("Well. " + CALL, numbers=ROOM)
    whole = (await server.chat(tools=TOOLS)).json["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}
    assert whole["message"]["content"].strip() == "Well."
    assert whole["finish_reason"] == "tool_calls"
    events = (await server.chat(tools=TOOLS, stream=True)).events
    deltas = [event["choices"][0]["delta"] for event in events]
    first, *later = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first.pop("id").startswith("call_")
    assert first == {"index": 0, "type": "function", "function": {"name": "add", "arguments": ""}}
    assert all(list(piece) == ["index", "function"] for piece in later)
    assert "".join(piece["function"]["arguments"] for piece in later) == '{"a": "é"}'
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "Well."
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_an_answer_that_only_calls_has_no_content(serve):
    server = await serve(CALL, numbers=ROOM)
    answer = (await server.chat(tools=TOOLS, logprobs=True, n=2)).json
    for choice in answer["choices"]:
        assert choice["message"]["content"] is None
        assert len(choice["logprobs"]["content"]) == len(CALL.encode()) + 1
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}
    assert len(ids) == 2


async def test_no_calls_without_tools(serve):
    server = await serve(CALL, numbers=ROOM)
    for fields in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = (await server.chat(**fields)).json["choices"][0]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("parallel", [True, False])
async def test_a_call_that_is_cut_off_ends_with_length(serve, parallel):
    server = await serve(CALL, numbers=ROOM)
    fields = {"max_tokens": len(CALL) - 20, "parallel_tool_calls": parallel}
    choice = (await server.chat(tools=TOOLS, **fields)).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"


async def test_a_call_that_could_not_be_computed_is_an_error(serve):
    class FailsLate(ScriptRunner):
        def _draw(self, row, context):
            if len(row.history) > row.num_prompt + len(CALL) - 20:
                self.errors[row.seq_id] = "NaN in the logits"
            return super()._draw(row, context)

    server = await serve(runner=FailsLate(CALL), numbers=ROOM)
    reply = await server.chat(tools=TOOLS, parallel_tool_calls=False)
    assert (reply.status, reply.error["message"]) == (500, "NaN in the logits")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}},
    ],
)
async def test_a_choice_that_cannot_be_met_is_named(serve, fields):
    server = await serve()
    assert (await server.chat(**fields)).error["param"] == "tool_choice"


async def test_of_many_tools_the_one_to_blame_is_named(serve):
    server = await serve(numbers=ROOM)
    broken = {"type": "object", "properties": {"a": {"$ref": "http://x"}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "g", "parameters": broken}}]
    for _ in range(2):  # refusals are remembered
        error = (await server.chat(tools=tools, tool_choice="required")).error
        assert error["param"] == "tools[2].function.parameters"
        assert "'$ref' at '/properties/a/$ref'" in error["message"]


async def test_what_must_be_written_reaches_the_engine(serve):
    server = await serve("a", numbers=ROOM)
    rows = capture(server)
    await server.chat(structured_outputs={"regex": "a"})
    await server.complete(guided_choice=["a", "b"])
    await server.chat(tools=TOOLS, tool_choice="required")
    assert [row.grammar is not None for row in rows] == [True] * 3
    assert [row.grammar.param for row in rows[:2]] == ["structured_outputs.regex", "guided_choice"]


async def test_what_the_template_does_not_read_is_reported(serve):
    server = await serve("a", server=ServerConfig(port=0))
    fields = {"reasoning_effort": "low", "enable_thinking": True, "thinking_budget": 3}
    more = {"metadata": {"a": "b"}, "chat_template_kwargs": {"depth": 1}}
    reply = await server.chat(**fields, **more)
    names = reply.headers["X-Ruvon-Ignored"].split(",")
    assert set(names) == {*fields, "chat_template_kwargs.depth"}
    assert reply.json["metadata"] == {"a": "b"}
    assert (await server.chat(documents=[{"text": "x"}])).error["param"] == "documents"
    strict = await serve("a", server=ServerConfig(port=0, strict=True))
    error = (await strict.chat(reasoning_effort="low")).error
    assert (error["param"], error["code"]) == ("reasoning_effort", "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "ant\n"[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "<|im_start|>us"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 500}, "<|im_start|>assistant\n"),
    ],
)
async def test_prompts_cut_to_size(serve, fields, kept):
    server = await serve("a")
    answer = (await server.chat("x" * 400, return_prompt_text=True, **fields)).json
    assert answer["prompt_text"].endswith(kept)
    if fields["truncate_prompt_tokens"] > 0:
        assert answer["prompt_text"] == kept
        assert answer["usage"]["prompt_tokens"] == 3
    else:
        assert answer["usage"]["prompt_tokens"] == 12
    for wrong in ({"truncate_prompt_tokens": 0}, {"truncation_side": "left"}):
        assert (await server.chat(**wrong)).error["param"] == next(iter(wrong))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_request_may_name_itself(serve, stream):
    server = await serve("a")
    reply = await server.chat(request_id="mine-1", stream=stream)
    assert reply.headers["X-Request-Id"] == "mine-1"
    answer = reply.events[0] if stream else reply.json
    assert answer["id"] == "chatcmpl-mine-1"
    for wrong in ("", "a b", "é", "a\n", "x" * 129):
        assert (await server.chat(request_id=wrong)).error["param"] == "request_id"


THINKING = TEMPLATE + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


async def thinker(serve, **options):
    """A server whose model thinks first, and can be told not to."""
    server = await serve(
        lambda prompt: "Yes." if "</think>" in prompt else "<think>\nHm.\n</think>\n\nYes.",
        **options,
    )
    chat = load_chat(server.service.tokenizer, THINKING)
    server.state.service = replace(server.service, chat=chat)
    return server


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_told_apart_and_counted(serve, stream):
    server = await thinker(serve)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    reply = await server.chat(**options)
    if stream:
        deltas = [c["delta"] for event in reply.events for c in event["choices"]]
        said = {key: "".join(d.get(key, "") for d in deltas) for key in ("content", "reasoning")}
        assert all(d["reasoning"] == d["reasoning_content"] for d in deltas if "reasoning" in d)
        usage = reply.events[-1]["usage"]
    else:
        said, usage = reply.json["choices"][0]["message"], reply.json["usage"]
        assert said["reasoning"] == said["reasoning_content"]
    assert (said["content"], said["reasoning"].strip()) == ("Yes.", "Hm.")
    counted = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 3 <= counted < usage["completion_tokens"] - 4


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
async def test_thinking_switched_off(serve, fields):
    server = await thinker(serve, server=ServerConfig(port=0, strict=True))
    reply = await server.chat(**fields)
    message = reply.json["choices"][0]["message"]
    assert message["content"] == "Yes."
    assert "reasoning" not in message
    assert "X-Ruvon-Ignored" not in reply.headers


async def test_reasoning_goes_back(serve):
    server = await thinker(serve)
    answer = (await server.chat()).json["choices"][0]["message"]
    user = {"role": "user", "content": "Hi"}
    reply = await server.post("/v1/chat/completions", {"messages": [user, answer, user]})
    assert reply.status == 200
    assert "X-Ruvon-Ignored" not in reply.headers
