"""Where values come from: argv, environment and TOML file, and which of them wins."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ruvon.config.engine import EngineConfig
from ruvon.config.fields import Kind, kinds, typed
from ruvon.config.router import RouterConfig
from ruvon.config.server import ServerConfig
from ruvon.errors import ConfigError

CONFIGS: tuple[type[EngineConfig] | type[ServerConfig] | type[RouterConfig], ...] = (
    EngineConfig, ServerConfig, RouterConfig,
)  # fmt: skip
Config = TypeVar("Config", EngineConfig, ServerConfig, RouterConfig)

ENV_PREFIX = "RUVON_"
VARIABLES = {
    "cache_dir": "Folder for compiled kernels. Default: `ruvon` in the user's cache folder.",
    "config": "File of settings, as `--config`.",
    "url": "Server that `chat`, `complete` and `models` ask, as their `--url`.",
    "api_key": "Key for that server, as their `--api-key`, of several the first; `OPENAI_API_KEY` "
    "serves as well. A server takes it as its own setting.",
}
"""Variables that are no settings: a name without prefix, as it is documented."""

LINK = re.compile(r"(tcp|udp|sctp)://.*")
"""What Kubernetes, beside a service named ruvon, sets RUVON_PORT to."""
SERVICE = re.compile(r"(service_(host|port)|port_\d+_(tcp|udp|sctp))(_\w+)?")
"""The names of the other variables that it then sets."""

WORDS = {"1": True, "true": True, "yes": True, "on": True}
WORDS |= {"0": False, "false": False, "no": False, "off": False}


def flag(name: str) -> str:
    """``max_num_seqs`` → ``--max-num-seqs``."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """``max_num_seqs`` → ``RUVON_MAX_NUM_SEQS``."""
    return ENV_PREFIX + name.upper()


def load(
    cls: type[Config],
    given: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    toml: Mapping[str, Any] | None = None,
) -> Config:
    """Build one config. ``given`` holds argv's values, where None means not given; ``toml`` is
    what `read_toml` returned. An empty variable counts as not set, as does a `LINK`.

    Raises:
        ConfigError: a value is of the wrong type, out of range or not among the choices.
    """
    values: dict[str, Any] = {}
    for name, kind in kinds(cls).items():
        text = environ.get(variable(name))
        if given and given.get(name) is not None:
            values[name] = given[name]
        elif text and not _is_service(name, text):
            values[name] = text if kind.many else _parsed(text, kind, variable(name))
        elif toml and name in toml:
            source = f"{name} in the TOML file"
            values[name] = toml[name] if kind.many else typed(toml[name], kind, source)
        if kind.many and name in values:
            values[name] = _several(values[name])
    return cls(**values)


def _several(value: Any) -> Any:
    """``"a, b"`` or ``["a", "b"]`` → ``("a", "b")``; what is neither stays, for `check_fields`."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return tuple(part.strip() for text in texts for part in text.split(","))


def _parsed(text: str, kind: Kind, source: str) -> Any:
    """A value out of a string, as the environment gives them."""
    try:
        value = WORDS[text.lower()] if kind.base is bool else kind.base(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{source} must be {kind}, got {text!r}") from None
    return typed(value, kind, source)


def cache_root(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder for what ruvon keeps between starts, which need not exist: ``RUVON_CACHE_DIR``, or
    ``ruvon`` in the user's cache folder. None for a user without a home."""
    shared = Path(environ.get("XDG_CACHE_HOME", ""))  # to be ignored, says XDG, if not absolute
    try:
        if folder := environ.get(variable("cache_dir")):
            return Path(folder).expanduser()
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "ruvon"
    except RuntimeError:
        return None


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, all of them known settings.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has a key that is no setting.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    known = _all_names()
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{_hint(key, known)}")
    return values


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each ``RUVON_*`` variable that is neither a setting nor one of `VARIABLES`,
    and one for all those that Kubernetes makes of a service named ruvon. Nobody wrote these, and
    others may have put the rest there: no reason to end."""
    known = _all_names().union(VARIABLES)
    strangers, services = [], []
    for name in sorted(name for name in environ if name.startswith(ENV_PREFIX)):
        setting = name.removeprefix(ENV_PREFIX).lower()
        if _is_service(setting, environ[name]):
            services.append(name)
        elif setting not in known:
            strangers.append(f"{name} is not a setting of ruvon")
    if services:
        strangers.append(f"{', '.join(services)}: about a service of Kubernetes, not settings")
    return strangers


def _is_service(name: str, text: str) -> bool:
    """Whether a variable, by its name without prefix, describes a service of Kubernetes."""
    return bool(LINK.fullmatch(text) if name == "port" else SERVICE.fullmatch(name))


def _all_names() -> set[str]:
    return {name for cls in CONFIGS for name in kinds(cls)}


def _hint(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
