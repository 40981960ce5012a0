"""HTTP itself: headers, methods, connections."""

from __future__ import annotations

from ruvon.doctor.ask import CHAT, STORY, answer, check_answered, post_chat, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import expect, expect_equal, not_empty
from ruvon.doctor.probe import Probe

SHORT = {"messages": user(STORY), "max_tokens": 1}


async def json_content_type(probe: Probe) -> None:
    """An answer is application/json."""
    reply = await post_chat(probe)
    check_answered(reply)
    kind = reply.headers.get("Content-Type", "none")
    expect(kind.startswith("application/json"), "application/json", kind)


async def json_length(probe: Probe) -> None:
    """Its Content-Length is that of the body, where it is told."""
    reply = await post_chat(probe)
    length = reply.headers.get("Content-Length")
    if length is not None:
        expect_equal(int(length), len(reply.body), "Content-Length")


async def request_id(probe: Probe) -> None:
    """Every answer has an X-Request-Id."""
    found = (await post_chat(probe)).headers.get("X-Request-Id")
    expect(not_empty(found), "X-Request-Id", found)


async def request_id_unique(probe: Probe) -> None:
    """Two answers have two."""
    one, other = await post_chat(probe), await post_chat(probe, again=1)
    ids = one.headers.get("X-Request-Id"), other.headers.get("X-Request-Id")
    expect(ids[0] != ids[1], "two ids", ids)


async def request_id_on_errors(probe: Probe) -> None:
    """An error has one too."""
    found = (await post_chat(probe, temperature="hot")).headers.get("X-Request-Id")
    expect(not_empty(found), "X-Request-Id", found)


@optional
async def request_id_kept(probe: Probe) -> None:
    """A client's own X-Request-Id comes back."""
    reply = await probe.post(CHAT, {"model": probe.model, **SHORT}, {"X-Request-Id": "doctor-1"})
    expect_equal(reply.headers.get("X-Request-Id"), "doctor-1", "X-Request-Id")


async def request_id_not_split(probe: Probe) -> None:
    """One that is not printable is not sent back."""
    reply = await probe.get("/v1/models", {"X-Request-Id": "a\u00e9" * 100})
    found = reply.headers.get("X-Request-Id", "")
    expect(found.isascii() and len(found) < 200, "an id of its own", found)


async def no_content_type(probe: Probe) -> None:
    """A body is JSON whatever its Content-Type says: curl -d sends another."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    answer(await probe.post(CHAT, {"model": probe.model, **SHORT}, kind))


async def charset(probe: Probe) -> None:
    """A charset in the Content-Type is taken."""
    kind = {"Content-Type": "application/json; charset=utf-8"}
    answer(await probe.post(CHAT, {"model": probe.model, **SHORT}, kind))


async def accept_header(probe: Probe) -> None:
    """Accept: text/event-stream without stream still gets JSON."""
    reply = await probe.post(CHAT, {"model": probe.model, **SHORT}, {"Accept": "text/event-stream"})
    answer(reply)
    expect(reply.headers["Content-Type"].startswith("application/json"), "JSON", "a stream")


async def sdk_headers(probe: Probe) -> None:
    """The headers of OpenAI's SDK are taken."""
    headers = {
        "X-Stainless-Lang": "python", "X-Stainless-Retry-Count": "0",
        "X-Stainless-Read-Timeout": "600", "OpenAI-Organization": "org-1",
        "OpenAI-Project": "proj-1", "User-Agent": "OpenAI/Python 3.54.0",
        "Accept-Encoding": "gzip, deflate",
    }  # fmt: skip
    answer(await probe.post(CHAT, {"model": probe.model, **SHORT}, headers))


async def head(probe: Probe) -> None:
    """HEAD of a path that GET has is answered without a body."""
    reply = await probe.ask("HEAD", "/v1/models")
    expect(reply.status in (200, 404, 405), "200 or 405", reply.status)
    expect_equal(reply.body, b"", "the body")


async def options(probe: Probe) -> None:
    """OPTIONS is answered, and is no server error."""
    reply = await probe.ask("OPTIONS", CHAT)
    expect(reply.status < 500, "no server error", reply.status)


async def delete(probe: Probe) -> None:
    """DELETE where nothing can be deleted is a 405 or 404 with JSON."""
    reply = await probe.ask("DELETE", CHAT)
    expect(reply.status in (404, 405), "404 or 405", reply.status)
    expect("error" in reply.json, "an error object", reply.json)


async def allow(probe: Probe) -> None:
    """A 405 says in Allow what is allowed."""
    reply = await probe.ask("DELETE", CHAT)
    if reply.status == 405:
        expect("POST" in reply.headers.get("Allow", ""), "Allow: POST", dict(reply.headers))


async def query_string(probe: Probe) -> None:
    """A query string that means nothing is passed over."""
    answer(await probe.post(f"{CHAT}?api-version=1&beta=true", {"model": probe.model, **SHORT}))


async def keep_alive(probe: Probe) -> None:
    """A connection is kept for a next request."""
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + _authorization(probe) + b"\r\n"
    came = await probe.raw(request * 2, 2.0)
    expect_equal(came.count(b"HTTP/1.1 200"), 2, "answers on one connection")


async def keep_alive_after_error(probe: Probe) -> None:
    """So it is after an error."""
    body = b'{"messages": 5}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    request = head + _authorization(probe) + b"\r\n" + body
    came = await probe.raw(request * 2, 2.0)
    expect_equal(came.count(b"HTTP/1.1 400"), 2, "answers on one connection")


async def malformed_http(probe: Probe) -> None:
    """What is no HTTP gets a 400, or the connection's end."""
    came = await probe.raw(b"HELLO\r\n\r\n", 3.0)
    expect(came == b"" or b" 400 " in came[:20], "400", came[:100].decode(errors="replace"))


async def chunked_body(probe: Probe) -> None:
    """A body may come in chunks, without a Content-Length."""
    body = b'{"messages": 5}'
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += b"Transfer-Encoding: chunked\r\n" + _authorization(probe) + b"\r\n"
    came = await probe.raw(head + chunks, 3.0)
    expect(b" 400 " in came[:20] and b"messages" in came, "a 400 about messages", came[:300])


async def expect_continue(probe: Probe) -> None:
    """Expect: 100-continue is answered."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    head += b"Connection: close\r\nContent-Length: 15\r\n" + _authorization(probe) + b"\r\n"
    came = await probe.raw(head + b'{"messages": 5}', 3.0)
    expect(came.startswith(b"HTTP/1.1 "), "an answer", came[:100])


async def gzip_body(probe: Probe) -> None:
    """A compressed body is understood, or refused with a 4xx."""
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    reply = await probe.ask("POST", CHAT, b"\x1f\x8bnot really", headers)
    expect(400 <= reply.status < 500, "a status from 400 to 499", reply.status)


def _authorization(probe: Probe) -> bytes:
    """The header line of the key, if there is one."""
    return f"Authorization: Bearer {probe.api_key}\r\n".encode() if probe.api_key else b""


CHECKS = collect("http", globals())
