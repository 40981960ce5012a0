"""Sampling parameters that cannot be drawn with are refused, by the name of their field."""

import math

import numpy as np
import pytest

from ruvon.engine.types import SamplingParams
from ruvon.engine.validation import check_length, check_sampling, normalize
from ruvon.errors import ContextLengthError, RequestError

VOCAB = 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("typical_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("min_tokens", -1),
        ("min_tokens", 17),  # max_tokens are 16
        ("logprobs", -1),
        ("prompt_logprobs", -2),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {3: math.inf}),
        ("allowed_token_ids", (-1,)),
        ("allowed_token_ids", ()),
        ("stop_token_ids", (VOCAB,)),
        ("bad_words", ((1, 2), ())),
        ("bad_words", ((1, VOCAB),)),
        ("temperature", "0.7"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", 50.0),
        ("repetition_penalty", "1"),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("min_tokens", None),
        ("seed", 0.5),
        ("logprobs", "all"),
    ],
)
def test_each_field_has_its_bounds(field, value):
    with pytest.raises(RequestError, match=r"\w") as caught:
        check_sampling(SamplingParams(**{field: value}), VOCAB)
    assert caught.value.param == field
    assert caught.value.status == 400


def test_what_is_within_bounds_passes():
    check_sampling(SamplingParams(), VOCAB)
    check_sampling(SamplingParams(max_tokens=None, temperature=np.float32(0.5)), VOCAB)
    check_sampling(SamplingParams(top_k=np.int64(3), temperature=1), VOCAB)
    check_sampling(
        SamplingParams(
            temperature=0,
            top_k=5,
            top_p=0.0,
            min_p=1,
            typical_p=0.5,
            repetition_penalty=0.5,
            presence_penalty=-2,
            frequency_penalty=2,
            logit_bias={0: -100.0, VOCAB - 1: 100.0},
            allowed_token_ids=(0, VOCAB - 1),
            bad_words=((1, 2), (3,)),
            seed=-(10**400),
            stop_token_ids=(7,),
            logprobs=0,
            prompt_logprobs=20,
        ),
        VOCAB,
    )


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(top_p=0),
        SamplingParams(top_p=0.0, temperature=1.5, top_k=4),
        SamplingParams(top_p=1e-46),  # 0 in float32, of which a GPU would draw for ever
        SamplingParams(temperature=1e-39),  # whose reciprocal is infinite there
        SamplingParams(temperature=5e-324),
        SamplingParams(temperature=0, top_p=0.5),
    ],
)
def test_what_leaves_the_likeliest_token_only_is_greedy(sampling):
    check_sampling(sampling, VOCAB)
    assert normalize(sampling).temperature == 0


def test_a_prompt_leaves_room_for_one_token_at_least():
    check_length(9, None, 10, "messages")
    check_length(9, 1, 10, "messages")
    check_length(10, 0, 10, "messages")
    with pytest.raises(ContextLengthError, match=r"length is 10 tokens.* 10 tokens") as caught:
        check_length(10, None, 10, "messages")
    assert caught.value.too_many == (10, 9)
    with pytest.raises(ContextLengthError, match=r"11 tokens \(9 in the messages, 2 in the"):
        check_length(9, 2, 10, "messages")


def test_what_leaves_more_stays_as_it_is():
    for sampling in (SamplingParams(), SamplingParams(temperature=1e-37, top_p=1e-30)):
        assert normalize(sampling) is sampling
