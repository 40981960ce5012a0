"""The tokens that a folder adds to its vocabulary, as transformers finds them.

Four files know of them: tokenizer.json has its own list; ``added_tokens_decoder`` of
tokenizer_config.json overrules the flags there; where it is missing, the older
special_tokens_map.json and added_tokens.json count. Whatever has a name (``eos_token``) or is
listed as special is special, or anybody could write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = ("extra_special_tokens", "additional_special_tokens")  # the newer name wins
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], older: Mapping[str, int]
) -> dict[str, str]:
    """Adds to ``backend`` what it lacks and sets the flags; ``older`` is added_tokens.json. Returns
    the texts of the named tokens. Raises ValueError for a token that cannot have its id, and
    whatever entries of the wrong types raise."""
    known = backend.get_added_tokens_decoder()
    named, listed = _named(config), _listed(config)
    special = dict.fromkeys(map(_content, (*named.values(), *listed)))
    if (decoder := config.get("added_tokens_decoder")) is not None:
        stated = {int(id): _token(entry) for id, entry in decoder.items()}
    else:
        stated = {id: _older_token(text, text in special) for text, id in older.items()} | known
    same = {repr(token) for token in known.values()}
    backend.add_tokens([stated[id] for id in sorted(stated) if repr(stated[id]) not in same])
    for id, token in stated.items():
        if (found := backend.token_to_id(token.content)) != id:
            raise ValueError(f"the token {token.content!r} is to be {id}, but becomes {found}")
    flags = {_content(entry): _token(entry) for entry in (*named.values(), *listed)}
    flags |= {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([flags[text] for text in special])
    return {name: _content(entry) for name, entry in named.items()}


def merge_older(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with special_tokens_map.json over it, but for the lists."""
    listed = any(config.get(name) for name in LISTS)
    return {**config, **{k: v for k, v in older.items() if not (listed and k in LISTS)}}


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens with a name: the usual ones, then the model's own (``image_token``)."""
    own = [key for key in config if key.endswith("_token") and key not in NAMES]
    named = {key: config[key] for key in (*NAMES, *own) if isinstance(config.get(key), str | dict)}
    more = config.get(LISTS[0])
    return named | more if isinstance(more, dict) else named


def _listed(config: Mapping[str, Any]) -> list[Any]:
    lists = [config.get(name) for name in LISTS]
    return next((entries for entries in lists if isinstance(entries, list) and entries), [])


def _content(entry: str | Mapping[str, Any]) -> str:
    """A token is written as a string or as an object."""
    return entry if isinstance(entry, str) else entry["content"]


def _token(entry: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(entry, str):
        return AddedToken(entry, special=True, normalized=False)
    return AddedToken(entry["content"], **{flag: entry[flag] for flag in FLAGS if flag in entry})


def _older_token(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=not special)
