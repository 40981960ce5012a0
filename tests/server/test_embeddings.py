"""Texts as vectors."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest
from fakes import fake_hidden

TEXTS = ["Hello", "Hi"]


def expected(text: str, pooling: str = "mean", dimensions: int | None = None) -> np.ndarray:
    """What the fake's hidden states come to."""
    rows = [fake_hidden(token, position) for position, token in enumerate(text.encode())]
    vector = (rows[-1] if pooling == "last" else np.mean(rows, axis=0))[:dimensions]
    return vector / np.linalg.norm(vector)


async def test_as_numbers_and_as_bytes(serve):
    server = await serve("x")
    body = {"input": TEXTS}
    for how in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        reply = await server.post("/v1/embeddings", body | how)
        assert reply.status == 200
        assert list(reply.json) == ["object", "data", "model", "usage"]
        assert reply.json["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        for index, (entry, text) in enumerate(zip(reply.json["data"], TEXTS, strict=True)):
            assert (entry["object"], entry["index"]) == ("embedding", index)
            vector = entry["embedding"]
            if "base64" in how.values():
                vector = np.frombuffer(base64.b64decode(vector), "<f4")
            np.testing.assert_allclose(vector, expected(text), rtol=1e-6)
    server.assert_idle()


@pytest.mark.parametrize("given", ["Hello", ["Hello"], list(b"Hello"), [list(b"Hello")]])
async def test_every_form_of_input(serve, given):
    server = await serve("x")
    reply = await server.post("/v1/embeddings", {"input": given})
    (entry,) = reply.json["data"]
    np.testing.assert_allclose(entry["embedding"], expected("Hello"), rtol=1e-6)


async def test_dimensions_and_pooling(serve):
    server = await serve("x")
    body = {"input": "Hello", "dimensions": 2, "pooling": "last"}
    (entry,) = (await server.post("/v1/embeddings", body)).json["data"]
    np.testing.assert_allclose(entry["embedding"], expected("Hello", "last", 2), rtol=1e-6)
    assert np.linalg.norm(entry["embedding"]) == pytest.approx(1)


async def test_more_texts_than_may_wait(serve):
    """The queue is never given more than a few at once, and texts keep their order."""
    server = await serve("x", max_num_queued_reqs=64, max_num_seqs=4)
    texts = [f"text {n}" for n in range(300)]
    reply = await server.post("/v1/embeddings", {"input": texts})
    assert reply.status == 200
    for text, entry in zip(texts, reply.json["data"], strict=True):
        np.testing.assert_allclose(entry["embedding"], expected(text), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [9999]}, "input"),
        ({"input": "a" * 600}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 5}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
    ],
)
async def test_what_is_wrong_is_named(serve, change, param):
    server = await serve("x")
    reply = await server.post("/v1/embeddings", {"input": "Hello"} | change)
    assert (reply.status, reply.error["param"]) == (400, param)
    server.assert_idle()


async def test_the_sdk_reads_it(serve):
    """Who asks for base64 unless told otherwise, which its strict validation does not know."""
    server = await serve("x")
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
        answer = await client.embeddings.create(model="org/fake", input=TEXTS, user="me")
    np.testing.assert_allclose(answer.data[1].embedding, expected("Hi"), rtol=1e-6)
    assert answer.model == "org/fake"
