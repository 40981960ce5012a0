"""Other people's attack and load tools against a server, and what a client beside them sees.

    python bench/flood.py [--seconds 30] [--tools FOLDER] [NAME ...] [-- SERVE OPTIONS]

slowhttptest, wrk and h2load are Debian packages (slowhttptest, wrk, nghttp2-client). Those that are
installed run, each for so many seconds, while one client goes on asking for short completions;
those that are not are named. ``--tools`` is a folder into which packages were unpacked
(``dpkg -x``). Exit code 1: a client was not answered, or the server was not as before at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from measure import machine, write
from process import Server, free_port, memory, running

from ruvon.bench import find_model, open_session

BODY = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
PATIENCE = 30.0  # seconds that a client beside an attack waits at most
SETTLES = 90.0  # seconds until what a tool has left behind must be gone
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LUA = """wrk.method = "POST"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
"""


@dataclass
class Attack:
    """A program, its arguments, and what of its output is worth a line."""

    program: str
    package: str
    what: str
    arguments: Callable[[str, float, Path], Sequence[object]]
    tells: Sequence[str]


def slow(mode: str, *more: object) -> Callable[[str, float, Path], Sequence[object]]:
    """slowhttptest in one of its modes: 500 connections, 200 a second."""

    def arguments(url: str, seconds: float, folder: Path) -> Sequence[object]:
        return [
            mode, "-c", 500, "-r", 200, "-i", 2, "-l", int(seconds), "-p", 3, "-u",
            f"{url}/v1/completions", *more,
        ]  # fmt: skip

    return arguments


def wrk(url: str, seconds: float, folder: Path) -> Sequence[object]:
    script = folder / "post.lua"
    script.write_text(LUA % orjson.dumps(BODY).decode())
    return ["-t1", "-c32", f"-d{seconds:.0f}s", "-s", script, f"{url}/v1/completions"]


def wrk_get(url: str, seconds: float, folder: Path) -> Sequence[object]:
    return ["-t1", "-c64", f"-d{seconds:.0f}s", f"{url}/v1/models"]


def h2load(url: str, seconds: float, folder: Path) -> Sequence[object]:
    body = folder / "body.json"
    body.write_bytes(orjson.dumps(BODY))
    return ["--h1", "-c32", "-t1", f"-D{seconds:.0f}", "-d", body, f"{url}/v1/completions"]


def h2load_http2(url: str, seconds: float, folder: Path) -> Sequence[object]:
    """HTTP/2 without TLS, which is not spoken here: it must be refused, not hang."""
    return ["-c8", "-t1", "-n64", "-T5s", "-N5s", f"{url}/ready"]


SLOW_TELLS = (r"closed: +(\d+)", r"service available: +(\w+)", r"Exit status: (.+)")
WRK_TELLS = (r"Requests/sec: +([\d.]+)", r"Latency +(\S+)", r"(Socket errors: .+)", r"(Non-2xx.+)")
H2_TELLS = (r"finished in [\d.ms]+, ([\d.]+ req/s)", r"requests: (.+)", r"status codes: (.+)")

ATTACKS: Mapping[str, Attack] = {
    "slow-headers": Attack("slowhttptest", "slowhttptest", "slowloris", slow("-H"), SLOW_TELLS),
    "slow-body": Attack("slowhttptest", "slowhttptest", "slow bodies", slow("-B"), SLOW_TELLS),
    "range": Attack("slowhttptest", "slowhttptest", "Range of Apache", slow("-R"), SLOW_TELLS),
    "slow-read": Attack(
        "slowhttptest", "slowhttptest", "slow readers",
        slow("-X", "-w", 1, "-y", 1, "-n", 5, "-z", 1, "-k", 3), SLOW_TELLS,
    ),
    "wrk": Attack("wrk", "wrk", "32 connections that complete", wrk, WRK_TELLS),
    "wrk-get": Attack("wrk", "wrk", "64 connections that list models", wrk_get, WRK_TELLS),
    "h2load": Attack("h2load", "nghttp2-client", "32 clients that complete", h2load, H2_TELLS),
    "h2load-http2": Attack("h2load", "nghttp2-client", "HTTP/2", h2load_http2, H2_TELLS),
}  # fmt: skip


@dataclass
class Beside:
    """A client that asks for something short again and again."""

    session: aiohttp.ClientSession
    url: str
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def ask(self) -> None:
        while True:
            await self.once()
            await asyncio.sleep(0.1)

    async def once(self) -> None:
        began = time.perf_counter()
        try:
            async with (
                asyncio.timeout(PATIENCE),
                self.session.post(f"{self.url}/v1/completions", json=BODY) as reply,
            ):
                if reply.status != 200:
                    self.failures.append(f"{reply.status}: {(await reply.text())[:200]}")
                await reply.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            self.failures.append(repr(error))
        self.seconds.append(time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(ATTACKS)}.")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tools", type=Path, help="Folder of unpacked packages.")
    own, options = split(sys.argv[1:])
    args = parser.parse_args(own)
    chosen = {name: ATTACKS[name] for name in args.names or ATTACKS}
    path = os.pathsep.join(
        filter(None, [str(args.tools or "") and f"{args.tools}/usr/bin", os.environ["PATH"]])
    )
    found = {name: shutil.which(attack.program, path=path) for name, attack in chosen.items()}
    for name in [name for name, program in found.items() if program is None]:
        print(
            f"{name}: not run, for {chosen[name].program} is not installed ({chosen[name].package})"
        )
        del chosen[name]
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port), "--log-level", "error"]
    with running([*command, *options], port) as server, tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(attack_all(server, chosen, found, args, Path(folder)))
    print(f"\nWrote {write('flood', {'machine': machine(), 'rows': rows})}")
    return 1 if any(row["failures"] or row["left"] for row in rows) else 0


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own, and those behind ``--``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


async def attack_all(
    server: Server,
    chosen: Mapping[str, Attack],
    found: Mapping[str, str | None],
    args: Any,
    folder: Path,
) -> list[dict[str, Any]]:
    rows = []
    print(
        "| attack | beside it: answers | p50 ms | worst ms | not answered | memory MB | it says |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    async with open_session() as session:
        await find_model(session, server.url)
        calm = Beside(session, server.url)
        for _ in range(10):
            await calm.once()
        rows.append(row_of("nothing", calm, server, "", await what_is_left(session, server.url)))
        for name, attack in chosen.items():
            beside = Beside(session, server.url)
            asking = asyncio.create_task(beside.ask())
            arguments = [found[name], *attack.arguments(server.url, args.seconds, folder)]
            said = await run_tool([str(one) for one in arguments], args.tools, args.seconds)
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking
            await beside.once()
            left = await what_is_left(session, server.url)
            rows.append(row_of(f"{name}: {attack.what}", beside, server, told(attack, said), left))
    return rows


async def run_tool(command: Sequence[str], tools: Path | None, seconds: float) -> str:
    env = dict(os.environ)
    if tools is not None:
        env["LD_LIBRARY_PATH"] = str(tools / LIBRARIES)
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(6 * seconds + 60):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        return "it did not end"
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", output.decode(errors="replace"))


def told(attack: Attack, said: str) -> str:
    """The last time that each of the lines of interest came."""
    found = (re.findall(pattern, said) for pattern in attack.tells)
    return "; ".join(matches[-1].strip() for matches in found if matches) or said.strip()[-150:]


async def what_is_left(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What still runs, waits or holds blocks once a tool has ended; nothing, after a while."""
    deadline = time.monotonic() + SETTLES
    while True:
        async with session.get(f"{url}/load") as reply:
            load = await reply.json()
        left = {name: load[name] for name in ("running", "waiting", "kv_cache_usage") if load[name]}
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def row_of(
    name: str, beside: Beside, server: Server, says: str, left: dict[str, float]
) -> dict[str, Any]:
    p50, worst = 1e3 * statistics.median(beside.seconds), 1e3 * max(beside.seconds)
    megabytes = memory(server.pid, "VmRSS") / 1e6
    print(
        f"| {name} | {len(beside.seconds)} | {p50:.0f} | {worst:.0f} | {len(beside.failures)} "
        f"| {megabytes:.0f} | {says}{f' LEFT: {left}' if left else ''} |",
        flush=True,
    )
    for failure in beside.failures[:3]:
        print(f"  {failure}")
    return {
        "name": name, "answers": len(beside.seconds), "p50_ms": p50, "worst_ms": worst,
        "failures": beside.failures, "memory_mb": megabytes, "says": says, "left": left,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
