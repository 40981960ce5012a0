"""How Python's garbage collector behaves in a process that serves: as long as it looks at objects,
it holds the event loop, so it is to look at few at a time."""

from __future__ import annotations

import gc

YOUNG = 4000
"""Objects before it looks at them, for some 2 ms; Python's own is 700. Most of those that a step of
hundreds of sequences makes are gone with the next."""

LOOKS = 1
"""At young ones, before it looks at those that have survived, too. With Python's own 10 these would
be too many."""

OLD_LOOKS = 1000
"""At those, before it looks at all that there is but what was kept for good: millions have come by
then. A large body that is being read at that time may be 100,000 objects, which take 60 ms."""


def keep_for_good() -> None:
    """What is there by now stays as long as the process: the collector, which else would stop
    everything to look through it every now and then (for 0.2 s), leaves it alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, LOOKS, OLD_LOOKS)
