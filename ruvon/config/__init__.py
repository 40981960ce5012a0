"""Every setting, once: name, type, default, help. The only reader of argv, environment and TOML.

A setting is a dataclass field. Its command-line flag is the field's name with dashes, its variable
is ``RUVON_`` and the name in capitals, its TOML key is the name. What is given wins over what is
not in this order: argv, environment, TOML file, default; what loses is not looked at. Whoever
builds a config, from whatever source, gets the same checks. Never imports torch.

`engine` and `server` hold the settings, `fields` what each is held against, `sources` where values
come from.
"""

from ruvon.config.engine import CPU_STEP, GPU_STEP, EngineConfig, StepSize
from ruvon.config.fields import Kind, kinds
from ruvon.config.router import RouterConfig
from ruvon.config.server import ServerConfig
from ruvon.config.sizes import parse_size
from ruvon.config.sources import (
    CONFIGS,
    VARIABLES,
    cache_root,
    flag,
    load,
    read_toml,
    unknown_variables,
    variable,
)

__all__ = [
    "CONFIGS",
    "CPU_STEP",
    "GPU_STEP",
    "VARIABLES",
    "EngineConfig",
    "Kind",
    "RouterConfig",
    "ServerConfig",
    "StepSize",
    "cache_root",
    "flag",
    "kinds",
    "load",
    "parse_size",
    "read_toml",
    "unknown_variables",
    "variable",
]
