"""``ruvon record``, ``ruvon replay``: a server's schedule in a file, and again without a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from ruvon.cli.client import Client
from ruvon.cli.options import Number, first_key, server_url
from ruvon.errors import RuvonError

if TYPE_CHECKING:
    from ruvon.engine.events import Planned
    from ruvon.engine.replay import Replayed

FIRST = 20  # lines shown of a replay


@click.command()
@click.argument("url", metavar="BASE_URL", callback=server_url)
@click.option("-o", "--output", type=click.File("wb"), default="-", help="Default: stdout.")
@click.option(
    "--admin-key",
    envvar="RUVON_ADMIN_KEY",
    callback=first_key,
    help="The server's admin key.",
)
@click.option("--steps", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--seconds", type=Number(0, 600, min_open=True), default=10.0,
              show_default=True, help="After which it ends, with fewer steps.")  # fmt: skip
@click.option("--contents", is_flag=True, help="With the tokens of prompts and answers.")
@click.option("--trace", is_flag=True, help="Give a Chrome trace of the last steps instead.")
def record(
    url: str,
    output: BinaryIO,
    admin_key: str | None,
    steps: int,
    seconds: float,
    contents: bool,
    trace: bool,
) -> None:
    """Record what the server at BASE_URL schedules.

    `ruvon replay` reads it. Of what people wrote only lengths are in it, unless --contents asks for
    more.
    """
    query = f"?steps={steps}&seconds={seconds}&contents={int(contents)}"
    path = "/debug/trace" if trace else f"/debug/recording{query}"
    output.write(Client(url, admin_key).read(path))


@click.command()
@click.argument(
    "path",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
)
@click.option("--all", "whole", is_flag=True, help=f"Show all steps, not the first {FIRST}.")
def replay(path: Path, whole: bool) -> None:
    """Schedule again what FILE has recorded, and compare.

    No model is needed. Exits with 1 at the first step that comes out differently.
    """
    from ruvon.engine.events import Planned, read
    from ruvon.engine.replay import replay as again

    num_plans = 0
    with click.open_file(str(path), "rb") as lines:
        for step in again(read(lines)):
            if isinstance(step.event, Planned):
                num_plans += 1
                if whole or num_plans <= FIRST:
                    click.echo(told(step, step.event))
            if step.difference:
                raise RuvonError(f"step {step.step} differs: {step.difference}")
    if num_plans > FIRST and not whole:
        click.echo(f"... and {num_plans - FIRST} more")
    click.echo(f"{num_plans} steps, each as it was.")


def told(step: Replayed, plan: Planned) -> str:
    """A line for a step."""
    lengths = [work[3] for work in plan.chunks]
    single = lengths.count(1)
    used = step.num_blocks - step.num_free_blocks
    parts = [
        f"step {step.step:<6}",
        f"{sum(lengths):5} tokens",
        f"{single:4} single",
        f"{len(lengths) - single:3} longer",
        f"running {step.num_running:<4} waiting {step.num_waiting:<4}",
        f"blocks {used}/{step.num_blocks}",
    ]
    if plan.new:
        parts.append("new " + ", ".join(str(seq_id) for seq_id, _ in plan.new[:8]))
    return "  ".join(parts)
