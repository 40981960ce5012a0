"""The store alone: its bounds hold, and what is shared stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ruvon.errors import RequestError, ResponseNotFoundError, UnavailableError
from ruvon.server.responses_api import store as module
from ruvon.server.responses_api.store import OVERHEAD, Recording, ResponseStore, Stored, StoredItem


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def entry(name: str, size: int = 1000, history: tuple[StoredItem, ...] = ()) -> Stored:
    """A response of so many bytes that has ended."""
    items = (StoredItem(f"msg_{name}", b"x" * size),)
    return Stored(name, history, items)


def running(name: str, size: int = 1000) -> Stored:
    made = entry(name, size)
    made.writer = SimpleNamespace()  # type: ignore[assignment]
    return made


def names(store: ResponseStore) -> set[str]:
    return {name for name in "abcdef" if name in store}


ROOM = 3 * (OVERHEAD + 1000)


def test_what_was_used_longest_ago_goes_first(clock):
    store = ResponseStore(ROOM, 100, clock)
    for name in "abc":
        store.put(entry(name))
    assert store.num_bytes == ROOM
    store.get("a")
    store.put(entry("d"))
    assert names(store) == {"a", "c", "d"}
    store.put(entry("e", 2000))  # for which two have to go
    assert names(store) == {"d", "e"}
    assert store.num_bytes == 2 * OVERHEAD + 3000
    store.put(entry("f", ROOM))  # does not fit at all
    assert "f" not in store
    assert store.num_bytes <= ROOM


def test_what_is_not_used_goes_with_time(clock):
    store = ResponseStore(ROOM, 100, clock)
    store.put(entry("a"))
    clock.now = 60
    store.put(entry("b"))
    clock.now = 99
    store.get("a")
    clock.now = 170
    assert store.get("a").id == "a"
    with pytest.raises(ResponseNotFoundError):
        store.get("b")
    assert store.find(["msg_a", "msg_b"]) == {"msg_a": b"x" * 1000}
    clock.now = 300
    assert store.find(["msg_a"]) == {}
    assert (len(store), store.num_bytes) == (0, 0)


def test_many_streams_go_at_once(clock):
    """However many: to forget one is not to forget the next within."""
    store = ResponseStore(1 << 24, 100, clock)
    for number in range(1000):
        made = entry(str(number), 1)
        made.recording = store.recording()
        made.recording.add(b"event")
        store.put(made)
    clock.now = 101
    assert store.find([]) == {}
    assert (len(store), store.num_bytes) == (0, 0)


def test_there_is_a_most(clock, monkeypatch):
    monkeypatch.setattr(module, "MAX_COUNT", 2)
    store = ResponseStore(1 << 20, 100, clock)
    for name in "abc":
        store.put(entry(name, 1))
    assert names(store) == {"b", "c"}


def test_what_runs_stays_and_may_take_all_the_room(clock):
    store = ResponseStore(ROOM, 100, clock)
    for name in "ab":
        store.put(running(name))
    clock.now = 1000
    store.put(entry("c"))
    store.put(running("d"))
    assert names(store) == {"a", "b", "d"}
    with pytest.raises(UnavailableError):
        store.put(running("e"))
    store.put(entry("f"))  # which is not kept, and that is no error
    assert names(store) == {"a", "b", "d"}
    with pytest.raises(RequestError, match="has not ended"):
        store.previous("a")


def test_a_conversation_survives_its_middle(clock):
    store = ResponseStore(1 << 20, 100, clock)
    first = entry("a")
    store.put(first)
    store.put(entry("b", history=first.items))
    assert store.previous("b") == (*first.items, StoredItem("msg_b", b"x" * 1000))
    assert store.delete("a").id == "a"
    assert len(store.previous("b")) == 2
    assert store.find(["msg_a"]) == {}  # it went with its response
    with pytest.raises(RequestError) as gone:
        store.previous("a")
    assert gone.value.code == "previous_response_not_found"


def test_an_item_that_two_responses_have_stays_with_the_later(clock):
    store = ResponseStore(1 << 20, 100, clock)
    store.put(entry("a"))
    again = Stored("b", (), entry("a").items)
    store.put(again)
    store.delete("a")
    assert set(store.find(["msg_a"])) == {"msg_a"}
    store.delete("b")
    assert store.num_bytes == 0


async def read(recording: Recording, number: int = 0) -> bytes:
    return b"".join([data async for data in recording.follow(number)])


async def test_events_count_and_go_with_their_response(clock):
    store = ResponseStore(80_000, 100, clock)
    kept = entry("a")
    kept.recording = store.recording()
    for number in range(100):
        kept.recording.add(b"%02d" % number)
    kept.recording.end()
    store.put(kept)
    assert store.num_bytes == OVERHEAD + 1000 + 200
    assert await read(kept.recording, 97) == b"979899"
    assert await read(kept.recording, 1000) == b""
    store.delete("a")
    assert store.num_bytes == 0
    with pytest.raises(RequestError):
        await read(kept.recording)


async def test_a_stream_that_is_too_long_is_not_kept(clock):
    store = ResponseStore(80_000, 100, clock)
    recording = store.recording()
    for _ in range(11):
        recording.add(b"x" * 1000)  # an eighth of all is the most
    assert store.num_bytes == 0
    with pytest.raises(RequestError):
        recording.check()


async def test_where_there_is_no_room_no_event_is_kept(clock):
    store = ResponseStore(ROOM, 100, clock)
    for name in "abc":
        store.put(running(name))
    recording = store.recording()
    recording.add(b"x")
    with pytest.raises(RequestError):
        recording.check()
    assert store.num_bytes == ROOM


async def test_what_is_not_kept_gives_its_events_room_back(clock):
    """Whoever reads them goes on."""
    store = ResponseStore(ROOM, 100, clock)
    made = running("a")
    made.recording = store.recording()
    store.put(made)
    made.recording.add(b"event")
    made.writer, made.response = None, b"x" * ROOM
    made.recording.end()
    store.put(made)
    assert ("a" in store, store.num_bytes) == (False, 0)
    assert await read(made.recording) == b"event"


async def test_dropping_twice_gives_back_once(clock):
    store = ResponseStore(80_000, 100, clock)
    recording: Any = store.recording()
    recording.add(b"x" * 100)
    recording.drop()
    recording.drop()
    recording.add(b"x")
    assert store.num_bytes == 0
