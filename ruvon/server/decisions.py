"""``POST /v1/decisions``: typed questions about an input, answered with probabilities.

Nothing is generated. Each question becomes the end of a chat that asks for a label (Yes or No, a
letter, a digit), and the answer is read from what the model gives these labels as its next token,
scaled to add up to 1. A label is one token, so its probability is exact, and options of many words
compete on equal terms: they are in the prompt, and only their letters are scored. The questions
share the input's blocks in the prefix cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, product
from string import ascii_uppercase, digits
from typing import Annotated, Literal

from aiohttp import web
from pydantic import Field, model_validator

from ruvon.engine.types import Emission, Job, SamplingParams
from ruvon.errors import RequestError
from ruvon.models.formats.tools import Reasoning
from ruvon.models.tokenizer import Tokenizer
from ruvon.server.collect import collect
from ruvon.server.conversation import Conversation, prepare_conversation, without_effect
from ruvon.server.generation import ignored_header
from ruvon.server.middleware import FACTS, json_response
from ruvon.server.requests import read_request
from ruvon.server.responses_api.input import Contents, Items, ReferenceItem
from ruvon.server.responses_api.items import Transcript, text_of
from ruvon.server.schemas import Fields
from ruvon.server.schemas.base import Timeout
from ruvon.server.service_responses import Answered, DecisionAnswer
from ruvon.server.state import Service, service_of

MOST_QUESTIONS = 256  # as completions of one request
MOST_CHOICES = 255
MOST_LEVELS = len(digits)
NO_REASONING = Reasoning(enabled=False)


class Question(Fields):
    """What all questions have."""

    name: str | None = None
    instructions: Contents


class Predicate(Question):
    """How likely is it that a statement is true?"""

    type: Literal["predicate"]


class Option(Fields):
    """One of the options to choose from. A string and a boolean of equal text are two."""

    value: str | bool
    description: str | None = None


class Choice(Question):
    """Which of these is it?"""

    type: Literal["choice"]
    choices: Annotated[list[Option], Field(fail_fast=True, min_length=2, max_length=MOST_CHOICES)]


class Level(Fields):
    """One of the ordered levels of a scale."""

    label: str
    description: str | None = None


class Score(Question):
    """Where on this scale is it?"""

    type: Literal["score"]
    levels: Annotated[list[Level], Field(fail_fast=True, min_length=2, max_length=MOST_LEVELS)]


class DecisionRequest(Fields):
    """``POST /v1/decisions``."""

    model: str | None = None
    input: Annotated[Items, Field(min_length=1)]
    questions: Annotated[
        list[Annotated[Predicate | Choice | Score, Field(discriminator="type")]],
        Field(fail_fast=True, min_length=1, max_length=MOST_QUESTIONS),
    ]
    timeout: Timeout | None = None

    @model_validator(mode="after")
    def _check_choices(self) -> DecisionRequest:
        for n, question in enumerate(self.questions):
            if isinstance(question, Choice):
                values = [(type(option.value), option.value) for option in question.choices]
                if len(set(values)) < len(values):
                    raise RequestError("Choices must be unique.", f"questions[{n}].choices")
        return self


# ------------------------------------------------------------------------------------ labels


@dataclass(frozen=True, slots=True)
class Label:
    """What stands for an option in the model's mouth, and the tokens that spell it, each alone."""

    text: str
    ids: tuple[int, ...]


@lru_cache(maxsize=4)
def letters(tokenizer: Tokenizer) -> tuple[Label, ...]:
    """A, B, C … and then those of AA, AB … that are single tokens: at most `MOST_CHOICES`."""
    texts = (*ascii_uppercase, *map("".join, product(ascii_uppercase, repeat=2)))
    found = (label for text in texts if (label := spell(tokenizer, text, f" {text}")).ids)
    return tuple(islice(found, MOST_CHOICES))


@lru_cache(maxsize=4)
def numbers(tokenizer: Tokenizer) -> tuple[Label, ...]:
    """The digits."""
    return tuple(spell(tokenizer, digit, f" {digit}") for digit in digits)


@lru_cache(maxsize=4)
def yes_and_no(tokenizer: Tokenizer) -> tuple[Label, ...]:
    """The two words, or what they begin with where they are no single tokens."""
    return tuple(
        label if label.ids else Label(word, (tokenizer.encode(word, add_special_tokens=False)[0],))
        for word in ("Yes", "No")
        for label in [spell(tokenizer, word, f" {word}", word.lower(), f" {word.lower()}")]
    )


def spell(tokenizer: Tokenizer, text: str, *others: str) -> Label:
    """A label, with those of its spellings that are one token: which of them a model prefers at
    the beginning of its answer depends on its template."""
    encoded = [tokenizer.encode(each, add_special_tokens=False) for each in (text, *others)]
    return Label(text, tuple(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1)))


def labels_of(question: Question, tokenizer: Tokenizer) -> tuple[Label, ...]:
    """A label for each option. Raises RequestError if the vocabulary has too few."""
    wanted, found = 2, yes_and_no(tokenizer)
    if isinstance(question, Choice):
        wanted, found = len(question.choices), letters(tokenizer)
    elif isinstance(question, Score):
        wanted, found = len(question.levels), numbers(tokenizer)
    labels = found[:wanted]
    ids = [id for label in labels for id in label.ids]
    if len(labels) < wanted or not all(label.ids for label in labels) or len(set(ids)) < len(ids):
        raise RequestError(
            f"This model's vocabulary lacks labels of one token for {wanted} options.",
            "questions",
            "unsupported_value",
        )
    return labels


# ----------------------------------------------------------------------------------- prompts


def ask(question: Question, labels: Sequence[Label], where: str) -> str:
    """The question in words. ``where`` is its place in the request."""
    said = text_of(question.instructions, f"{where}.instructions")
    if isinstance(question, Choice):
        options = [(said_value(each.value), each.description) for each in question.choices]
        rest = f"{listed(options, labels)}\n\nAnswer only with the letter of the best choice."
    elif isinstance(question, Score):
        levels = [(level.label, level.description) for level in question.levels]
        rest = f"{listed(levels, labels)}\n\nAnswer only with the number of the best level."
    else:
        rest = "Is this true? Answer only with Yes or No."
    return f"{said}\n\n{rest}"


def listed(options: Sequence[tuple[str, str | None]], labels: Sequence[Label]) -> str:
    return "\n".join(
        f"{label.text}: {name}" + (f" - {description}" if description else "")
        for label, (name, description) in zip(labels, options, strict=True)
    )


def said_value(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def transcribe(request: DecisionRequest) -> Transcript:
    """The input as messages, the last of which is a user's, for the question to follow in it: many
    templates want turns to alternate."""
    transcript = Transcript(None)
    for n, item in enumerate(request.input):
        if isinstance(item, ReferenceItem):
            raise RequestError(
                "Stored items cannot be referred to here.", f"input[{n}]", "unsupported_value"
            )
        transcript.add(item, f"input[{n}]")
    if not transcript.messages or transcript.messages[-1]["role"] != "user":
        transcript.messages.append({"role": "user", "content": ""})
    return transcript


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions, understood: a job and the labels of each, and what of the input means nothing."""

    jobs: list[Job]
    labels: list[tuple[Label, ...]]
    skipped: list[str]


def prepare(request: DecisionRequest, service: Service, max_logprobs: int) -> Asked:
    """Raises RequestError for all that can be wrong."""
    transcript = transcribe(request)
    *before, last = transcript.messages
    labels = [labels_of(question, service.tokenizer) for question in request.questions]
    jobs = []
    for n, (question, of) in enumerate(zip(request.questions, labels, strict=True)):
        text = ask(question, of, f"questions[{n}]")
        asked = {"role": "user", "content": f"{last['content']}\n\n{text}".lstrip("\n")}
        conversation = Conversation([*before, asked], reasoning=NO_REASONING, param="input")
        jobs.append(prepare_conversation(conversation, read_only(of), service)[0])
    return Asked(jobs, labels, transcript.skipped)


def read_only(labels: Sequence[Label]) -> SamplingParams:
    """One token, for the sake of the labels' probabilities."""
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        ignore_eos=True,
        logprobs=0,
        logprob_token_ids=tuple(id for label in labels for id in label.ids),
    )


# ----------------------------------------------------------------------------------- answers


async def decisions(http: web.Request) -> web.Response:
    """Answer questions about an input."""
    service = service_of(http)
    request, ignored, asked = await read_request(http, DecisionRequest, prepare, always_aside=True)
    ignored = without_effect(http, ignored, asked.skipped)
    emissions, num_output = await collect(http, service, asked.jobs), len(asked.jobs)
    answers = [
        answer(question, shares(emission, of))
        for question, emission, of in zip(request.questions, emissions, asked.labels, strict=True)
    ]
    num_input = sum(len(job.prompt) for job in asked.jobs)
    num_cached = sum(emission.num_cached for emission in emissions)
    http[FACTS].update(prompt_tokens=num_input, cached_tokens=num_cached, output_tokens=num_output)
    body: Answered = {
        "model": request.model or service.names[0],
        "answers": answers,
        "usage": {
            "input_tokens": num_input,
            "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        },
    }
    return json_response(body, headers=ignored_header(ignored))


def shares(emission: Emission, labels: Sequence[Label]) -> list[float]:
    """The labels' probabilities, given that it is one of them."""
    (entry,) = emission.logprobs or ()
    logprobs: Mapping[int, float] = dict(entry.top)
    best = max(logprobs.values())  # so that what is unlikely as a whole does not vanish
    weights = [sum(math.exp(logprobs[id] - best) for id in label.ids) for label in labels]
    return [weight / sum(weights) for weight in weights]


def answer(question: Question, shares: Sequence[float]) -> DecisionAnswer:
    """One answer, out of the probabilities of the question's options."""
    if isinstance(question, Choice):
        values = [option.value for option in question.choices]
        return {
            "type": "choice",
            "name": question.name,
            "choice": values[shares.index(max(shares))],
            "confidence": max(shares),
            "probabilities": [
                {"value": value, "probability": share}
                for value, share in zip(values, shares, strict=True)
            ],
        }
    if isinstance(question, Score):
        return {
            "type": "score",
            "name": question.name,
            "score": sum(value * share for value, share in enumerate(shares)),
            "confidence": max(shares),
            "probabilities": [
                {"label": level.label, "value": value, "probability": share}
                for value, (level, share) in enumerate(zip(question.levels, shares, strict=True))
            ],
        }
    return {"type": "predicate", "name": question.name, "probability": shares[0]}
