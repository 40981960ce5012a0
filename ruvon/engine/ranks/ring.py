"""Plans in shared memory: written once by the scheduler's process, read by every rank beside it.

The memory has no name that anybody could open: it is handed from process to process, and is gone
with the last of them. A plan lies in one piece; its number and place are sent through each rank's
channel, which also orders the memory's accesses, and wakes a rank that sleeps. A rank that has read
a plan writes its number down in the same memory: once all have, the room is free again.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from typing import NamedTuple

LINE = 64  # bytes of a cache line: each rank's acknowledgement has one
NUMBER = struct.Struct("<Q")
PLACE = struct.Struct("<QQQ")  # a plan's number, and where it lies: offset and size
ROOM = 8 << 20  # bytes; what is never written takes no memory


def anonymous_memory(size: int) -> int:
    """A descriptor of that many shared bytes, which nobody else can open."""
    fd = os.memfd_create("ruvon", os.MFD_CLOEXEC)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, size)
    return fd


class Held(NamedTuple):
    """A plan that some rank may still have to read."""

    number: int
    start: int
    end: int


class PlanRing:
    """The writer's end. ``room`` is in bytes."""

    def __init__(self, num_readers: int, room: int = ROOM) -> None:
        self._first = num_readers * LINE  # of the bytes that plans may lie in
        self._room = room
        self._readers = range(0, self._first, LINE)
        self.fd = anonymous_memory(self._first + room)
        self._memory = mmap.mmap(self.fd, self._first + room)
        self._held: deque[Held] = deque()  # oldest first

    def write(self, number: int, data: bytes) -> bytes | None:
        """Put a plan down, and say where, for a frame; None if there is no room for it now."""
        start = self._place(len(data))
        if start is None:
            return None
        self._held.append(Held(number, start, start + len(data)))
        first = self._first + start
        self._memory[first : first + len(data)] = data
        return PLACE.pack(number, first, len(data))

    @property
    def acknowledged(self) -> int:
        """The number of the latest plan that every rank has read."""
        numbers: list[int] = [NUMBER.unpack_from(self._memory, place)[0] for place in self._readers]
        return min(numbers)

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)

    def _place(self, size: int) -> int | None:
        """Where so many bytes in one piece are free."""
        acknowledged = self.acknowledged
        while self._held and self._held[0].number <= acknowledged:
            self._held.popleft()
        if not self._held:
            return 0 if size <= self._room else None
        first, last = self._held[0].start, self._held[-1].end
        if last <= first:  # what is held goes round the end
            return last if last + size <= first else None
        if last + size <= self._room:
            return last
        return 0 if size <= first else None


class RingReader:
    """A rank's end of the ring whose descriptor it was given; ``place`` counts its readers. The
    descriptor may be closed afterwards."""

    def __init__(self, fd: int, place: int) -> None:
        self._memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self._acknowledgement = place * LINE

    def read(self, place: bytes) -> tuple[int, bytes]:
        """The number and the bytes of the plan that lies where a frame says; its room may be
        written to afterwards."""
        number, first, size = PLACE.unpack(place)
        data = self._memory[first : first + size]
        NUMBER.pack_into(self._memory, self._acknowledgement, number)
        return number, data

    def acknowledge(self, number: int) -> None:
        """A plan that lies elsewhere has been read."""
        NUMBER.pack_into(self._memory, self._acknowledgement, number)

    def close(self) -> None:
        self._memory.close()


def read_whole(fd: int) -> bytes:
    """All of a plan that has memory of its own, whose descriptor is closed."""
    try:
        with mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_READ) as memory:
            return memory[:]
    finally:
        os.close(fd)


def own_memory(data: bytes) -> int:
    """The descriptor of memory that holds one large plan."""
    fd = anonymous_memory(len(data))
    with mmap.mmap(fd, len(data)) as memory:
        memory[:] = data
    return fd
