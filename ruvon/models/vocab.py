"""Finding a model's vocabulary, special tokens and chat templates in its folder."""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from ruvon.errors import LoadError
from ruvon.models.added_tokens import add_tokens, merge_older
from ruvon.models.byte_level import BYTE_OF
from ruvon.models.sources import pointer_to_large_file

GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT2_KINDS = (None, "gpt2", "GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_END = "<|endoftext|>"
CONVERTIBLE_FILES = ("tokenizer.model", "spiece.model", "tekken.json")


class VocabNotFoundError(LoadError):
    """The folder has no vocabulary."""


@dataclass(frozen=True, slots=True)
class Vocab:
    """A vocabulary as it is stored. ``bos_id`` and ``eos_ids`` are what it declares;
    ``chat_templates`` maps names ("default", "tool_use") to Jinja sources, ``named_tokens`` names
    ("eos_token") to texts."""

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    named_tokens: Mapping[str, str] = field(default_factory=dict)


def read_vocab(folder: Path, generation: Mapping[str, Any]) -> Vocab:
    """The vocabulary of a folder in the Hugging Face layout, as transformers reads it; no code from
    it is run. What is added around a text is said by tokenizer.json and, only where there is none,
    by the config.

    Raises VocabNotFoundError if there is none, LoadError naming a file that cannot be used.
    """
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config = merge_older(config, _read_json(folder / "special_tokens_map.json"))
    backend = _read_backend(folder, config)
    try:
        named = add_tokens(backend, config, _read_json(folder / "added_tokens.json"))
        bos, eos = (_id(backend, named.get(name)) for name in ("bos_token", "eos_token"))
        ends = generation.get("eos_token_id")
        templates = _chat_templates(folder, config)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = f"its tokenizer's files have a value that makes no sense ({error})"
        raise LoadError(f"{folder}: {why}") from None
    if backend.post_processor is None and not (folder / "tokenizer.json").exists():
        surround(
            backend,
            bos if config.get("add_bos_token") else None,
            eos if config.get("add_eos_token") else None,
        )
    return Vocab(
        backend=backend,
        bos_id=bos,
        eos_ids=unique_ids(eos, *(ends if isinstance(ends, list) else [ends])),
        chat_templates=templates,
        named_tokens=named,
    )


def byte_vocab() -> Vocab:
    """Bytes as tokens 0 to 255, for a model that has no vocabulary."""
    return Vocab(byte_level_backend(models.BPE(BYTE_OF, [])))


def byte_level_backend(model: models.Model, prefixed: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE that splits text into words as GPT-2 does; ``prefixed`` begins it with a
    space."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    backend.decoder = decoders.ByteLevel()
    return backend


def surround(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Sets which tokens ``add_special_tokens`` puts before and after a text."""
    before, after = ["bos"] * (bos_id is not None), ["eos"] * (eos_id is not None)
    named = (("bos", bos_id), ("eos", eos_id))
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(name, id) for name, id in named if id is not None],
    )


def unique_ids(*ids: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(id for id in ids if id is not None))


def _read_json(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):  # a link to nothing is a file that is missing
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path}: not a JSON object")
    return content


def _read_backend(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    try:
        if os.path.lexists(path):
            return tokenizers.Tokenizer.from_file(str(path))
        for names in GPT2_FILES:
            path, merges = (folder / name for name in names)
            if path.exists() and merges.exists():
                return _merge_backend(folder, path, merges, config)
    except LoadError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise LoadError(f"{path}: {pointer_to_large_file(path) or error}") from None
    if any((folder / name).exists() for name in CONVERTIBLE_FILES):
        return _convert(folder, config)
    wanted = ("tokenizer.json", *(" and ".join(names) for names in GPT2_FILES), *CONVERTIBLE_FILES)
    raise VocabNotFoundError(f"{folder}: no tokenizer, expected one of: {', '.join(wanted)}")


def _merge_backend(
    folder: Path, vocab: Path, merges: Path, config: dict[str, Any]
) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2 stored it, unless the folder names another class: those cut text
    into words in ways of their own."""
    model = _read_json(folder / "config.json")
    kind = config.get("tokenizer_class") or model.get("tokenizer_class") or model.get("model_type")
    if kind not in GPT2_KINDS:
        return _convert(folder, config)
    for name in ("bos_token", "eos_token", "unk_token"):
        config.setdefault(name, GPT2_END)
    prefixed = bool(config.get("add_prefix_space", False))
    return byte_level_backend(models.BPE.from_file(str(vocab), str(merges)), prefixed)


def _convert(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """A vocabulary in another format or of another class, made by transformers; ``config`` is told
    the tokens that are named by default there."""
    from transformers import AutoTokenizer  # heavy, and seldom needed

    try:
        converted = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        backend: tokenizers.Tokenizer = converted.backend_tokenizer
        for name, text in converted.special_tokens_map.items():
            config.setdefault(name, text)
    except Exception as error:  # whatever the converters and their own dependencies raise
        raise LoadError(
            f"{folder}: its tokenizer cannot be converted ({error}); save it as tokenizer.json"
        ) from error
    return backend


def _id(backend: tokenizers.Tokenizer, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """From the newest place to the oldest: files of their own, then tokenizer_config.json."""
    try:
        extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        named = {path.stem: path.read_text(encoding="utf-8") for path in extra}
        path = folder / "chat_template.jinja"
        if os.path.lexists(path):
            return named | {"default": path.read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: {error}") from None
    stored = _read_json(folder / "chat_template.json").get("chat_template")
    stored = stored or config.get("chat_template") or {}
    if isinstance(stored, str):
        return named | {"default": stored}
    if isinstance(stored, list):
        stored = {entry["name"]: entry["template"] for entry in stored}
    if wrong := [name for name, source in stored.items() if not isinstance(source, str)]:
        raise TypeError(f"chat template {wrong[0]!r} is no text")
    return named | stored
