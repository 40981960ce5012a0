"""Added tokens from all the files that may know of them, against transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from texts import DONE, END, START, mixed_strings, trained_json
from tokenizers import AddedToken
from transformers import AutoTokenizer

from ruvon.errors import LoadError
from ruvon.models.vocab import Vocab, read_vocab

SIZE = 702  # of the trained vocabulary, in which the last two are added
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")


def write(folder: Path, config: dict[str, Any], /, **others: Any) -> Path:
    """tokenizer.json, tokenizer_config.json, and ``others`` by name."""
    (folder / "tokenizer.json").write_text(others.pop("tokenizer", trained_json()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in {"tokenizer_config": config, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_as_transformers(folder: Path) -> None:
    """But for one thing: what is named or listed as special is special, whatever its flags."""
    ours, theirs = read_vocab(folder, {}), AutoTokenizer.from_pretrained(folder)
    special = theirs.all_special_tokens
    assert flags(ours.backend) == flags(theirs.backend_tokenizer, special)
    assert all(token.special for token in added(ours).values() if token.content in special)
    assert ours.named_tokens.items() >= theirs.special_tokens_map.items()
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for text in mixed_strings(200, seed=20):
        assert ours.backend.encode(text).ids == theirs.encode(text), repr(text)


def added(vocab: Vocab) -> dict[int, AddedToken]:
    return vocab.backend.get_added_tokens_decoder()


def flags(backend: tokenizers.Tokenizer, special: Sequence[str] = ()) -> dict[int, dict[str, Any]]:
    """The flags of each added token, as if those were special."""
    tokens = backend.get_added_tokens_decoder()
    states = {id: token.__getstate__() for id, token in tokens.items()}
    return {
        id: {**state, "special": state["special"] or state["content"] in special}
        for id, state in states.items()
    }


def entry(draw: random.Random, content: str) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"content": content, **{name: draw.random() < 0.5 for name in names}}


def random_folder(folder: Path, seed: int) -> Path:
    """Files that contradict one another in every way that transformers puts up with."""
    draw = random.Random(seed)
    stored = json.loads(trained_json())
    stored["added_tokens"] = [
        {**token, **entry(draw, token["content"])} for token in stored["added_tokens"]
    ]
    texts = [token["content"] for token in stored["added_tokens"]] + ["Hello", "<new>", "<image>"]
    config: dict[str, Any] = {}
    for name in draw.sample(NAMES, 3):
        text = draw.choice(texts)
        config[name] = draw.choice([text, {"__type": "AddedToken", **entry(draw, text)}])
    if draw.random() < 0.5:
        config["additional_special_tokens"] = draw.sample(texts, 2)
    others: dict[str, Any] = {}
    fresh = {str(SIZE + i): entry(draw, f"<fresh {i}>") for i in range(2)}
    if draw.random() < 0.5:
        known = draw.sample(stored["added_tokens"], 2)
        overruled = {str(token["id"]): entry(draw, token["content"]) for token in known}
        config["added_tokens_decoder"] = fresh | overruled
    else:
        others["added_tokens"] = {token["content"]: int(id) for id, token in fresh.items()}
    if draw.random() < 0.5:
        text = draw.choice(texts)
        others["special_tokens_map"] = {
            "eos_token": draw.choice([text, entry(draw, text)]),
            "additional_special_tokens": draw.sample(texts, 2),
        }
    return write(folder, config, tokenizer=json.dumps(stored), **others)


@pytest.mark.parametrize("seed", range(40))
def test_any_folder_is_read_as_transformers_reads_it(tmp_path, seed):
    assert_as_transformers(random_folder(tmp_path, seed))


def test_tokenizer_config_overrules_the_flags(tmp_path):
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    folder = write(
        tmp_path,
        {
            "eos_token": END,
            "added_tokens_decoder": {"701": {"content": "<think>", **plain, "special": True}},
        },
    )
    think = added(read_vocab(folder, {}))[701]
    assert (think.content, think.special) == ("<think>", True)
    assert_as_transformers(folder)


def test_a_token_with_a_name_is_special_whatever_its_flags(tmp_path):
    """Else whoever writes it in a message ends the turn."""
    stored = json.loads(trained_json())
    for token in stored["added_tokens"]:
        token["special"] = False
    folder = write(
        tmp_path,
        {"eos_token": END, "extra_special_tokens": [START]},
        tokenizer=json.dumps(stored),
    )
    tokens = added(read_vocab(folder, {})).values()
    assert {token.content for token in tokens if token.special} == {START, END}
    assert_as_transformers(folder)


def write_merges(folder: Path, config: dict[str, Any], /, **others: Any) -> Path:
    """vocab.json and merges.txt in place of tokenizer.json."""
    model = json.loads(trained_json())["model"]
    write(folder, config, vocab=model["vocab"], **others)
    (folder / "tokenizer.json").unlink()
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_merges_are_read_by_the_class_that_the_config_names(tmp_path, kind, prefixed):
    """With the tokens of a fine-tune, the end of turn among them."""
    folder = write_merges(
        tmp_path,
        {
            "tokenizer_class": kind,
            "add_prefix_space": prefixed,
            "additional_special_tokens": ["<|turn|>"],
        },
        added_tokens={"<|turn|>": SIZE - 2, "<|over|>": SIZE - 1},
        special_tokens_map={"eos_token": "<|over|>"},
    )
    assert_as_transformers(folder)
    vocab = read_vocab(folder, {})
    assert vocab.eos_ids == (SIZE - 1,)
    assert vocab.named_tokens["unk_token"] == DONE


def test_the_class_may_be_known_from_the_models_config(tmp_path):
    folder = write_merges(tmp_path, {"tokenizer_class": None}, config={"model_type": "qwen2"})
    assert_as_transformers(folder)
    assert read_vocab(folder, {}).backend.normalizer is not None


@pytest.mark.parametrize(
    ("config", "others", "message"),
    [
        ({"added_tokens_decoder": {"900": {"content": "<x>"}}}, {}, "'<x>' is to be 900, but beco"),
        ({"added_tokens_decoder": {"first": {"content": "<x>"}}}, {}, "makes no sense"),
        ({"added_tokens_decoder": [1]}, {}, "makes no sense"),
        ({"eos_token": {"text": "<x>"}}, {}, "makes no sense"),
        ({"additional_special_tokens": [5]}, {}, "makes no sense"),
        ({"chat_template": [{"name": "default"}]}, {}, "makes no sense"),
        ({"chat_template": {"default": 5}}, {}, "chat template 'default' is no text"),
        ({}, {"added_tokens": {"<x>": "702"}}, "makes no sense"),
        ({}, {"added_tokens": ["<x>"]}, "not a JSON object"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(tmp_path, config, others, message):
    with pytest.raises(LoadError) as caught:
        read_vocab(write(tmp_path, config, **others), {})
    assert str(tmp_path) in str(caught.value)
    assert message in str(caught.value)
