"""A mix of conversations: chats, agents and questions about documents, as turns with their lengths.

    python bench/conversations.py tests/router/conversations.json

writes the recording that tests play: what comes when, in tokens, not what it says.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """What a user adds, and what the model answers: ``wait`` seconds after the answer before it."""

    wait: float
    asked: int  # tokens
    answered: int


class Conversation(NamedTuple):
    """A text that others begin with too, by its number and its tokens, and what follows it."""

    start: float  # seconds
    shared: int
    shared_tokens: int
    turns: list[Turn]


SYSTEMS = ((1, 180), (2, 420), (3, 800), (4, 60))  # chats: a number, tokens
TOOLS = ((10, 3000), (11, 4500), (12, 2200))  # agents
DOCUMENTS = 40  # numbers from 100 on


def chat(rng: random.Random) -> tuple[tuple[int, int], list[Turn]]:
    turns = [
        Turn(rng.expovariate(1 / 12), rng.randint(15, 150), rng.randint(40, 250))
        for _ in range(rng.randint(2, 8))
    ]
    return rng.choice(SYSTEMS), turns


def agent(rng: random.Random) -> tuple[tuple[int, int], list[Turn]]:
    turns = [
        Turn(rng.expovariate(1 / 1.5), rng.randint(80, 900), rng.randint(20, 90))
        for _ in range(rng.randint(5, 16))
    ]
    return rng.choice(TOOLS), turns


def document(rng: random.Random) -> tuple[tuple[int, int], list[Turn]]:
    number = min(int(rng.paretovariate(0.7)), DOCUMENTS)
    turns = [
        Turn(rng.expovariate(1 / 15), rng.randint(10, 60), rng.randint(30, 200))
        for _ in range(rng.randint(1, 3))
    ]
    return (100 + number, 1500 + 4500 * number // DOCUMENTS), turns


KINDS: tuple[Callable[[random.Random], tuple[tuple[int, int], list[Turn]]], ...] = (
    chat, chat, chat, agent, document, document,
)  # fmt: skip


def mix(rate: float, seconds: float, seed: int = 0, scale: float = 1.0) -> Iterator[Conversation]:
    """Conversations that begin at random, ``rate`` a second; ``scale`` shortens all texts."""
    rng = random.Random(seed)
    now = rng.expovariate(rate)
    while now < seconds:
        (shared, tokens), turns = rng.choice(KINDS)(rng)
        scaled = [
            Turn(round(t.wait, 2), max(int(t.asked * scale), 1), max(int(t.answered * scale), 1))
            for t in turns
        ]
        yield Conversation(round(now, 3), shared, int(tokens * scale), scaled)
        now += rng.expovariate(rate)


def read(path: Path) -> list[Conversation]:
    """A recording."""
    rows: list[list[Any]] = json.loads(path.read_text())
    return [Conversation(*row[:3], [Turn(*turn) for turn in row[3]]) for row in rows]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        "[\n"
        + ",\n".join(json.dumps(each, separators=(",", ":")) for each in mix(3, 30, scale=0.25))
        + "\n]\n"
    )
