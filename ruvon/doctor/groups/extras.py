"""Beyond OpenAI's usual endpoints: tokens, decisions, Ollama's API."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import CHAT, STORY, answer, chat, check_answered, parse, refusal, user
from ruvon.doctor.check import Check, collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.probe import Probe

TEXT = "Grüße, 世界! \U0001f600 <|x|>"


async def _tokenize(probe: Probe, **fields: Any) -> Any:
    return answer(await probe.post("/tokenize", {"model": probe.model, **fields}), fields)


async def tokenize(probe: Probe) -> None:
    """POST /tokenize gives the ids of a prompt."""
    found = await _tokenize(probe, prompt="Once upon a time")
    expect_shape(found, {"tokens": [int]})
    expect(found["tokens"], "some ids", found)


async def tokenize_count(probe: Probe) -> None:
    """It counts them."""
    found = await _tokenize(probe, prompt="Once upon a time")
    expect_equal(found["count"], len(found["tokens"]), "count")


async def tokenize_messages(probe: Probe) -> None:
    """Messages give the ids that a chat counts as its prompt."""
    found = await _tokenize(probe, messages=user(STORY))
    usage = (await chat(probe))["usage"]["prompt_tokens"]
    expect_equal(len(found["tokens"]), usage, "tokens")


async def tokenize_wrong(probe: Probe) -> None:
    """A prompt that is no text is a 400."""
    await _tokenize(probe, prompt="a")
    refusal(await probe.post("/tokenize", {"model": probe.model, "prompt": 5}), names="prompt")


async def detokenize(probe: Probe) -> None:
    """POST /detokenize gives the text back, whatever it holds."""
    tokens = (await _tokenize(probe, prompt=TEXT, add_special_tokens=False))["tokens"]
    reply = await probe.post("/detokenize", {"model": probe.model, "tokens": tokens})
    found = answer(reply)
    expect_equal(found.get("prompt", found.get("text")), TEXT, "the text")


async def detokenize_wrong(probe: Probe) -> None:
    """An id that the model does not have is a 400."""
    await _tokenize(probe, prompt="a")
    reply = await probe.post("/detokenize", {"model": probe.model, "tokens": [10**9]})
    refusal(reply, names="tokens")


async def render_chat(probe: Probe) -> None:
    """POST /v1/chat/completions/render shows the prompt's ids as the model sees them."""
    body = {"model": probe.model, "messages": user(STORY)}
    reply = await probe.post(f"{CHAT}/render", body)
    found = answer(reply)
    ids = found.get("prompt_token_ids", found.get("token_ids", found.get("tokens")))
    expect_equal(len(ids), (await chat(probe))["usage"]["prompt_tokens"], "ids")


QUESTIONS: list[dict[str, Any]] = [
    {"type": "predicate", "instructions": "Is this about the sea?"},
    {"type": "choice", "instructions": "Which colour?",
     "choices": [{"value": "blue"}, {"value": "red"}]},
    {"type": "score", "instructions": "How calm?",
     "levels": [{"label": "not"}, {"label": "somewhat"}, {"label": "very"}]},
]  # fmt: skip


async def _decide(probe: Probe) -> list[Any]:
    body = {"model": probe.model, "input": "The sea is calm and blue.", "questions": QUESTIONS}
    found = answer(await probe.post("/v1/decisions", body))
    expect_shape(found, {"model": str, "answers": list, "usage": dict})
    answers: list[Any] = found["answers"]
    return answers


async def decisions(probe: Probe) -> None:
    """POST /v1/decisions answers each question with its own type."""
    kinds = [found["type"] for found in await _decide(probe)]
    expect_equal(kinds, [question["type"] for question in QUESTIONS], "types")


async def decisions_predicate(probe: Probe) -> None:
    """A predicate has a probability."""
    found = (await _decide(probe))[0]["probability"]
    expect(0 <= found <= 1, "from 0 to 1", found)


async def decisions_choice(probe: Probe) -> None:
    """A choice is one of the values, and probabilities add up to 1."""
    found = (await _decide(probe))[1]
    expect(found["choice"] in ("blue", "red"), "blue or red", found)
    total = sum(each["probability"] for each in found["probabilities"])
    expect(abs(total - 1) < 1e-3, "a sum of 1", total)


async def decisions_score(probe: Probe) -> None:
    """A score has a confidence and probabilities of its levels."""
    shape = {"score": float, "confidence": float, "probabilities": [{"probability": float}]}
    expect_shape((await _decide(probe))[2], shape, "answers[2]")


async def decisions_wrong(probe: Probe) -> None:
    """A question of an unknown type is a 400."""
    await _decide(probe)
    body = {"model": probe.model, "input": "a", "questions": [{"type": "riddle"}]}
    refusal(await probe.post("/v1/decisions", body), names="questions")


async def ollama_version(probe: Probe) -> None:
    """GET /api/version is Ollama's."""
    expect_shape(answer(await probe.get("/api/version")), {"version": str})


async def ollama_tags(probe: Probe) -> None:
    """GET /api/tags lists models."""
    shape = {"models": [{"name": str, "model": str}]}
    expect_shape(answer(await probe.get("/api/tags")), shape)


async def ollama_show(probe: Probe) -> None:
    """POST /api/show describes one."""
    found = answer(await probe.post("/api/show", {"model": probe.model}))
    expect_shape(found, {"details": dict, "model_info": dict, "capabilities": list})


SHORT: dict[str, Any] = {"options": {"num_predict": 6, "temperature": 0}}


async def ollama_chat(probe: Probe) -> None:
    """POST /api/chat with stream false answers."""
    body = {"model": probe.model, "messages": user(STORY), "stream": False, **SHORT}
    found = answer(await probe.post("/api/chat", body))
    message = {"role": "assistant", "content": str}
    expect_shape(found, {"model": str, "message": message, "done": True, "eval_count": int})


async def ollama_chat_stream(probe: Probe) -> None:
    """Without it, it streams lines of JSON; the last is done."""
    body = {"model": probe.model, "messages": user(STORY), **SHORT}
    reply = await probe.post("/api/chat", body)
    check_answered(reply)
    lines = [parse(line) for line in reply.body.decode().splitlines()]
    expect_equal([line["done"] for line in lines], [False] * (len(lines) - 1) + [True], "done")
    expect(len(lines) > 3, "several lines", lines)


async def ollama_generate(probe: Probe) -> None:
    """POST /api/generate with stream false answers."""
    body = {"model": probe.model, "prompt": STORY, "stream": False, **SHORT}
    found = answer(await probe.post("/api/generate", body))
    expect_shape(found, {"model": str, "response": str, "done": True})


CHECKS = [
    Check(check.id, check.title, check.ask, optional=True) for check in collect("extras", globals())
]
