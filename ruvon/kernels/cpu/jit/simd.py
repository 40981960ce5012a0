"""Sixteen floats as one value, for kernels written in Python and compiled by numba.

numba knows scalars and arrays; this file teaches it one more type, ``f32x16``, and the few things
a kernel does with it. LLVM turns each into one AVX-512 instruction, or two AVX2 ones, or four of
NEON: the arithmetic, and so every bit of the result, is the same on all of them. Memory is
addressed by plain integers (bytes), as in C.

Nothing here depends on how wide the machine is, and nothing is reassociated: ``fastmath`` stays
off, sums over lanes use one fixed tree.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import ConcreteTemplate, signature
from numba.core.typing.templates import infer_global as infer
from numba.extending import intrinsic, lower_builtin, models, register_model

from ruvon.kernels.cpu.arguments import fields
from ruvon.kernels.cpu.formats import FORMATS, LANES
from ruvon.kernels.cpu.jit.translate import helper

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class BrainType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat16, which llvmlite does not name. Only the CPU's dot product takes it."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


BF16 = BrainType()


def vector(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


F32V, I32V = vector(F32), vector(I32)


def constant(value: int, lanes: int = LANES) -> ir.Constant:
    """An int32 in all lanes."""
    signed = value - (1 << 32) if value >= 1 << 31 else value
    return ir.Constant(vector(I32, lanes), [signed] * lanes)


class F32x16(types.Type):  # type: ignore[misc]
    """numba's view of sixteen float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


f32x16 = F32x16()


@register_model(F32x16)
class F32x16Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, vector(F32))


# Building blocks of LLVM code, shared with the register-blocked kernels in `tiles`.


def pointer(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return b.inttoptr(address, kind.as_pointer())


def load_as(b: ir.IRBuilder, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    return b.load(pointer(b, address, kind), align=align)


def store_as(b: ir.IRBuilder, address: ir.Value, value: ir.Value, align: int) -> None:
    b.store(value, pointer(b, address, value.type), align=align)


def number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def offset(b: ir.IRBuilder, address: ir.Value, value: int) -> ir.Value:
    return b.add(address, number(value)) if value else address


def broadcast(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """One number from memory in all lanes: part of the instruction that uses it, on AVX-512."""
    return splat(b, load_as(b, address, kind, 4))


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(vector(I32, lanes), [0] * lanes))


def call(b: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic or an external function, declaring it at first use."""
    declared = b.module.globals.get(name)
    if declared is None:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        declared = ir.Function(b.module, kind, name)
    return b.call(declared, arguments)


def fused(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return call(b, f"llvm.fma.v{z.type.count}f32", z.type, [x, y, z])


def widen(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """Lanes of float16, or of bfloat16 held as int16, to float32: exact."""
    if raw.type.element == F32:
        return raw
    if raw.type.element == F16:
        return b.fpext(raw, F32V)
    return b.bitcast(b.shl(b.zext(raw, I32V), constant(16)), F32V)


def narrow(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 lanes to bfloat16 in int16, rounding to nearest even (NaN is not preserved)."""
    bits = b.bitcast(value, I32V)
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    rounded = b.add(bits, b.add(odd, constant(0x7FFF)))
    return b.trunc(b.lshr(rounded, constant(16)), vector(I16))


def outlined(
    b: ir.IRBuilder, name: str, arguments: list[ir.Value], emit: Callable[..., None]
) -> None:
    """Call a function of this module, which ``emit`` writes at first use: large unrolled code
    stands, and is compiled, once."""
    function = b.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = ir.Function(b.module, kind, name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        function.attributes.alignstack = 64  # what is spilled must not lie across cache lines
        inner = ir.IRBuilder(function.append_basic_block())
        emit(inner, *function.args)
        inner.ret_void()
    b.call(function, arguments)


def greater(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def first_lanes(b: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """A mask of the lanes below ``count`` (which may be negative or above 16)."""
    lanes = ir.Constant(I32V, list(range(LANES)))
    return b.icmp_signed("<", lanes, splat(b, b.trunc(count, I32)))


def define(
    result: types.Type, arguments: tuple[types.Type, ...], emit: Callable[..., ir.Value | None]
) -> tuple[Any, Any]:
    """The (signature, code generator) pair that numba wants of an intrinsic."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> Any:
        made = emit(b, *values)
        return context.get_dummy_value() if made is None else made

    return result(*arguments), generate


# Operators


def teach_operator(symbol: Any, method: str) -> None:
    @infer(symbol)
    class Template(ConcreteTemplate):  # type: ignore[misc]
        cases = [signature(f32x16, f32x16, f32x16)]  # noqa: RUF012

    @lower_builtin(symbol, f32x16, f32x16)
    def lower(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> ir.Value:
        return getattr(b, method)(*values)


for _symbol, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    teach_operator(_symbol, _method)


# Vectors

V = f32x16


def operation(
    emit: Callable[..., ir.Value | None], *arguments: types.Type, result: types.Type = V
) -> Any:
    """A function that kernels may call, which ``emit`` writes in LLVM's language."""

    def called(typing, *_given):
        return define(result, arguments, emit)

    names = ["typing", *(f"x{n}" for n in range(len(arguments)))]
    each = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    called.__signature__ = Signature(each)  # type: ignore[attr-defined]  # numba wants to know
    return intrinsic(called)


def unary(name: str) -> Callable[..., ir.Value]:
    return lambda b, x: call(b, f"llvm.{name}.v16f32", F32V, [x])


def with_exponent(b: ir.IRBuilder, exponents: ir.Value) -> ir.Value:
    """2 ** (exponent - 127), and 0 for 0: an exponent is where a float32 has it."""
    return b.bitcast(b.shl(exponents, constant(23)), F32V)


def emit_any_within(b: ir.IRBuilder, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    inside = b.and_(b.fcmp_ordered(">=", x, low), b.fcmp_ordered("<=", x, high))
    bits = ir.IntType(LANES)
    return b.icmp_unsigned("!=", b.bitcast(inside, bits), ir.Constant(bits, 0))


def tree(b: ir.IRBuilder, x: ir.Value, combine: Callable[..., ir.Value]) -> ir.Value:
    """Fold 16 lanes into one, halves upon halves: the same order on every machine."""
    width = LANES
    while width > 1:
        width //= 2
        low = ir.Constant(vector(I32, width), list(range(width)))
        high = ir.Constant(vector(I32, width), list(range(width, 2 * width)))
        x = combine(b, b.shuffle_vector(x, x, low), b.shuffle_vector(x, x, high))
    return b.extract_element(x, ir.Constant(I32, 0))


splat16 = operation(splat, types.float32)  # one float in all lanes
fma = operation(fused, V, V, V)  # x * y + z, rounded once
larger = operation(greater, V, V)
absolute = operation(unary("fabs"), V)
nearest = operation(unary("rint"), V)  # ties to even
# of integral numbers in [-127, 127]; -127 gives 0
power_of_two = operation(lambda b, x: with_exponent(b, b.add(b.fptosi(x, I32V), constant(127))), V)
sum_lanes = operation(
    lambda b, x: tree(b, x, lambda b, p, q: b.fadd(p, q)), V, result=types.float32
)
max_lanes = operation(lambda b, x: tree(b, x, greater), V, result=types.float32)

# (x, count, other): lanes below ``count`` of x, the rest of ``other``
keep_first = operation(
    lambda b, x, count, other: b.select(first_lanes(b, count), x, other), V, types.intp, V
)
# (x, low, high): whether any lane is from low to high
any_within = operation(emit_any_within, V, V, V, result=types.boolean)


# Memory: vectors

load = operation(lambda b, at: load_as(b, at, F32V, 4), types.intp)
store = operation(lambda b, at, x: store_as(b, at, x, 4), types.intp, V, result=types.void)


def stored(b: ir.IRBuilder, x: ir.Value, storage: str) -> ir.Value:
    """float32 lanes as they are kept in memory, bfloat16 as int16."""
    if storage == "f32":
        return x
    return narrow(b, x) if storage == "bf16" else b.fptrunc(x, vector(F16))


@intrinsic(prefer_literal=True)
def store_lanes(typing, kind, address, x):
    """Store sixteen lanes side by side, as dense tiles of a kind have them."""
    storage = FORMATS[kind.literal_value].storage

    def emit(b, _kind, address, x):
        store_as(b, address, stored(b, x, storage), 2)

    return define(types.void, (kind, types.intp, f32x16), emit)


@intrinsic(prefer_literal=True)
def scatter_lanes(typing, kind, address, x):
    """The same as a column of a tile, each lane sixteen numbers behind the one before."""
    form = FORMATS[kind.literal_value]

    def emit(b, _kind, address, x):
        kept = stored(b, x, form.storage)
        for lane in range(LANES):
            value = b.extract_element(kept, ir.Constant(I32, lane))
            store_as(b, offset(b, address, lane * form.step_bytes), value, 2)

    return define(types.void, (kind, types.intp, f32x16), emit)


def emit_prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    hints = [ir.Constant(I32, number) for number in (0, 2, 1)]  # to read, into L2, data
    call(b, "llvm.prefetch.p0", ir.VoidType(), [pointer(b, address, I8), *hints])


# Ask for a cache line that will be read soon
prefetch = operation(emit_prefetch, types.intp, result=types.void)


# Memory: scalars


def reader(kind: ir.Type, size: int, known: types.Type = types.intp) -> Any:
    """Reads a number at an address; an integer is widened to int64."""

    def emit(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        value = load_as(b, address, kind, size)
        return b.sext(value, I64) if kind in (I8, I32) else value

    return operation(emit, types.intp, result=known)


def writer(kind: ir.Type, size: int, known: types.Type = types.intp) -> Any:
    """Writes a number at an address; an integer is cut to size."""

    def emit(b: ir.IRBuilder, address: ir.Value, x: ir.Value) -> None:
        store_as(b, address, b.trunc(x, kind) if kind in (I8, I32) else x, size)

    return operation(emit, types.intp, known, result=types.void)


read_i64, read_i32, read_i8 = reader(I64, 8), reader(I32, 4), reader(I8, 1)
read_f32, read_f64 = reader(F32, 4, types.float32), reader(F64, 8, types.float64)
write_i64, write_i32, write_i8 = writer(I64, 8), writer(I32, 4), writer(I8, 1)
write_f32, write_f64 = writer(F32, 4, types.float32), writer(F64, 8, types.float64)


@helper
def get(params, number):
    """A step's parameter."""
    return read_i64(params + 8 * number)


def numba_type(kind: Any) -> types.Type:
    """Of a field of arguments, or of a whole tuple of them."""
    if kind is float:
        return types.float64
    if not hasattr(kind, "_fields"):
        return types.intp
    return types.BaseTuple.from_types([*map(numba_type, fields(kind).values())], kind)


@intrinsic
def arguments(typing, kind, address):
    """A tuple of `ruvon.kernels.cpu.arguments`, of this kind, as it lies at ``address``."""
    result = numba_type(kind.instance_class)

    def generate(context, b, sig, values):
        places = (b.add(values[1], number(at)) for at in itertools.count(0, 8))

        def read(kind):
            if kind is types.float64:
                return load_as(b, next(places), F64, 8)
            if kind is types.intp:
                return load_as(b, next(places), I64, 8)
            return context.make_tuple(b, kind, [read(each) for each in kind])

        return read(result)

    return result(kind, types.intp), generate


# Functions of vectors

LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440054690583e-4  # their sum is ln 2 to 2 ** -39


@helper
def exp16(x):
    """e ** x to about 1e-7 of itself; exactly 1 at 0, exactly 0 at and below -88."""
    x = larger(x, splat16(-88.0))
    x = splat16(0.0) - larger(splat16(0.0) - x, splat16(-88.0))
    whole = nearest(x * splat16(LOG2_E))
    rest = fma(whole, splat16(-LN2_HIGH), x)
    rest = fma(whole, splat16(-LN2_LOW), rest)
    p = splat16(1.9875691500e-4)
    p = fma(p, rest, splat16(1.3981999507e-3))
    p = fma(p, rest, splat16(8.3334519073e-3))
    p = fma(p, rest, splat16(4.1665795894e-2))
    p = fma(p, rest, splat16(1.6666665459e-1))
    p = fma(p, rest, splat16(5.0000001201e-1))
    p = fma(p, rest * rest, rest) + splat16(1.0)
    return p * power_of_two(whole)
