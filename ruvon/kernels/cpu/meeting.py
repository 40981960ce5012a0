"""Where ranks meet in a captured step: between the instructions before and those after.

A mesh's functions are traced like the operations of a table. Each call becomes a *meeting*, which
stands among the instructions as one of them, so that what it reads and makes has memory as long as
that is needed. A program runs what comes before it, calls the mesh, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ruvon.kernels.cpu.arguments import Address
from ruvon.kernels.cpu.capture import Capture, Value
from ruvon.kernels.cpu.params import Param
from ruvon.kernels.mesh import Mesh

KEY = ("meet", None)  # in place of a kernel's

Function: TypeAlias = Callable[..., Tensor]


class Meeting(NamedTuple):
    """The arguments of what is no kernel."""

    x: Address
    out: Address
    call: Callable[[Sequence[int]], object]  # with a step's sizes, by `Param`


def traced(mesh: Mesh, capturing: Callable[[], Capture | None]) -> Mesh:
    """The same mesh, but that calls while something is captured are noted. Functions that do
    nothing on this rank stay as they are."""

    def noting(at_once: Function, trace: Function, *, needed: bool) -> Function:
        def call(*arguments: Any) -> Tensor:
            capture = capturing()
            return at_once(*arguments) if capture is None else trace(capture, mesh, *arguments)

        return call if needed else at_once

    several = mesh.size > 1
    return replace(
        mesh,
        reduce=noting(mesh.reduce, _reduce, needed=several),
        gather=noting(mesh.gather, _gather, needed=several),
        send=noting(mesh.send, _send, needed=not mesh.is_last),
        receive=noting(mesh.receive, _receive, needed=not mesh.is_first),
    )


def _reduce(capture: Capture, mesh: Mesh, x_TC: Tensor) -> Tensor:
    x = capture.value_of(x_TC)
    out = capture.new(x.rows, x.width)
    _meet(capture, x, out, lambda size: _into(out, size, mesh.reduce(x.floats()[:size])))
    return capture.stand_in(out)


def _gather(capture: Capture, mesh: Mesh, x_LV: Tensor, widths: Sequence[int]) -> Tensor:
    x = capture.value_of(x_LV)
    out = capture.new(x.rows, sum(widths))
    _meet(capture, x, out, lambda size: _into(out, size, mesh.gather(x.floats()[:size], widths)))
    return capture.stand_in(out)


def _send(capture: Capture, mesh: Mesh, x_TC: Tensor) -> Tensor:
    x = capture.value_of(x_TC)
    _meet(capture, x, None, lambda size: mesh.send(x.floats()[:size]))
    return x_TC


def _receive(capture: Capture, mesh: Mesh, ids_T: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    out = capture.new(Param.TOKENS, width)
    _meet(
        capture, None, out, lambda size: _into(out, size, mesh.receive(ids_T[:size], width, dtype))
    )
    return capture.stand_in(out)


def _meet(
    capture: Capture, x: Value | None, out: Value | None, call: Callable[[int], object]
) -> None:
    value = x or out
    assert value is not None
    meeting = Meeting(
        x=None if x is None else x.read(),
        out=None if out is None else out.read(),
        call=lambda sizes: call(sizes[value.rows]),
    )
    capture.append(KEY, value.rows, meeting)


def _into(out: Value, size: int, made: Tensor) -> None:
    out.floats()[:size] = made
