"""What a person at the terminal is shown of a server's start; elsewhere the log says the same."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
import structlog
from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ruvon import __version__
from ruvon.config import ServerConfig
from ruvon.telemetry import Progress as Report
from ruvon.telemetry.logs import Sink

log = structlog.get_logger(__name__)

QUESTION = {"messages": [{"role": "user", "content": "Name three colours."}]}
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # listened on, but nobody is asked there


def is_watched(server: ServerConfig) -> bool:
    """Whether a person looks on: at a terminal that was not asked to be a file of JSON."""
    return Sink(sys.stderr).isatty() and server.log_format != "json"


def terminal(**options: Any) -> Console:
    """The terminal; what it does not take, because it is gone, is dropped."""
    sink: Any = Sink(sys.stderr)
    return Console(file=sink, highlight=False, **options)


def greet(server: ServerConfig) -> None:
    """Say what this is, before importing it takes seconds."""
    if is_watched(server):
        terminal().print(f"\n[bold]ruvon {__version__}[/bold]")


def tell_address(
    server: ServerConfig, host: str, port: int, dialects: Mapping[str, Sequence[str]]
) -> None:
    """Say where it listens, which it does before the model is loaded, and whose APIs it speaks
    there: by name, their endpoints."""
    url = f"{server.scheme}://{bracketed(host)}:{port}"
    url = f"unix:{server.uds}" if server.uds else url
    page = f"{server.scheme}://{ANYWHERE.get(host, bracketed(host))}:{port}/"
    if is_watched(server):
        console = terminal(soft_wrap=True)
        console.print(f"Listening on [bold]{url}[/bold], as")
        for name, endpoints in dialects.items():
            console.print(f"  {name:<10} {', '.join(endpoints)}")
        if server.has_page and server.uds is None:
            console.print(f"  {'a page':<10} {page}")
        console.print()
    else:
        where = {"url": url} if server.uds else {"url": url, "port": port}
        log.info("listening", **where, speaks=list(dialects))


@contextmanager
def loading(server: ServerConfig) -> Iterator[Report]:
    """What shows how far loading is: a bar, or a log line for each phase."""
    if not is_watched(server):
        yield phase_logger()
        return
    columns = (
        TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=terminal(), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda phase, share: bar.update(task, description=phase, completed=share)


def phase_logger() -> Report:
    latest = ""

    def report(phase: str, share: float) -> None:
        nonlocal latest
        if phase != latest:
            log.info("loading", phase=phase)
        latest = phase

    return report


def announce(
    server: ServerConfig, facts: Mapping[str, str], seconds: float, address: tuple[str, int]
) -> None:
    """Say what was loaded and how much fits, and what to type next."""
    if not is_watched(server):
        log.info("ready", seconds=round(seconds, 1), **facts)
        return
    table = Table(box=SIMPLE, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), value, style="bold" if name == "model" else None)
    console = terminal(soft_wrap=True)
    console.print(Padding(table, (0, 0, 0, 1)))
    console.print(f"[bold]Ready[/bold] after {seconds:.1f} s. In another terminal:\n")
    console.print(f"  {first_request(*address, server)}\n", markup=False)
    console.print("Every field is in docs/reference/api.md. Ctrl-C ends the server.\n")


def first_request(host: str, port: int, server: ServerConfig) -> str:
    """A line for a shell that asks the server something, with a key if it needs one."""
    url = f"{server.scheme}://{ANYWHERE.get(host, bracketed(host))}:{port}/v1/chat/completions"
    header = "-H 'Content-Type: application/json'"
    if server.is_keyed:
        header += " -H 'Authorization: Bearer YOUR_KEY'"
    if server.uds is not None:
        url = f"--unix-socket {shlex.quote(server.uds)} http://localhost/v1/chat/completions"
    return f"curl {url} {header} -d {shlex.quote(orjson.dumps(QUESTION).decode())}"


def bracketed(host: str) -> str:
    """As it is written in a URL."""
    return f"[{host}]" if ":" in host else host
