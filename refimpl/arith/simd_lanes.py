"""Lanes of SIMD vectors: convert, reinterpret, permute, take apart; and IEEE half precision."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError

from refimpl.arith.simd import (
    FEATURES,
    I1,
    I8,
    I32,
    I64,
    IS_ARM64,
    Lanes,
    Vector,
    element,
    inlined,
    minimum,
    primitive,
    select,
)


@primitive
def convert(tc: Any, x: Any, to: Any) -> Any:
    """convert(v, np.int32): each lane's value in another type; float to integer truncates."""
    vector = Vector(element(to), x.n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if x.is_float and vector.is_float:
            wider = vector.llvm.element is ir.DoubleType()
            return (builder.fpext if wider else builder.fptrunc)(args[0], vector.llvm)
        if x.is_float:
            return (builder.fptosi if vector.is_signed else builder.fptoui)(args[0], vector.llvm)
        if vector.is_float:
            return (builder.sitofp if x.is_signed else builder.uitofp)(args[0], vector.llvm)
        if vector.llvm.element.width <= x.llvm.element.width:
            return builder.trunc(args[0], vector.llvm)
        return (builder.sext if x.is_signed else builder.zext)(args[0], vector.llvm)

    return vector(x, to), emit


@primitive
def reinterpret(tc: Any, x: Any, to: Any) -> Any:
    """reinterpret(v, np.uint8): the same bits as lanes of another type, as many as fit."""
    bits = x.n * (1 if x.elt == types.boolean else x.elt.bitwidth)
    vector = Vector(element(to), bits // element(to).bitwidth)
    return vector(x, to), lambda context, builder, sig, args: builder.bitcast(args[0], vector.llvm)


@primitive
def as_float32(tc: Any, x: Any) -> Any:
    """float32 lanes as they are; uint16 lanes as the bfloat16 numbers whose bits they are."""
    vector = Vector(types.float32, x.n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if x == vector:
            return args[0]
        words = ir.VectorType(I32, x.n)
        moved = builder.shl(builder.zext(args[0], words), ir.Constant(words, [16] * x.n))
        return builder.bitcast(moved, vector.llvm)

    if x != vector and x != Vector(types.uint16, x.n):
        raise TypingError(f"as_float32() takes float32 or bfloat16 bits, not {x}")
    return vector(x), emit


def shuffle(builder: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    """LLVM's shufflevector: lanes count through x, then on through y."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def permutation(lanes: Sequence[int]) -> Any:
    """A kernel function v -> w with w[k] = v[lanes[k]], 0 where that is -1. The lanes are compiled in: call it at
    module level.
    """

    def permute(tc: Any, x: Any) -> Any:
        vector = Vector(x.elt, len(lanes))
        none = ir.Constant(x.llvm, None)
        chosen = [x.n if k < 0 else k for k in lanes]
        return vector(x), lambda context, builder, sig, args: shuffle(builder, args[0], none, chosen)

    return primitive(permute)


def constants(dtype: str, values: Sequence[float]) -> Any:
    """A kernel function () -> a vector of these values, dtype named as in Numba ("float32")."""
    vector = Vector(getattr(types, dtype), len(values))

    def constant(tc: Any) -> Any:
        return vector(), lambda context, builder, sig, args: ir.Constant(vector.llvm, list(values))

    return primitive(constant)


def lookup(values: Sequence[int]) -> Any:
    """A kernel function: uint8 lanes 0..15 -> int8 lanes values[lane]. The table is compiled in, as 15 selects."""

    def look(tc: Any, codes: Any) -> Any:
        vector = Vector(types.int8, codes.n)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            level = [ir.Constant(vector.llvm, [v] * codes.n) for v in values]
            for bit in range(4):
                ones = ir.Constant(codes.llvm, [1 << bit] * codes.n)
                mask = builder.icmp_unsigned("==", builder.and_(args[0], ones), ones)
                pairs = zip(level[::2], level[1::2], strict=True)
                level = [builder.select(mask, odd, even) for even, odd in pairs]
            return level[0]

        return vector(codes), emit

    return primitive(look)


def staircase(top: float, steps: Sequence[tuple[float, float]]) -> Any:
    """A kernel function of float32 lanes v: top, less the height of every (threshold, height) that v is below of.

    NaN is below of nothing. All heights are integers, so that their order does not matter.
    """

    def descend(tc: Any, x: Any) -> Any:
        def constant(value: float) -> Any:
            return ir.Constant(x.llvm, [value] * x.n)

        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            result, zero = constant(top), constant(0.0)
            for threshold, height in steps:
                below = builder.fcmp_ordered("<", args[0], constant(threshold))
                result = builder.fsub(result, builder.select(below, constant(height), zero))
            return result

        return x(x), emit

    return primitive(descend)


@primitive
def join(tc: Any, x: Any, y: Any) -> Any:
    """Twice the lanes: those of x, then those of y."""
    vector = Vector(x.elt, 2 * x.n)
    return vector(x, y), lambda context, builder, sig, args: shuffle(
        builder, args[0], args[1], range(2 * x.n)
    )


def halve(x: Any, high: bool) -> Any:
    """Typing and code of low_half() and high_half()."""
    if x.n % 2:
        raise TypingError(f"{x} has no halves")
    vector = Vector(x.elt, x.n // 2)
    lanes = range(vector.n, x.n) if high else range(vector.n)
    return vector(x), lambda context, builder, sig, args: shuffle(builder, args[0], args[0], lanes)


@primitive
def low_half(tc: Any, x: Any) -> Any:
    """The first half of the lanes."""
    return halve(x, high=False)


@primitive
def high_half(tc: Any, x: Any) -> Any:
    """The second half of the lanes."""
    return halve(x, high=True)


@primitive
def first(tc: Any, x: Any) -> Any:
    """Lane 0 as a scalar."""
    return x.elt(x), lambda context, builder, sig, args: builder.extract_element(args[0], ir.Constant(I32, 0))


@primitive
def lane(tc: Any, x: Any, k: Any) -> Any:
    """Lane k as a scalar: from its register where k is known while compiling."""
    return x.elt(x, types.intp), lambda context, builder, sig, args: builder.extract_element(*args)


@primitive
def of_eight(tc: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """Eight scalars of one type as lanes. What was read from memory goes from there to its lane."""
    vector = Vector(a, 8)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = ir.Constant(vector.llvm, ir.Undefined)
        for k, scalar in enumerate(args):
            value = builder.insert_element(value, scalar, ir.Constant(I32, k))
        return value

    return vector(*[a] * 8), emit


@primitive
def mask_bits(tc: Any, mask: Any) -> Any:
    """A mask of up to 64 lanes as uint64: bit k is lane k."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(mask.n))
        return bits if mask.n == 64 else builder.zext(bits, I64)

    return types.uint64(mask), emit


@primitive
def mask_from(tc: Any, bits: Any) -> Any:
    """The mask of 8, 16, 32 or 64 lanes whose lane k is set where bit k of an unsigned integer is."""
    vector = Vector(types.boolean, bits.bitwidth)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if "avx512bw" in FEATURES:
            return builder.bitcast(args[0], vector.llvm)
        # Elsewhere a mask is lanes of bytes, and LLVM would make it bit by bit.
        held = builder.bitcast(args[0], ir.VectorType(I8, vector.n // 8))
        each = shuffle(builder, held, held, [k // 8 for k in range(vector.n)])
        one = ir.Constant(each.type, [1 << k % 8 for k in range(vector.n)])
        return builder.icmp_unsigned("==", builder.and_(each, one), one)

    return vector(bits), emit


@primitive
def lowest_lane(tc: Any, bits: Any) -> Any:
    """The first lane that is set in mask_bits(); 64 where none is."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(I1, 0))

    return types.int64(types.uint64), emit


# ---------------------------------------------------------------- half precision


@primitive
def widen_half(tc: Any, halves: Any) -> Any:
    """float16 bits to float32, by the CPU."""
    vector = Vector(types.float32, halves.n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.VectorType(ir.HalfType(), halves.n)), vector.llvm)

    return vector(halves), emit


@primitive
def narrow_half(tc: Any, floats: Any) -> Any:
    """float32 to float16 bits, by the CPU: to nearest, ties to even."""
    vector = Vector(types.uint16, floats.n)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.VectorType(ir.HalfType(), floats.n)), vector.llvm)

    return vector(floats), emit


@inlined
def widen_half_by_bits(halves: Lanes) -> Lanes:
    """float16 bits to float32: exact. The exponent's bias grows by 112; subnormals are mantissa * 2^-24."""
    h = convert(halves, np.uint32)
    moved = (h & np.uint32(0x7FFF)) << np.uint32(13)
    exponent = h & np.uint32(0x7C00)
    normal = reinterpret(moved + np.uint32(112 << 23), np.float32)
    special = reinterpret(moved + np.uint32(224 << 23), np.float32)  # infinity and NaN: all exponent bits set
    tiny = convert(h & np.uint32(0x3FF), np.float32) * np.float32(2.0**-24)
    finite = select(exponent == np.uint32(0), tiny, normal)
    value = select(exponent == np.uint32(0x7C00), special, finite)
    sign = (h & np.uint32(0x8000)) << np.uint32(16)
    return reinterpret(reinterpret(value, np.uint32) | sign, np.float32)


@inlined
def narrow_half_by_bits(floats: Lanes) -> Lanes:
    """float32 to float16 bits: to nearest, ties to even; a NaN keeps its sign alone.

    Normal results round by integer addition at bit 13, which carries into the exponent as it should.
    Subnormal ones are counted in units of 2^-24, the last place of 0.5f: the addition |x| + 0.5f rounds them.
    """
    bits = reinterpret(floats, np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    odd = (size >> np.uint32(13)) & np.uint32(1)
    normal = ((size + np.uint32(0xFFF) + odd) >> np.uint32(13)) - np.uint32(112 << 10)
    counted = reinterpret(size, np.float32) + np.float32(0.5)
    tiny = reinterpret(counted, np.uint32) - np.uint32(0x3F000000)
    half = select(size < np.uint32(0x38800000), tiny, normal)
    half = minimum(half, np.uint32(0x7C00))  # what is too large becomes infinity
    half = select(size > np.uint32(0x7F800000), np.uint32(0x7E00), half)  # NaN
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    return convert(half | sign, np.uint16)


# Elsewhere LLVM would call a library that is not there.
HARDWARE = "f16c" in FEATURES or IS_ARM64
decode_half = widen_half if HARDWARE else widen_half_by_bits
encode_half = narrow_half if HARDWARE else narrow_half_by_bits
