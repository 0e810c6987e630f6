"""Integer dot products of SIMD lanes, and the fused multiply-add.

Each is the CPU's instruction where it has one, and plain LLVM where it has not, to the same bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.core.errors import TypingError

from refimpl.arith.simd import FEATURES, I8, I32, IS_ARM64, Lanes, Vector, call, inlined, primitive, select
from refimpl.arith.simd_lanes import convert, lookup, reinterpret, shuffle

I16 = ir.IntType(16)


FUSES = "fma" in FEATURES or IS_ARM64
# From LLVM 22 on vpdpbusd takes bytes; before, the words that hold them.
TAKES_BYTES = binding.llvm_version_info[0] >= 22


def pieces(builder: Any, v: Any, lanes: int) -> list[Any]:
    """A vector cut into vectors of so many lanes."""
    return [shuffle(builder, v, v, range(i, i + lanes)) for i in range(0, v.type.count, lanes)]


def whole(builder: Any, parts: list[Any]) -> Any:
    """Vectors put together again; their number is a power of two."""
    while len(parts) > 1:
        lanes = range(2 * parts[0].type.count)
        parts = [shuffle(builder, parts[i], parts[i + 1], lanes) for i in range(0, len(parts), 2)]
    return parts[0]


def every_other(builder: Any, v: Any, odd: int, kind: Any, signed: bool) -> Any:
    """Even or odd lanes, widened."""
    half = shuffle(builder, v, v, range(odd, v.type.count, 2))
    wide = ir.VectorType(kind, half.type.count)
    return (builder.sext if signed else builder.zext)(half, wide)


def add_neighbours(builder: Any, x: Any, y: Any, kind: Any, x_signed: bool) -> Any:
    """x[2k]*y[2k] + x[2k + 1]*y[2k + 1], all widened first."""
    terms = [
        builder.mul(every_other(builder, x, odd, kind, x_signed), every_other(builder, y, odd, kind, True))
        for odd in (0, 1)
    ]
    return builder.add(*terms)


def need(x: Any, elt: Any, multiple: int, what: str) -> None:
    if not isinstance(x, Vector) or x.elt != elt or x.n % multiple:
        raise TypingError(f"{what} takes {multiple} lanes of {elt} or a multiple, not {x}")


def instructions(*ways: tuple[str, int, str]) -> Any:
    """Which of (feature, lanes, LLVM's name) the CPU has, widest first, for a vector of n lanes; None: none fits."""
    return lambda n: next((w[1:] for w in ways if w[0] in FEATURES and n % w[1] == 0), None)


MULTIPLY_BYTES = instructions(
    ("avx512bw", 64, "llvm.x86.avx512.pmaddubs.w.512"),
    ("avx2", 32, "llvm.x86.avx2.pmadd.ub.sw"),
    ("ssse3", 16, "llvm.x86.ssse3.pmadd.ub.sw.128"),
)
MULTIPLY_WORDS = instructions(
    ("avx512bw", 32, "llvm.x86.avx512.pmaddw.d.512"),
    ("avx2", 16, "llvm.x86.avx2.pmadd.wd"),
    ("sse2", 8, "llvm.x86.sse2.pmadd.wd"),
)
ADD_FOURS = instructions(
    ("avx512vnni", 64, "llvm.x86.avx512.vpdpbusd.512"),
    ("avx512vnni", 32, "llvm.x86.avx512.vpdpbusd.256"),
    ("avxvnni", 32, "llvm.x86.avx512.vpdpbusd.256"),
)


HAS_FOURS = ADD_FOURS(32) is not None  # does the CPU multiply and add 4 bytes at once?

SHUFFLE_BYTES = instructions(
    ("avx512bw", 64, "llvm.x86.avx512.pshuf.b.512"),
    ("avx2", 32, "llvm.x86.avx2.pshuf.b"),
    ("ssse3", 16, "llvm.x86.ssse3.pshuf.b.128"),
)


def table(values: Sequence[int]) -> Any:
    """As simd_lanes.lookup, by the CPU's own lookup where it has one: uint8 lanes 0..15 -> int8 lanes values[lane]."""
    if "ssse3" not in FEATURES:
        return lookup(values)

    def look(tc: Any, codes: Any) -> Any:
        need(codes, types.uint8, 16, "table()")
        vector = Vector(types.int8, codes.n)
        lanes, name = SHUFFLE_BYTES(codes.n)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            part = ir.VectorType(I8, lanes)
            held = ir.Constant(part, [v & 255 for v in values] * (lanes // 16))
            return whole(
                builder, [call(builder, name, part, [held, p]) for p in pieces(builder, args[0], lanes)]
            )

        return vector(codes), emit

    return primitive(look)


GIVE_SIGNS = instructions(("avx2", 32, "llvm.x86.avx2.psign.b"), ("ssse3", 16, "llvm.x86.ssse3.psign.b.128"))


@primitive
def give_signs(tc: Any, x: Any, signs: Any) -> Any:
    """x, -x or 0, as signs is positive, negative or 0: int8 lanes."""
    need(x, types.int8, 1, "give_signs()")
    need(signs, types.int8, x.n, "give_signs()")
    way = GIVE_SIGNS(x.n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if way is None:
            none = ir.Constant(x.llvm, [0] * x.n)
            minus, some = (builder.icmp_signed(op, args[1], none) for op in ("<", "!="))
            return builder.select(some, builder.select(minus, builder.sub(none, args[0]), args[0]), none)
        lanes, name = way
        part = ir.VectorType(I8, lanes)
        pairs = zip(*(pieces(builder, v, lanes) for v in args), strict=True)
        return whole(builder, [call(builder, name, part, pair) for pair in pairs])

    return x(x, signs), emit


def add_pairs(x: Any, y: Any, result: Any, way: Any, x_signed: bool) -> Any:
    """Typing and code of multiply_bytes() and multiply_words()."""
    vector = Vector(result, x.n // 2)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if way is None:
            return add_neighbours(builder, args[0], args[1], vector.llvm.element, x_signed)
        lanes, name = way
        part = ir.VectorType(vector.llvm.element, lanes // 2)
        pairs = zip(*(pieces(builder, v, lanes) for v in args), strict=True)
        return whole(builder, [call(builder, name, part, pair) for pair in pairs])

    return vector(x, y), emit


@primitive
def multiply_bytes(tc: Any, x: Any, y: Any) -> Any:
    """x[2k]*y[2k] + x[2k + 1]*y[2k + 1]: uint8 and int8 [n] to int16 [n/2]. The sums must fit in 16 bits."""
    need(x, types.uint8, 16, "multiply_bytes()")
    need(y, types.int8, 16, "multiply_bytes()")
    return add_pairs(x, y, types.int16, MULTIPLY_BYTES(x.n), False)


@primitive
def multiply_words(tc: Any, x: Any, y: Any) -> Any:
    """x[2k]*y[2k] + x[2k + 1]*y[2k + 1]: int16 [n] to int32 [n/2], modulo 2^32."""
    need(x, types.int16, 2, "multiply_words()")
    need(y, types.int16, 2, "multiply_words()")
    return add_pairs(x, y, types.int32, MULTIPLY_WORDS(x.n), True)


def split_words(builder: Any, v: Any, signed: bool) -> tuple[Any, Any]:
    """The even and the odd bytes of a vector, as words."""
    kind = ir.VectorType(I16, v.type.count // 2)
    by, words = ir.Constant(kind, [8] * kind.count), builder.bitcast(v, kind)
    if not signed:
        return builder.and_(words, ir.Constant(kind, [255] * kind.count)), builder.lshr(words, by)
    return builder.ashr(builder.shl(words, by), by), builder.ashr(words, by)


def add_up_fours(builder: Any, x: Any, y: Any, small: bool) -> Any:
    """The sums of add_fours() of a vector that fits the CPU's multiplication of words."""
    lanes, name = MULTIPLY_WORDS(x.type.count // 2)
    kind = ir.VectorType(I32, lanes // 2)
    if small:
        pairs = call(builder, MULTIPLY_BYTES(x.type.count)[1], ir.VectorType(I16, lanes), [x, y])
        return call(builder, name, kind, [pairs, ir.Constant(pairs.type, [1] * lanes)])
    sides = zip(split_words(builder, x, False), split_words(builder, y, True), strict=True)
    even, odd = (call(builder, name, kind, side) for side in sides)
    return builder.add(even, odd)


def add_by_fours(total: Any, x: Any, y: Any, small: bool) -> Any:
    """Typing and code of add_fours() and add_small_fours()."""
    need(x, types.uint8, 16, "add_fours()")
    need(y, types.int8, 16, "add_fours()")
    need(total, types.int32, x.n // 4, "add_fours()")
    way, way_of_words = ADD_FOURS(x.n), MULTIPLY_WORDS(x.n // 2)
    small = small and MULTIPLY_BYTES(x.n) is not None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if way is None and way_of_words is None:
            x16 = builder.zext(args[1], ir.VectorType(I16, x.n))
            y16 = builder.sext(args[2], ir.VectorType(I16, x.n))
            words = add_neighbours(builder, x16, y16, I32, True)
            even, odd = (shuffle(builder, words, words, range(o, x.n // 2, 2)) for o in (0, 1))
            return builder.add(args[0], builder.add(even, odd))
        if way is None:
            sides = zip(*(pieces(builder, v, 2 * way_of_words[0]) for v in args[1:]), strict=True)
            return builder.add(
                args[0], whole(builder, [add_up_fours(builder, v, w, small) for v, w in sides])
            )
        lanes, name = way
        result = ir.VectorType(I32, lanes // 4)
        taken = ir.VectorType(I8, lanes) if TAKES_BYTES else result
        parts = []
        for total_part, x_part, y_part in zip(
            pieces(builder, args[0], lanes // 4), *(pieces(builder, v, lanes) for v in args[1:]), strict=True
        ):
            operands = [total_part, builder.bitcast(x_part, taken), builder.bitcast(y_part, taken)]
            parts.append(call(builder, name, result, operands))
        return whole(builder, parts)

    return total(total, x, y), emit


@primitive
def add_fours(tc: Any, total: Any, x: Any, y: Any) -> Any:
    """total[k] + the sum of x[i]*y[i] for i = 4k to 4k + 3: int32 [n/4], uint8 and int8 [n]. Exact."""
    return add_by_fours(total, x, y, small=False)


@primitive
def add_small_fours(tc: Any, total: Any, x: Any, y: Any) -> Any:
    """As add_fours(), where no x is above 127: sums of two products then fit in 16 bits."""
    return add_by_fours(total, x, y, small=True)


@primitive
def fuse(tc: Any, a: Any, b: Any, c: Any) -> Any:
    """a*b + c of float32 lanes, rounded once, by the CPU."""
    if not isinstance(a, Vector) or a.elt != types.float32 or a != b or a != c:
        raise TypingError(f"fma() takes three equal float32 vectors, not {a}, {b}, {c}")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, f"llvm.fma.{a.suffix}", a.llvm, args)

    return a(a, b, c), emit


@primitive
def add_exact(tc: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a*b of float64 lanes that hold float32: a*b is exact, so fused or not it is the same bits."""
    if not isinstance(a, Vector) or a.elt != types.float64 or a != b or a != total:
        raise TypingError(f"add_exact() takes three equal float64 vectors, not {total}, {a}, {b}")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, f"llvm.fmuladd.{a.suffix}", a.llvm, [args[1], args[2], args[0]])

    return a(total, a, b), emit


@inlined
def fuse_by_bits(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a*b + c of float32 lanes, rounded once, in float64 rounded to odd: see arith.fma."""
    product = convert(a, np.float64) * convert(b, np.float64)
    addend = convert(c, np.float64)
    total = product + addend
    t = total - product
    error = (product - (total - t)) + (addend - t)
    bits = reinterpret(total, np.int64)
    up = (error > np.float64(0)) == (total > np.float64(0))
    step = select(up, bits + np.int64(1), bits - np.int64(1))
    even = (bits & np.int64(1)) == np.int64(0)
    odd = (error != np.float64(0)) & even & ((total - total) == np.float64(0))
    return convert(reinterpret(select(odd, step, bits), np.float64), np.float32)


fma = fuse if FUSES else fuse_by_bits
