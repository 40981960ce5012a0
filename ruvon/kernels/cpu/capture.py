"""Instructions and values of a graph in the making: a model's calls are traced, not computed.

A `Capture` stands behind a table of `operations`. Each of them appends an instruction and returns a
tensor without memory, which stands for the value that it will make. Once all are there, it is known
who wants which value in which form, and up to where: `graph` then gives out memory.

A value is made in the forms that are asked for. A product with quantized weights wants its input
as int8 with scales, one with pairs of bfloat16 wants bfloat16; if that input is the output of a
norm, of attention or of another product, that instruction writes this form while it has the numbers
in its registers, and writes plain rows only if somebody else reads them. Nothing else is fused, and
models say nothing about any of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ruvon.kernels.cpu import arguments as told
from ruvon.kernels.cpu.arguments import Key, Output, Place, Rows
from ruvon.kernels.cpu.formats import GROUP, Form
from ruvon.kernels.cpu.layout import aligned_bytes, round_up
from ruvon.kernels.cpu.params import Param


class Instruction(NamedTuple):
    """A kernel and what it is told; ``units`` for each of what is counted."""

    kernel: Key
    counted: Param
    units: int
    dynamic: bool
    arguments: Any  # of `arguments`


@dataclass(slots=True, eq=False)
class Value:
    """What an instruction makes: plain rows, packed rows, or both, as others want them."""

    counted: Param  # says how many rows there are in a step
    capacity: int  # most of them
    width: int
    packable: bool = False  # whether its instruction can write every form, or plain rows only
    wanted: set[Form] = field(default_factory=set)
    memory: dict[Form, Tensor] = field(default_factory=dict)  # once it is given out

    @property
    def groups(self) -> int:
        return round_up(self.width, GROUP) // GROUP

    @property
    def stride(self) -> int:
        """Bytes from one plain row to the next."""
        return self.groups * Form.ROWS.group_bytes

    def read(self, form: Form = Form.ROWS, offset: int = 0) -> Place:
        """Where an instruction will find it in a form."""
        self.wanted.add(form)
        return Place(self, form, offset)

    def rows(self) -> Rows:
        """Where an instruction will find its plain rows."""
        return Rows(self.read(), self.stride)

    def output(self, offset: int = 0) -> Output:
        """Where its instruction writes it."""
        return Output(
            rows=Rows(Place(self, Form.ROWS, offset), self.stride),
            int8=Place(self, Form.INT8),
            bf16=Place(self, Form.BF16),
            groups=self.groups,
        )

    def floats(self) -> Tensor:
        """Its plain rows, float32 [capacity, width]."""
        return (
            self.memory[Form.ROWS].view(torch.float32).view(-1, self.stride // 4)[:, : self.width]
        )


@dataclass(slots=True)
class Capture:
    """A graph in the making, for steps of at most ``capacity`` rows."""

    capacity: dict[Param, int]
    instructions: list[Instruction] = field(default_factory=list)
    values: dict[int, tuple[Tensor, Value]] = field(default_factory=dict)  # by id of the tensor

    def append(
        self, kernel: Key, count: Param, arguments: Any, *, units: int = 1, dynamic: bool = False
    ) -> None:
        self.instructions.append(Instruction(kernel, count, units, dynamic, arguments))

    # Values

    def new(
        self,
        counted: Param,
        width: int,
        capacity: int | None = None,
        *,
        packable: bool = False,
    ) -> Value:
        """A value to be made by the instruction that comes next. ``capacity``: its most rows, where
        there are not as many as ``counted`` says."""
        most = self.capacity[counted] if capacity is None else capacity
        return Value(counted, most, width, packable, set() if packable else {Form.ROWS})

    def stand_in(self, value: Value, *shape: int) -> Tensor:
        """What the model is given for a value: a tensor without memory, a row for each of as many
        as there may be."""
        shape = shape or (value.width,)
        tensor = torch.empty(value.capacity, *shape, device="meta")
        self.values[id(tensor)] = tensor, value
        return tensor

    def value_of(self, x: Tensor) -> Value:
        """The value that a tensor stands for; one from outside is a value as it is now."""
        if id(x) in self.values:
            return self.values[id(x)][1]
        flat = x.reshape(x.shape[0], -1)
        value = Value(Param.TOKENS, flat.shape[0], flat.shape[1], wanted={Form.ROWS})
        value.memory[Form.ROWS] = aligned_bytes(round_up(value.capacity, GROUP) * value.stride)
        value.floats()[: flat.shape[0]] = flat
        return value

    def result(self, x: Tensor) -> Tensor:
        """What a tensor stands for, once there is memory."""
        floats = self.value_of(x).floats()[: x.shape[0]]
        if x.dim() == 3:  # heads, padded
            floats = floats.view(*x.shape[:2], -1)[:, :, : x.shape[2]]
        return floats

    def packed(self, value: Value, form: Form) -> Place:
        """Where rows for a product will be: written by what makes the value if that can, else
        packed from its plain rows."""
        if not value.packable and form not in value.wanted:
            packs = value.output()._replace(rows=Rows())
            self.append(("copy", None), value.counted, told.Copy(value.rows(), packs))
        return value.read(form)
