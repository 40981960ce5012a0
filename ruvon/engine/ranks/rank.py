"""One rank: the program of a process that computes its share of every step.

It is started with two descriptors (`ruvon.engine.ranks.process`): its channel, and the lifeline
that ends it with the process that started it. What it is to do comes through the channel.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from threading import Event, get_ident
from typing import Any, NoReturn

import structlog
import torch
import torch.distributed as dist

from ruvon.config import EngineConfig
from ruvon.engine.kv_cache import MemoryPlan
from ruvon.engine.ranks.channel import Channel, Frame, Kind
from ruvon.engine.ranks.codec import decode_plan, encode_result
from ruvon.engine.ranks.meeting import MeetingCounter
from ruvon.engine.ranks.messages import (
    checksum,
    describe_error,
    describe_failure,
    describe_memory,
    write_report,
)
from ruvon.engine.ranks.process import hold_on_to
from ruvon.engine.ranks.ring import NUMBER, RingReader, read_whole
from ruvon.engine.ranks.steps import Meetings, Report
from ruvon.engine.startup import Partners, start_engine
from ruvon.engine.steps import Runner
from ruvon.engine.types import StepResult
from ruvon.grammars import Grammar
from ruvon.kernels.mesh import Mesh, process_group_mesh

log = structlog.get_logger(__name__)


class Rank:
    """Computes the plans that come, in order. A step that raises is told of, and nothing follows it
    before all ranks have agreed to go on."""

    def __init__(
        self,
        channel: Channel,
        ring: RingReader,
        runner: Runner,
        counter: MeetingCounter,
        *,
        answers: bool,
        compile: Callable[[Grammar], object] = lambda grammar: None,
    ) -> None:
        """``answers``: whether results are to be sent, as one rank of all does. ``compile`` is for
        grammars that plans will ask for."""
        self._channel = channel
        self._ring = ring
        self._runner = runner
        self._counter = counter
        self._answers = answers
        self._compile = compile
        self._beside = ThreadPoolExecutor(1, "ruvon-grammars")
        self._failed: dict[int, Event] = {}  # steps behind which a runner's thread waits
        self._held_by: int | None = None  # the failed step behind which none is launched
        self._backlog: deque[Frame] = deque()  # behind it
        self._thread = 0

    def serve(self) -> None:
        """Until the end is asked for. Raises EOFError if the other side ends without asking."""
        self._thread = get_ident()
        while (frame := self._channel.receive()).kind != Kind.END:
            match frame.kind:
                case Kind.PLAN | Kind.LARGE_PLAN:
                    self._backlog.append(frame)
                case Kind.RESUME:
                    self._resume(NUMBER.unpack(frame.payload)[0])
                case Kind.GRAMMAR:
                    self._beside.submit(self._compile, Grammar(**frame.json))
                case Kind.PING:
                    self._channel.send(Kind.PONG)
            while self._backlog and self._held_by is None:
                self._launch(self._backlog.popleft())

    def _launch(self, frame: Frame) -> None:
        number, data = self._read(frame)
        try:
            future = self._runner.launch(decode_plan(data))
        except Exception as error:
            self._held_by = number
            self._tell_failure(number, error, Meetings())
        else:
            future.add_done_callback(partial(self._tell, number))

    def _read(self, frame: Frame) -> tuple[int, bytes]:
        if frame.kind == Kind.PLAN:
            return self._ring.read(frame.payload)
        (number,) = NUMBER.unpack(frame.payload)
        data = read_whole(frame.fds[0])
        self._ring.acknowledge(number)
        return number, data

    def _resume(self, number: int) -> None:
        if number == self._held_by:
            self._held_by = None
        else:
            self._failed.pop(number).set()

    def _tell(self, number: int, future: Future[StepResult]) -> None:
        """Say how a step has ended: in the thread that computes steps, before it begins another, or
        in the one that launches them, if it has ended before that could ask to be called."""
        meetings, error = self._counter.take(), future.exception()
        if error is None:
            self._tell_result(number, future.result(), meetings)
        elif get_ident() == self._thread:
            self._held_by = number
            self._tell_failure(number, error, meetings)
        else:
            resumed = self._failed[number] = Event()
            self._tell_failure(number, error, meetings)
            resumed.wait()

    def _tell_result(self, number: int, result: StepResult, meetings: Meetings) -> None:
        payload = write_report(number, Report(meetings, checksum(result)))
        with suppress(OSError):  # nobody is there to hear it; the main thread sees that as well
            if self._answers:
                self._channel.send(Kind.RESULT, payload + encode_result(result))
            else:
                self._channel.send(Kind.DONE, payload)

    def _tell_failure(self, number: int, error: BaseException, meetings: Meetings) -> None:
        with suppress(OSError):
            self._channel.send_json(Kind.FAILED, describe_failure(number, error, meetings))


def run(channel: Channel, setup: Mapping[str, Any], ring: RingReader) -> None:
    """Load what ``setup`` says, and compute until the end."""

    def progress(phase: str, share: float) -> None:
        channel.send_json(Kind.PROGRESS, [phase, share])

    def agree(own: MemoryPlan) -> MemoryPlan:
        channel.send_json(Kind.LOADED, describe_memory(own))
        said = expect(channel, Kind.CACHE).json
        return replace(own, num_blocks=said["num_blocks"], max_model_len=said["max_model_len"])

    if setup["cores"] is not None:
        os.sched_setaffinity(0, setup["cores"])
    config = EngineConfig(**setup["config"])
    counter, mesh = MeetingCounter(), join(setup, config)
    if config.device == "cpu" or config.kernels == "torch":
        mesh = counter.over(mesh)
    loaded = start_engine(config, progress, mesh, Partners(agree, setup["sharers"]))
    counter.take()
    runner = loaded.runner
    ready = {
        "depth": runner.depth,
        "grammar_depth": runner.grammar_depth,
        "long_step": runner.long_step,
        "device": loaded.device,
        "kernels": loaded.kernels,
        "dtype": loaded.dtype,
        "batch_invariant": loaded.batch_invariant,
    }
    channel.send_json(Kind.READY, ready)
    answers = mesh.is_last and mesh.rank == 0
    compile = loaded.grammars.hold
    Rank(channel, ring, runner, counter, answers=answers, compile=compile).serve()
    loaded.close()
    mesh.close()


def join(setup: Mapping[str, Any], config: EngineConfig) -> Mesh:
    """Meet the other ranks."""
    size, stages, number = setup["size"], setup["stages"], setup["rank"]
    torch_stores: Any = dist  # whose stubs do not have them
    if setup["host"] is None:
        store = torch_stores.FileStore(f"/proc/self/fd/{setup['store']}", size * stages)
    else:
        store = torch_stores.TCPStore(setup["host"], setup["port"], wait_for_workers=False)
    device = torch.device(config.device)
    mesh = process_group_mesh(
        store,
        rank=number % size,
        size=size,
        stage=number // size,
        stages=stages,
        device=device,
        in_order=config.deterministic,
        address=setup["address"],
        timeout=timedelta(seconds=setup["timeout"]),
    )
    if device.type == "cpu" or setup["host"] is not None:
        return mesh
    from ruvon.kernels.memory_mesh import over_memory  # triton is not on every platform

    try:
        return over_memory(mesh, store, device)
    except RuntimeError as error:  # slower, but right
        log.warning("slow_sums", reason=str(error), cause=str(error.__cause__))
        return mesh


def expect(channel: Channel, kind: Kind) -> Frame:
    """The next frame of a kind; pings are answered meanwhile."""
    while (frame := channel.receive()).kind != kind:
        if frame.kind == Kind.END:
            raise EOFError("the start was given up")
    return frame


def send_logs(channel: Channel) -> None:
    """Let whatever is logged here be logged by the process that has started this one."""

    def forward(logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        with suppress(OSError):
            channel.send_json(Kind.LOG, {**event, "level": level})
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.processors.format_exc_info, forward])


def main() -> None:
    """A terminal's Ctrl-C, and whoever stops all of a service's processes, reach this one too: it
    is for the process that has started it to say when the end has come."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    rank, connection, lifeline, store = map(int, sys.argv[1:])
    hold_on_to(lifeline)
    channel = Channel(socket.socket(fileno=connection), rank)
    send_logs(channel)
    try:
        frame = expect(channel, Kind.SETUP)
        setup = {**frame.json, "rank": rank, "store": store}
        run(channel, setup, RingReader(frame.fds[0], setup["place"]))
        os._exit(0)  # what is left to undo is memory
    except EOFError:  # nobody is left to say it to
        os._exit(1)
    except BaseException as error:
        channel.send_json(Kind.FATAL, describe_error(error))
        os._exit(1)  # threads of libraries may wait for other ranks


if __name__ == "__main__":
    main()
