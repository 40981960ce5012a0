"""Lesson 13: a long prompt among running answers, whole and in chunks; and a prompt seen before.

The engine of lesson 8 with two things more: a budget of tokens for each step, and a cache of
prefixes.

python docs/series/code/13_mixed_steps.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from time import perf_counter

import llama

kv_cache = import_module("03_kv_cache")
continuous = import_module("08_continuous_batch")

BLOCK = 16
NEW = 8
QUESTIONS = ("What is rain?", "What is wind?", "What is snow?")
TEACHER = "You are a patient teacher of natural science. " * 16


@dataclass
class Sequence(continuous.Sequence):
    share: int = 0  # how many of its tokens the next step computes
    moments: list[float] = field(default_factory=list)  # when each of its tokens was there

    def left(self) -> int:
        return len(self.prompt) + len(self.tokens) - self.cache.length

    def pending(self) -> list[int]:
        return super().pending()[: self.share]


class Engine:
    def __init__(self, model: llama.Llama, budget: int, *, caching: bool = False) -> None:
        self.model, self.budget, self.caching = model, budget, caching
        self.prefixes: dict[tuple[int, ...], kv_cache.Cache] = {}  # a beginning → who has it
        self.running: list[Sequence] = []
        self.sizes: list[int] = []  # tokens of each step

    def add(self, text: str, most: int = NEW) -> Sequence:
        ids = self.model.encode(text)
        cache = kv_cache.Cache(self.model, len(ids) + NEW)
        for end in range((len(ids) - 1) // BLOCK * BLOCK, 0, -BLOCK):  # the longest that is known
            if found := self.prefixes.get(tuple(ids[:end])):
                cache.k[:, :end], cache.v[:, :end] = found.k[:, :end], found.v[:, :end]
                cache.length = end
                break
        self.running.append(Sequence(ids, most, cache, 0))
        return self.running[-1]

    def share(self) -> None:
        """Who computes how many tokens: whoever waits for one token first, then prompts."""
        left = self.budget
        for seq in sorted(self.running, key=lambda seq: seq.left() > 1):
            seq.share = min(seq.left(), left)
            left -= seq.share

    def step(self) -> None:
        self.share()
        chosen = [seq for seq in self.running if seq.share]
        self.sizes.append(sum(seq.share for seq in chosen))
        for seq, token in zip(chosen, continuous.step(self.model, chosen), strict=True):
            if seq.left() == 0:  # a chunk in the middle of a prompt gives no token
                seq.tokens.append(token)
                seq.moments.append(perf_counter())
                self.remember(seq)
        self.running = [seq for seq in self.running if len(seq.tokens) < seq.most]

    def remember(self, seq: Sequence) -> None:
        for end in range(BLOCK, len(seq.prompt) + 1, BLOCK) if self.caching else ():
            self.prefixes.setdefault(tuple(seq.prompt[:end]), seq.cache)


def compare_budgets(model: llama.Llama) -> None:
    """Two answers run when somebody comes with a long prompt."""
    answers = []
    for budget in (512, 48):
        engine = Engine(model, budget)
        running = [engine.add(question) for question in QUESTIONS[:2]]
        for _ in range(2):
            engine.step()
        late, arrived = engine.add(TEACHER + QUESTIONS[2]), perf_counter()
        while engine.running:
            engine.step()
        gap = max(b - a for seq in running for a, b in pairwise(seq.moments))
        print(f"budget {budget}: steps of {engine.sizes[2:9]} tokens; longest gap ~{gap:.2f} s,")
        print(f"  first token of the long prompt after ~{late.moments[0] - arrived:.2f} s")
        answers.append([seq.tokens for seq in (*running, late)])
    print(f"the same tokens: {answers[0] == answers[1]}")


def compare_prefixes(model: llama.Llama) -> None:
    """Three questions to one teacher, one after the other."""
    answers = []
    for caching in (False, True):
        engine, asked = Engine(model, 512, caching=caching), []
        for question in QUESTIONS:
            asked.append(engine.add(TEACHER + question, most=2))
            while engine.running:
                engine.step()
        computed = sum(engine.sizes) - len(asked)  # the second token of each answer
        print(f"prefixes {'kept' if caching else 'not kept'}: {computed} prompt tokens computed")
        answers.append([seq.tokens for seq in asked])
    print(f"the same tokens: {answers[0] == answers[1]}")


def main() -> None:
    model = llama.load()
    compare_budgets(model)
    compare_prefixes(model)


if __name__ == "__main__":
    main()
