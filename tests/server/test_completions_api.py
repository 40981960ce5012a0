"""``/v1/completions``, as clients see it."""

from __future__ import annotations

import asyncio
import threading

import pytest
from fakes import fake_logprobs
from serving import ScriptRunner, byte_grammars, texts

from ruvon.errors import UnavailableError
from ruvon.server.parsing import SMALL


async def test_a_whole_answer_has_every_field(serve):
    server = await serve("lo")
    answer = (await server.complete("Hel")).json
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    usage = answer.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 3, 6)
    assert answer == {
        "object": "text_completion",
        "model": "org/fake",
        "choices": [
            {
                "index": 0,
                "text": "lo",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
    }


async def test_a_stream_is_byte_for_byte_what_openai_sends(serve):
    server = await serve("ab")
    reply = await server.complete("Hi", stream=True, max_tokens=2)
    first = reply.events[0]
    head = (
        f'"id":"{first["id"]}","object":"text_completion","created":{first["created"]},'
        f'"model":"org/fake","system_fingerprint":"{first["system_fingerprint"]}"'
    )
    choices = [
        '{"index":0,"text":"a","logprobs":null,"finish_reason":null}',
        '{"index":0,"text":"b","logprobs":null,"finish_reason":"length","stop_reason":null}',
    ]
    expected = "".join(f'data: {{{head},"choices":[{c}]}}\n\n' for c in choices)
    assert reply.body.decode() == expected + "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("ab", ["AB"]),
        (["ab", "cd"], ["AB", "CD"]),
        ([97, 98], ["AB"]),
        ([[97, 98], [99]], ["AB", "C"]),
        (["ab", [99]], ["AB", "C"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_of_every_shape(serve, prompt, answers, stream):
    server = await serve(str.upper)
    reply = await server.complete(prompt, n=2, stream=stream)
    expected = {2 * i + k: text for i, text in enumerate(answers) for k in range(2)}
    assert texts(reply.events if stream else [reply.json]) == expected


async def test_sixteen_tokens_by_default(serve):
    server = await serve("x" * 50)
    answer = (await server.complete()).json
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(serve, stream):
    server = await serve("lo")
    for prompt in ("Hel", [72, 101, 108]):
        reply = await server.complete(prompt, echo=True, n=2, stream=stream)
        assert texts(reply.events if stream else [reply.json]) == {0: "Hello", 1: "Hello"}


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_shows_all_ids_that_were_given(serve, stream):
    """Special ones too: they are the prompt. They take room in offsets, as any text does."""
    server = await serve("lo")
    fields = {"echo": True, "logprobs": 0, "stream": stream}
    reply = await server.complete([258, 72, 101], **fields)
    answers = reply.events if stream else [reply.json]
    assert texts(answers) == {0: "<|im_start|>Helo"}
    parts = [answer["choices"][0]["logprobs"] for answer in answers]
    offsets = [offset for part in parts if part for offset in part["text_offset"]]
    assert offsets == [0, 12, 13, 14, 15, 16]
    text = (await server.complete("He", **fields | {"stream": False})).json["choices"][0]
    assert text["text"] == "Helo"
    assert text["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


async def test_logprobs_side_by_side(serve):
    server = await serve("é!")
    logprobs = (await server.complete("Hi", logprobs=1, max_tokens=3)).json["choices"][0][
        "logprobs"
    ]
    assert logprobs == {
        "tokens": ["�", "�", "!"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"�": -0.5}, {"�": -0.5}, {"!": -0.5}],
        "text_offset": [0, 0, 1],
    }


async def test_logprobs_zero_is_the_drawn_token_alone(serve):
    server = await serve("a")
    logprobs = (await server.complete("Hi", logprobs=0, max_tokens=1)).json["choices"][0][
        "logprobs"
    ]
    assert logprobs["top_logprobs"] == [{"a": -0.5}]


async def test_logprobs_of_tokens_that_are_named(serve):
    server = await serve("a")
    asked = {"logprobs": 0, "logprob_token_ids": [120, 98], "max_tokens": 1}
    logprobs = (await server.complete("Hi", **asked)).json["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"x": -1.0, "b": -1.0, "a": -0.5}]
    for ids in ([999], [-1], [97] * 129, []):
        refused = await server.complete("Hi", **asked | {"logprob_token_ids": ids})
        assert refused.status == 400
        assert refused.error["param"].startswith("logprob_token_ids")


async def test_streamed_logprobs_add_up_to_the_whole_ones(serve):
    server = await serve("né, ok")
    fields = {"logprobs": 2, "echo": True, "return_token_ids": True}
    whole = (await server.complete("Hé", **fields)).json["choices"][0]
    events = (await server.complete("Hé", stream=True, **fields)).events
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [event["choices"][0]["logprobs"] for event in events]
        joined = [value for part in parts if part for value in part[key]]
        assert joined == whole["logprobs"][key]
    ids = [i for event in events for i in event["choices"][0]["token_ids"]]
    assert ids == whole["token_ids"]
    assert events[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]


async def test_scoring_a_prompt_without_generating(serve):
    """What evaluation harnesses do: echo, logprobs and no new tokens."""
    server = await serve("never")
    answer = (await server.complete("Héy", echo=True, logprobs=1, max_tokens=0)).json
    choice = answer["choices"][0]
    assert choice["text"] == "Héy"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["H", "�", "�", "y"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert answer["usage"]["completion_tokens"] == 0
    server.assert_idle()


async def test_echo_alone_with_no_new_tokens(serve):
    server = await serve("never")
    choice = (await server.complete("Hey", echo=True, max_tokens=0)).json["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("Hey", None)


class Unequal(ScriptRunner):
    """Completions of different likelihood: the later a sequence came, the likelier it is."""

    def _draw(self, row, context):
        tokens, _ = super()._draw(row, context)
        made = fake_logprobs(tokens[0], 0)
        better = type(made)(made.token, -1 / (1 + row.seq_id), made.rank, made.top)
        return tokens, None if row.sampling.logprobs is None else (better,)


async def test_best_of_gives_the_likeliest_per_token(serve):
    server = await serve(runner=Unequal("ab"))
    answer = (await server.complete(["x", "y"], n=2, best_of=3, logprobs=0)).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    firsts = [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]]
    assert firsts == [-1 / 3, -1 / 2, -1 / 6, -1 / 5]
    assert answer["usage"]["completion_tokens"] == 18  # all that was computed
    silent = (await server.complete("x", best_of=3)).json["choices"]
    assert len(silent) == 1
    assert silent[0]["logprobs"] is None


@pytest.mark.parametrize("field", ["n", "best_of"])
async def test_a_request_asks_for_so_many_completions_at_most(serve, field):
    server = await serve()
    reply = await server.complete(["x"] * 256, **{field: 3})
    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == (field, "invalid_value")
    assert "256" in reply.error["message"]


async def test_prompt_logprobs_of_each_choice(serve):
    server = await serve("a")
    choice = (await server.complete("Hi", prompt_logprobs=0)).json["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {"105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"}},
    ]


async def test_an_empty_prompt_begins_a_document(serve):
    server = await serve("a")
    answer = (await server.complete("", return_token_ids=True)).json
    assert answer["choices"][0]["prompt_token_ids"] == [256]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_prompt_as_the_model_reads_it(serve, stream):
    server = await serve("ok")
    reply = await server.complete(["Hi", [97, 256]], return_prompt_text=True, stream=stream)
    answers = reply.events if stream else [reply.json]
    told = {
        c["index"]: c["prompt_text"] for a in answers for c in a["choices"] if "prompt_text" in c
    }
    assert told == {0: "Hi", 1: "a<bos>"}


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_cut_off_a_prompt_is_not_echoed(serve, stream):
    server = await serve("!")
    fields = {"truncate_prompt_tokens": 2, "echo": True, "logprobs": 0, "stream": stream}
    reply = await server.complete(["hello", "yo"], **fields)
    assert texts(reply.events if stream else [reply.json]) == {0: "lo!", 1: "yo!"}
    if not stream:
        assert [c["logprobs"]["text_offset"][:2] for c in reply.json["choices"]] == [[0, 1]] * 2
    answer = (
        await server.complete("hello", truncate_prompt_tokens=2, truncation_side="right")
    ).json
    assert answer["usage"]["prompt_tokens"] == 2


async def test_requests_that_name_themselves(serve):
    server = await serve("a")
    reply = await server.complete(request_id="mine")
    assert (reply.headers["X-Request-Id"], reply.json["id"]) == ("mine", "cmpl-mine")


async def test_chat_fields_are_named(serve):
    server = await serve("a")
    reply = await server.complete(reasoning_effort="low", metadata={"a": "b"})
    assert set(reply.headers["X-Ruvon-Ignored"].split(",")) == {"reasoning_effort", "metadata"}
    for fields in ({"tools": [{}]}, {"tool_choice": "required"}, {"documents": [{"a": 1}]}):
        assert (await server.complete(**fields)).error["code"] == "unsupported_parameter"


async def test_large_bodies_do_not_wait_behind_a_grammar(serve, monkeypatch):
    """One that takes long to compile keeps waiting whoever sent it, and nobody else."""
    server = await serve("yes", numbers={"max_model_len": 16384, "num_blocks": 2048})
    trial, go_on = byte_grammars()._trial, threading.Event()
    error_of = trial.error_of
    monkeypatch.setattr(trial, "error_of", lambda text: go_on.wait() and error_of(text))
    long, constraint = "x" * (2 * SMALL), {"structured_outputs": {"regex": "y(e|s)+_slow"}}
    slow = [asyncio.create_task(server.complete(text, **constraint)) for text in ("Hi", long)]
    reply = await server.complete(long)
    waiting = [task.done() for task in slow]
    go_on.set()
    assert (reply.json["choices"][0]["text"], waiting) == ("yes", [False, False])
    assert [reply.status for reply in await asyncio.gather(*slow)] == [200, 200]


async def test_a_machine_without_time_for_a_grammar_says_when_to_come_again(serve, monkeypatch):
    server = await serve("yes")

    def busy(text: str) -> str:
        raise UnavailableError("No time.", 5.0)

    monkeypatch.setattr(byte_grammars()._trial, "error_of", busy)
    reply = await server.complete("Hi", structured_outputs={"regex": "never_compiled"})
    assert (reply.status, reply.headers["Retry-After"]) == (503, "5")
