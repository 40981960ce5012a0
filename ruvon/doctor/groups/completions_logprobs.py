"""Log-probabilities of completions: parallel lists, and where each token begins."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import complete, post_completion, refusal
from ruvon.doctor.check import collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.probe import Probe

PROMPT = "Once upon a time"
SCORED = {"echo": True, "max_tokens": 0, "logprobs": 1}
LISTS = {
    "tokens": [str],
    "token_logprobs": [(float, None)],
    "top_logprobs": [(dict, None)],
    "text_offset": [int],
}


async def _choice(probe: Probe, **fields: Any) -> Any:
    return (await complete(probe, **fields))["choices"][0]


async def shape(probe: Probe) -> None:
    """tokens, token_logprobs, top_logprobs and text_offset are lists."""
    expect_shape(await _choice(probe, logprobs=2), {"logprobs": LISTS})


async def parallel(probe: Probe) -> None:
    """They have an item for each token."""
    found = await complete(probe, logprobs=2)
    lists = found["choices"][0]["logprobs"]
    lengths = {len(lists[name]) for name in LISTS}
    expect_equal(lengths, {found["usage"]["completion_tokens"]}, "lengths")


async def finite(probe: Probe) -> None:
    """Every logprob is a finite number, at most 0."""
    lists = (await _choice(probe, logprobs=5))["logprobs"]
    values = [*lists["token_logprobs"], *(v for top in lists["top_logprobs"] for v in top.values())]
    expect_shape(values, [float], "logprobs")
    expect(max(values) <= 0, "at most 0", max(values))


async def tokens_are_the_text(probe: Probe) -> None:
    """The tokens put together are the text."""
    choice = await _choice(probe, logprobs=1)
    expect_equal("".join(choice["logprobs"]["tokens"]), choice["text"], "the tokens")


async def top_number(probe: Probe) -> None:
    """There are as many alternatives as asked for, or one more where the drawn one is another."""
    tops = (await _choice(probe, logprobs=3, temperature=1, seed=8))["logprobs"]["top_logprobs"]
    expect({len(top) for top in tops} <= {3, 4}, "3 or 4", [len(top) for top in tops])


async def top_has_the_token(probe: Probe) -> None:
    """The token is among them, with its logprob."""
    lists = (await _choice(probe, logprobs=2))["logprobs"]
    names = ("tokens", "token_logprobs", "top_logprobs")
    for token, logprob, top in zip(*(lists[name] for name in names), strict=True):
        expect(abs(top.get(token, 99) - logprob) < 1e-3, f"{token!r}: {logprob}", top)


async def zero(probe: Probe) -> None:
    """logprobs 0 tells those of the drawn tokens."""
    lists = (await _choice(probe, logprobs=0))["logprobs"]
    expect_shape(lists, {"tokens": [str], "token_logprobs": [float]}, "logprobs")


async def offsets(probe: Probe) -> None:
    """text_offset says where in the text each token begins."""
    choice = await _choice(probe, logprobs=1)
    lists, text = choice["logprobs"], choice["text"]
    first = lists["text_offset"][0]  # from the prompt's start in old engines, else from 0
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        expect(text.startswith(token, offset - first), f"{token!r} at {offset}", text)


async def echo_first_is_null(probe: Probe) -> None:
    """With echo the first token of the prompt has no logprob: null."""
    lists = (await _choice(probe, **SCORED))["logprobs"]
    first = lists["token_logprobs"][0], lists["top_logprobs"][0]
    expect_equal(first, (None, None), "the first token's")


async def echo_tokens(probe: Probe) -> None:
    """With echo the tokens put together are prompt and completion."""
    choice = await _choice(probe, echo=True, logprobs=1)
    expect_equal("".join(choice["logprobs"]["tokens"]), choice["text"], "the tokens")


async def echo_offsets(probe: Probe) -> None:
    """With echo offsets begin at 0 with the prompt."""
    lists = (await _choice(probe, **SCORED))["logprobs"]
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        expect(PROMPT.startswith(token, offset), f"{token!r} at {offset}", PROMPT)


async def echo_finite(probe: Probe) -> None:
    """Every other token of the prompt has a finite one."""
    lists = (await _choice(probe, **SCORED))["logprobs"]
    expect_shape(lists["token_logprobs"][1:], [float], "token_logprobs")


async def score_agrees(probe: Probe) -> None:
    """A text that was generated, scored as a prompt, has the same logprobs."""
    first = await _choice(probe, logprobs=1)
    made = first["logprobs"]
    whole = PROMPT + first["text"]
    scored = (await _choice(probe, **{**SCORED, "prompt": whole}))["logprobs"]
    number = len(made["tokens"])
    if scored["tokens"][-number:] != made["tokens"]:
        return  # the text is cut into other tokens when it is read as a whole
    pairs = zip(scored["token_logprobs"][-number:], made["token_logprobs"], strict=True)
    worst = max(abs(one - other) for one, other in pairs)
    expect(worst < 0.1, "a difference below 0.1", worst)


async def too_many(probe: Probe) -> None:
    """Too many are a 400 that names the field."""
    refusal(await post_completion(probe, logprobs=100_000), names="logprobs")


async def not_a_flag(probe: Probe) -> None:
    """true is not a number of alternatives."""
    refusal(await post_completion(probe, logprobs="many"), names="logprobs")


CHECKS = collect("completions.logprobs", globals())
