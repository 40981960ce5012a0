"""Products of bytes, added up by fours into 16 exact integers: what each instruction set does best.

vpdpbusd   one instruction multiplies unsigned by signed bytes and adds fours of them to int32
maddubs    one adds pairs of such products into int16; as many of those as cannot overflow are
           added up, then one more instruction makes int32 of pairs. Signs of codes of 8 bits
           are moved to the activations
usdot      as vpdpbusd, on Arm; sdot: both signed
plain      bytes widened, multiplied and added like any integers
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from llvmlite import ir

from ruvon.kernels.cpu.formats import CODED, CODED_BITS, HALVES, LANES, TOTAL, VECTORS, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit.llvm import F16, F32, F32V, I8, I32, I32V, Builder, constant, vector


@dataclass
class Group:
    """One group of a tile, as it comes out of memory."""

    b: Builder
    isa: Isa
    kind: TileFormat
    w: ir.Value  # where its codes lie,
    s: ir.Value  # its scales,
    over: ir.Value  # and what multiplies them, if something does
    loaded: dict[int, ir.Value] = field(default_factory=dict)

    @property
    def signed(self) -> bool:
        """Whether codes of 8 bits are to be signed; they are stored with 128 on top."""
        return self.isa.dot in ("sdot", "maddubs") and self.kind.bits == 8

    def load(self, number: int) -> ir.Value:
        """The ``number``-th 64 bytes."""
        if number not in self.loaded:
            self.loaded[number] = self.b.load_as(self.b.offset(self.w, 64 * number), I32V, 64)
        return self.loaded[number]

    def codes(self, q: int) -> ir.Value:
        """Lane = weight row, bytes = k of 4q to 4q + 3."""
        b = self.b
        if self.kind.bits == 8:
            return b.xor(self.load(q), constant(0x80808080)) if self.signed else self.load(q)
        pair = self.load(q // 2)
        four = self.upper_half(pair) if q % 2 else b.and_(pair, constant(0x0F0F0F0F))
        if self.kind.floats:
            return coded(b, four, self.isa)
        return b.or_(four, self.upper(q)) if self.kind.bits > 4 else four

    @cached_property
    def scales(self) -> list[ir.Value]:
        """Those of the group (two if halves), then its offsets if there are any; loaded where they
        are first asked for. Products of such numbers are exact."""
        b, kind = self.b, self.kind
        places = [b.offset(self.s, i * kind.table_bytes) for i in range(kind.tables)]
        if kind.scales == "e8m0":
            return [b.with_exponent(b.zext(b.load_as(places[0], vector(I8), 16), I32V))]
        if kind.scales != "two":
            element = vector(F32 if kind.scales == "f32" else F16)
            return [b.widen(b.load_as(place, element, 32)) for place in places]
        by = [
            b.widen(b.load_as(b.offset(self.over, at), vector(F16), 32))
            for at in range(0, kind.super_bytes, 2 * LANES)
        ]
        small = (b.sext(b.load_as(place, vector(I8), 16), I32V) for place in places)
        return [
            b.fmul(b.sitofp(x, F32V), by[number // kind.scales_per_group])
            for number, x in enumerate(small)
        ]

    def upper_half(self, pair: ir.Value) -> ir.Value:
        """The upper four bits of each byte. Arm has shifts of bytes."""
        b = self.b
        if self.isa.machine == "aarch64":
            shift = ir.Constant(vector(I8, 4 * LANES), [4] * 4 * LANES)
            return b.bitcast(b.lshr(b.bitcast(pair, shift.type), shift), I32V)
        return b.and_(b.lshr(pair, constant(4)), constant(0x0F0F0F0F))

    def upper(self, q: int) -> ir.Value:
        """What counts 16 and more of a code of 5 or 6 bits."""
        b, extra = self.b, self.kind.bits - 4
        each = VECTORS // extra  # of such parts in a vector
        shift = 4 - q % each * extra
        words = self.load(VECTORS // 2 + q // each)
        if shift:
            move, by = (b.shl, shift) if shift > 0 else (b.lshr, -shift)
            words = move(words, constant(by))
        return b.and_(words, constant(0x01010101 * ((1 << extra) - 1 << 4)))


def group_sums(group: Group, blocks: list[ir.Value], part: int) -> list[ir.Value]:
    """For each row, at ``blocks``, sums [16] of (code - zero) * activation over one part of the
    group: all of it, or a half where each half has a scale. Integers, as exact in float32."""
    b, kind, per_part = group.b, group.kind, VECTORS // group.kind.scales_per_group
    which = range(part * per_part, (part + 1) * per_part)
    dots = {"maddubs": madd_bytes, "plain": plain}.get(group.isa.dot, dot_bytes)
    sums = [b.sitofp(each, F32V) for each in dots(group, blocks, which)]
    if not kind.zero or group.signed:
        return sums
    zero = ir.Constant(F32V, [-kind.zero] * LANES)
    totals = [code_sum(group, block, part) for block in blocks]
    return [b.fused(total, zero, each) for total, each in zip(totals, sums, strict=True)]


def code_sum(group: Group, x: ir.Value, part: int) -> ir.Value:
    """The sum of the activation codes in this part of the group, as a float."""
    at = HALVES + 4 * part if group.kind.half else TOTAL
    return group.b.broadcast(group.b.offset(x, at), F32)


# 4-bit floats

LOOK_UPS = {
    ("x86_64", 32): "llvm.x86.avx2.pshuf.b",
    ("x86_64", 64): "llvm.x86.avx512.pshuf.b.512",
    ("aarch64", 16): "llvm.aarch64.neon.tbl1.v16i8",
}


def coded(b: Builder, four: ir.Value, isa: Isa) -> ir.Value:
    """The integers that the 4-bit floats in each byte stand for."""
    if isa.machine == "any":
        return coded_by_comparing(b, four)
    name, table = LOOK_UPS[isa.machine, isa.width], [*CODED] * (isa.width // len(CODED))
    numbers = ir.Constant(vector(I8, isa.width), table)
    found = [b.invoke(name, numbers.type, [numbers, part]) for part in b.cut(four, I8, isa.width)]
    return b.join([b.bitcast(part, vector(I32, isa.width // 4)) for part in found])


def coded_by_comparing(b: Builder, four: ir.Value) -> ir.Value:
    """Twice a 4-bit float's size is its lower three bits up to 4, then 6, 8 and 12."""
    bytes_of = vector(I8, 4 * LANES)

    def splat_byte(value: int) -> ir.Constant:
        return ir.Constant(bytes_of, [value] * 4 * LANES)

    code = b.bitcast(four, bytes_of)
    twice = low = b.and_(code, splat_byte(7))
    for above, more in ((4, 1), (5, 1), (6, 3)):
        larger = b.icmp_signed(">", low, splat_byte(above))
        twice = b.add(twice, b.select(larger, splat_byte(more), splat_byte(0)))
    zero = splat_byte(CODED[0])
    negative = b.icmp_signed(">", code, splat_byte(7))
    return b.bitcast(b.select(negative, b.sub(zero, twice), b.add(zero, twice)), I32V)


# maddubs

MADD_BYTES = {32: "llvm.x86.avx2.pmadd.ub.sw", 64: "llvm.x86.avx512.pmaddubs.w.512"}
MADD_WORDS = {32: "llvm.x86.avx2.pmadd.wd", 64: "llvm.x86.avx512.pmaddw.d.512"}


def madd(b: Builder, names: dict[int, str], x: ir.Value, y: ir.Value) -> ir.Value:
    """Products of neighbours, added by pairs, in elements twice as wide."""
    element, lanes = x.type.element, x.type.count
    wide = vector(ir.IntType(2 * element.width), lanes // 2)
    return b.invoke(names[element.width * lanes // 8], wide, [x, y])


def most_in_words(bits: int) -> int:
    """How many sums of two products of a code and an activation an int16 is sure to hold. Sizes of
    codes of 8 bits are at most 128."""
    return max(int((2**15 - 1) // (2 * 127 * (2**bits - 1))), 1)


def madd_bytes(group: Group, blocks: list[ir.Value], which: range) -> list[ir.Value]:
    """Added up in 16 bits as long as that is sure to fit, then in 32. Of signed codes, their sizes
    are multiplied, by activations that have taken on their signs."""
    b, width = group.b, group.isa.width
    totals = [b.cut(constant(0), I32, width) for _ in blocks]
    most = most_in_words(CODED_BITS if group.kind.floats else group.kind.bits)
    for first in range(which.start, which.stop, most):
        sums: Iterable[list[ir.Value]] = []
        for q in range(first, min(first + most, which.stop)):
            codes = b.cut(group.codes(q), I8, width)
            xs = [splat_bytes(b, b.offset(block, 4 * q), width) for block in blocks]
            rows = ([madd_code(group, code, x) for code in codes] for x in xs)
            # What goes into 32 bits at once does so row by row.
            products = rows if most == 1 else [*rows]
            if sums:
                products = [add_all(b, *args) for args in zip(sums, products, strict=True)]
            # With few registers not all codes of a group can be at hand.
            few = most > 1 and group.isa.registers == 16
            sums = fence(b, [*products]) if few else products
        totals = [
            add_all(b, total, add_pairs(b, parts))
            for total, parts in zip(totals, sums, strict=True)
        ]
        if most == 1:
            totals = fence(b, totals)
    return [b.join(total) for total in totals]


def madd_code(group: Group, code: ir.Value, x: ir.Value) -> ir.Value:
    b = group.b
    if group.signed:
        code, x = with_sign(b, code, code), with_sign(b, x, code)
    return madd(b, MADD_BYTES, code, x)


def with_sign(b: Builder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x, negated where y is."""
    if x.type.count == 32:
        return b.invoke("llvm.x86.avx2.psign.b", x.type, [x, y])
    zero = ir.Constant(x.type, [0] * x.type.count)
    return b.select(b.icmp_signed("<", y, zero), b.sub(zero, x), x)


def add_pairs(b: Builder, parts: list[ir.Value]) -> list[ir.Value]:
    """Sums of neighbours of 16 bits, in 32."""
    ones = ir.Constant(parts[0].type, [1] * parts[0].type.count)
    return [madd(b, MADD_WORDS, part, ones) for part in parts]


def splat_bytes(b: Builder, address: ir.Value, width: int, element: ir.Type = I8) -> ir.Value:
    """Four bytes from memory, again and again through a register."""
    lanes = b.splat(b.load_as(address, I32, 4), width // 4)
    return b.bitcast(lanes, vector(element, 8 * width // element.width))


def fence(b: Builder, rows: list[list[ir.Value]]) -> list[list[ir.Value]]:
    """The same sums, all of which are there before anything that comes after is loaded.

    Left alone, LLVM takes one row after the other through the whole group, and keeps the codes on
    the stack meanwhile, for which there are not enough registers.
    """
    flat = [part for row in rows for part in row]
    outs = ir.LiteralStructType([part.type for part in flat]) if len(flat) > 1 else flat[0].type
    places = ",".join(["=v"] * len(flat) + [str(n) for n in range(len(flat))] + ["~{memory}"])
    kind = ir.FunctionType(outs, [part.type for part in flat])
    after = b.asm(kind, "", places, flat, side_effect=True)
    news = iter([b.extract_value(after, n) for n in range(len(flat))] if len(flat) > 1 else [after])
    return [[next(news) for _ in row] for row in rows]


def add_all(b: Builder, totals: list[ir.Value], parts: list[ir.Value]) -> list[ir.Value]:
    return [b.add(total, part) for total, part in zip(totals, parts, strict=True)]


# Dot products

DOT_BYTES = {
    ("vpdpbusd", 64): "llvm.x86.avx512.vpdpbusd.512",
    ("vpdpbusd", 32): "llvm.x86.avx512.vpdpbusd.256",
    ("usdot", 16): "llvm.aarch64.neon.usdot.v4i32.v16i8",
    ("sdot", 16): "llvm.aarch64.neon.sdot.v4i32.v16i8",
}


def dot_bytes(group: Group, blocks: list[ir.Value], which: range) -> list[ir.Value]:
    """Fours of products straight into 32 bits."""
    b, isa = group.b, group.isa
    name, element = DOT_BYTES[isa.dot, isa.width], I32 if isa.machine == "x86_64" else I8
    totals = [b.cut(constant(0), I32, isa.width) for _ in blocks]
    for q in which:
        codes = b.cut(group.codes(q), element, isa.width)
        for row, block in enumerate(blocks):
            x = same_bytes(b, block, q, isa, element)
            totals[row] = [
                b.invoke(name, total.type, [total, part, x])
                for total, part in zip(totals[row], codes, strict=True)
            ]
    return [b.join(total) for total in totals]


def same_bytes(b: Builder, block: ir.Value, q: int, isa: Isa, element: ir.Type) -> ir.Value:
    """The q-th four bytes of a row's group, again and again through a register. On Arm, a product
    takes them out of a register that holds the next ones too."""
    if isa.machine == "x86_64":
        return splat_bytes(b, b.offset(block, 4 * q), isa.width, element)
    fours = b.load_as(b.offset(block, q // 4 * 16), vector(I32, 4), 16)
    return b.bitcast(b.pick(fours, [q % 4] * 4), vector(element, 16))


def plain(group: Group, blocks: list[ir.Value], which: range) -> list[ir.Value]:
    """Byte by byte, in int32."""
    b, totals = group.b, [constant(0)] * len(blocks)
    for q in which:
        for j in range(4):
            code = b.and_(b.lshr(group.codes(q), constant(8 * j)), constant(255))
            for row, block in enumerate(blocks):
                x = b.sext(b.load_as(b.offset(block, 4 * q + j), I8, 1), I32)
                totals[row] = b.add(totals[row], b.mul(code, b.splat(x)))
    return totals
