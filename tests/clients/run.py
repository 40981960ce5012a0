"""Install clients, drive each against a scripted server, and tell what worked: ``make clients``.

``make clients ARGS='openai codex'`` takes only these; without names the table in docs/clients.md is
written anew. The table is printed; build/clients/ keeps report.json, what each client sent
(NAME.jsonl) and what it printed (NAME.log).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from catalog import CLIENTS, HERE, Client
from environments import BUILD, InstallError, install, node, npm_environment, versions
from rich.console import Console
from rich.table import Table
from scripted import running

from ruvon.telemetry.logs import configure_logging

DOCUMENT = HERE.parent.parent / "docs" / "clients.md"
BEGIN, END = "<!-- table: make clients -->", "<!-- end of table -->"


@dataclass
class Outcome:
    """What one client did. ``cases`` are (name, what failed or an empty text)."""

    client: str
    versions: list[str] = field(default_factory=list)
    exercised: str = ""
    seconds: float = 0.0
    cases: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""

    @property
    def failures(self) -> list[tuple[str, str]]:
        return [(name, why) for name, why in self.cases if why]

    @property
    def passed(self) -> bool:
        return not self.error and bool(self.cases) and not self.failures

    @property
    def summary(self) -> str:
        if self.error:
            return self.error.split("\n")[0]
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{len(self.cases) - len(self.failures)} of {len(self.cases)}{skipped}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(names)}")
    asked = parser.parse_args().clients
    if unknown := set(asked).difference(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}")
    configure_logging("warning")
    BUILD.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for client in CLIENTS:
        if not asked or client.name in asked:
            print(f"==> {client.name}", file=sys.stderr, flush=True)
            outcomes.append(attempt(client))
    (BUILD / "report.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    show(outcomes)
    if not asked:
        write_table(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def attempt(client: Client) -> Outcome:
    """Install a client, and run its tests."""
    outcome = Outcome(client.name, exercised=client.exercised)
    try:
        home = install(client)
    except InstallError as error:
        outcome.error = f"not installed: {error}"
        return outcome
    outcome.versions = versions(client, home)
    record = BUILD / f"{client.name}.jsonl"
    record.unlink(missing_ok=True)
    began = time.monotonic()
    with running(client.script, record) as url:
        outcome.error = run_tests(client, home, url)
    outcome.seconds = round(time.monotonic() - began, 1)
    if not outcome.error:
        read_report(BUILD / f"{client.name}.xml", outcome)
    return outcome


def run_tests(client: Client, home: Path, url: str) -> str:
    """Run a client's tests, which write a JUnit report; gives what kept them from that."""
    report = BUILD / f"{client.name}.xml"
    report.unlink(missing_ok=True)
    environment = clean(os.environ if client.requirements else npm_environment()) | {
        "RUVON_URL": url,
        "RUVON_CLIENT": str(home / client.program) if client.program else "",
        **client.environment,
    }
    with (BUILD / f"{client.name}.log").open("w") as log:
        try:
            subprocess.run(
                command(client, home, report), cwd=home, env=environment, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=client.seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done in {client.seconds:g} s"
    return "" if report.exists() else f"no report; see {log.name}"


def command(client: Client, home: Path, report: Path) -> list[str]:
    tests = str(HERE / client.tests)
    if client.kind == "node":
        (home / Path(tests).name).write_bytes(Path(tests).read_bytes())  # beside its packages
        out = ["--test-reporter=junit", f"--test-reporter-destination={report}"]
        return [str(node()), "--test", *out, Path(tests).name]
    python = sys.executable if client.kind == "agent" else str(home / "bin" / "python")
    options = ["-c", str(HERE / "own.ini"), "--rootdir", str(HERE), "--confcutdir", str(HERE)]
    return [python, "-m", "pytest", *options, "--junitxml", str(report), tests]


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would send a client to another server."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(("OPENAI_", "ANTHROPIC_", "CLAUDE", "CODEX_", "RUVON_", "PYTHON"))
    }


def read_report(path: Path, outcome: Outcome) -> None:
    for case in ElementTree.parse(path).iter("testcase"):
        name, failed = case.get("name", "?"), ""
        for child in case:
            text = child.get("message") or (child.text or "").strip()
            if child.tag in ("failure", "error"):
                failed = " ".join(text.split())[:500] or child.tag
            if child.tag == "skipped":
                outcome.skipped.append((name, text))
                break
        else:
            outcome.cases.append((name, failed))


def show(outcomes: list[Outcome]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("client", "version", "exercised", "passed", "s")
    for o in outcomes:
        table.add_row(o.client, "\n".join(o.versions), o.exercised, o.summary, f"{o.seconds:g}")
    console.print(table)
    for o in outcomes:
        for name, why in [*o.failures, *([("", o.error)] if o.error else [])]:
            console.print(f"{o.client}: {name}: {why}", markup=False, highlight=False)


def write_table(outcomes: list[Outcome]) -> None:
    """Put what was found into the document."""
    lines = ["| client | exercised | passed |", "|---|---|---|"]
    lines += [
        f"| {', '.join(o.versions) or o.client} | {o.exercised} | {o.summary} |" for o in outcomes
    ]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
