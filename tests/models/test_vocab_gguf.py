"""GGUF vocabularies against plain-Python tokenizing by llama.cpp's rules."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import (
    DONE,
    END,
    START,
    ByteLevelReference,
    mixed_strings,
    sentencepiece_reference,
    trained,
    trained_json,
)
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from ruvon.config import EngineConfig
from ruvon.errors import LoadError
from ruvon.models.checkpoint import Checkpoint, open_checkpoint
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.models.vocab_gguf import read_gguf_vocab
from ruvon.telemetry import silent

PATH = Path("model.gguf")

# As llama.cpp writes them, which has no \p{Lu} and no (?i:...)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORDS = rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REFERENCE = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"],
    "dbrx": [rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"],
    "qwen2": [rf"{WORDS}|\p{{N}}|{REST}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REFERENCE |= {  # from the models' own tokenizer.json
    "tekken": [rf"{BEFORE}{UPPER}*{LOWER}+|{BEFORE}{UPPER}+{LOWER}*|\p{{N}}|{CASED_REST}"],
    "gpt-4o": [
        rf"{BEFORE}{UPPER}*{LOWER}+{ENGLISH}?|{BEFORE}{UPPER}+{LOWER}*{ENGLISH}?"
        rf"|\p{{N}}{{1,3}}|{CASED_REST}"
    ],
    "qwen35": [
        rf"{ENGLISH}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


@cache
def model() -> dict[str, Any]:
    return json.loads(trained_json())["model"]


def metadata(**extra: Any) -> dict[str, Any]:
    """GGUF metadata of the trained vocabulary; ``pre="x"`` sets tokenizer.ggml.pre."""
    tokens = [*sorted(model()["vocab"], key=model()["vocab"].get), START, "<think>"]
    kinds = [3 if token in (START, END, DONE) else 1 for token in tokens[:-1]]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [*kinds, 4],
        "merges": [f"{left} {right}" for left, right in model()["merges"]],
        "bos_token_id": tokens.index(START),
        "eos_token_id": tokens.index(END),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | extra).items()}


def build(fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer(read_gguf_vocab(PATH, fields))


@cache
def default() -> tuple[Checkpoint, Tokenizer]:
    checkpoint = open_checkpoint(EngineConfig(), silent)
    return checkpoint, load_tokenizer(checkpoint)


@pytest.mark.parametrize("pre", REFERENCE)
def test_every_way_of_splitting_equals_the_reference(pre):
    merges = [tuple(merge) for merge in model()["merges"]]
    whole = pre in ("llama-bpe", "tekken")
    reference = ByteLevelReference(model()["vocab"], merges, REFERENCE[pre], whole)
    tokenizer = build(metadata(pre=pre, add_bos_token=False))
    for text in mixed_strings(400, seed=10):
        text = text.replace("<think>", "")  # user-defined: found before any splitting
        assert tokenizer.encode(text) == reference.encode(text), repr(text)


def test_the_default_model_equals_the_reference():
    checkpoint, tokenizer = default()
    tokens = checkpoint.config["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in checkpoint.config["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(tokens)}
    reference = ByteLevelReference(vocab, merges, REFERENCE["smollm"])
    for text in mixed_strings(1500, seed=11):
        assert tokenizer.encode(text) == reference.encode(text), repr(text)


def test_the_default_model_equals_transformers():
    checkpoint, tokenizer = default()
    path = checkpoint.path
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # It knows no "smollm" and would leave numbers together, which the model's authors do not.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in mixed_strings(1000, seed=12):
        assert tokenizer.encode(text, parse_special=True) == theirs.encode(text), repr(text)
        assert tokenizer.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert (tokenizer.bos_id, tokenizer.eos_ids[0]) == (theirs.bos_token_id, theirs.eos_token_id)
    texts = [tokenizer.token_text(id) for id in tokenizer.eos_ids]
    assert texts == ["<|im_end|>", "<|endoftext|>", "<reponame>"]  # as llama.cpp lists them


def test_a_gguf_vocabulary_equals_the_folder_it_came_from():
    tokenizer, folder = build(metadata()), trained()
    for text in mixed_strings(300, seed=13):
        for parse in (False, True):
            expected = folder.encode(text, parse_special=parse)
            assert tokenizer.encode(text, parse_special=parse) == expected, repr(text)
        assert tokenizer.decode(expected) == folder.decode(expected)
    assert tokenizer.special_ids == folder.special_ids
    assert tokenizer.vocab_size == folder.vocab_size


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("dbrx", False)])
def test_words_that_are_tokens_are_taken_whole_where_the_model_does_so(pre, whole):
    fields = metadata(pre=pre, add_bos_token=False)
    fields["tokenizer.ggml.tokens"].append("zqzq")  # no merges lead to it
    fields["tokenizer.ggml.token_type"].append(1)
    assert (len(build(fields).encode("zqzq")) == 1) == whole


@pytest.mark.parametrize(
    ("pre", "stated", "added"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_whether_bos_is_added(pre, stated, added):
    extra = {} if stated is None else {"add_bos_token": stated}
    tokenizer = build(metadata(pre=pre, **extra))
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) == added
    assert tokenizer.encode("a", add_special_tokens=False)[0] != tokenizer.bos_id


def test_eos_is_added_only_when_stated():
    tokenizer = build(metadata(add_eos_token=True))
    assert tokenizer.encode("a")[1:] == [tokenizer.eos_ids[0]]


def test_all_ends_that_keys_name_are_known():
    tokenizer = build(metadata(eot_token_id=5, eom_token_id=6, fim_pad_token_id=7))
    assert tokenizer.eos_ids[1:4] == (5, 6, 7)


def with_token(text: str, kind: int = 3) -> Tokenizer:
    fields = metadata()
    fields["tokenizer.ggml.tokens"].append(text)
    fields["tokenizer.ggml.token_type"].append(kind)
    return build(fields)


@pytest.mark.parametrize(
    ("text", "kind", "ends"),
    [
        ("<|eot_id|>", 3, True),
        ("<end_of_turn>", 3, True),
        ("<|eom_id|>", 3, True),
        ("<|fim_pad|>", 3, True),
        ("<|eot_id|>", 4, True),  # whatever it is said to be
        ("<|eot_id|>", 1, True),
        ("</s>", 3, True),
        ("</s>", 1, False),
        ("<|tool|>", 3, False),
    ],
)
def test_ends_are_known_by_their_text_though_no_key_names_them(text, kind, ends):
    tokenizer = with_token(text, kind)
    id = tokenizer.vocab_size - 1
    assert (id in tokenizer.eos_ids) == ends
    assert (id in tokenizer.special_ids) == (ends or kind == 3)
    assert tokenizer.decode([id], skip_special_tokens=False) == text


def test_the_end_of_a_message_in_harmony_ends_no_answer():
    fields = metadata()
    fields["tokenizer.ggml.tokens"] += ["<|return|>", "<|call|>", "<|end|>"]
    fields["tokenizer.ggml.token_type"] += [3, 3, 3]
    last = len(fields["tokenizer.ggml.tokens"]) - 1
    ends = set(build(fields).eos_ids)
    assert {last - 1, last - 2} <= ends
    assert last not in ends


def test_unknown_is_special():
    tokenizer = with_token("<unk>", 2)
    assert tokenizer.vocab_size - 1 in tokenizer.special_ids


@pytest.mark.parametrize(
    ("change", "event"),
    [
        ({"merges": ["zz zz"]}, "merges_left_out"),
        ({"merges": ["zz"]}, "merges_left_out"),
        ({"merges": ["Ġ \x00"]}, "merges_left_out"),
        ({"pre": None}, "no_pre_tokenizer"),
        ({"bos_token_id": 99999, "add_bos_token": False}, "no_such_token"),
        ({"eot_token_id": 99999}, "no_such_token"),
    ],
)
def test_what_llama_cpp_reads_past_is_read_past_with_a_warning(change, event):
    fields = metadata(**change)
    fields = {key: value for key, value in fields.items() if value is not None}
    with structlog.testing.capture_logs() as logs:
        tokenizer = build(fields)
    assert [entry["event"] for entry in logs] == [event]
    assert max(tokenizer.eos_ids) < tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("hé 1")) == "hé 1"


def test_merges_that_lead_nowhere_change_no_other():
    odd = ["zz zz", "zz", "h zz"]
    texts = mixed_strings(50, seed=14)
    fields = metadata()
    fields["tokenizer.ggml.merges"] = odd + fields["tokenizer.ggml.merges"] + odd
    odder, plain = build(fields), build(metadata())
    assert [odder.encode(text) for text in texts] == [plain.encode(text) for text in texts]


def test_no_types_are_ordinary_ones():
    fields = metadata()
    del fields["tokenizer.ggml.token_type"]
    tokenizer = build(fields)
    assert {tokenizer.token_text(id) for id in tokenizer.special_ids} == {END, DONE}  # by text
    assert tokenizer.encode("a b") == build(metadata()).encode("a b")


def test_chat_templates():
    key = "tokenizer.chat_template"
    fields = metadata() | {key: "one", f"{key}.tool_use": "two"}
    assert build(fields).chat_templates == {"default": "one", "tool_use": "two"}
    assert build(metadata()).chat_template is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "martian"}, r"model\.gguf: tokenizer\.ggml\.pre 'martian'"),
        ({"model": "bert"}, r"model\.gguf: tokenizer\.ggml\.model 'bert'"),
        ({"token_type": [1, 1]}, r"model\.gguf: tokenizer\.ggml\.token_type: 2 for 702 tokens"),
        ({"tokens": ["a", "b", "a"]}, r"model\.gguf: tokenizer\.ggml\.tokens: 'a' is both 0 and 2"),
        ({"tokens": 7}, r"model\.gguf: "),
        ({"eos_token_id": "</s>"}, r"model\.gguf: "),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but there is no"),
        ({"bos_token_id": 99999, "add_bos_token": True}, "add_bos_token is true, but there is no"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(LoadError, match=message):
        build(metadata(**change))


def test_a_missing_key_is_named():
    fields = metadata()
    del fields["tokenizer.ggml.merges"]
    with pytest.raises(LoadError, match=r"tokenizer\.ggml\.merges"):
        build(fields)


# SentencePiece


def test_sentencepiece_ids_that_are_none_are_the_usual_ones():
    tokenizer = sentencepiece({"a": 0.0}, bos_token_id=9999, eos_token_id=9999)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("a")[0] == 1


def sentencepiece(score: dict[str, float], **extra: Any) -> Tokenizer:
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*specials, *bytes_, *score]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(score.values()),
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(score),
        **extra,
    }
    return build({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


def random_pieces(seed: int) -> dict[str, float]:
    """Pieces over ▁abc, each the join of two others, with scores in no order of length."""
    draw = random.Random(seed)
    pieces = list("▁abc")
    while len(pieces) < 40:
        joined = draw.choice(pieces) + draw.choice(pieces)
        if len(joined) <= 6 and joined not in pieces:
            pieces.append(joined)
    ranks = draw.sample(range(len(pieces)), len(pieces))
    return {piece: -float(rank) for piece, rank in zip(pieces, ranks, strict=True)}


@settings(deadline=None)
@given(st.integers(0, 50), st.text("abc ", min_size=1, max_size=20))
def test_sentencepiece_equals_the_reference(seed, text):
    score = random_pieces(seed)
    ids = sentencepiece(score, add_bos_token=False).encode(text)
    names = [list(score)[id - 259] for id in ids]
    assert names == sentencepiece_reference(score, "▁" + text.replace(" ", "▁"))


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = sentencepiece({"▁": 0.0, "a": 0.0, "▁a": -1.0})
    ids = tokenizer.encode("a🙂a")
    assert ids[0] == tokenizer.bos_id == 1
    assert [tokenizer.token_bytes(id) for id in ids[1:]] == [
        b" a", b"\xf0", b"\x9f", b"\x99", b"\x82", b"a",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "a🙂a"
    assert tokenizer.eos_ids == (2,)


def test_text_that_reads_like_a_byte_or_control_token_is_text():
    score = dict.fromkeys("▁<0xA>s/", 0.0) | {"<s": -1.0, "s>": -2.0, "</": -3.0}
    tokenizer = sentencepiece(score, add_space_prefix=False, add_bos_token=False)
    for text in ("<0xAA>", "<s>", "</s>"):
        ids = tokenizer.encode(text)
        assert len(ids) > 1
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("</s>", parse_special=True) == [2]


def test_the_space_prefix_comes_after_each_special_token():
    score = {"▁": 0.0, "a": 0.0, "▁a": -1.0}
    tokenizer = sentencepiece(score)
    assert [tokenizer.token_text(id) for id in tokenizer.encode("a</s>a", parse_special=True)] == [
        "<s>", " a", "</s>", " a",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    bare = sentencepiece(score, add_space_prefix=False)
    assert [bare.token_text(id) for id in bare.encode("a</s>a", parse_special=True)] == [
        "<s>", "a", "</s>", "a",
    ]  # fmt: skip
    assert bare.decode(bare.encode(" a")) == " a"
