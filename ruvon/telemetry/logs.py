"""Logs: ours and the libraries', through one sink that neither raises nor waits."""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Mapping
from typing import Literal, TextIO

import structlog

PIECE = 4096  # bytes that a pipe takes whole or not at all (Linux's PIPE_BUF)
PATIENCE = 5  # milliseconds that one line may wait for a slow reader; after that, none waits


class Sink:
    """Writes lines to a stream. What cannot be written is dropped and counted, whatever the
    reason: the reader is gone or has stopped reading, the disk is full, the stream is closed."""

    def __init__(self, stream: TextIO | None) -> None:
        """``stream`` is None where the process began without one (``2>&-``)."""
        self.dropped = 0  # lines
        self._stream = stream
        self._patience = PATIENCE
        self._poll: select.poll | None = None
        try:
            self._file = -1 if stream is None else stream.fileno()
        except (OSError, ValueError):
            self._file = -1  # kept in memory
        if self._file >= 0 and hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(self._file, select.POLLOUT)

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # closed
            return False

    def write(self, text: str) -> None:
        """Write ``text``, or count it as dropped."""
        try:
            if self._file >= 0:
                self._write_pieces(text.encode(errors="backslashreplace"))
            elif self._stream is not None:
                self._stream.write(text)
            else:
                self.dropped += 1
        except (OSError, ValueError):
            self.dropped += 1

    def _write_pieces(self, data: bytes) -> None:
        while data:
            if self._poll is not None and not self._poll.poll(self._patience):
                self._patience = 0
                raise BlockingIOError
            self._patience = PATIENCE
            data = data[os.write(self._file, data[:PIECE]) :]

    def flush(self) -> None:
        """For `logging`; nothing is held back."""


def wants_colours(environ: Mapping[str, str]) -> bool:
    """Whether a terminal is to be written to in colours, as https://no-color.org has it."""
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


OF_PEERS = ("bytes", "client", "user_agent")


def without_peers(
    logger: object, name: str, entry: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A request's line for people, who know whose it is and have no room to be told."""
    if entry["event"] == "request":
        return {key: value for key, value in entry.items() if key not in OF_PEERS}
    return entry


def configure_logging(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["auto", "console", "json"] = "auto",
) -> Sink:
    """Send all logs to stderr, as console lines or as JSON lines; returns where they go."""
    sink = Sink(sys.stderr)
    console = format == "console" or (format == "auto" and sink.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
    ]
    render: list[structlog.typing.Processor] = (
        [
            without_peers,
            structlog.dev.ConsoleRenderer(
                colors=sink.isatty() and wants_colours(os.environ),
                pad_event_to=0,
                pad_level=False,
                sort_keys=False,
                # No locals: they hold what people asked.
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    number = logging.getLevelName(level.upper())
    structlog.configure(
        processors=[*shared, structlog.processors.StackInfoRenderer(), *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sink),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    # Libraries speak up from "warning": their info lines are about themselves, not about ruvon.
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    return sink
