"""Typed questions, answered with probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace

import openai
import pytest
import torch
from embedded import MODEL, needs_model, running
from paged import PagedSequences
from serving import ScriptRunner

from ruvon.config import EngineConfig
from ruvon.kernels.reference import make_torch_ops
from ruvon.models import load_model
from ruvon.models.chat import load_chat
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.server.decisions import DecisionRequest, letters, prepare
from ruvon.telemetry import silent

PREDICATE = {"type": "predicate", "instructions": "The customer is angry."}
CHOICE = {
    "type": "choice",
    "name": "team",
    "instructions": "Which team should answer?",
    "choices": [
        {"value": "billing", "description": "invoices and payments"},
        {"value": True},
        {"value": "true"},
    ],
}
SCORE = {
    "type": "score",
    "instructions": "How urgent is it?",
    "levels": [{"label": "later"}, {"label": "soon", "description": "today"}, {"label": "now"}],
}
REQUEST = {"input": "I was charged twice!", "questions": [PREDICATE, CHOICE, SCORE]}


class Weighing(ScriptRunner):
    """Prefers labels as it is told, and keeps the prompts it has seen."""

    def __init__(self, **weights: float) -> None:
        super().__init__("x")
        self.weights = {ord(label): math.log(weight) for label, weight in weights.items()}
        self.prompts: list[str] = []

    def weigh(self, prompt: str, token: int) -> float:
        if prompt not in self.prompts:
            self.prompts.append(prompt)
        return self.weights.get(token, math.log(1e-3)) - 50  # none of them is likely


async def test_each_kind_of_question(serve):
    fake = Weighing(Y=0.6, N=0.2, A=0.2, B=0.1, C=0.1, **{"0": 0.1, "1": 0.1, "2": 0.2})
    server = await serve(runner=fake)
    reply = await server.post("/v1/decisions", REQUEST)
    assert reply.status == 200
    predicate, choice, score = reply.json["answers"]
    assert predicate == {"type": "predicate", "name": None, "probability": pytest.approx(0.75)}
    assert (choice["name"], choice["choice"]) == ("team", "billing")
    assert choice["confidence"] == pytest.approx(0.5)
    assert [each["value"] for each in choice["probabilities"]] == ["billing", True, "true"]
    assert [each["probability"] for each in choice["probabilities"]] == pytest.approx(
        [0.5, 0.25, 0.25]
    )
    assert score["score"] == pytest.approx(0.25 + 2 * 0.5)
    assert score["probabilities"][1] == {
        "label": "soon",
        "value": 1,
        "probability": pytest.approx(0.25),
    }
    first, second, third = fake.prompts
    for prompt in fake.prompts:
        assert prompt.startswith("user\nI was charged twice!\n\n")
        assert prompt.endswith("assistant\n")
    assert "The customer is angry." in first
    assert "A: billing - invoices and payments\nB: true\nC: true\n" in second
    assert "0: later\n1: soon - today\n2: now\n" in third
    usage = reply.json["usage"]
    assert usage["output_tokens"] == 3
    assert usage["total_tokens"] == usage["input_tokens"] + 3
    server.assert_idle()


async def test_questions_share_the_input_in_the_cache(serve):
    server = await serve(runner=Weighing(), numbers={"max_model_len": 1024, "num_blocks": 512})
    reply = await server.post("/v1/decisions", REQUEST | {"input": "a long story " * 20})
    usage = reply.json["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] >= 2 * 13 * 20 - 2 * 16


async def test_a_conversation_as_input(serve):
    fake = Weighing()
    server = await serve(runner=fake)
    items = [
        {"role": "system", "content": "Be fair."},
        {"role": "user", "content": [{"type": "input_json", "data": {"a": [1]}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
    ]
    for last in ([], [{"role": "user", "content": "So?"}]):
        body = {"input": items + last, "questions": [PREDICATE]}
        assert (await server.post("/v1/decisions", body)).status == 200
    without, following = fake.prompts
    start = 'system\nBe fair.\nuser\n{"a":[1]}\nassistant\nWell.\nuser\n'
    assert without.startswith(start + "The customer")
    assert following.startswith(start + "So?\n\nThe customer")


async def test_calls_of_tools_in_the_input(serve):
    fake = Weighing()
    server = await serve(runner=fake)
    items = [
        {"role": "user", "content": "Add."},
        {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 7}'},
        {"type": "function_call_output", "call_id": "1", "output": "it is 8"},
        {"type": "custom_tool_call", "call_id": "2", "name": "say", "input": "aloud"},
        {
            "type": "custom_tool_call_output",
            "call_id": "2",
            "output": [{"type": "input_text", "text": "said"}],
        },
    ]
    reply = await server.post("/v1/decisions", {"input": items, "questions": [PREDICATE]})
    assert reply.status == 200, reply.body
    (prompt,) = fake.prompts
    places = [prompt.index(word) for word in ("add", "7", "it is 8", "aloud", "said", "angry")]
    assert places == sorted(places)


async def test_items_that_mean_nothing_are_named(serve):
    server = await serve(runner=Weighing())
    items = [{"type": "mcp_call", "id": "x"}, {"role": "user", "content": "Hi"}]
    reply = await server.post("/v1/decisions", {"input": items, "questions": [PREDICATE]})
    assert reply.headers["X-Ruvon-Ignored"] == "input[0].mcp_call"


async def test_the_sdk_reads_it(serve):
    server = await serve(runner=Weighing(N=0.9))
    async with openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="none", _strict_response_validation=True
    ) as client:
        decision = await client.decisions.create(
            model="org/fake", input="Hi", questions=[PREDICATE, CHOICE, SCORE]
        )
    assert [answer.type for answer in decision.answers] == ["predicate", "choice", "score"]
    assert decision.answers[0].probability < 0.01


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 257}, "questions"),
        ({"questions": [{"type": "essay", "instructions": "x"}]}, "questions[0]"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}]}]}, "questions[0].choices"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}] * 2}]}, "questions[0].choices"),
        ({"questions": [SCORE | {"levels": [{"label": "a"}] * 11}]}, "questions[0].levels"),
        (
            {"questions": [CHOICE | {"choices": [{"value": str(n)} for n in range(99)]}]},
            "questions",
        ),
        ({"input": []}, "input"),
        ({"input": "a" * 2000}, "input"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [3]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        (
            {"questions": [PREDICATE, PREDICATE | {"instructions": [{"type": "input_text"}]}]},
            "questions[1].instructions[0].text",
        ),
    ],
)
async def test_what_is_wrong_is_named(serve, change, param):
    server = await serve(runner=Weighing())
    reply = await server.post("/v1/decisions", REQUEST | change)
    assert reply.status == 400
    assert (reply.error["param"] or "").startswith(param)
    server.assert_idle()


async def test_one_that_cannot_be_computed_fails_the_request_and_frees_the_rest(serve):
    fake = Weighing()
    fake.errors[1] = "the model computed logits that are not numbers (NaN)"
    server = await serve(runner=fake)
    reply = await server.post("/v1/decisions", REQUEST)
    assert (reply.status, reply.error["code"]) == (500, "generation_failed")
    await server.until(lambda: server.idle)


@pytest.mark.slow
@needs_model
def test_the_embedded_model_gives_what_plain_torch_gives():
    config = EngineConfig()
    tokenizer = load_tokenizer(open_checkpoint(config, silent))
    assert len(letters(tokenizer)) == 255
    with running("--kv-cache-memory", "64MiB", "--kernels", "cpu") as process:
        url = process.wait_for("listening")["url"]
        process.wait_for("ready")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answers = client.decisions.create(model=MODEL, **REQUEST).answers
    told = [[answers[0].probability, 1 - answers[0].probability]]
    told += [[each.probability for each in answer.probabilities] for answer in answers[1:]]
    for shares, expected in zip(told, reference_shares(config, tokenizer), strict=True):
        assert shares == pytest.approx(expected, abs=0.06)  # 8-bit activations


def reference_shares(config: EngineConfig, tokenizer: Tokenizer) -> list[list[float]]:
    """The same out of all logits, in float32: what the labels' spellings have of the softmax."""
    service = SimpleNamespace(
        tokenizer=tokenizer,
        chat=load_chat(tokenizer),
        max_model_len=8192,
        prepare=lambda job: job,
    )
    asked = prepare(DecisionRequest.model_validate(REQUEST), service, 20)
    torch.set_num_threads(1)
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    model = load_model(open_checkpoint(config, silent), config, ops, silent)
    run = PagedSequences(model, capacity=1024, block=16)
    prompts = {number: list(job.prompt) for number, job in enumerate(asked.jobs)}
    found = []
    for p_V, of in zip(run.step(prompts, every_row=False).softmax(-1), asked.labels, strict=True):
        shares = torch.stack([p_V[list(label.ids)].sum() for label in of])
        found.append((shares / shares.sum()).tolist())
    return found
