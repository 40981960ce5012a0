"""Where a response ends, however its bytes come."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvon.router.framing import Chunked, FramingError, Sized, Unsized, body_of, parse_head, payload

CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=5)


def framed(chunks: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


@settings(max_examples=200, deadline=None)
@given(
    CHUNKS,
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from((b"\r\n", b"Trailer: x\r\n\r\n")),
)
def test_chunks_pass_as_they_are_however_they_are_cut(chunks, places, end):
    body, passed = Chunked(), b""
    whole = framed(chunks)
    for piece in cut(whole + b"0\r\n" + end, places):
        assert not body.done
        passed += body.feed(piece)
    assert body.done
    assert passed == whole
    assert payload(passed) == b"".join(chunks)


@pytest.mark.parametrize("size", [1, 9, 10, 255, 256, 4095, 4096, 70_000])
def test_a_chunk_of_any_size(size):
    whole, body = framed([b"x" * size, b"y"]), Chunked()
    assert body.feed(whole[:-1]) == whole[:-1]
    assert not body.whole
    assert body.feed(whole[-1:]) == whole[-1:]
    assert (body.whole, body.done) == (True, False)
    assert payload(whole) == b"x" * size + b"y"


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"-1\r\n",
        b"\r\n",
        b"0\r\n\r\nmore",
        b"f" * 17 + b"\r\n",
        b"1;" + b"a" * 9000,
    ],
)
def test_what_is_no_chunk_is_no_answer(data):
    with pytest.raises(FramingError):
        Chunked().feed(data)


def test_a_head_says_how_its_body_ends():
    def body(*lines: str, method: str = "GET", first: str = "HTTP/1.1 200 OK"):
        return body_of(method, parse_head("\r\n".join([first, *lines]).encode()))

    assert isinstance(body("Transfer-Encoding: chunked", "Content-Length: 5"), Chunked)
    assert body("content-length: 5").left == 5
    assert isinstance(body(), Unsized)
    assert body("Content-Length: 5", method="HEAD").done
    assert body(first="HTTP/1.1 204 No Content").done
    for wrong in ("Content-Length: -1", "Content-Length: 1_0", "no colon", " folded: x"):
        with pytest.raises(FramingError):
            body(wrong)
    with pytest.raises(FramingError, match="status line"):
        parse_head(b"SSH-2.0-x")
    sized = Sized(3)
    assert sized.feed(b"ab") == b"ab"
    with pytest.raises(FramingError, match="more than"):
        sized.feed(b"cd")


@pytest.mark.parametrize(
    ("version", "said", "keeps"),
    [("1.1", "", True), ("1.1", "close", False), ("1.0", "", False), ("1.0", "keep-alive", True)],
)
def test_a_head_says_whether_the_connection_goes_on(version, said, keeps):
    lines = f"HTTP/{version} 200 OK" + (f"\r\nConnection: {said}" if said else "")
    assert parse_head(lines.encode()).keeps_open is keeps
