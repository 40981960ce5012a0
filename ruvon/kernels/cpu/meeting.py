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

from ruvon.kernels.cpu.arguments import Place
from ruvon.kernels.cpu.graph import MEET, Capture, Value
from ruvon.kernels.cpu.params import Param
from ruvon.kernels.mesh import Mesh

Function: TypeAlias = Callable[..., Tensor]


class Meeting(NamedTuple):
    """The arguments of what is no kernel."""

    touched: tuple[Place, ...]
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
    return _made(capture, x.counted, x.width, [x], lambda size: mesh.reduce(x.floats()[:size]))


def _gather(capture: Capture, mesh: Mesh, x_LV: Tensor, widths: Sequence[int]) -> Tensor:
    x = capture.value_of(x_LV)
    return _made(
        capture, x.counted, sum(widths), [x], lambda size: mesh.gather(x.floats()[:size], widths)
    )


def _send(capture: Capture, mesh: Mesh, x_TC: Tensor) -> Tensor:
    x = capture.value_of(x_TC)
    _meet(capture, x.counted, [x], lambda size: mesh.send(x.floats()[:size]))
    return x_TC


def _receive(capture: Capture, mesh: Mesh, ids_T: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return _made(
        capture, Param.TOKENS, width, [], lambda size: mesh.receive(ids_T[:size], width, dtype)
    )


def _made(
    capture: Capture, rows: Param, width: int, given: list[Value], make: Callable[[int], Tensor]
) -> Tensor:
    """What a meeting makes of ``given``, told how many rows there are."""
    out = capture.new(rows, width)

    def call(size: int) -> None:
        out.floats()[:size] = make(size)

    _meet(capture, rows, [*given, out], call)
    return capture.stand_in(out)


def _meet(
    capture: Capture, rows: Param, values: list[Value], call: Callable[[int], object]
) -> None:
    touched = tuple(value.read() for value in values)
    capture.append(MEET, rows, Meeting(touched, lambda sizes: call(sizes[rows])))
