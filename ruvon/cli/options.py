"""Command-line options made from the fields of the configs.

A new setting is a new flag, variable and TOML key at once; nothing is listed twice.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click

from ruvon.config import (
    CONFIGS,
    EngineConfig,
    Kind,
    flag,
    kinds,
    load,
    read_toml,
    unknown_variables,
)
from ruvon.locate import find

Function = TypeVar("Function", bound=Callable[..., Any])
EPILOG = (
    "Every setting is also a variable (--max-num-seqs is RUVON_MAX_NUM_SEQS) and a key of the file "
    "given with --config (max_num_seqs = 8). The command line wins over the environment, the "
    "environment over the file."
)


class Number(click.FloatRange):
    """A number within bounds. NaN is none, though no bound excludes it."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Setting(click.Option):
    """An option made from a config's field; ``section`` is its heading in the help."""

    def __init__(self, *args: Any, section: str, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.section = section


class SettingsCommand(click.Command):
    """A command whose help shows its settings under headings, after its own options."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        rest.setdefault("epilog", EPILOG)
        super().__init__(*args, **rest)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


SECTIONS = dict(
    zip(CONFIGS, ("Engine settings", "Server settings", "Router settings"), strict=True)
)


def settings(*classes: type, without: Sequence[str] = ()) -> Callable[[Function], Function]:
    """Give a command an option for every field of these configs, and ``--config FILE``."""

    def decorate(function: Function) -> Function:
        options = [
            _option(cls, spec, kind)
            for cls in classes
            for spec, kind in zip(dataclasses.fields(cls), kinds(cls).values(), strict=True)
            if spec.name not in without
        ]
        for names, attributes in reversed(options):
            click.option(*names, cls=Setting, **attributes)(function)
        return click.option(
            "--config",
            type=click.Path(path_type=Path),
            envvar="RUVON_CONFIG",
            help="TOML file with settings.",
        )(function)

    return decorate


def _option(
    cls: type, spec: dataclasses.Field[Any], kind: Kind
) -> tuple[list[str], dict[str, Any]]:
    names = [flag(spec.name), spec.name]
    if kind.base is bool:
        names[0] += "/--no-" + flag(spec.name).removeprefix("--")
    shown = "" if spec.default in (None, ()) else f"  [default: {_shown(spec.default)}]"
    return names, {
        "default": None,
        "type": _click_type(kind),
        "multiple": kind.many,
        "callback": _none_if_empty if kind.many else None,
        "help": spec.metadata["help"] + shown,
        "section": SECTIONS[cls],
    }


def _none_if_empty(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[str, ...] | None:
    """None means not given, as for other settings."""
    return value or None


def writable(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A file that is to be written when all is done: that it cannot be is said before."""
    folder = None if value is None else value.absolute().parent
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{folder} is no folder that can be written to", ctx, param)
    return value


FILE_OUT = click.Path(path_type=Path, dir_okay=False, writable=True)
"""The type of such an option; `writable` is its callback."""


def first_key(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A client's key, of a variable that it may share with a server that takes several."""
    return (value or "").partition(",")[0].strip() or None


def server_url(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Where a server is, with or without a path in front of its own."""
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment:
        raise click.BadParameter(f"{value!r} is not a URL like http://127.0.0.1:8000", ctx, param)
    return value


def _click_type(kind: Kind) -> Any:
    return click.Choice(kind.choices) if kind.choices else kind.base


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def read_settings(config: Path | None) -> Mapping[str, Any]:
    """The TOML file, if one is given; warns of variables that look like settings and are none."""
    for warning in unknown_variables(os.environ):
        click.echo(f"Warning: {warning}", err=True)
    return read_toml(config) if config else {}


def load_engine(given: Mapping[str, Any], toml: Mapping[str, Any]) -> EngineConfig:
    """The engine's settings. A model that is not there is told here, before anything heavy is
    imported or anybody listens; one of the hub only later, by the hub.

    Raises:
        ConfigError, LoadError: as `load` and `find` do.
    """
    config = load(EngineConfig, given, toml=toml)
    find(config)
    return config


def one_model(positional: str | None, option: str | None) -> str | None:
    """MODEL may be given as an argument or with --model, not as both."""
    if positional and option:
        raise click.UsageError("give the model as an argument or with --model, not both")
    return positional or option
