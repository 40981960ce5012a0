"""The command line: argv → config → one call.

Torch and the server are imported inside the commands that use them: ``ruvon --help`` and whatever
only talks to a server starts without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ruvon import __version__
from ruvon.cli.bench import bench
from ruvon.cli.options import (
    FILE_OUT,
    Number,
    SettingsCommand,
    first_key,
    load_engine,
    one_model,
    read_settings,
    server_url,
    settings,
    writable,
)
from ruvon.cli.process import DISK, open_closed_streams
from ruvon.cli.recordings import record, replay
from ruvon.config import EngineConfig, RouterConfig, ServerConfig, flag, kinds, load
from ruvon.config.router import OF_RAY
from ruvon.errors import ConfigError, RuvonError
from ruvon.server.imports import import_beside_torch, importing

if TYPE_CHECKING:
    from ruvon.cli.answers import Source

Function = TypeVar("Function", bound=Callable[..., Any])


class Commands(click.Group):
    """Turns ruvon's own errors, and a disk's, into one line on stderr and exit code 1."""

    def main(self, *args: Any, **rest: Any) -> Any:
        open_closed_streams()
        try:
            return super().main(*args, **rest)
        except OSError as error:
            if error.errno not in DISK:
                raise
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RuvonError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ruvon")
def main() -> None:
    """A small, fast LLM inference engine and OpenAI-compatible server."""


main.add_command(bench)
main.add_command(record)
main.add_command(replay)


ROUTED = (
    "host", "port", "uds", "api_key", "api_key_file", "admin_key", "admin_key_file", "tls_cert",
    "tls_key", "max_body_size", "max_connections", "max_connections_per_address",
    "keep_alive_timeout", "shutdown_timeout", "rate_limit_requests", "log_level", "log_format",
    "log_requests",
)  # fmt: skip
"""What a router over given servers has in common with them; all else is theirs to set."""

OF_REPLICAS = ("data_parallel_size", "data_parallel_backend", *OF_RAY)
NOT_ROUTED = (*(name for name in kinds(ServerConfig) if name not in ROUTED), *OF_REPLICAS)


@main.command(cls=SettingsCommand)
@click.argument("name", metavar="[MODEL]", required=False)
@settings(EngineConfig, ServerConfig, RouterConfig)
def serve(name: str | None, config: Path | None, **given: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI's API.

    MODEL is a folder, a GGUF file or a hub id; without it the embedded SmolLM2-135M-Instruct.
    """
    given["model"] = one_model(name, given["model"])
    engine, server, router = build_all(given, config)
    from ruvon.server.console import greet

    greet(server)
    if engine.node_rank:
        refuse_unused(router)
        with importing():
            from ruvon.engine.startup import compute_for_server
            from ruvon.telemetry.logs import configure_logging
        configure_logging(server.log_level, server.log_format)
        compute_for_server(engine)
        return
    on_ray = router.data_parallel_backend == "ray"
    if router.data_parallel_size > 1 or on_ray:
        if engine.nnodes > 1:
            raise ConfigError(
                "--data-parallel-size: its replicas are on one machine each, not on --nnodes"
            )
        refuse_each(server)
        from ruvon.router.run import serve_on_ray, serve_replicas

        (serve_on_ray if on_ray else serve_replicas)(engine, server, router)
        return
    refuse_unused(router)
    with importing():
        import_beside_torch()
        from ruvon.server.app import serve as serve_forever
    serve_forever(engine, server)


@main.command("route", cls=SettingsCommand)
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@settings(ServerConfig, RouterConfig, without=NOT_ROUTED)
def route_command(urls: tuple[str, ...], config: Path | None, **given: Any) -> None:
    """Share requests out among servers.

    Each URL is one's, such as http://10.0.0.5:8000 or unix:/path. A request goes to the replica
    whose cache holds the most of its prompt, unless that one has much more to do than others.
    """
    toml = read_settings(config)
    server, router = load(ServerConfig, given, toml=toml), load(RouterConfig, given, toml=toml)
    from ruvon.router.run import route

    route(urls, server, router)


def source_options(function: Function) -> Function:
    """Options of commands that answer: from a server, or from the engine in process."""
    options = [
        click.option(
            "--url",
            envvar="RUVON_URL",
            callback=server_url,
            help="Ask this server, not a model in process.",
        ),
        click.option(
            "--api-key",
            envvar=["RUVON_API_KEY", "OPENAI_API_KEY"],
            callback=first_key,
            help="Key for that server.",
        ),
        click.option("--temperature", type=float, help="0 is greedy. Default: the model's own."),
        click.option("--top-p", type=float, help="Share of probability to draw from."),
        click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer."),
        click.option("--seed", type=int, help="The same seed gives the same answer."),
    ]
    for option in reversed(options):
        function = option(function)
    return settings(EngineConfig, without=("seed",))(function)


SAMPLING = ("temperature", "top_p", "max_tokens", "seed")


@main.command(cls=SettingsCommand)
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--system", help="System message.")
@source_options
def chat(name: str | None, system: str | None, **given: Any) -> None:
    """Chat in the terminal with MODEL, or with a server (--url)."""
    from rich.console import Console

    from ruvon.cli.chat import Conversation, run

    options = take_options(given)
    given["model"] = one_model(name, given["model"])
    run(Conversation(open_source(given), system, options), Console(soft_wrap=True))


@main.command(cls=SettingsCommand)
@click.argument("prompt")
@click.option("--stop", multiple=True, help="Text that ends the completion; may be repeated.")
@source_options
def complete(prompt: str, stop: tuple[str, ...], **given: Any) -> None:
    """Continue PROMPT and stream the text to stdout. PROMPT - reads it from stdin."""
    options = take_options(given) | ({"stop": list(stop)} if stop else {})
    text = read_stdin() if prompt == "-" else prompt
    has_begun = False
    try:
        for delta in open_source(given).complete(text, options):
            click.echo(delta.text, nl=False)
            has_begun = True
    except RuvonError:
        if has_begun:
            click.echo()  # the error has a line of its own
        raise
    click.echo()


def read_stdin() -> str:
    """Raises click.UsageError for what is not text."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"stdin is not UTF-8: {error.reason} at {error.start}") from None


@main.command()
@click.option(
    "--url", envvar="RUVON_URL", callback=server_url, help="Ask this server, not the local disk."
)
@click.option(
    "--api-key",
    envvar=["RUVON_API_KEY", "OPENAI_API_KEY"],
    callback=first_key,
    help="Key for that server.",
)
def models(url: str | None, api_key: str | None) -> None:
    """List the models of a server, or of this machine's disk."""
    from ruvon.cli.models import print_local, print_remote

    if url:
        print_remote(url, api_key)
    else:
        print_local()


VARIED = (
    "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs",
    "kv_cache_memory", "gpu_memory_utilization", "cpu_memory_utilization", "enable_prefix_caching",
    "enable_chunked_prefill", "batching", "scheduling_policy", "generation_config",
)  # fmt: skip
"""What `verify` chooses itself."""


@main.command(cls=SettingsCommand)
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--requests", type=click.IntRange(min=8), default=32, show_default=True)
@click.option(
    "--tokens",
    type=click.IntRange(min=3, max=64),
    default=16,
    show_default=True,
    help="New tokens of a request, on average.",
)
@click.option(
    "--reference/--no-reference",
    default=True,
    show_default=True,
    help="Compare the kernels with plain torch too; takes 4 bytes of memory a weight.",
)
@settings(EngineConfig, without=VARIED)
def verify(name: str | None, requests: int, tokens: int, reference: bool, **given: Any) -> None:
    """Show that the same request gives the same bytes.

    It does alone or among others, under every policy. Exits with 1 and names the first difference
    if there is one and the kernels promise none.
    """
    given["model"] = one_model(name, given["model"])
    config = load_engine(given, read_settings(given.pop("config")))
    from rich.console import Console

    with importing():
        from ruvon.verify.table import print_verification
    print_verification(config, requests, tokens, reference, Console())


@main.command()
@click.argument("url", metavar="BASE_URL", required=False, callback=server_url)
@click.option(
    "--api-key",
    envvar=["RUVON_API_KEY", "OPENAI_API_KEY"],
    callback=first_key,
    help="Key for that server.",
)
@click.option("--model", help="Ask this model. Default: the first that the server lists.")
@click.option(
    "--only", "globs", multiple=True, metavar="GLOB",
    help="Checks or groups, such as chat.stream or '*.usage*'; may be repeated.",
)  # fmt: skip
@click.option("--json", "report", type=FILE_OUT, callback=writable, help="Write a report there.")
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--timeout",
    type=Number(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that a check may take.",
)
@click.option("--list", "listing", is_flag=True, help="Name the checks instead of running them.")
def doctor(
    url: str | None, globs: tuple[str, ...], report: Path | None, listing: bool, **options: Any
) -> None:
    """Check that the server at BASE_URL speaks OpenAI's dialect.

    Any server may be asked, not only ruvon's. Exits with 1 if a check fails that is not about an
    extension.
    """
    from rich.console import Console

    from ruvon.doctor.run import choose
    from ruvon.doctor.table import print_checks, print_examination

    console = Console(soft_wrap=True)
    if listing:
        print_checks(choose(globs), console)
    elif url is None:
        raise click.UsageError("BASE_URL is missing")
    else:
        print_examination(url, globs, report, console, **options)


def build_all(
    given: Mapping[str, Any], config: Path | None
) -> tuple[EngineConfig, ServerConfig, RouterConfig]:
    """All configs of a server."""
    toml = read_settings(config)
    server, router = load(ServerConfig, given, toml=toml), load(RouterConfig, given, toml=toml)
    return load_engine(given, toml), server, router


def refuse_each(server: ServerConfig) -> None:
    """Raises ConfigError for what each replica would have for itself."""
    if server.ui or server.ui_step_gate:
        name = "ui" if server.ui else "ui_step_gate"
        raise ConfigError(f"{flag(name)} goes with one replica: a router has no page")


def refuse_unused(router: RouterConfig) -> None:
    """Raises ConfigError for a router's setting where there is no router."""
    usual = RouterConfig()
    for name in kinds(RouterConfig):
        if getattr(router, name) != getattr(usual, name):
            raise ConfigError(f"{flag(name)} needs --data-parallel-size 2 or more")


def take_options(given: dict[str, Any]) -> dict[str, Any]:
    """Move the sampling options out of a command's values; those not given are left out."""
    taken = {name: given.pop(name) for name in SAMPLING}
    return {name: value for name, value in taken.items() if value is not None}


def open_source(given: dict[str, Any]) -> Source:
    """The server at --url, or the engine in this process.

    Raises:
        ConfigError: an engine setting is given together with --url.
    """
    url, api_key, config = given.pop("url"), given.pop("api_key"), given.pop("config")
    if url is None:
        engine = load_engine(given, read_settings(config))
        with importing():
            from ruvon.cli.local import Local
        return Local.load(engine)
    from ruvon.cli.answers import Remote
    from ruvon.cli.client import Client

    model = given.pop("model")
    idle = [flag(name) for name, value in given.items() if value is not None]
    if config is not None or idle:
        raise ConfigError(f"{(idle or ['--config'])[0]} has no effect on the server at --url")
    return Remote.connect(Client(url, api_key), model)
