"""How the tokens of a vocabulary spell bytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruvon.errors import LoadError

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes as printable characters: those that are printable in Latin-1 as
    themselves, the others, in order, as U+0100 and up. Maps character to byte, in id order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF = _byte_alphabet()
CODES = {ord(char): byte for char, byte in BYTE_OF.items()}


def byte_level_bytes(token: str) -> bytes:
    """A token of byte-level BPE; one with a character outside the alphabet is plain text."""
    try:
        return codecs.charmap_encode(token, "strict", CODES)[0]
    except UnicodeEncodeError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """A SentencePiece token: ``<0x0A>`` is a byte, ``▁`` is a space, all else is text."""
    if byte := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode()


class DecoderError(LoadError):
    """The decoder of a tokenizer is missing or of a kind that is not supported."""


SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
JOINTS = ({"type": "ByteFallback"}, {"type": "Fuse"})  # what we do in any case


def read_decoder(decoder: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether tokens are spelt in bytes, whether a text's leading space is not its own), by a
    decoder as tokenizer.json has it; {} is none. Raises DecoderError naming what it is made of."""
    steps = [step for step in _steps(decoder) if step not in JOINTS]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return True, False
    match steps:
        case [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}]:
            return False, scheme != "never"
        case [first, *rest] if first == SPACES and rest in ([], [STRIP]):
            return False, bool(rest)
    kinds = " and ".join(step["type"] for step in steps)
    raise DecoderError(
        f"the tokenizer's decoder {kinds} is not supported as it is"
        if kinds
        else "the tokenizer has no decoder, which would say how its tokens spell text"
    )


def _steps(decoder: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """One after another, however deep they are nested."""
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder] if decoder else []
