"""How the tokens of a vocabulary spell bytes."""

from __future__ import annotations

import re

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


def byte_level_bytes(token: str) -> bytes:
    """A token of byte-level BPE; one with a character outside the alphabet is plain text."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """A SentencePiece token: ``<0x0A>`` is a byte, ``▁`` is a space, all else is text."""
    if byte := BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode()
