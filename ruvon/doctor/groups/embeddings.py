"""Embeddings."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

from ruvon.doctor.ask import answer, refusal
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.probe import Probe, Reply

PATH = "/v1/embeddings"


async def _post(probe: Probe, **fields: Any) -> Reply:
    body = {"model": probe.model, "input": "The sea is calm.", "encoding_format": "float"}
    return await probe.post(PATH, body | fields)


async def _embed(probe: Probe, **fields: Any) -> Any:
    return answer(await _post(probe, **fields), fields)


async def _vector(probe: Probe, **fields: Any) -> list[float]:
    vector: list[float] = (await _embed(probe, **fields))["data"][0]["embedding"]
    return vector


def _cosine(one: list[float], other: list[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / (math.hypot(*one) * math.hypot(*other))


async def shape(probe: Probe) -> None:
    """The answer is a list of embeddings with index, model and usage."""
    item = {"object": "embedding", "index": int, "embedding": [float]}
    usage = {"prompt_tokens": int, "total_tokens": int}
    shape = {"object": "list", "data": [item], "model": str, "usage": usage}
    expect_shape(await _embed(probe), shape)


async def model(probe: Probe) -> None:
    """It names the model that was asked for."""
    expect_equal((await _embed(probe))["model"], probe.model, "model")


async def usage(probe: Probe) -> None:
    """total_tokens is prompt_tokens, above 0."""
    found = (await _embed(probe))["usage"]
    expect(found["total_tokens"] == found["prompt_tokens"] > 0, "equal counts above 0", found)


async def several(probe: Probe) -> None:
    """Several texts give a vector each, in order."""
    found = (await _embed(probe, input=["one", "two", "three"]))["data"]
    expect_equal([item["index"] for item in found], [0, 1, 2], "indices")


async def several_as_one(probe: Probe) -> None:
    """A text's vector is the same in company."""
    alone = await _vector(probe, input="two")
    data = (await _embed(probe, input=["one", "two"]))["data"]
    near = _cosine(alone, data[1]["embedding"])
    expect(near > 0.999, "the same vector", f"a cosine of {near:.4f}")


async def repeats(probe: Probe) -> None:
    """The same text is the same vector."""
    data = (await _embed(probe, input=["one", "one"]))["data"]
    near = _cosine(data[0]["embedding"], data[1]["embedding"])
    expect(near > 0.9999, "the same vector", f"a cosine of {near:.4f}")


async def differs(probe: Probe) -> None:
    """Another text is another vector."""
    data = (await _embed(probe, input=["The sea is calm.", "def f(x): return x"]))["data"]
    near = _cosine(data[0]["embedding"], data[1]["embedding"])
    expect(near < 0.9999, "another vector", f"a cosine of {near:.4f}")


async def base64_equals_float(probe: Probe) -> None:
    """encoding_format base64 is the same numbers as little-endian float32."""
    numbers = await _vector(probe)
    text = (await _embed(probe, encoding_format="base64"))["data"][0]["embedding"]
    expect_shape(text, str, "embedding")
    data = base64.b64decode(text)
    decoded = struct.unpack(f"<{len(data) // 4}f", data)
    expect_equal(len(decoded), len(numbers), "the number of numbers")
    worst = max(abs(a - b) for a, b in zip(decoded, numbers, strict=True))
    expect(worst < 1e-5, "the same numbers", f"a difference of {worst}")


async def float_is_default(probe: Probe) -> None:
    """Without encoding_format numbers come."""
    found = await _embed(probe, encoding_format=None)
    expect_shape(found, {"data": [{"embedding": [float]}]})


async def token_ids(probe: Probe) -> None:
    """Input may be token ids, or lists of them."""
    found = await _embed(probe, input=[[40, 41, 42], [43]])
    expect_equal(len(found["data"]), 2, "vectors")


async def dimensions(probe: Probe) -> None:
    """dimensions is honoured, or refused by name."""
    reply = await _post(probe, dimensions=8)
    if reply.status == 200:
        expect_equal(len(reply.json["data"][0]["embedding"]), 8, "numbers")
    else:
        await _embed(probe)
        refusal(reply, names="dimensions")


async def user(probe: Probe) -> None:
    """user is taken."""
    await _embed(probe, user="u")


async def _refused(probe: Probe, names: str, **fields: Any) -> None:
    await _embed(probe)
    refusal(await _post(probe, **fields), names=names)


async def input_missing(probe: Probe) -> None:
    """No input is a 400 that names it."""
    await _refused(probe, "input", input=None)


async def input_empty(probe: Probe) -> None:
    """An empty list is a 400."""
    await _refused(probe, "input", input=[])


async def input_type(probe: Probe) -> None:
    """A number is no input."""
    await _refused(probe, "input", input=5)


async def format_wrong(probe: Probe) -> None:
    """An unknown encoding_format is a 400 that names it."""
    await _refused(probe, "encoding_format", encoding_format="hex")


async def model_unknown(probe: Probe) -> None:
    """An unknown model is a 404."""
    await _embed(probe)
    refusal(await _post(probe, model="no-such-model"), 404)


async def too_long(probe: Probe) -> None:
    """Too long a text is a 400, not cut off in silence."""
    await _embed(probe)
    refusal(await _post(probe, input="word " * 140_000), 400, 413)


@optional
async def normalised(probe: Probe) -> None:
    """Vectors have length 1."""
    length = math.hypot(*await _vector(probe))
    expect(abs(length - 1) < 1e-3, "a length of 1", length)


CHECKS = collect("embeddings", globals())
