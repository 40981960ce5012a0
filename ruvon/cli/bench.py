"""`ruvon bench`: measure a server over HTTP, or the engine by itself.

Flags and result fields are those of `vllm bench serve` and `vllm bench throughput`.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
from ruvon.config import EngineConfig
from ruvon.errors import PeerError
from ruvon.server.imports import importing

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from ruvon.bench import Load, Sample


@click.group()
def bench() -> None:
    """Measure speed."""


def _metrics(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    known = ("ttft", "tpot", "itl", "e2el")
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return names


def _percentiles(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        points = tuple(float(point) for point in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers like 50,99") from error
    if not all(0 <= point <= 100 for point in points):
        raise click.BadParameter("percentiles lie between 0 and 100")
    return points


def _goodput(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, float]:
    limits = {}
    for value in values:
        name, _, limit = value.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not limit.replace(".", "", 1).isdigit():
            raise click.BadParameter(f"{value!r} is not like ttft:200, tpot:50 or e2el:2000 (ms)")
        limits[name] = float(limit)
    return limits


@bench.command("serve")
@click.option(
    "--url", "--base-url",
    envvar="RUVON_URL",
    callback=server_url,
    help="The server, instead of --host and --port.",
)  # fmt: skip
@click.option("--host", help="Default: 127.0.0.1.")
@click.option("--port", type=int, help="Default: 8000.")
@click.option("--backend", type=click.Choice(["openai", "openai-chat"]), default="openai")
@click.option("--model", help="Default: the first that the server lists.")
@click.option("--api-key", envvar=["RUVON_API_KEY", "OPENAI_API_KEY"], callback=first_key)
@click.option("--dataset-name", type=click.Choice(["random"]), default="random")
@click.option(
    "--random-input-len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Words in a prompt, each about one token; the server's own count is reported.",
)
@click.option("--random-output-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--random-range-ratio",
    type=Number(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Lengths are drawn from (1 - r) to (1 + r) times those given.",
)
@click.option("--num-prompts", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--request-rate",
    type=Number(0, min_open=True),
    default=math.inf,
    help="Per second; inf: all at once.",
)
@click.option("--burstiness", type=Number(0, min_open=True), default=1.0)
@click.option("--max-concurrency", type=click.IntRange(min=1))
@click.option("--num-warmups", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True)
@click.option("--percentile-metrics", default="ttft,tpot,itl", callback=_metrics, show_default=True)
@click.option("--metric-percentiles", default="99", callback=_percentiles, show_default=True)
@click.option("--goodput", multiple=True, callback=_goodput, help="Such as ttft:200; repeatable.")
@click.option("--save-result", is_flag=True, help="Write the numbers as JSON.")
@click.option("--save-detailed", is_flag=True, help="With them, those of every request.")
@click.option("--result-dir", type=click.Path(path_type=Path), default=Path())
@click.option("--result-filename")
@click.option("--disable-tqdm", is_flag=True, help="No progress bar.")
def bench_serve(**given: Any) -> None:
    """Time the streams of an OpenAI-compatible server.

    It is sent random prompts.
    """
    import asyncio  # a fifth of what `ruvon --help` would take

    if saved := given["save_result"] or given["save_detailed"]:
        make_folder(given["result_dir"])
    result = asyncio.run(measure(given))
    from ruvon.bench.result import render

    click.echo(render(result, given["percentile_metrics"]))
    if saved:
        click.echo(f"Wrote {save(result, given)}")
    if result["failed"]:
        raise click.ClickException(f"{result['failed']} requests failed: {result['errors'][0]}")


async def measure(given: Mapping[str, Any]) -> dict[str, Any]:
    """Run the load that the flags describe, and give vLLM's result fields."""
    from ruvon.bench import find_model, open_session, run_load
    from ruvon.bench.result import summarize

    base_url = address(**{name: given[name] for name in ("url", "host", "port")})
    async with open_session(given["api_key"]) as session:
        model = given["model"] or await find_model(session, base_url)
        requests = make_load(model, given)
        await warm_up(session, base_url, requests, given["num_warmups"])
        with progress_bar(given["num_prompts"], given["disable_tqdm"]) as advance:
            samples, duration = await run_load(session, base_url, requests, advance)
    numbers = summarize(
        samples, duration, percentiles=given["metric_percentiles"], goodput=given["goodput"]
    )
    return describe(model, given) | numbers | details(samples, full=given["save_detailed"])


def address(url: str | None, host: str | None, port: int | None) -> str:
    """The server's, without ``/v1``. Raises click.UsageError where two are named."""
    if url and (host or port):
        raise click.UsageError("--url (or RUVON_URL) and --host, --port name two servers")
    host = host or "127.0.0.1"
    url = url or f"http://{f'[{host}]' if ':' in host else host}:{port or 8000}"
    return url.removesuffix("/").removesuffix("/v1")


def make_load(model: str, given: Mapping[str, Any]) -> Load:
    """The flags as a load: random prompts with random lengths around those given."""
    from ruvon.bench import Load, random_requests

    return Load(
        model,
        random_requests(
            random.Random(given["seed"]),
            given["num_prompts"],
            given["random_input_len"],
            given["random_output_len"],
            given["random_range_ratio"],
        ),
        backend=given["backend"],
        rate=given["request_rate"],
        burstiness=given["burstiness"],
        max_concurrency=given["max_concurrency"],
        sampling={"temperature": given["temperature"], "top_p": 1.0},  # not the model's own
        ignore_eos=given["ignore_eos"],
        seed=given["seed"],
    )


async def warm_up(session: ClientSession, base_url: str, load: Load, count: int) -> None:
    """Send the first prompt ``count`` times, unmeasured.

    Raises:
        PeerError: the server refuses it, so that a load would fail as a whole.
    """
    from ruvon.bench import run_load

    trial = replace(load, requests=[load.requests[0]] * count, rate=math.inf)
    samples, _ = await run_load(session, base_url, trial) if count else ([], 0.0)
    for sample in samples:
        if sample.error:
            raise PeerError(f"the warm-up request failed: {sample.error}")


@contextmanager
def progress_bar(total: int, disabled: bool) -> Iterator[Callable[[Sample], None]]:
    """A bar on stderr if that is a terminal; calling what it gives moves it by one."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    hidden = disabled or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda _: progress.advance(task)


def describe(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, in a result."""
    rate = given["request_rate"]
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": given["backend"],
        "model_id": model,
        "num_prompts": given["num_prompts"],
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": given["burstiness"],
        "max_concurrency": given["max_concurrency"],
    }


def details(samples: Sequence[Sample], full: bool) -> dict[str, Any]:
    """The numbers of each request; only the errors unless all are wanted."""
    errors = [sample.error for sample in samples if sample.error]
    if not full:
        return {"errors": errors}
    return {
        "input_lens": [sample.num_input for sample in samples],
        "output_lens": [sample.num_output for sample in samples],
        "ttfts": [sample.ttft for sample in samples],
        "itls": [sample.gaps for sample in samples],
        "generated_texts": ["".join(sample.texts) for sample in samples],
        "errors": errors,
    }


def make_folder(path: Path) -> None:
    """Where results are to lie: that they cannot is said before the work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{error}", param_hint="--result-dir") from None


def save(result: Mapping[str, Any], given: Mapping[str, Any]) -> Path:
    """Write a result; without a file name, one made of what it is about."""
    rate, model = result["request_rate"], str(result["model_id"]).rpartition("/")[2]
    default = f"{result['backend']}-{rate}qps-{model}-{result['date']}.json"
    path = Path(given["result_dir"]) / (given["result_filename"] or default)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


@bench.command("offline", cls=SettingsCommand)
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--num-prompts", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--n", type=click.IntRange(min=1), default=1, help="Completions of each prompt.")
@click.option("--output-json", type=FILE_OUT, callback=writable, help="Write the numbers here.")
@click.option("--disable-tqdm", is_flag=True, help="No progress bar.")
@settings(EngineConfig)
def bench_offline(name: str | None, config: Path | None, **given: Any) -> None:
    """Measure the engine by itself, without HTTP.

    It is given all prompts at once, to the end.
    """
    own = {key: given.pop(key) for key in OFFLINE}
    given["model"] = one_model(name, given["model"])
    result = throughput(load_engine(given, read_settings(config)), own)
    click.echo(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    if own["output_json"]:
        own["output_json"].write_text(json.dumps(result) + "\n", encoding="utf-8")


OFFLINE = ("input_len", "output_len", "num_prompts", "n", "output_json", "disable_tqdm")


def throughput(config: EngineConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """Run the prompts through the engine; `vllm bench throughput`'s fields and the output rate."""
    from ruvon.bench import random_prompt

    with importing():
        from ruvon.engine.types import SamplingParams
        from ruvon.llm import LLM
    rng = random.Random(config.seed)
    prompts = [random_prompt(rng, own["input_len"]) for _ in range(own["num_prompts"])]
    sampling = SamplingParams(temperature=0.0, max_tokens=own["output_len"], ignore_eos=True)
    llm = LLM(**asdict(config))
    started = time.perf_counter()
    results = llm.generate(prompts, sampling, n=own["n"], use_tqdm=not own["disable_tqdm"])
    seconds = time.perf_counter() - started
    num_output = sum(len(one.tokens) for completions in results for one in completions)
    num_total = num_output + sum(completions[0].num_prompt for completions in results)
    return {
        "elapsed_time": seconds,
        "num_requests": own["num_prompts"],
        "total_num_tokens": num_total,
        "requests_per_second": own["num_prompts"] / seconds,
        "tokens_per_second": num_total / seconds,
        "output_tokens_per_second": num_output / seconds,
    }
