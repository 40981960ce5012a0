"""Messages between the scheduler's process and those of the ranks: frames on a stream socket.

A frame is a kind, the rank that it is from or for, the payload's size, and the payload. On one
machine the sockets are a pair that nobody else can open, and what is large, plans, lies in shared
memory (`ruvon.engine.ranks.ring`); between machines it is a TCP connection, and plans are payloads.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from enum import IntEnum
from threading import Lock
from typing import Any, NamedTuple

import orjson

HEADER = struct.Struct("<BxHI")
LARGEST = 1 << 30  # bytes of a payload; whoever says more is not one of us
AT_ONCE = 1 << 18  # bytes read


class Kind(IntEnum):
    """What a frame is about. First what the scheduler's process says, then what a rank does."""

    SETUP = 1  # JSON; what to load, and which rank this is
    CACHE = 2  # JSON: how many blocks
    PLAN = 3  # where it lies in the ring
    LARGE_PLAN = 4  # its number; it lies in memory of its own, which comes along
    RESUME = 5  # after a failed step: all have agreed that it failed
    PING = 6
    GRAMMAR = 7  # JSON: one that plans will ask for
    END = 8
    WHOLE_PLAN = 9  # to another machine: its number, and the plan
    WELCOME = 10  # JSON, to another machine: where ranks meet
    PROGRESS = 33  # JSON: phase, share
    LOADED = 34  # JSON: what its share of the model takes, and what is left for the cache
    READY = 35  # JSON: how it computes
    RESULT = 36  # a step's result, from the rank that answers for all
    DONE = 37  # a step is over
    FAILED = 38  # JSON: a step has failed
    PONG = 39
    LOG = 40  # JSON: level, event, fields
    FATAL = 41  # JSON: why it ends
    GONE = 42  # JSON, from another machine: how one of its ranks has ended


WITH_MEMORY = (Kind.SETUP, Kind.LARGE_PLAN)
"""Frames that a descriptor comes along with, if they do not come from another machine."""


class Frame(NamedTuple):
    kind: Kind
    rank: int
    payload: bytes
    fds: tuple[int, ...] = ()  # descriptors that came along

    @property
    def json(self) -> Any:
        return orjson.loads(self.payload)


class Channel:
    """One end of a connection. Frames may be sent from any thread, and received in one."""

    def __init__(self, connection: socket.socket, rank: int = 0) -> None:
        """``rank`` is what frames are from or for, where nothing else is said."""
        self._socket = connection
        self._rank = rank
        self._sending = Lock()
        self._received = bytearray()
        self._fds: deque[int] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(
        self,
        kind: Kind,
        payload: bytes = b"",
        *,
        rank: int | None = None,
        fds: tuple[int, ...] = (),
    ) -> None:
        """Send a frame, waiting until the other end's buffer takes it. Raises OSError when there is
        no other end. Descriptors in ``fds`` go along; they stay open here."""
        data = HEADER.pack(kind, self._rank if rank is None else rank, len(payload)) + payload
        with self._sending:
            if fds:
                sent = socket.send_fds(self._socket, [data], list(fds))
                data = data[sent:]
            self._socket.sendall(data)

    def send_json(self, kind: Kind, value: Any, *, rank: int | None = None) -> None:
        self.send(kind, orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS), rank=rank)

    def receive(self) -> Frame:
        """The next frame. Raises EOFError when the other end is closed."""
        while (frame := self._next()) is None:
            self._read(0)
        return frame

    def available(self) -> list[Frame]:
        """All that has arrived, once `fileno` is readable. Raises EOFError when the other end is
        closed."""
        self._read(socket.MSG_DONTWAIT)
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _read(self, flags: int) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, AT_ONCE, 1, flags)
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError("the connection is closed")
        self._received += data
        self._fds.extend(fds)

    def _next(self) -> Frame | None:
        """The first frame of what has been read, if all of it is here."""
        if len(self._received) < HEADER.size:
            return None
        number, rank, size = HEADER.unpack_from(self._received)
        if size > LARGEST:
            raise EOFError(f"a frame of {size} bytes")
        end = HEADER.size + size
        if len(self._received) < end:
            return None
        payload = bytes(self._received[HEADER.size : end])
        del self._received[:end]
        kind = Kind(number)
        fds = (self._fds.popleft(),) if kind in WITH_MEMORY and self._fds else ()
        return Frame(kind, rank, payload, fds)
