"""Ask a real Prometheus, which scrapes a loaded server and a router, all that dashboards and alerts
ask: nothing may be empty.

    python scripts/check_dashboards.py [--prometheus FOLDER] [--seconds 30] [-- SERVE OPTIONS]

FOLDER has the programs prometheus and promtool, if PATH does not. Exits with 1 for a panel without
a value, a variable without a choice, or a rule that Prometheus does not take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).parent.parent
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules"
CHOSEN = {"$job": ".+", "$instance": ".+", "$model": ".+", "$__rate_interval": "1m"}
COMPARISON = re.compile(r"\s(==|!=|>|<|>=|<=)\s[\d.]+\s*$")
LATER = ("vllm:rank_step_failures_total", 'status=~"5..', "ruvon_router_retries_total")
"""What is not counted before it happens, or by every server."""
ROUTERS_OWN = {"source_labels": ["__name__"], "regex": "ruvon_router_.*", "action": "keep"}
"""A router adds up its replicas' numbers, which are scraped as well."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="", help="Folder of prometheus and promtool.")
    parser.add_argument("--seconds", type=float, default=30.0, help="How long to ask the server.")
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    program = shutil.which("prometheus", path=args.prometheus or None)
    if program is None:
        raise SystemExit("There is no prometheus; Debian has it in a package of that name.")
    ports = [free_port() for _ in range(3)]
    server, router = (f"http://127.0.0.1:{port}" for port in ports[:2])
    serve = ["serve", "--port", str(ports[0]), "--max-num-seqs", "4", *args.options]
    route = ["route", server, "--port", str(ports[1])]
    targets = {"ruvon": server, "ruvon-router": router}
    with running(*ruvon(serve)), running(*ruvon(route)):
        wait_for(f"{router}/ready")
        with prometheus(program, ports[2], targets) as url:
            asyncio.run(load(router, args.seconds))
            failures = check(url)
    for failure in failures:
        print(f"FAILED  {failure}")
    raise SystemExit(bool(failures))


def ruvon(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "ruvon", *command, "--log-level", "warning"]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
    return port


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program, as long as this lasts."""
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.terminate()


def wait_for(url: str, patience: float = 300.0) -> None:
    """Until there is an answer of 200."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{url} did not answer in {patience:g} seconds")


@contextmanager
def prometheus(program: str, port: int, targets: Mapping[str, str]) -> Iterator[str]:
    """A Prometheus that scrapes ``targets``, by their jobs' names, every second, and has our rules;
    gives its address."""
    jobs = [
        {
            "job_name": name,
            "static_configs": [{"targets": [url.partition("//")[2]]}],
            "metric_relabel_configs": [ROUTERS_OWN] if "router" in name else [],
        }
        for name, url in targets.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{RULES}/*.yml"],
        "scrape_configs": jobs,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prometheus.yml")
        path.write_text(yaml.safe_dump(config))
        command = [
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
        with running(*command):
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/-/ready")
            while len(evaluate(url, "up == 1")) < len(targets):  # it takes seconds to begin
                time.sleep(0.2)
            yield url


async def load(url: str, seconds: float) -> None:
    """Ask the server all the time: streams, whole answers, the same prompts again, what is wrong,
    and some who leave."""
    end = time.monotonic() + seconds

    async def ask(number: int) -> None:
        body: dict[str, Any] = {
            "prompt": f"Client {number % 3} counts: " + "one two three " * (8 * (number % 5)),
            "max_tokens": 8 + number % 30,
            "stream": number % 2 == 0,
        }
        if number % 11 == 0:
            body["temperature"] = -1  # refused
        if number % 7 == 0:
            body["timeout"] = 0.05  # too late
        timeout = aiohttp.ClientTimeout(0.2 if number % 13 == 0 else 60)
        with suppress(TimeoutError, aiohttp.ClientError):
            async with session.post(f"{url}/v1/completions", json=body, timeout=timeout) as answer:
                await answer.read()

    async def client(first: int) -> None:
        number = first
        while time.monotonic() < end:
            await ask(number)
            number += 8

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(first) for first in range(1, 9)))


def check(url: str) -> list[str]:
    """What is wrong with dashboards and rules, asked of this Prometheus."""
    failures = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        made = json.loads(path.read_text())
        print(f"\n{path.name}")
        failures += check_variables(url, made) + check_panels(url, made)
    print("\nalerts")
    return failures + check_rules(url)


def check_variables(url: str, made: Mapping[str, Any]) -> list[str]:
    """Variables that offer nothing."""
    failures = []
    for variable in made["templating"]["list"]:
        if variable["type"] != "query":
            continue
        metric, label = re.fullmatch(
            r"label_values\((\S+), (\w+)\)", variable["definition"]
        ).groups()
        values = ask(url, f"label/{label}/values", {"match[]": metric})
        print(f"  {'$' + variable['name']:44} {', '.join(values)}")
        if not values:
            failures.append(f"${variable['name']}: nothing to choose")
    return failures


def check_panels(url: str, made: Mapping[str, Any]) -> list[str]:
    """Queries without a value."""
    failures = []
    for title, legend, expression in queries(made):
        values = evaluate(url, expression)
        told = ", ".join(f"{value:.4g}" for value in values[:6])
        print(f"  {title[:30]:30} {legend[:26]:26} {told}")
        if not any(value == value for value in values):  # all are NaN, or there are none
            failures.append(f"{title}: no value of {expression}")
    return failures


def queries(made: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """A dashboard's queries, with everything chosen: panel, legend, expression."""
    for panel in made["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in CHOSEN.items():
                expression = expression.replace(name, value)
            yield panel["title"], target["legendFormat"], expression


def check_rules(url: str) -> list[str]:
    """Rules that Prometheus cannot evaluate, and alerts of what is nowhere counted."""
    failures = []
    for group in ask(url, "rules")["groups"]:
        for rule in group["rules"]:
            parts = [COMPARISON.sub("", part) for part in re.split(r"\sand\s", rule["query"])]
            empty = [part for part in parts if not evaluate(url, part) and not is_later(part)]
            print(f"  {rule['name']:30} {rule['health']:8} {rule['state']}")
            if rule["health"] != "ok":
                failures.append(f"{rule['name']}: {rule.get('lastError')}")
            failures += [f"{rule['name']}: no value of {part}" for part in empty]
    return failures


def is_later(expression: str) -> bool:
    return any(name in expression for name in LATER)


def evaluate(url: str, expression: str) -> list[float]:
    """The values of an expression now."""
    found = ask(url, "query", {"query": expression})["result"]
    return [float(each["value"][1]) for each in found]


def ask(url: str, path: str, options: Mapping[str, str] | None = None) -> Any:
    """Prometheus's API; what it refuses ends this."""
    query = urllib.parse.urlencode(options or {})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}?{query}: {error.read().decode()}") from error


if __name__ == "__main__":
    main()
