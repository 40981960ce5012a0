"""Cache groups: which layers share a block table.

Layers with a window need the keys and values of their last tokens only, so their sequences' blocks
come back as they leave it, while layers that see everything keep all of theirs. A `CacheGroup` is
a set of layers with one window and one block table a sequence.

All groups are of one size, `layers_a_block`, and the cache has as many tensors of keys and values
as that. A block is the same number of tokens in each of them, and whichever group holds it uses all
of it: group g's j-th layer writes to the j-th tensor. So one pool of blocks serves every group,
and none has to be told beforehand how much memory it will take. A group that has fewer layers than
there are tensors leaves some of its blocks' memory unused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ruvon.models.spec import ModelSpec

MOST_GROUPS = 8
"""Each is a block table to keep and to send: finer groups would save less than that costs."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers with the same window, whose keys and values lie in the same blocks."""

    window: int  # tokens that a layer sees, the last one included; 0 is all of them
    layers: tuple[int, ...]


def cache_groups(spec: ModelSpec) -> tuple[CacheGroup, ...]:
    """A model's groups, those that see everything first. One of all layers, if they are alike.

    Layers of one window are cut into groups of the size with which a sequence of the most positions
    takes the least memory; of equal ones, into the fewest. Gemma's 15 layers that slide and 3 that
    do not are six groups of three.
    """
    kinds = layers_by_window(spec)
    sizes = range(1, max(map(len, kinds.values())) + 1)
    size = min(sizes, key=lambda size: cost(kinds, size, spec.max_positions))
    return tuple(
        CacheGroup(window, layers[first : first + size])
        for window, layers in sorted(kinds.items())
        for first in range(0, len(layers), size)
    )


def layers_by_window(spec: ModelSpec) -> dict[int, tuple[int, ...]]:
    """A window that holds all positions is none."""
    windows = [window if window < spec.max_positions else 0 for window in spec.windows]
    return {
        window: tuple(layer for layer, its in enumerate(windows) if its == window)
        for window in set(windows)
    }


def cost(kinds: dict[int, tuple[int, ...]], size: int, max_positions: int) -> tuple[bool, int, int]:
    """Of groups of a size: whether they are too many, a sequence's memory, how many they are."""
    counts = {window: math.ceil(len(layers) / size) for window, layers in kinds.items()}
    memory = sum(size * count * (window or max_positions) for window, count in counts.items())
    num_groups = sum(counts.values())
    return num_groups > max(MOST_GROUPS, len(kinds)), memory, num_groups


def layers_a_block(groups: Iterable[CacheGroup]) -> int:
    """Layers whose keys and values lie in one block."""
    return max(len(group.layers) for group in groups)


def of_stage(groups: Iterable[CacheGroup], held: range) -> tuple[CacheGroup, ...]:
    """The same groups, without the layers that other stages hold: their blocks are this stage's
    too, by the same numbers."""
    return tuple(
        CacheGroup(group.window, tuple(layer for layer in group.layers if layer in held))
        for group in groups
    )


def place_of(groups: Iterable[CacheGroup], layer: int) -> tuple[int, int]:
    """A layer's group, and which of the cache's tensors is its."""
    return next(
        (number, group.layers.index(layer))
        for number, group in enumerate(groups)
        if layer in group.layers
    )
