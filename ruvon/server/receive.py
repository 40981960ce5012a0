"""A request's body as it comes, within bounds of size and time."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ruvon.errors import BodyTimeoutError, BodyTooLargeError, EncodingError

BODY_PATIENCE = 60.0  # seconds that a body may take, and as many more
SLOWEST = 1024  # as it has bytes, by so many


async def receive(http: web.Request) -> list[bytes]:
    """The body as it comes. One that is declared too large is not waited for."""
    encoding, limit = http.headers.get("Content-Encoding", "identity"), http.client_max_size
    if encoding.lower() != "identity":
        raise EncodingError(f"Content-Encoding '{encoding[:20]}' is not supported.")
    declared, size = http.content_length or 0, 0
    if http.content.is_eof() and declared <= limit:  # all of it came with the head, as a rule
        whole = http.content.read_nowait()
        if len(whole) <= limit:
            return [whole]
        size = len(whole)
    began = asyncio.get_running_loop().time()
    pieces: list[bytes] = []
    while max(declared, size) <= limit:
        try:
            async with asyncio.timeout_at(began + BODY_PATIENCE + size / SLOWEST):
                piece = await http.content.readany()
        except TimeoutError:
            raise BodyTimeoutError(
                f"The body came more slowly than {SLOWEST} bytes a second."
            ) from None
        if not piece:
            return pieces
        pieces.append(piece)
        size += len(piece)
    raise BodyTooLargeError(f"The request body is larger than {limit} bytes.")
