"""Lesson 14: the same memory for keys and values, given out whole and in pages.

Keys and values of all sequences lie in one tensor of pages. A sequence has a table: which page has
its first 16 tokens, its next 16, and so on. To reserve room for the longest answer beforehand is
the same with a table that is filled at once.

python docs/series/code/14_pages.py
"""

from __future__ import annotations

from collections import deque
from importlib import import_module

import llama
import torch
from torch import Tensor

continuous = import_module("08_continuous_batch")

PAGE = 16
PAGES = 7  # 112 tokens for everybody
LONGEST = 48  # tokens that a request may have, prompt and answer
ANSWERS = (3, 14, 5, 8)  # tokens after which they end, which nobody knows beforehand
THINGS = ("gold", "iron", "salt", "rain", "wine", "silk")


class Memory:
    """Pages for all sequences, and which of them are free."""

    def __init__(self, model: llama.Llama) -> None:
        shape = (len(model.layers), PAGES, PAGE, model.groups, model.head_dim)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.free = [*range(PAGES)]


class Paged:
    """What lesson 3 calls a cache, but that its tokens lie wherever a page was free."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.table: list[int] = []
        self.length = 0

    def grow(self, tokens: int) -> bool:
        """Take the pages that so many tokens need; none if there are too few."""
        missing = max(-(-tokens // PAGE) - len(self.table), 0)
        if missing > len(self.memory.free):
            return False
        self.table += [self.memory.free.pop() for _ in range(missing)]
        return True

    def release(self) -> None:
        self.memory.free += self.table
        self.table, self.length = [], 0

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        total = self.length + len(k_TGD)
        at = torch.arange(self.length, total)
        table = torch.tensor(self.table)
        pages, offsets = table[at // PAGE], at % PAGE
        self.memory.k[layer, pages, offsets] = k_TGD
        self.memory.v[layer, pages, offsets] = v_TGD
        k, v = (x[layer, table].flatten(0, 1)[:total] for x in (self.memory.k, self.memory.v))
        return llama.attention(q_THD, k, v, llama.causal(len(q_THD), total))


class Engine:
    def __init__(self, model: llama.Llama, *, reserve: bool) -> None:
        self.model, self.reserve = model, reserve
        self.memory = Memory(model)
        self.waiting: deque[continuous.Sequence] = deque()
        self.running: list[continuous.Sequence] = []
        self.steps = self.preempted = self.most = self.used = 0

    def schedule(self) -> None:
        """Pages for everybody's next token; then others join, as long as there is room."""
        for seq in [*self.running]:
            while seq in self.running and not seq.cache.grow(seq.cache.length + len(seq.pending())):
                last = self.running.pop()  # gives its pages back, computes its tokens again later
                last.cache.release()
                self.waiting.appendleft(last)
                self.preempted += 1
        while self.waiting:
            seq = self.waiting[0]
            if not seq.cache.grow(LONGEST if self.reserve else len(seq.pending())):
                break
            self.running.append(self.waiting.popleft())

    def step(self) -> None:
        self.schedule()
        for seq, token in zip(self.running, continuous.step(self.model, self.running), strict=True):
            seq.tokens.append(token)
        self.steps += 1
        self.most = max(self.most, len(self.running))
        self.used += sum(seq.cache.length for seq in self.running)
        for seq in [seq for seq in self.running if len(seq.tokens) == seq.most]:
            seq.cache.release()
            self.running.remove(seq)


def start(model: llama.Llama, *, reserve: bool) -> tuple[Engine, list[continuous.Sequence]]:
    """An engine with six requests in its queue."""
    engine = Engine(model, reserve=reserve)
    for i, thing in enumerate(THINGS):
        prompt = model.encode(f"Where {thing} comes from, and what it is good for: the old")
        cache = Paged(engine.memory)
        engine.waiting.append(continuous.Sequence(prompt, ANSWERS[i % 4], cache, 0))
    return engine, [*engine.waiting]


def main() -> None:
    model, answers = llama.load(), []
    for reserve in (True, False):
        engine, sequences = start(model, reserve=reserve)
        while engine.waiting or engine.running:
            engine.step()
        used = engine.used / engine.steps / (PAGES * PAGE)
        print(f"{f'{LONGEST} tokens reserved' if reserve else f'pages of {PAGE}'}:")
        print(f"  {engine.most} at once, {engine.steps} steps, {engine.preempted} preempted,"
              f" {used:.0%} of the memory in use")  # fmt: skip
        answers.append([seq.tokens for seq in sequences])
    print(f"the same tokens: {answers[0] == answers[1]}")


if __name__ == "__main__":
    main()
