"""What was answered, for a while: responses by id, their items, and streams to be read again.

Everything is kept as the JSON that it is sent as, so what the store holds is what it counts. It has
bounds in bytes, in number and in time; what was used last goes last.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import orjson
from aiohttp import web

from ruvon.errors import RequestError, ResponseNotFoundError, UnavailableError
from ruvon.server.responses_api.writer import ResponsesWriter

MAX_COUNT = 10_000
OVERHEAD = 2048  # bytes of an entry beside its JSON
EVENTS_AT_ONCE = 64
SHARE = 8  # of the store's bytes that one recording may have is one in so many


class StoredItem(NamedTuple):
    """An item under its id, as JSON."""

    id: str
    json: bytes


class Recording:
    """The events of one stream, so that it can be read again from any number on, also while it
    goes on."""

    def __init__(self, limit: int, room: Callable[[int], bool]) -> None:
        """``room`` takes so many bytes, or tells that there are none. Where there is none, or
        beyond ``limit``, nothing is kept."""
        self.ended = False
        self._lost = False
        self._limit = limit
        self._room = room
        self._size = 0
        self._events: list[bytes] = []
        self._readers: list[asyncio.Future[None]] = []

    def add(self, event: bytes) -> None:
        """Take the event whose number is that of all before it."""
        size = len(event)
        if self._lost or self._size + size > self._limit or not self._room(size):
            self.drop()
        else:
            self._size += size
            self._events.append(event)
        self._wake()

    def drop(self) -> None:
        """Give all room back; who reads is told."""
        self.release()
        self._lost = True
        self._events.clear()
        self._wake()

    def release(self) -> None:
        """Give all room back; what is there goes with its last reader."""
        self._room(-self._size)
        self._size = 0

    def end(self) -> None:
        self.ended = True
        self._wake()

    async def follow(self, number: int) -> AsyncGenerator[bytes, None]:
        """The events from ``number`` on, until the last. Raises RequestError if they are gone."""
        while True:
            self.check()
            if found := self._events[number : number + EVENTS_AT_ONCE]:
                number += len(found)
                yield b"".join(found)
            elif self.ended:
                return
            else:
                await self._news()

    def check(self) -> None:
        """Raise RequestError if the events are gone."""
        if self._lost:
            raise RequestError("The events of this response are no longer kept.", "stream")

    async def _news(self) -> None:
        reader: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.append(reader)
        await reader

    def _wake(self) -> None:
        for reader in self._readers:
            if not reader.done():
                reader.set_result(None)
        self._readers.clear()


@dataclass(slots=True)
class Stored:
    """One response."""

    id: str
    history: tuple[StoredItem, ...]  # what went before the request's own items
    items: tuple[StoredItem, ...]  # the request's own
    recording: Recording | None = None
    owner: str = ""  # the tenant that asked for it; nobody else finds it
    background: bool = False
    output: tuple[StoredItem, ...] = ()
    response: bytes = b""  # the object, once it has ended
    writer: ResponsesWriter | None = None  # until then
    task: asyncio.Task[None] | None = None  # what runs it in the background
    used_at: float = 0.0
    deleted: bool = False

    @property
    def context(self) -> tuple[StoredItem, ...]:
        """All that its answer follows."""
        return self.history + self.items

    @property
    def size(self) -> int:
        """Bytes beside those of the recording. What it shares with others counts for each."""
        items = sum(len(item.json) for item in (*self.context, *self.output))
        return OVERHEAD + items + len(self.response)


class ResponseStore:
    """Responses by id, and their items by theirs."""

    def __init__(
        self, max_bytes: int, ttl: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """At most ``max_bytes``, and each for ``ttl`` seconds after it was used last."""
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[str, Stored] = OrderedDict()  # what was used last is last
        self._sizes: dict[str, int] = {}  # as they were counted
        self._items: dict[str, tuple[str, bytes]] = {}  # id → the response that has it, JSON

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._entries

    def recording(self) -> Recording:
        """Room for a stream."""
        return Recording(self._max_bytes // SHARE, self._take)

    def put(self, entry: Stored) -> None:
        """Keep a response, or count anew one that has changed, at the cost of those used longest
        ago. Raises UnavailableError where what still runs takes all the room."""
        self._forget(entry.id)
        size = entry.size
        if not self._take(size):
            if entry.writer is None:
                if entry.recording is not None:
                    entry.recording.release()
                return
            raise UnavailableError("There is no room for another response.", retry_after=5.0)
        self._sizes[entry.id] = size
        self._entries[entry.id] = entry
        entry.used_at = self._clock()
        for item in (*entry.items, *entry.output):
            self._items[item.id] = (entry.id, item.json)

    def finish(self, entry: Stored, writer: ResponsesWriter) -> None:
        """Keep a response that has ended."""
        entry.writer = None
        entry.output = tuple(StoredItem(one["id"], orjson.dumps(one)) for one in writer.kept())
        entry.response = orjson.dumps(writer.snapshot())
        if entry.recording is not None:
            entry.recording.end()
        if not entry.deleted:
            self.put(entry)

    def get(self, response_id: str, owner: str = "") -> Stored:
        """Raises ResponseNotFoundError, also for what is another's."""
        self._expire()
        entry = self._entries.get(response_id)
        if entry is None or entry.owner != owner:
            raise ResponseNotFoundError(f"Response with id '{response_id[:100]}' not found.")
        entry.used_at = self._clock()
        self._entries.move_to_end(response_id)
        return entry

    def previous(self, response_id: str, owner: str = "") -> tuple[StoredItem, ...]:
        """The conversation that a response ends. Raises RequestError."""
        try:
            entry = self.get(response_id, owner)
        except ResponseNotFoundError:
            raise RequestError(
                f"Previous response with id '{response_id[:100]}' not found.",
                "previous_response_id",
                "previous_response_not_found",
            ) from None
        if entry.writer is not None:
            raise RequestError(
                f"Response '{response_id[:100]}' has not ended yet.", "previous_response_id"
            )
        return entry.context + entry.output

    def find(self, item_ids: Iterable[str], owner: str = "") -> dict[str, bytes]:
        """Those of the items that are here, as JSON."""
        self._expire()
        found: dict[str, bytes] = {}
        for item_id in item_ids:
            response_id, json = self._items.get(item_id, ("", b""))
            if response_id and self._entries[response_id].owner == owner:
                found[item_id] = json
        return found

    def delete(self, response_id: str, owner: str = "") -> Stored:
        """Forget a response for good. Raises ResponseNotFoundError."""
        entry = self.get(response_id, owner)
        entry.deleted = True
        self._drop(entry)
        return entry

    def tasks(self) -> list[asyncio.Task[None]]:
        """What runs in the background."""
        return [entry.task for entry in self._entries.values() if entry.task is not None]

    def _take(self, size: int) -> bool:
        """Count so many more bytes, if there is or can be made room. What is given back makes no
        other response go: whoever forgets one is in the midst of that."""
        if size > 0:
            self._expire()
        while size > 0 and (
            self.num_bytes + size > self._max_bytes or len(self._entries) >= MAX_COUNT
        ):
            oldest = next((id for id, kept in self._entries.items() if kept.writer is None), None)
            if oldest is None:
                return False
            self._drop(self._entries[oldest])
        self.num_bytes += size
        return True

    def _expire(self) -> None:
        """Forget what has not been used for too long; it is first. What runs is not touched."""
        oldest = self._clock() - self._ttl
        while self._entries:
            entry = next(iter(self._entries.values()))
            if entry.used_at >= oldest:
                return
            if entry.writer is None:
                self._drop(entry)
            else:
                entry.used_at = self._clock()
                self._entries.move_to_end(entry.id)

    def _drop(self, entry: Stored) -> None:
        self._forget(entry.id)
        if entry.recording is not None:
            entry.recording.drop()

    def _forget(self, response_id: str) -> None:
        """Drop an entry with its items; its recording stays."""
        entry = self._entries.pop(response_id, None)
        if entry is None:
            return
        self.num_bytes -= self._sizes.pop(response_id)
        for item in (*entry.items, *entry.output):
            if self._items.get(item.id, ("", b""))[0] == response_id:
                del self._items[item.id]


RESPONSES = web.AppKey("responses", ResponseStore)
