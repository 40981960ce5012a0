"""Write docs/reference/flags.md from the config's fields; tests check that it is current.

python scripts/make_flags.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ruvon.config import CONFIGS, VARIABLES, flag, kinds, variable

PATH = Path(__file__).parent.parent / "docs" / "reference" / "flags.md"
HEAD = """\
# Settings

<!-- Made by scripts/make_flags.py from ruvon/config. -->

Each setting is a flag of `ruvon serve`, an environment variable and a key of the TOML file given
with `--config`. The command line wins over the environment, the environment over the file, the
file over the default. A key that is unknown or a value that cannot be honoured ends the start with
an error that names it, unless another value wins over it. An empty variable counts as not set, and
so do the variables that Kubernetes makes of a service named ruvon, such as
`RUVON_PORT=tcp://10.0.0.5:8000`.

```toml
# ruvon.toml
model = "Qwen/Qwen3-0.6B"
max_num_seqs = 8
kv_cache_memory = "2GiB"
enable_prefix_caching = false
```
"""
TITLES = ("Engine", "Server", "Router")


def render() -> str:
    parts = [HEAD]
    for title, cls in zip(TITLES, CONFIGS, strict=True):
        parts.append(f"\n## {title}\n")
        for spec in dataclasses.fields(cls):
            kind = kinds(cls)[spec.name]
            shown = str(kind).replace(" | ", "`, `")
            values = f"one of `{shown}`" if kind.choices else shown
            parts.append(
                f"\n### `{flag(spec.name)}`\n\n{spec.metadata['help']}\n\n"
                f"- variable: `{variable(spec.name)}`\n- value: {values}{off(kind.base, spec)}\n"
                f"- default: {default(spec.default)}\n"
            )
    parts.append("\n## Other variables\n\n")
    parts += [f"- `{variable(name)}`: {help}\n" for name, help in VARIABLES.items()]
    return "".join(parts)


def off(base: type, spec: dataclasses.Field[object]) -> str:
    return f"; `--no-{flag(spec.name)[2:]}` is off" if base is bool else ""


def default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, ()) else f"`{value}`"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
    print(f"Wrote {PATH}")
