"""Model files that say what cannot be: refused in an error of ours, never with a traceback, and
never with more memory than the file is large (llama.cpp CVE-2026-21869, 27940, Ollama 7482).

Damaged GGUF files are in `test_gguf.TestDamage` and `test_damaged_gguf`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import load, make_reference
from tokenizers import AddedToken

from ruvon.config import EngineConfig
from ruvon.errors import LoadError
from ruvon.models.chat import load_chat
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.defaults import sampling_defaults
from ruvon.models.tokenizer import load_tokenizer
from ruvon.models.vocab import byte_vocab
from ruvon.telemetry import silent

ODD = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, float("nan"), float("inf"), "", "x",
    "9" * 5000, "\ud800", [], [[]], {}, {"a": 1}, [None], ["a"], [0, 2**62], [2**40, 2**41],
)  # fmt: skip
"""What no file of a model has where it stands."""

CONFIGS = {
    "tokenizer_config.json": {
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>"},
        "added_tokens_decoder": {"256": {"content": "<bos>", "special": True}},
        "chat_template": "{{ messages }}",
        "add_bos_token": True,
    },
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.5, "top_k": 5},
}


@pytest.fixture
def folder(tmp_path):
    make_reference("qwen3").save_pretrained(tmp_path)
    backend = byte_vocab().backend
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<bos>", "<eos>")])
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    for name, config in CONFIGS.items():
        (tmp_path / name).write_text(json.dumps(config))
    return tmp_path


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON, by keys and numbers."""
    yield before
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*before, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 3)):
            yield from places(value[index], (*before, index))


def replaced(value: Any, place: tuple[Any, ...], by: object) -> Any:
    if not place:
        return by
    changed = inner = copy.deepcopy(value)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = by
    return changed


def read_all(folder: Path) -> None:
    """All but the weights."""
    checkpoint = open_checkpoint(EngineConfig(model=str(folder)), silent)
    sampling_defaults(checkpoint.generation)
    tokenizer = load_tokenizer(checkpoint)
    load_chat(tokenizer)
    tokenizer.decode(tokenizer.encode("hello <bos> é"))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_configs_of_odd_values(folder, name):
    read_all(folder)
    original = json.loads((folder / name).read_text())
    where = list(places(original))
    dice = random.Random(name)
    for _ in range(40):
        changed = replaced(original, dice.choice(where), dice.choice(ODD))
        (folder / name).write_text(json.dumps(changed))
        with contextlib.suppress(LoadError):
            read_all(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_configs_deeper_than_a_stack(folder, name):
    (folder / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(LoadError, match=name):
        read_all(folder)


FILES = (
    "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_nothing_is_a_file_that_is_missing(folder, name):
    """As the hub's cache has them where somebody has made room; not as if nobody had meant it."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("blobs/gone")
    with pytest.raises(LoadError, match=rf"{name}.*[Nn]o such file"):
        (load if name == "model.safetensors" else read_all)(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.gguf"])
def test_what_git_leaves_for_large_files_is_known(folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
    (folder / name).write_text(pointer)
    where = folder / name if name == "model.gguf" else folder
    with pytest.raises(LoadError, match=rf"{name}.*`git lfs pull`"):
        (read_all if name == "tokenizer.json" else load)(where)


@pytest.mark.parametrize("size", [2**20 + 2, 2**31, 2**62])
def test_sizes_beyond_all_memory(folder, size):
    """Nothing is made in a size that a file only claims."""
    original = json.loads((folder / "config.json").read_text())
    for key in (
        "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
        "num_attention_heads", "num_hidden_layers", "vocab_size",
    ):  # fmt: skip
        if (key, size) != ("max_position_embeddings", 2**20 + 2):
            (folder / "config.json").write_text(json.dumps({**original, key: size}))
            with pytest.raises(LoadError):
                load(folder)


def test_weights_whose_header_lies(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    dice, where = random.Random(0), list(places(header))
    lengths = (0, 1, length - 1, length + 1, 10**8, 2**31, 2**63, 2**64 - 1)
    for _ in range(30):
        changed = replaced(header, dice.choice(where), dice.choice((*ODD, "F64", "I8", "F8_E4M3")))
        text = json.dumps(changed).encode()
        damaged = bytearray(data)
        damaged[dice.randrange(8 + length)] = dice.randrange(256)
        for lie in (
            struct.pack("<Q", len(text)) + text + data[8 + length :],
            struct.pack("<Q", dice.choice(lengths)) + data[8:],
            bytes(damaged),
        ):
            file.write_bytes(lie)
            with contextlib.suppress(LoadError):
                load(folder)
