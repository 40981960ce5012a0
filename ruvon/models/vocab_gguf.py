"""The vocabulary in a GGUF file's metadata, read as llama.cpp reads it.

Two kinds are known: byte-level BPE (``tokenizer.ggml.model`` is gpt2), whose way of splitting text
into words is named by ``tokenizer.ggml.pre``, and SentencePiece's BPE (llama), which merges by
score. What llama.cpp reads past with a warning (a merge of unknown tokens, the id of no token) is
read past here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ruvon.errors import LoadError
from ruvon.models.vocab import Vocab, surround, unique_ids

log = structlog.get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
PREFIX = "tokenizer.ggml"
TEMPLATE_KEY = "tokenizer.chat_template"

END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # besides eos
END_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))  # fmt: skip
"""Tokens that end an answer though no key names them: converters long wrote one end only."""


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
    """Raises LoadError naming the file and what of its vocabulary is not supported."""
    try:
        return _read(metadata)
    except KeyError as error:
        raise LoadError(f"{path}: {error} is missing") from None
    except Exception as error:  # the library raises bare Exception, and values may be of any type
        raise LoadError(f"{path}: {error}") from None


def _read(metadata: Mapping[str, Any]) -> Vocab:
    kind = metadata.get(f"{PREFIX}.model")
    if kind not in ("gpt2", "llama"):
        raise LoadError(f"{PREFIX}.model {kind!r} is not supported")
    tokens = _tokens(metadata)
    types = _types(metadata, tokens)
    if kind == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
    else:
        backend, add_bos = _sentencepiece(metadata, tokens, types), True
    _mark_added(backend, tokens, types)
    size, has_usual = len(tokens), kind == "llama"
    bos = _id(metadata, "bos", 1 if has_usual else None, size)
    eos = _id(metadata, "eos", 2 if has_usual else None, size)
    surround(backend, _stated(metadata, "bos", bos, add_bos), _stated(metadata, "eos", eos, False))
    ends = [_id(metadata, name, None, size) for name in END_KEYS]
    named = {"bos_token": bos, "eos_token": eos}
    return Vocab(
        backend=backend,
        bos_id=bos,
        eos_ids=unique_ids(eos, *ends, *_ends(tokens, types)),
        named_tokens={name: tokens[id] for name, id in named.items() if id is not None},
        chat_templates=_chat_templates(metadata),
    )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The tokens, each another one: an id that nothing leads to would be dropped in silence."""
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(metadata[f"{PREFIX}.tokens"])]
    seen: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if seen.setdefault(token, id) != id:
            raise LoadError(f"{PREFIX}.tokens: {token!r} is both {seen[token]} and {id}")
    return tokens


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """What kind of token each is. One that ends answers is a control token whatever is stated,
    but for ``</s>``: where text is cut into bytes that is a word of HTML."""
    types = list(metadata.get(f"{PREFIX}.token_type") or [NORMAL] * len(tokens))
    if len(types) < len(tokens):
        raise LoadError(f"{PREFIX}.token_type: {len(types)} for {len(tokens)} tokens")
    return [
        CONTROL if token in END_TEXTS and not (token == "</s>" and type == NORMAL) else type
        for token, type in zip(tokens, types, strict=False)
    ]


def _ends(tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    """The tokens that end an answer by their text."""
    ends = {
        token: id
        for id, (token, type) in enumerate(zip(tokens, types, strict=True))
        if token in END_TEXTS and type == CONTROL
    }
    if "<|return|>" in ends and "<|call|>" in ends:
        ends.pop("<|end|>", None)  # of OpenAI's harmony: it ends a message, of which more may come
    return list(ends.values())


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    pre = metadata.get(f"{PREFIX}.pre")
    if pre is None:
        pre = "default"
        log.warning("no_pre_tokenizer", reason=f"{PREFIX}.pre is missing; words may be cut wrongly")
    if pre not in SPLITTERS:
        raise LoadError(f"{PREFIX}.pre {pre!r} is not supported")
    splitter = SPLITTERS[pre]
    vocab = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(vocab, _merges(metadata, vocab), ignore_merges=splitter.ignore_merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitter.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, splitter.add_bos


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges of tokens into tokens; others lead nowhere."""
    pairs = [line.partition(" ") for line in metadata[f"{PREFIX}.merges"]]
    merges = [
        (left, right)
        for left, _, right in pairs
        if left in vocab and right in vocab and left + right in vocab
    ]
    if num_odd := len(pairs) - len(merges):
        log.warning("merges_left_out", count=num_odd, reason="they name no tokens")
    return merges


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE. The leading space comes before every stretch between special tokens,
    as in llama.cpp."""
    unknown = _id(metadata, "unknown", 0, len(tokens))
    model = models.BPE(
        {token: id for id, token in enumerate(tokens)},
        _merges_by_score(metadata, tokens, types),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    prefixed = metadata.get(f"{PREFIX}.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_by_score(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins whatever two neighbours make the token of the highest score; written as
    merges, that is every way to cut a token into two others, best token first."""
    scores = metadata[f"{PREFIX}.scores"]
    score = {
        token: scores[id] for id, token in enumerate(tokens) if types[id] in (NORMAL, USER_DEFINED)
    }
    return [
        (token[:cut], token[cut:])
        for token in sorted(score, key=score.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]


def _mark_added(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens become special, user-defined ones are found in every text."""
    backend.add_tokens(
        [
            AddedToken(token, special=type != USER_DEFINED, normalized=False)
            for token, type in zip(tokens, types, strict=True)
            if type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )


def _id(metadata: Mapping[str, Any], name: str, usual: int | None, size: int) -> int | None:
    """A special token's id; ``usual`` where the file does not say, or names one that is none of
    ``size`` tokens."""
    id: int | None = metadata.get(f"{PREFIX}.{name}_token_id", usual)
    if id is None or 0 <= id < size:
        return id
    log.warning("no_such_token", key=f"{PREFIX}.{name}_token_id", id=id, tokens=size)
    return usual if usual is not None and usual < size else None


def _stated(metadata: Mapping[str, Any], name: str, id: int | None, usual: bool) -> int | None:
    """The id, if that token is to be put around texts."""
    key = f"{PREFIX}.add_{name}_token"
    if id is None and metadata.get(key, False):
        raise LoadError(f"{key} is true, but there is no {name} token")
    return id if metadata.get(key, usual) else None


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {
        key.removeprefix(f"{TEMPLATE_KEY}."): str(source)
        for key, source in metadata.items()
        if key.startswith(f"{TEMPLATE_KEY}.")
    }
    default = metadata.get(TEMPLATE_KEY)
    return templates if default is None else templates | {"default": str(default)}
