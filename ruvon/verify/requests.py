"""The requests that `ruvon verify` asks, of all kinds, the same ones every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from ruvon.engine.types import Job, SamplingParams
from ruvon.models.tokenizer import Tokenizer

TEXT = """\
A language model reads a text and says, for every word it knows, how likely that word comes next. \
To write, it draws one, adds it to the text, and reads on. A server does this for many people at \
once. Their texts have nothing to do with each other, but they share the machine: in one step the \
model reads the last word of thirty conversations and the first hundred words of a new one. What \
anybody gets must not depend on who else was there. That is harder than it sounds, for computers \
do not add exactly. The sum of a thousand small numbers comes out a little different when they are \
added in another order, and fast programs choose the order that suits the size of the batch. Most \
of the time nobody notices. But when two words are almost equally likely, the last digit decides \
between them, and from there on the two stories part. So the order is fixed here: each row of a \
matrix is summed by itself, from left to right in pieces of the same size, whether it came alone \
or with a crowd. Threads share out the rows, never the sums. A prompt may be read at a stroke, or \
in slices between other people's words; its beginning may be remembered from a minute ago; it may \
be put aside when memory is short and read again later. The answer stays the same, letter for \
letter, and so do the odds that the model gave to every letter. This program is the proof: it asks \
the same questions in every one of these ways, and compares."""


Requests: TypeAlias = Mapping[int, Job]
"""By number, from 0."""


FEWEST = 8  # requests that make every case happen: two of them outgrow their block


def make_jobs(tokenizer: Tokenizer, number: int, tokens: int, room: int, block: int) -> Requests:
    """Requests of all kinds, the same ones every time: prompts from one token to ``room``, at the
    edges of blocks too, some with a common beginning; answers of half, once and thrice ``tokens``.
    One that `outgrows` fills a block but for one token, so that its answer needs another.
    """
    ids = tokenizer.encode(TEXT)
    lengths = (1, 100, block, 3 * block - 2, room, block + 1, 7, 200, 50, 150, 33)
    jobs = {}
    for i in range(number):
        length = block - 1 if outgrows(i) else lengths[i % len(lengths)]
        output = tokens if outgrows(i) else (max(tokens // 2, 1), tokens, 3 * tokens)[i % 3]
        start = 0 if i % 3 == 1 else 13 * i % len(ids)
        text = ids[start:] + ids * (room // len(ids) + 1)
        prompt = tuple(text[: min(max(length, 1), room)])
        jobs[i] = Job(prompt, make_sampling(i, output), priority=7 * i % 5)
    return jobs


def outgrows(number: int) -> bool:
    """Whether this request begins in one block and soon needs another; one in five does."""
    return number % 5 == 2


def make_sampling(i: int, max_tokens: int) -> SamplingParams:
    """Greedy with and without logprobs, drawn with filters and with penalties, in turn."""
    common = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i)
    match i % 4:
        case 0:
            return replace(common, temperature=0.0)
        case 1:
            return replace(common, temperature=0.0, logprobs=5, prompt_logprobs=1)
        case 2:
            return replace(common, temperature=0.8, top_p=0.95, logprobs=3)
        case _:
            drawn = replace(common, temperature=1.2, top_k=50, logprobs=0)
            return replace(drawn, repetition_penalty=1.2, presence_penalty=0.3)
