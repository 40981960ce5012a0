"""What the model would be given, without asking it."""

from __future__ import annotations

import pytest


async def test_a_chat_is_rendered_as_it_is_answered(serve):
    server = await serve("Hello", numbers={"defaults": {"temperature": 0.3}})
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "top_p": 0.5,
        "stop": "x",
        "logit_bias": {"7": 1},
        "nonsense": 1,
    }
    reply = await server.post("/v1/chat/completions/render", body)
    assert (reply.status, reply.headers["X-Ruvon-Ignored"]) == (200, "nonsense")
    shown = reply.json
    assert shown["prompt"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert shown["token_strs"][:2] == ["<|im_start|>", "u"]
    assert shown["model"] == "org/fake"
    sampling = shown["sampling_params"]
    assert (sampling["temperature"], sampling["top_p"]) == (0.3, 0.5)
    assert (sampling["stop"], sampling["n"], sampling["grammar"]) == (["x"], 1, None)
    assert sampling["logit_bias"] == {"7": 1}
    assert not server.fake.plans  # nobody was asked
    whole = await server.chat("Hi", return_token_ids=True)
    assert whole.json["prompt_token_ids"] == shown["token_ids"]
    template = await server.post("/apply-template", body)
    assert template.json == {"prompt": shown["prompt"]}


async def test_every_prompt_of_a_completion_is_rendered(serve):
    server = await serve("Hello")
    reply = await server.post("/v1/completions/render", {"prompt": ["a", "<|im_end|>b"]})
    assert [one["prompt"] for one in reply.json] == ["a", "<|im_end|>b"]
    assert reply.json[0]["token_ids"] == [97]
    assert all(one["sampling_params"]["max_tokens"] == 16 for one in reply.json)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions/render", {"messages": []}, "messages"),
        ("/v1/completions/render", {"prompt": "a" * 500}, "prompt"),
        ("/apply-template", {}, "messages"),
    ],
)
async def test_errors_are_those_of_the_answer(serve, path, body, param):
    server = await serve("Hello", numbers={"max_model_len": 64})
    reply = await server.post(path, body)
    assert (reply.status, reply.error["param"]) == (400, param)
