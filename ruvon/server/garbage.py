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

OLD_LOOKS = 100
"""At those, before it looks at all that there is but what was kept for good: some 800,000 objects
have come by then. That may take 60 ms if a large body is being read; but what lived as long as a
connection, and was left in cycles, is found in no other way (a router under attack grew by a fifth
in three minutes with 1,000)."""


def keep_for_good() -> None:
    """What is there by now stays as long as the process: the collector, which else would stop
    everything to look through it every now and then (for 0.2 s), leaves it alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, LOOKS, OLD_LOOKS)
