"""A small synchronous client for any OpenAI-compatible server: what `chat --url` and friends use.

Standard library only, so that commands which talk to a server start at once.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ruvon.errors import PeerError, RequestError

TIMEOUT = 600.0  # seconds without a byte; a long prompt on a small machine needs a while
DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Client:
    """One server. ``url`` is with or without ``/v1`` at its end."""

    url: str
    api_key: str | None = None

    def get(self, path: str) -> Any:
        """The JSON answer to ``GET path``.

        Raises:
            PeerError: the server cannot be reached or answers with an error.
        """
        raw = self.read(path)
        try:
            return json.loads(raw)
        except json.JSONDecodeError as error:
            raise PeerError(f"{self.url}: {error}") from error

    def read(self, path: str) -> bytes:
        """The answer to ``GET path`` as it comes; raises as `get`."""
        with self._exchange("GET", path, None) as response:
            return response.read()

    def stream(self, path: str, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer to ``POST path``, up to ``[DONE]``. Closing the iterator
        closes the connection, by which the server knows to stop.

        Raises:
            PeerError: as `get`, or the stream breaks off or carries an error event.
        """
        with self._exchange("POST", path, {**payload, "stream": True}) as response:
            for data in _data_lines(response):
                if data == DONE:
                    return
                event = json.loads(data)
                if "error" in event:
                    raise PeerError(_message(event) or data)
                yield event
        raise PeerError(f"{self.url} ended the stream before it was done")

    @contextmanager
    def _exchange(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect()
        try:
            connection.request(method, self._path(path), _encode(body), self._headers())
            response = connection.getresponse()
            if response.status >= 400:
                raise PeerError(_explain(response))
            yield response
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise PeerError(f"{self.url}: {error or type(error).__name__}") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=TIMEOUT)

    def _path(self, path: str) -> str:
        base = urlsplit(self.url).path.rstrip("/")
        return base.removesuffix("/v1") + path

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def _encode(body: Any) -> bytes | None:
    """Raises RequestError for text that was no UTF-8 when it was typed."""
    try:
        return None if body is None else json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None


def _data_lines(response: http.client.HTTPResponse) -> Iterator[str]:
    """The ``data:`` payloads of server-sent events; comments and other fields are passed over."""
    for line in response:
        field, _, value = line.decode("utf-8").rstrip("\r\n").partition(":")
        if field == "data":
            yield value.removeprefix(" ")


def _explain(response: http.client.HTTPResponse) -> str:
    raw = response.read().decode("utf-8", "replace")
    try:
        message = _message(json.loads(raw))
    except json.JSONDecodeError:
        message = None
    return f"{response.status} {response.reason}: {message or raw[:500]}"


def _message(body: Any) -> str | None:
    """The message inside OpenAI's error object, in any of the shapes servers give it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        return error.get("message") or error.get("detail")
    return error if isinstance(error, str) else None
