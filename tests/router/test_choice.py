"""Who gets a request, and what a router believes of caches: pure functions."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, field

import orjson
import pytest

from ruvon.config import RouterConfig
from ruvon.errors import ConfigError
from ruvon.router.choice import choose
from ruvon.router.fleet import Fleet, Remembered
from ruvon.router.prefixes import PIECE, Prefixes, chain
from ruvon.router.prompt import read_prompt
from ruvon.router.replica import Address, parse_url


@dataclass(eq=False)
class Some:
    load: int = 0
    prefixes: Prefixes = field(default_factory=lambda: Prefixes(1000))


def keys(*pieces: str) -> list[bytes]:
    return chain(b"", b"".join(piece.encode() * PIECE for piece in pieces))


def test_the_longest_prefix_wins_within_the_bound():
    short, long, none = Some(), Some(load=3), Some()
    short.prefixes.hold(keys("a"))
    long.prefixes.hold(keys("a", "b"))
    everyone = [short, long, none]
    assert choose(everyone, keys("a", "b", "c"), 3) == (long, 2, "prefix")
    assert choose(everyone, keys("a", "b", "c"), 2) == (short, 1, "prefix")
    assert choose(everyone, [], 2, turn=1) == (none, 0, "load")
    assert choose([], keys("a"), 2) is None


def test_ties_go_to_the_session_then_the_least_loaded_then_in_turns():
    busy, idle, other = Some(load=2), Some(), Some()
    everyone = [busy, idle, other]
    assert choose(everyone, keys("x"), 5, session=busy) == (busy, 0, "session")
    assert choose(everyone, keys("x"), 1, session=busy)[0] in (idle, other)
    got = [choose(everyone, keys("x"), 5, turn=turn)[0] for turn in range(6)]
    assert set(got) == {idle, other}


def test_a_chain_is_forgotten_from_its_end():
    prefixes = Prefixes(limit=4)
    prefixes.hold(keys("a", "b", "c"))
    prefixes.hold(keys("a", "x"))
    assert (prefixes.match(keys("a", "b", "c")), prefixes.match(keys("a", "x"))) == (3, 2)
    prefixes.hold(keys("y"))  # one too many: c was used longest ago
    assert (prefixes.match(keys("a", "b", "c")), prefixes.match(keys("a", "x"))) == (2, 2)
    prefixes.forget(1)
    assert prefixes.match(keys("a", "b")) == 1
    prefixes.hold(keys("p", "q", "r", "s", "t", "u"))  # its own end does not fit
    assert prefixes.match(keys("p", "q", "r", "s", "t", "u")) == 4


def test_only_full_pieces_have_keys():
    sizes = (0, PIECE - 1, PIECE, 2 * PIECE - 1, 2 * PIECE)
    assert [len(chain(b"", bytes(size))) for size in sizes] == [0, 0, 1, 1, 2]


def test_a_longer_conversation_begins_as_a_shorter_one():
    messages = [{"role": "user", "content": "x" * 400}]
    more = [*messages, {"role": "assistant", "content": "y" * 400}]
    first, second = (prompt(messages=each) for each in (messages, more))
    assert first.keys == second.keys[: len(first.keys)] != ()
    for other in ({"cache_salt": "s"}, {"model": "m"}, {"tools": [{"type": "function"}]}):
        assert prompt(messages=messages, **other).keys[0] != first.keys[0]
    key = {"Authorization": "Bearer k"}
    assert read_prompt(CHAT, key, orjson.dumps({"messages": messages})).keys[0] != first.keys[0]


CHAT = "/v1/chat/completions"


def prompt(path: str = CHAT, **fields):
    return read_prompt(path, {}, orjson.dumps(fields))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"messages": 7}', b'{"messages": null}', b"\xff"]
)
def test_what_makes_no_sense_has_no_prompt(body):
    assert read_prompt(CHAT, {}, body).keys == ()


def test_what_only_one_replica_has_is_named():
    assert read_prompt("/v1/responses/resp_1/cancel", {}, b"").held == "resp_1"
    assert read_prompt("/v1/responses/input_tokens", {}, b"{}").held is None
    assert read_prompt(CHAT, {"Last-Event-ID": "chatcmpl-1:7"}, b"{}").held == "chatcmpl-1"
    assert prompt("/v1/responses", previous_response_id="resp_2").held == "resp_2"
    item = {"type": "item_reference", "id": "msg_3"}
    assert prompt("/v1/responses", input=[item]).held == "msg_3"


def test_what_a_replica_says_is_believed():
    replica = Fleet(RouterConfig()).add("http://localhost:1")
    told = {"status": "ready", "epoch": "a-0", "running": 3, "waiting": 1, "evicted_tokens": 0}
    replica.hear(told)
    replica.in_flight = 1
    replica.hear(told)
    assert (replica.open, replica.load) == (True, 4)
    replica.prefixes.hold(keys("a", "b", "c", "d"))
    replica.hear(told | {"evicted_tokens": 128})  # 512 bytes
    assert replica.prefixes.match(keys("a", "b", "c", "d")) == 2
    replica.hear(told | {"epoch": "a-1"})
    assert replica.prefixes.match(keys("a")) == 0
    replica.hear({"status": "draining", "epoch": "a-1"})
    assert not replica.open


def test_a_replica_tells_totals_and_what_is_new_of_them_is_taken_once():
    replica = Fleet(RouterConfig()).add("http://localhost:1")

    def taken(epoch: str, **spent: int) -> dict[str, int]:
        replica.hear({"status": "ready", "epoch": epoch, "spent": spent})
        return replica.take_spent()

    assert taken("a-0", one=5) == {"one": 5}
    assert taken("a-0", one=5) == {"one": 0}
    assert taken("a-1", one=7, two=1) == {"one": 2, "two": 1}  # its cache was emptied
    replica.hear({"status": "starting"})  # as a server of another make says it
    replica.lose()
    assert replica.take_spent() == {}
    assert taken("a-1", one=8, two=1) == {"one": 1, "two": 0}
    assert taken("b-0", one=9) == {"one": 9}  # it was started again


def test_a_url_says_where_a_replica_is():
    assert parse_url("http://h:8000") == Address("h", 8000)
    assert parse_url("https://[::1]/") == Address("::1", 443, tls=True)
    assert parse_url("unix:/run/r.sock").path == "/run/r.sock"
    for wrong in ("h:8000", "ftp://h", "http://h/v1", "http://h:x", "http://u@h", "unix:"):
        with pytest.raises(ConfigError, match="no URL of a replica"):
            parse_url(wrong)


def test_a_body_of_more_values_than_any_prompt_is_not_even_parsed():
    """Four megabytes of empty lists would take seconds and gigabytes."""

    def prompt(value: bytes):
        return read_prompt("/v1/completions", {}, b'{"prompt":%s}' % value)

    assert len(prompt(b"[" + b"97," * 100_000 + b"1]").keys) > 1000
    for value in (b"[" + b"97," * 400_000 + b"1]", b"[" + b"[]," * 20_000 + b"[]]"):
        assert prompt(value).keys == ()


def test_no_clients_name_of_a_session_takes_more_room_than_another():
    remembered, replica = Remembered(), Some()
    tracemalloc.start()
    for number in range(1000):
        remembered.note(f"{number}" + "x" * 8000, replica)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 1_000_000
    assert remembered.find("7" + "x" * 8000) is replica
    assert remembered.find("7" + "x" * 7999 + "\udc80") is None
    remembered.forget(replica)
    assert remembered.find("7" + "x" * 8000) is None
