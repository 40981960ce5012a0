"""The vocabulary in a GGUF file's metadata, read as llama.cpp reads it.

Two kinds are known: byte-level BPE (``tokenizer.ggml.model`` is gpt2), whose way of splitting text
into words is named by ``tokenizer.ggml.pre``, and SentencePiece's BPE (llama), which merges by
score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ruvon.errors import LoadError
from ruvon.models.vocab import Vocab, surround, unique_ids

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
TEMPLATE_KEY = "tokenizer.chat_template"


class Splitter(NamedTuple):
    """How text is cut into words before merging: each pattern in turn cuts the pieces so far.

    ``ignore_merges``: a word that is a token is taken whole. ``add_bos``: unless stated otherwise.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    rf"|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{TAIL}"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{TAIL}"
)
GPT4O = CASED % (f"{CONTRACTION}?", f"{CONTRACTION}?", "{1,3}")
TEKKEN = CASED % ("", "", "")

SPLITTERS: Mapping[str, Splitter] = {
    name: splitter
    for names, splitter in (
        (
            "gpt-2 phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling",
            Splitter((GPT2,)),
        ),
        (
            "smollm starcoder refact command-r codeshell exaone minerva-7b",
            Splitter((r"\p{N}", GPT2)),
        ),
        (
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            Splitter((LLAMA3,), ignore_merges=True, add_bos=True),
        ),
        ("dbrx smaug-bpe glm4 chatglm-bpe", Splitter((LLAMA3,))),
        (
            "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan grok-2 solar-open",
            Splitter((QWEN2,)),
        ),
        ("qwen35", Splitter((QWEN35,))),
        ("gpt-4o llama4 kanana2 minimax-m2", Splitter((GPT4O,))),
        ("tekken", Splitter((TEKKEN,), ignore_merges=True, add_bos=True)),
        (
            "deepseek-coder",
            Splitter((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
        ),
        (
            "default",
            Splitter((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        ),
    )
    for name in names.split()
}


def read_gguf_vocab(path: Path, metadata: Mapping[str, Any]) -> Vocab:
    """Raises LoadError naming the file and the kind of vocabulary if it is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "gpt2":
            backend, add_bos = _byte_level(metadata)
        elif kind == "llama":
            backend, add_bos = _sentencepiece(metadata), True
        else:
            raise LoadError(f"tokenizer.ggml.model {kind!r} is not supported")
    except KeyError as error:
        raise LoadError(f"{path}: {error} is missing") from None
    except Exception as error:  # the library raises bare Exception for merges it does not like
        raise LoadError(f"{path}: {error}") from None
    _mark_added(backend, metadata)
    bos, eos, eot, eom = (_id(metadata, name) for name in ("bos", "eos", "eot", "eom"))
    surround(
        backend,
        bos if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return Vocab(backend, bos, unique_ids(eos, eot, eom), _chat_templates(metadata))


def _byte_level(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITTERS:
        raise LoadError(f"tokenizer.ggml.pre {pre!r} is not supported")
    splitter = SPLITTERS[pre]
    vocab = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=splitter.ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitter.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, splitter.add_bos


def _sentencepiece(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE. The leading space comes before every stretch between special tokens,
    as in llama.cpp."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    vocab = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(
        vocab, _merges(metadata), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """SentencePiece joins whatever two neighbours make the token of the highest score; written as
    merges, that is every way to cut a token into two others, best token first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = _types(metadata)
    score = {
        token: scores[id] for id, token in enumerate(tokens) if types[id] in (NORMAL, USER_DEFINED)
    }
    return [
        (token[:cut], token[cut:])
        for token in sorted(score, key=score.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]


def _types(metadata: Mapping[str, Any]) -> Sequence[int]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)


def _mark_added(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens become special, user-defined ones are found in every text."""
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(metadata["tokenizer.ggml.tokens"], _types(metadata), strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )


def _id(metadata: Mapping[str, Any], name: str) -> int | None:
    """A special token's id; SentencePiece files may leave out the usual 1 and 2."""
    usual = {"bos": 1, "eos": 2} if metadata["tokenizer.ggml.model"] == "llama" else {}
    id: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id", usual.get(name))
    return id


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {
        key.removeprefix(f"{TEMPLATE_KEY}."): str(source)
        for key, source in metadata.items()
        if key.startswith(f"{TEMPLATE_KEY}.")
    }
    default = metadata.get(TEMPLATE_KEY)
    return templates if default is None else templates | {"default": default}
