"""Pieces of text while ids come: joined they are the whole, and nothing is shown too early."""

from __future__ import annotations

import codecs
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import END, mixed_strings, trained

from ruvon.errors import RequestError
from ruvon.models.text_stream import StopStrings, TextStream
from ruvon.models.tokenizer import Tokenizer
from ruvon.models.vocab import byte_vocab

POOL = [b"", b"a", b"ab", b"b\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b" ", b"\xff", b"<|x|>"]
"""Tokens by id; the last is special. Parts of characters join to é, 🙂 or nothing valid."""

ids = st.lists(st.integers(0, len(POOL) + 1), max_size=30)  # two of them unknown
stops = st.lists(st.text("ab é🙂\ufffd<|", min_size=1, max_size=4), max_size=3)


def token_bytes(id: int) -> bytes:
    return POOL[id] if id < len(POOL) else b""


@cache
def tokenizer() -> Tokenizer:
    return trained()


def chunked(values: list[int], draw: st.DataObject) -> list[list[int]]:
    chunks, at = [], 0
    while at < len(values):
        size = draw.draw(st.integers(1, 5))
        chunks.append(values[at : at + size])
        at += size
    return chunks


def whole(values: list[int], hidden: frozenset[int] = frozenset()) -> str:
    raw = b"".join(token_bytes(id) for id in values if id not in hidden)
    return raw.decode(errors="replace")


@settings(deadline=None)
@given(ids, st.booleans(), st.data())
def test_pieces_join_to_the_whole(values, skip, data):
    hidden = frozenset({len(POOL) - 1}) if skip else frozenset()
    stream = TextStream(token_bytes, hidden=hidden)
    pieces = [stream.push(chunk) for chunk in chunked(values, data)]
    assert "".join(pieces) + stream.finish() == whole(values, hidden)
    assert stream.num_tokens == len(values)


@settings(deadline=None)
@given(ids)
def test_nothing_shown_is_ever_taken_back(values):
    """At any time what was shown begins every text that may follow: no U+FFFD for a character
    that the next token finishes."""
    stream, shown = TextStream(token_bytes), ""
    for at, id in enumerate(values):
        shown += stream.push([id])
        for next in range(len(POOL)):
            assert whole([*values[: at + 1], next]).startswith(shown)


@settings(deadline=None)
@given(ids, stops, st.booleans(), st.data())
def test_stop_strings_cut_where_the_first_is_complete(values, stop, include, data):
    text = whole(values)
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    stream = TextStream(token_bytes, stop=stop, include_stop=include)
    shown = "".join(stream.push(chunk) for chunk in chunked(values, data)) + stream.finish()
    if ends:
        end, size, first = min(ends)
        assert stream.stopped == first
        assert shown == text[: end if include else end + size]
    else:
        assert stream.stopped is None
        assert shown == text


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=12), st.text("ab", min_size=1, max_size=5))
@example(["aab", "aaa", "b"], "aabaaab")
@example(["aabaaa", "b"], "aabaaac")
def test_no_more_is_held_back_than_may_still_become_the_stop_string(pieces, stop):
    finder, text, shown = StopStrings([stop], include=False), "", ""
    for piece in pieces:
        text, shown = text + piece, shown + finder.push(piece)
        if finder.matched:
            break
        held = text.removeprefix(shown)
        sizes = [size for size in range(len(stop)) if text.endswith(stop[:size])]
        assert len(held) == max(sizes)


@settings(deadline=None)
@given(ids, stops, st.booleans(), st.integers(0, 12), st.data())
def test_stop_strings_that_the_first_tokens_complete_are_text(values, stop, include, least, data):
    """As if they were looked for anew after each token, and found ones forgotten up to there."""
    stream = TextStream(token_bytes, stop=stop, include_stop=include, min_tokens=least)
    shown = "".join(stream.push(chunk) for chunk in chunked(values, data)) + stream.finish()
    before = codecs.utf_8_decode(b"".join(map(token_bytes, values[:least])), "replace", False)[0]
    text = whole(values) if len(values) > least else before
    later = [
        (at + len(s), -len(s), s)
        for s in stop
        for at in range(len(text))
        if text.startswith(s, at) and at + len(s) > len(before)
    ]
    if later:
        end, size, first = min(later)
        assert stream.stopped == first
        assert shown == text[: end if include else end + size]
        assert stream.num_tokens > least
    else:
        assert stream.stopped is None
        assert shown == whole(values)


def test_a_stop_string_over_many_tokens_never_shows():
    stream = TextStream(lambda id: b"x<STOP>y"[id : id + 1], stop=["<STOP>"])
    assert [stream.push([id]) for id in range(8)] == ["x", "", "", "", "", "", "", ""]
    assert (stream.stopped, stream.num_tokens, stream.finish()) == ("<STOP>", 7, "")


@pytest.mark.parametrize("stop", [["b", "ab", "abc"], ["ab", "b"]])
def test_of_stop_strings_that_end_together_the_longest_is_cut(stop):
    stream = TextStream(lambda id: b"xab"[id : id + 1], stop=stop)
    assert stream.push(range(3)) == "x"
    assert stream.stopped == "ab"


def test_a_stop_string_that_never_comes_is_shown():
    stream = TextStream(lambda id: b"x<STO!"[id : id + 1], stop=["<STOP>"])
    assert [stream.push([id]) for id in range(6)] == ["x", "", "", "", "", "<STO!"]
    half = TextStream(lambda id: b"x<STO!"[id : id + 1], stop=["<STOP>"])
    assert half.push(range(5)) == "x"
    assert half.finish() == "<STO"


def test_with_include_stop_nothing_is_held_back():
    stream = TextStream(lambda id: b"ab!c"[id : id + 1], stop=["b!"], include_stop=True)
    assert [stream.push([id]) for id in range(4)] == ["a", "b", "!", ""]


def test_an_unfinished_character_can_complete_a_stop_string_at_the_end():
    stream = TextStream(token_bytes, stop=["\ufffd"])
    assert stream.push([3]) == "b"
    assert stream.finish() == ""
    assert stream.stopped == "\ufffd"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError) as caught:
        TextStream(token_bytes, stop=["a", ""])
    assert caught.value.param == "stop"


@pytest.mark.parametrize("skip", [True, False])
def test_the_tokenizers_stream_equals_its_decode(skip):
    for text in mixed_strings(300, seed=9):
        values = [*tokenizer().encode(text, parse_special=True), tokenizer().vocab_size]
        stream = tokenizer().stream(skip_special_tokens=skip)
        shown = "".join(stream.push([id]) for id in values) + stream.finish()
        assert shown == tokenizer().decode(values, skip_special_tokens=skip)
        if not skip:
            assert shown == text


def test_characters_begun_by_the_prompt_are_finished():
    values = list("🙂é".encode())
    stream = Tokenizer(byte_vocab()).stream(prompt_ids=values[:3])
    assert [stream.push([id]) for id in values[3:]] == ["🙂", "", "é"]


def test_special_tokens_are_hidden_or_shown():
    (end,) = tokenizer().encode(END, parse_special=True)
    assert tokenizer().stream().push([end]) == ""
    assert tokenizer().stream(skip_special_tokens=False).push([end]) == END
    stopping = tokenizer().stream(skip_special_tokens=False, stop=["|im"])
    assert stopping.push([end]) == "<"


@pytest.mark.parametrize(
    ("prompt", "expected"), [([], "hi hi"), ([0], "hi hi"), ([1], " hi hi"), ([0, 1], " hi hi")]
)
def test_a_leading_space_goes_only_where_a_text_begins(prompt, expected):
    llama = SimpleNamespace(
        token_bytes=[b"<s>", b"a", b" hi"].__getitem__,
        special_ids=frozenset({0}),
        strips_space=True,
    )
    stream = Tokenizer.stream(llama, prompt_ids=prompt)
    assert stream.push([2, 2]) == expected


def test_hidden_tokens_can_be_shown():
    stream = TextStream(token_bytes, hidden=frozenset({1, 9}))
    stream.show(frozenset({9}))
    assert stream.push([1, 9, 2]) == "<|x|>ab"


def test_whoever_reads_a_text_can_end_it():
    stream = TextStream(token_bytes, stop=("bx",))
    assert stream.push([1, 2]) == "aa"
    stream.end()
    assert stream.over
    assert stream.stopped is None
    assert stream.push([1]) + stream.finish() == ""
    assert stream.num_tokens == 2
