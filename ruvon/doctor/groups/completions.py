"""Completions, not streamed."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import answer, complete, post_completion, refusal
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Skipped, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.chat import USAGE
from ruvon.doctor.probe import Probe

PROMPTS = ["Once upon a time", "The sea is", "1 2 3 4"]


async def _choice(probe: Probe, **fields: Any) -> Any:
    return (await complete(probe, **fields))["choices"][0]


async def _ids(probe: Probe) -> list[int]:
    """The ids of the usual prompt."""
    body = {"model": probe.model, "prompt": "Once upon a time"}
    reply = await probe.post("/tokenize", body)
    if reply.status != 200 or not reply.json.get("tokens"):
        raise Skipped(f"POST /tokenize gives no ids of a prompt ({reply.status})")
    tokens: list[int] = reply.json["tokens"]
    return tokens


async def object(probe: Probe) -> None:
    """`object` is text_completion."""
    expect_shape(await complete(probe), {"object": "text_completion"})


async def fields(probe: Probe) -> None:
    """The answer has id, created, model, choices and usage."""
    shape = {"id": not_empty, "created": int, "model": probe.model, "usage": USAGE}
    expect_shape(await complete(probe), shape)


async def id_prefix(probe: Probe) -> None:
    """`id` begins with cmpl-."""
    found = (await complete(probe))["id"]
    expect(found.startswith("cmpl-"), "cmpl-…", found)


async def choice(probe: Probe) -> None:
    """A choice has text, index, finish_reason and logprobs, which are null."""
    shape = {"text": str, "index": 0, "finish_reason": ("stop", "length"), "logprobs": None}
    expect_shape(await _choice(probe), shape)


async def usage_adds_up(probe: Probe) -> None:
    """total_tokens is the sum of the others."""
    found = (await complete(probe))["usage"]
    total = found["prompt_tokens"] + found["completion_tokens"]
    expect_equal(found["total_tokens"], total, "total_tokens")


async def max_tokens(probe: Probe) -> None:
    """max_tokens is honoured, and the finish_reason then is length."""
    found = await complete(probe)
    expect_equal(found["usage"]["completion_tokens"], 8, "completion_tokens")
    expect_equal(found["choices"][0]["finish_reason"], "length", "finish_reason")


async def max_tokens_default(probe: Probe) -> None:
    """Without max_tokens there are 16."""
    found = await complete(probe, max_tokens=None)
    expect(found["usage"]["completion_tokens"] <= 16, "16 tokens at most", found["usage"])


async def greedy_repeats(probe: Probe) -> None:
    """Temperature 0 twice is the same text."""
    first, second = await complete(probe), await complete(probe, again=1)
    expect_equal(second["choices"][0]["text"], first["choices"][0]["text"], "the second text")


async def seed_repeats(probe: Probe) -> None:
    """The same seed at temperature 1 is the same text."""
    fields = {"seed": 99, "temperature": 1}
    first, second = [await complete(probe, again, **fields) for again in range(2)]
    expect_equal(second["choices"][0]["text"], first["choices"][0]["text"], "the second text")


async def several_prompts(probe: Probe) -> None:
    """A list of prompts gives a choice for each, in order."""
    found = await complete(probe, prompt=PROMPTS)
    expect_equal([choice["index"] for choice in found["choices"]], [0, 1, 2], "indices")


async def several_prompts_as_one(probe: Probe) -> None:
    """Each is answered as if it were alone."""
    together = await complete(probe, prompt=PROMPTS)
    alone = [(await _choice(probe, prompt=prompt))["text"] for prompt in PROMPTS]
    expect_equal([choice["text"] for choice in together["choices"]], alone, "the texts")


async def several_prompts_usage(probe: Probe) -> None:
    """usage counts all prompts."""
    together = (await complete(probe, prompt=PROMPTS))["usage"]["prompt_tokens"]
    alone = [(await complete(probe, prompt=prompt))["usage"]["prompt_tokens"] for prompt in PROMPTS]
    expect_equal(together, sum(alone), "prompt_tokens")


async def n(probe: Probe) -> None:
    """With n and several prompts, the choices of a prompt are side by side."""
    found = await complete(probe, prompt=PROMPTS[:2], n=2, logprobs=1)
    texts = [choice["text"] for choice in found["choices"]]
    expect_equal([choice["index"] for choice in found["choices"]], [0, 1, 2, 3], "indices")
    expect_equal((texts[0], texts[2]), (texts[1], texts[3]), "greedy texts of equal prompts")


async def token_prompt(probe: Probe) -> None:
    """A prompt may be token ids; those of a text give the same answer."""
    ids = await _ids(probe)
    expect_equal((await _choice(probe, prompt=ids))["text"], (await _choice(probe))["text"], "text")


async def token_prompts(probe: Probe) -> None:
    """A prompt may be several lists of ids."""
    ids = await _ids(probe)
    found = await complete(probe, prompt=[ids, ids])
    expect_equal([choice["index"] for choice in found["choices"]], [0, 1], "indices")


async def echo(probe: Probe) -> None:
    """echo puts the prompt before the completion."""
    plain, echoed = await _choice(probe), await _choice(probe, echo=True)
    expect_equal(echoed["text"], "Once upon a time" + plain["text"], "the text")


async def echo_alone(probe: Probe) -> None:
    """echo with max_tokens 0 gives the prompt and nothing else."""
    found = await complete(probe, echo=True, max_tokens=0)
    expect_equal(found["choices"][0]["text"], "Once upon a time", "the text")
    expect_equal(found["usage"]["completion_tokens"], 0, "completion_tokens")


async def stop(probe: Probe) -> None:
    """A stop string ends the text before it, also where it spans tokens."""
    text = (await _choice(probe, max_tokens=16))["text"]
    if len(text) < 16:
        raise Skipped(f"the model says too little to stop it: {text!r}")
    found = await _choice(probe, max_tokens=16, stop=[text[5:12]])
    expect_equal(found["text"], text[: text.index(text[5:12])], "the text")
    expect_equal(found["finish_reason"], "stop", "finish_reason")


async def suffix(probe: Probe) -> None:
    """suffix is honoured or refused by name, not passed over."""
    reply = await post_completion(probe, suffix="The end.")
    if reply.status == 200:
        plain = (await _choice(probe))["text"]
        changed = reply.json["choices"][0]["text"] != plain
        expect(changed, "another text than without suffix, or a 400", plain)
    else:
        refusal(reply, 400, 422, 501, names="suffix")


async def best_of(probe: Probe) -> None:
    """best_of draws several and gives n."""
    found = await complete(probe, n=1, best_of=2, temperature=1, seed=3)
    expect_equal(len(found["choices"]), 1, "choices")


async def best_of_counts(probe: Probe) -> None:
    """All of them count in usage."""
    fields: Any = {"n": 1, "best_of": 2, "temperature": 1, "seed": 3, "logit_bias": {}}
    found = await complete(probe, **fields)
    expect(found["usage"]["completion_tokens"] > 8, "more than of one", found["usage"])


async def best_of_below_n(probe: Probe) -> None:
    """best_of less than n is a 400 that names it."""
    refusal(await post_completion(probe, n=3, best_of=2), names="best_of")


async def empty_prompt(probe: Probe) -> None:
    """An empty prompt is continued or refused; it is no server error."""
    reply = await post_completion(probe, prompt="")
    if reply.status != 400:
        expect_shape(answer(reply), {"choices": [{"text": str}]})


async def empty_list(probe: Probe) -> None:
    """An empty list of prompts is a 400."""
    refusal(await post_completion(probe, prompt=[]), names="prompt")


async def mixed_list(probe: Probe) -> None:
    """A list of neither strings nor ids is a 400."""
    refusal(await post_completion(probe, prompt=[{"text": "a"}]), names="prompt")


async def id_out_of_range(probe: Probe) -> None:
    """A token id that the model does not have is a 400."""
    refusal(await post_completion(probe, prompt=[1, 2, 10**9]), names="prompt")


async def negative_id(probe: Probe) -> None:
    """A token id below 0 is a 400."""
    refusal(await post_completion(probe, prompt=[1, -5]), names="prompt")


@optional
async def return_token_ids(probe: Probe) -> None:
    """return_token_ids tells the ids of prompt and completion."""
    found = await complete(probe, return_token_ids=True)
    choice, usage = found["choices"][0], found["usage"]
    holder = choice if "prompt_token_ids" in choice else found
    expect_equal(len(choice["token_ids"]), usage["completion_tokens"], "token_ids")
    expect_equal(len(holder["prompt_token_ids"]), usage["prompt_tokens"], "prompt_token_ids")


@optional
async def extensions_accepted(probe: Probe) -> None:
    """top_k, min_p, repetition_penalty, min_tokens and ignore_eos are taken."""
    fields: Any = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1}
    await complete(probe, **fields, ignore_eos=True)


@optional
async def top_k_one_is_greedy(probe: Probe) -> None:
    """top_k 1 at temperature 1 is greedy."""
    narrow = await _choice(probe, temperature=1, top_k=1)
    expect_equal(narrow["text"], (await _choice(probe))["text"], "the text")


@optional
async def allowed_token_ids(probe: Probe) -> None:
    """allowed_token_ids leaves no other token."""
    found = await _choice(probe, allowed_token_ids=[65], logprobs=0, ignore_eos=True)
    expect_equal(len(set(found["logprobs"]["tokens"])), 1, "different tokens")


@optional
async def truncate_prompt_tokens(probe: Probe) -> None:
    """truncate_prompt_tokens keeps the last tokens of a prompt."""
    found = await complete(probe, prompt="a b c d e f g h", truncate_prompt_tokens=3)
    expect_equal(found["usage"]["prompt_tokens"], 3, "prompt_tokens")


CHECKS = collect("completions", globals())
