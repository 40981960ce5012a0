"""Sixteen floats as one value, for kernels written in Python and compiled by numba: ``v`` there.

numba knows scalars and arrays; this file teaches it one more type, ``f32x16``, and the few things
a kernel does with it. Nothing here depends on how wide the machine is, and nothing is reassociated:
``fastmath`` stays off, sums over lanes use one fixed tree.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, get_type_hints

from llvmlite import ir
from numba import types
from numba.core.typeconv import Conversion
from numba.core.typing.templates import ConcreteTemplate, signature
from numba.core.typing.templates import infer_global as infer
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

from ruvon.kernels.cpu.formats import LANES
from ruvon.kernels.cpu.jit.llvm import (
    F32,
    F32V,
    F64,
    I8,
    I32,
    I32V,
    I64,
    Builder,
    constant,
    number,
    vector,
)
from ruvon.kernels.cpu.jit.translate import helper


class F32x16(types.Type):  # type: ignore[misc]
    """numba's view of sixteen float32 in a register. One number counts as sixteen of it."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")

    def can_convert_from(self, typing: Any, other: types.Type) -> Conversion | None:
        return Conversion.promote if isinstance(other, types.Float) else None


V = F32x16()


@register_model(F32x16)
class F32x16Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, vector(F32))


def teach_operator(symbol: Any, method: str) -> None:
    @infer(symbol)
    class Template(ConcreteTemplate):  # type: ignore[misc]
        cases = [signature(V, V, V)]  # noqa: RUF012

    @lower_builtin(symbol, V, V)
    def lower(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> ir.Value:
        return getattr(b, method)(*values)


for _symbol, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    teach_operator(_symbol, _method)


def written(b: ir.IRBuilder, emit: Callable[..., Any], *values: ir.Value) -> Any:
    """What ``emit`` makes of values in our builder's words, behind what numba's has written."""
    ours = Builder(b.block)
    made = emit(ours, *values)
    b.position_at_end(ours.block)
    return made


@lower_cast(types.Float, F32x16)
def spread(context: Any, b: ir.IRBuilder, given: Any, _wanted: Any, value: ir.Value) -> ir.Value:
    return written(b, Builder.splat, context.cast(b, value, given, types.float32))


def operation(
    emit: Callable[..., ir.Value | None], *arguments: types.Type, result: types.Type = V
) -> Any:
    """A function that kernels may call, which ``emit`` writes in LLVM's language."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> Any:
        made = written(b, emit, *values)
        return context.get_dummy_value() if made is None else made

    def called(typing, *_given):
        return result(*arguments), generate

    names = ["typing", *(f"x{n}" for n in range(len(arguments)))]
    each = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    called.__signature__ = Signature(each)  # type: ignore[attr-defined]  # numba wants to know
    return intrinsic(called)


# Vectors


def unary(name: str) -> Callable[..., ir.Value]:
    return lambda b, x: b.invoke(f"llvm.{name}.v16f32", F32V, [x])


def emit_any_within(b: Builder, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    inside = b.and_(b.fcmp_ordered(">=", x, low), b.fcmp_ordered("<=", x, high))
    bits = ir.IntType(LANES)
    return b.icmp_unsigned("!=", b.bitcast(inside, bits), ir.Constant(bits, 0))


fma = operation(Builder.fused, V, V, V)  # x * y + z, rounded once
larger = operation(Builder.greater, V, V)
absolute = operation(unary("fabs"), V)
nearest = operation(unary("rint"), V)  # ties to even
# of integral numbers in [-127, 127]; -127 gives 0
power_of_two = operation(lambda b, x: b.with_exponent(b.add(b.fptosi(x, I32V), constant(127))), V)
sum_lanes = operation(lambda b, x: b.tree(x, b.fadd), V, result=types.float32)
max_lanes = operation(lambda b, x: b.tree(x, b.greater), V, result=types.float32)

# (x, count, other): lanes below ``count`` of x, the rest of ``other``
keep_first = operation(
    lambda b, x, count, other: b.select(b.first_lanes(count), x, other), V, types.intp, V
)
# (x, low, high): whether any lane is from low to high
any_within = operation(emit_any_within, V, V, V, result=types.boolean)


# Memory: vectors

load = operation(lambda b, at: b.load_as(at, F32V, 4), types.intp)
store = operation(lambda b, at, x: b.store_as(at, x, 4), types.intp, V, result=types.void)
# Ask for a cache line that will be read soon
prefetch = operation(Builder.prefetch, types.intp, result=types.void)


def make_store(storage: str) -> Any:
    """The function that stores sixteen lanes side by side: "f32", "f16" or "bf16"."""

    def emit(b: Builder, address: ir.Value, x: ir.Value) -> None:
        b.store_as(address, b.narrow(x, storage), 2)

    return operation(emit, types.intp, V, result=types.void)


def make_scatter(storage: str, stride: int) -> Any:
    """The same, but that each lane lies ``stride`` bytes behind the one before."""

    def emit(b: Builder, address: ir.Value, x: ir.Value) -> None:
        kept = b.narrow(x, storage)
        for lane in range(LANES):
            value = b.extract_element(kept, ir.Constant(I32, lane))
            b.store_as(b.offset(address, lane * stride), value, 2)

    return operation(emit, types.intp, V, result=types.void)


# Memory: scalars


def reader(kind: ir.Type, size: int, known: types.Type = types.intp) -> Any:
    """Reads a number at an address; an integer is widened to int64."""

    def emit(b: Builder, address: ir.Value) -> ir.Value:
        value = b.load_as(address, kind, size)
        return b.sext(value, I64) if kind in (I8, I32) else value

    return operation(emit, types.intp, result=known)


def writer(kind: ir.Type, size: int, known: types.Type = types.intp) -> Any:
    """Writes a number at an address; an integer is cut to size."""

    def emit(b: Builder, address: ir.Value, x: ir.Value) -> None:
        b.store_as(address, b.trunc(x, kind) if kind in (I8, I32) else x, size)

    return operation(emit, types.intp, known, result=types.void)


read_i64, read_i32, read_i8 = reader(I64, 8), reader(I32, 4), reader(I8, 1)
read_f32, read_f64 = reader(F32, 4, types.float32), reader(F64, 8, types.float64)
write_i64, write_i32, write_i8 = writer(I64, 8), writer(I32, 4), writer(I8, 1)
write_f32, write_f64 = writer(F32, 4, types.float32), writer(F64, 8, types.float64)


@helper
def get(params, number):
    """A step's parameter."""
    return read_i64(params + 8 * number)


@helper
def row_at(rows, row):
    """Where one of some plain rows lies."""
    return rows.at + row * rows.stride


def numba_type(kind: Any) -> types.Type:
    """Of a field of arguments, or of a whole tuple of them."""
    if kind is float:
        return types.float64
    if not hasattr(kind, "_fields"):
        return types.intp
    return types.BaseTuple.from_types([*map(numba_type, get_type_hints(kind).values())], kind)


@intrinsic
def arguments(typing, kind, address):
    """A tuple of `ruvon.kernels.cpu.arguments`, of this kind, as it lies at ``address``."""
    result = numba_type(kind.instance_class)

    def generate(context, b, sig, values):
        places = (b.add(values[1], number(at)) for at in itertools.count(0, 8))

        def read(kind):
            if kind in (types.float64, types.intp):
                element = F64 if kind is types.float64 else I64
                return b.load(b.inttoptr(next(places), element.as_pointer()), align=8)
            return context.make_tuple(b, kind, [read(each) for each in kind])

        return read(result)

    return result(kind, types.intp), generate


# Functions of vectors

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440054690583e-4  # their sum is ln 2 to 2 ** -39


@helper
def exp16(x):
    """e ** x to about 1e-7 of itself; exactly 1 at 0, exactly 0 at and below -88."""
    x = larger(x, -88.0)
    x = 0.0 - larger(0.0 - x, -88.0)
    whole = nearest(x * LOG2_E)
    rest = fma(whole, -LN2_HIGH, x)
    rest = fma(whole, -LN2_LOW, rest)
    p = 1.9875691500e-4
    p = fma(p, rest, 1.3981999507e-3)
    p = fma(p, rest, 8.3334519073e-3)
    p = fma(p, rest, 4.1665795894e-2)
    p = fma(p, rest, 1.6666665459e-1)
    p = fma(p, rest, 5.0000001201e-1)
    p = fma(p, rest * rest, rest) + 1.0
    return p * power_of_two(whole)
