"""What ranks say of steps, of themselves and of what happens to them, as the payloads of frames."""

from __future__ import annotations

import struct
import traceback
import zlib
from array import array
from collections.abc import Mapping
from itertools import chain
from typing import Any

import structlog
import torch

from ruvon.engine.kv_cache import KVFormat, MemoryPlan
from ruvon.engine.ranks.steps import Meetings, RankError, Report
from ruvon.engine.types import StepResult
from ruvon.errors import ConfigError, LoadError

log = structlog.get_logger(__name__)

REPORT = struct.Struct("<QIIII")  # the step's number, a checksum, and with whom the rank has met
PASSED_ON = {"ConfigError": ConfigError, "LoadError": LoadError}
"""Errors at start that are the user's business; all others are our own."""


def write_report(number: int, report: Report) -> bytes:
    """That a step is over, and went well."""
    return REPORT.pack(number, report.checksum, *report.meetings[:3])


def read_report(payload: bytes) -> tuple[int, Report]:
    """What `write_report` was given."""
    number, checksum, *meetings = REPORT.unpack_from(payload)
    return number, Report(Meetings(*meetings), checksum)


def describe_failure(number: int, error: BaseException, meetings: Meetings) -> dict[str, Any]:
    """That a step has failed, as JSON."""
    return {"number": number, "meetings": list(meetings), **describe_error(error)}


def read_failure(said: Mapping[str, Any]) -> tuple[int, Report]:
    """What `describe_failure` was given."""
    meetings = Meetings(*said["meetings"])
    text = f"{said['type']}: {said['message']}\n{said['traceback']}"
    return said["number"], Report(meetings, error=text)


def checksum(result: StepResult) -> int:
    """Of the tokens that a step has sampled: ranks must have the same ones."""
    return zlib.crc32(array("q", chain.from_iterable(result.tokens)).tobytes())


def describe_error(error: BaseException) -> dict[str, str]:
    """An error, as JSON."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def start_error(rank: int, said: Mapping[str, str]) -> Exception:
    """What a rank could not start for, as an error of this process."""
    if said["type"] in PASSED_ON:
        return PASSED_ON[said["type"]](f"rank {rank}: {said['message']}")
    error = RankError(f"rank {rank} could not start: {said['type']}: {said['message']}")
    error.add_note(said["traceback"])
    return error


def describe_memory(memory: MemoryPlan) -> dict[str, Any]:
    """A rank's own plan, as JSON."""
    return {
        "weight_bytes": memory.weight_bytes,
        "block_bytes": memory.block_bytes,
        "num_blocks": memory.num_blocks,
        "max_model_len": memory.max_model_len,
        "cache_dtype": memory.dtype,
        "head_multiple": memory.kv.multiple,
    }


def join_memory(
    each: list[Mapping[str, Any]], block_size: int, windows: tuple[int, ...]
) -> MemoryPlan:
    """The plan of all ranks: what they take together, and blocks as the one with the fewest has."""
    return MemoryPlan(
        weight_bytes=sum(said["weight_bytes"] for said in each),
        block_bytes=sum(said["block_bytes"] for said in each),
        block_size=block_size,
        num_blocks=min(said["num_blocks"] for said in each),
        max_model_len=min(said["max_model_len"] for said in each),
        kv=KVFormat(getattr(torch, each[0]["cache_dtype"]), each[0]["head_multiple"]),
        windows=windows,
    )


def forward_log(rank: int, said: Mapping[str, Any]) -> None:
    """Log a line of a rank's as one of this process."""
    fields = dict(said)
    level, event = fields.pop("level", "info"), fields.pop("event", "")
    getattr(log, level, log.info)(event, rank=rank, **fields)
