"""One model's weights in every format and container that bench/peers.py serves them in.

Files that are not there yet are made once, by scripts that run in an environment with the package
`gguf` or in that of transformers.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from peer_servers import HERE, HOME, LONGEST, PEERS, Peer, install, quiet

from ruvon.config import EngineConfig
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.gguf import GgufFile
from ruvon.telemetry import silent

MADE = ("bf16", "int8", "q8_0", "q4_1", "q4_0")
FILE_TYPES = {1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 32: "bf16", 38: "mxfp4"}
"""``general.file_type`` of a GGUF. Any other is named after the file."""

TOOLS = Peer("gguf", "", lambda python, setting: [], lambda format: False, packages=("gguf",))


@dataclass(frozen=True, slots=True)
class Weights:
    """A GGUF file, or a Hugging Face folder in safetensors, and what is made from it."""

    source: Path

    @property
    def format(self) -> str:
        """That of the source."""
        if self.source.is_dir():
            return "bf16"
        kind = GgufFile(self.source).metadata.get("general.file_type")
        return FILE_TYPES.get(kind, self.source.stem)

    def usual_formats(self) -> list[str]:
        """The source's own, and for a GGUF those that llama.cpp is fastest and most exact with.
        Of experts in MXFP4 nothing else is made."""
        if self.format == "mxfp4":
            return [self.format]
        more = ("int8",) if self.source.is_dir() else ()
        return list(dict.fromkeys((self.format, *more, "q4_0", "q8_0")))

    @property
    def context(self) -> int:
        """Tokens that a sequence may have here."""
        spec = open_checkpoint(EngineConfig(str(self.source)), silent).spec
        return min(spec.max_positions, LONGEST)

    def path(self, peer: Peer, format: str) -> Path:
        """What ``peer`` is given to serve ``format``.

        Raises:
            RuntimeError: it could not be made.
        """
        return self.folder() if format in peer.folders else self.gguf(format)

    def folder(self) -> Path:
        """Dequantized to bfloat16, unless the source is a folder."""
        if self.source.is_dir():
            return self.source
        (maker,) = (peer for peer in PEERS if peer.name == "transformers")
        return self._made("folder", maker, HERE / "gguf_to_folder.py", self.source)

    def gguf(self, format: str) -> Path:
        if self.source.is_file() and format == self.format:
            return self.source
        if self.source.is_dir() and format == "bf16":
            return self._made("bf16.gguf", TOOLS, HERE / "gpt2_to_gguf.py", self.source)
        base = self.source if self.source.is_file() else self.gguf("bf16")
        return self._made(f"{format}.gguf", TOOLS, HERE / "requantize.py", base, format)

    def _made(self, name: str, maker: Peer, script: Path, *arguments: object) -> Path:
        """``script ARGUMENTS OUTPUT``, run once; half an output has another name."""
        mark = hashlib.sha256(f"{self.source.resolve()} {self.source.stat().st_mtime_ns}".encode())
        home = HOME / "weights" / f"{self.source.stem}-{mark.hexdigest()[:8]}"
        path = home / name
        if not path.exists():
            install(maker)
            home.mkdir(parents=True, exist_ok=True)
            print(f"making {path}", file=sys.stderr, flush=True)
            part = path.with_name(f"part-{name}")
            quiet([str(maker.python), str(script), *map(str, arguments), str(part)])
            part.rename(path)
        return path
