"""LLVM's language as the kernels' innermost loops are written in it: types, and a builder of code.

Memory is addressed by plain integers (bytes), as in C. A vector has sixteen lanes; LLVM turns what
is done to one into an AVX-512 instruction, or two AVX2 ones, or four of NEON: the arithmetic, and
so every bit of the result, is the same on all of them. Nothing is reassociated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from ruvon.kernels.cpu.formats import LANES

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


def constant(value: int) -> ir.Constant:
    """An int32 in all lanes."""
    return ir.Constant(I32V, [value - (1 << 32) if value >= 1 << 31 else value] * LANES)


def number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class Builder(ir.IRBuilder):  # type: ignore[misc]
    """llvmlite's, with words for what kernels do."""

    # Memory

    def pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.inttoptr(address, kind.as_pointer())

    def load_as(self, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        return self.load(self.pointer(address, kind), align=align)

    def store_as(self, address: ir.Value, value: ir.Value, align: int) -> None:
        self.store(value, self.pointer(address, value.type), align=align)

    def offset(self, address: ir.Value, value: int) -> ir.Value:
        return self.add(address, number(value)) if value else address

    def broadcast(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """One number in all lanes: part of the instruction that uses it, on AVX-512."""
        return self.splat(self.load_as(address, kind, 4))

    def prefetch(self, address: ir.Value) -> None:
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # to read, into L2, data
        self.invoke("llvm.prefetch.p0", ir.VoidType(), [self.pointer(address, I8), *hints])

    # Lanes

    def splat(self, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.shuffle_vector(first, undefined, ir.Constant(vector(I32, lanes), [0] * lanes))

    def pick(self, x: ir.Value, lanes: Sequence[int]) -> ir.Value:
        return self.shuffle_vector(x, x, ir.Constant(vector(I32, len(lanes)), [*lanes]))

    def first_lanes(self, count: ir.Value) -> ir.Value:
        """A mask of the lanes below ``count`` (which may be negative or above 16)."""
        lanes = ir.Constant(I32V, list(range(LANES)))
        return self.icmp_signed("<", lanes, self.splat(self.trunc(count, I32)))

    def tree(self, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """Fold 16 lanes into one, halves upon halves: the same order on every machine."""
        width = LANES
        while width > 1:
            width //= 2
            x = combine(self.pick(x, range(width)), self.pick(x, range(width, 2 * width)))
        return self.extract_element(x, ir.Constant(I32, 0))

    def cut(self, x: ir.Value, element: ir.Type, width: int) -> list[ir.Value]:
        """A vector's registers, of ``width`` bytes each, as vectors of ``element``."""
        lanes = width // 4
        parts = [
            self.pick(x, range(first, first + lanes)) if lanes < LANES else x
            for first in range(0, LANES, lanes)
        ]
        return [self.bitcast(part, vector(element, 8 * width // element.width)) for part in parts]

    def join(self, parts: list[ir.Value]) -> ir.Value:
        """Vectors of int32, end to end."""
        while len(parts) > 1:
            lanes = 2 * parts[0].type.count
            order = ir.Constant(vector(I32, lanes), list(range(lanes)))
            parts = [
                self.shuffle_vector(low, high, order)
                for low, high in zip(parts[::2], parts[1::2], strict=True)
            ]
        return parts[0]

    # Arithmetic

    def fused(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, rounded once."""
        return self.invoke(f"llvm.fma.v{z.type.count}f32", z.type, [x, y, z])

    def greater(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.select(self.fcmp_ordered(">", x, y), x, y)

    def widen(self, raw: ir.Value) -> ir.Value:
        """Lanes of float16, or of bfloat16 held as int16, to float32: exact."""
        if raw.type.element == F32:
            return raw
        if raw.type.element == F16:
            return self.fpext(raw, F32V)
        return self.bitcast(self.shl(self.zext(raw, I32V), constant(16)), F32V)

    def narrow(self, value: ir.Value, storage: str) -> ir.Value:
        """float32 lanes as they are stored: bfloat16 in int16, rounded to nearest even (NaN is not
        preserved)."""
        if storage == "f32":
            return value
        if storage == "f16":
            return self.fptrunc(value, vector(F16))
        bits = self.bitcast(value, I32V)
        odd = self.and_(self.lshr(bits, constant(16)), constant(1))
        rounded = self.add(bits, self.add(odd, constant(0x7FFF)))
        return self.trunc(self.lshr(rounded, constant(16)), vector(I16))

    def with_exponent(self, exponents: ir.Value) -> ir.Value:
        """2 ** (exponent - 127), and 0 for 0: an exponent is where a float32 has it."""
        return self.bitcast(self.shl(exponents, constant(23)), F32V)

    # Code

    def invoke(self, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
        """Call an LLVM intrinsic or an external function, declaring it at first use."""
        declared = self.module.globals.get(name)
        if declared is None:
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            declared = ir.Function(self.module, kind, name)
        return self.call(declared, arguments)

    def outlined(self, name: str, arguments: list[ir.Value], emit: Callable[..., None]) -> None:
        """Call a function of this module, which ``emit`` writes at first use: large unrolled code
        stands, and is compiled, once."""
        function = self.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            function = ir.Function(self.module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            function.attributes.alignstack = 64  # what is spilled must not lie across cache lines
            inner = Builder(function.append_basic_block())
            emit(inner, *function.args)
            inner.ret_void()
        self.call(function, arguments)

    def counted_loop(
        self,
        count: ir.Value,
        start: list[ir.Value],
        body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    ) -> list[ir.Value]:
        """``count`` (at least 1) turns of ``body``, which maps the number of the turn and the
        carried values to their next."""
        before, loop = self.block, self.append_basic_block("loop")
        after = self.append_basic_block("after")
        self.branch(loop)
        self.position_at_end(loop)
        phis = [self.phi(value.type) for value in (number(0), *start)]
        for phi, value in zip(phis, (number(0), *start), strict=True):
            phi.add_incoming(value, before)
        turn, *carried = phis
        following = body(turn, carried)
        next_turn = self.add(turn, number(1))
        for phi, value in zip(phis, (next_turn, *following), strict=True):
            phi.add_incoming(value, self.block)
        self.cbranch(self.icmp_signed("<", next_turn, count), loop, after)
        self.position_at_end(after)
        return following

    def for_each_count(self, rows: ir.Value, most: int, emit: Callable[[int], None]) -> None:
        """A copy of the code for each number of rows from 1 to ``most``, and a jump to the right
        one."""
        done = self.append_basic_block("done")
        switch = self.switch(rows, done)
        for count in range(1, most + 1):
            case = self.append_basic_block(f"rows{count}")
            switch.add_case(number(count), case)
            self.position_at_end(case)
            emit(count)
            self.branch(done)
        self.position_at_end(done)
