"""An explicit SIMD value for Numba kernels: Vector(elt, n) is LLVM's `<n x elt>` and lives in registers.

Inside a kernel:  v = load(x, i, 32)           # 32 consecutive elements of a C-contiguous array, flat index i
                  v = v * v + np.float32(1)    # elementwise; a scalar is repeated into every lane
                  store(y, i, select(v > w, v, w))

Any n is legal: LLVM splits <32 x float> into 2 AVX-512, 4 AVX2, 8 SSE or NEON registers. The bits do not
depend on that split, because everything here is elementwise IEEE arithmetic (never fused) or moves lanes.
Both operands of an operator have one element type: nothing is promoted. Converting a float to an integer type
that cannot hold it is undefined, so kernels select first. Conversions and
shuffles are in simd_lanes.py, loads and stores in simd_memory.py.
"""

import operator
import platform
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.core.errors import TypingError
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

F = TypeVar("F", bound=Callable[..., Any])
Lanes: TypeAlias = Any  # annotation for a Vector, or a mask of booleans, in a kernel's text
Scratch: TypeAlias = Any  # annotation for what stack() returns

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
SCALARS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: I1}
for _bits in (8, 16, 32, 64):
    SCALARS[getattr(types, f"int{_bits}")] = SCALARS[getattr(types, f"uint{_bits}")] = ir.IntType(_bits)

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_ARM64 = platform.machine().lower() in ("aarch64", "arm64")


def target_features() -> frozenset[str]:
    """Features of the CPU that kernels are compiled for; none where it is no x86."""
    if not IS_X86:
        return frozenset()
    given = numba.config.CPU_FEATURES
    listed = get_host_cpu_features() if given is None else given
    return frozenset(f[1:] for f in listed.split(",") if f.startswith("+"))


FEATURES = target_features()
# Float32 lanes of a value that a kernel keeps several of in registers: 32 registers of 64 bytes, or 16 of 32.
ROOM = 32 if "avx512f" in FEATURES else 16


class Vector(types.Type):  # type: ignore[misc]
    """n lanes of a Numba scalar type. Masks have boolean lanes."""

    def __init__(self, elt: Any, n: int) -> None:
        self.elt, self.n = elt, n
        self.is_float = isinstance(elt, types.Float)
        self.is_signed = bool(getattr(elt, "signed", False))
        self.llvm = ir.VectorType(SCALARS[elt], n)
        super().__init__(name=f"vec<{n} x {elt}>")

    @property
    def suffix(self) -> str:
        """How LLVM's overloaded intrinsics spell this type: v32f32, v16i8."""
        short = {types.float32: "f32", types.float64: "f64"}.get(self.elt) or f"i{self.llvm.element.width}"
        return f"v{self.n}{short}"


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def inlined(function: F) -> F:
    """Paste a kernel's text into its callers, so that vectors it takes and returns stay in registers."""
    return numba.njit(function, inline="always", error_model="numpy")


def primitive(function: Callable[..., Any]) -> Any:
    """Numba's @intrinsic; literal arguments arrive as literal types."""
    return intrinsic(prefer_literal=True)(function)


def literal(argument: Any, what: str) -> int:
    """The value of an argument that must be known while compiling. Raises TypingError where it is not."""
    if not isinstance(argument, types.IntegerLiteral):
        raise TypingError(f"{what} must be a literal or a module-level int, not an expression ({argument})")
    return int(argument.literal_value)


def element(argument: Any) -> Any:
    """The scalar type that a NumPy type such as np.uint8 names in a kernel."""
    return argument.dtype


def repeat(builder: Any, scalar: Any, vector: Vector) -> Any:
    """LLVM's idiom for a scalar in every lane."""
    empty = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, vector.n), None))


def call(builder: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """Call an LLVM intrinsic by its full name (llvmlite's own lookup does not know vector types)."""
    shape = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), arguments)


# ---------------------------------------------------------------- operators

_ARITHMETIC = {  # operator: its in-place twin, and the builder's method for float, signed and unsigned lanes
    operator.add: (operator.iadd, "fadd", "add", "add"),
    operator.sub: (operator.isub, "fsub", "sub", "sub"),
    operator.mul: (operator.imul, "fmul", "mul", "mul"),
    operator.truediv: (operator.itruediv, "fdiv", None, None),
    operator.and_: (operator.iand, None, "and_", "and_"),
    operator.or_: (operator.ior, None, "or_", "or_"),
    operator.xor: (operator.ixor, None, "xor", "xor"),
    operator.lshift: (operator.ilshift, None, "shl", "shl"),
    operator.rshift: (operator.irshift, None, "ashr", "lshr"),
}
_COMPARISONS = {
    operator.lt: "<",
    operator.gt: ">",
    operator.le: "<=",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}


def common_vector(args: Sequence[Any]) -> Vector | None:
    """The type of two operands: equal vectors, or one vector and a scalar of exactly its element type."""
    vectors = [a for a in args if isinstance(a, Vector)]
    if len(args) != 2 or not vectors:
        return None
    same = all(a == vectors[0] or types.unliteral(a) == vectors[0].elt for a in args)
    return vectors[0] if same else None


def spread(builder: Any, vector: Vector, kinds: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The operands with scalars repeated into vectors."""
    return [
        v if kind == vector else repeat(builder, v, vector) for kind, v in zip(kinds, values, strict=True)
    ]


def declare(op: Any, legal: Callable[[Vector], bool], result: Callable[[Vector], Vector], emit: Any) -> None:
    """Register typing and code of one operator for vectors, and for a vector beside a scalar."""

    class Typing(AbstractTemplate):  # type: ignore[misc]
        key = op

        def generic(self, args: Any, kws: Any) -> Any:
            vector = common_vector(args)
            if vector is not None and legal(vector):
                return signature(result(vector), *(a if a == vector else vector.elt for a in args))
            return None

    infer_global(op)(Typing)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = common_vector(sig.args)
        assert vector is not None
        return emit(builder, vector, *spread(builder, vector, sig.args, args))

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(op, *kinds)(lower)


def declare_arithmetic(op: Any, *methods: str | None) -> None:
    def method(vector: Vector) -> str | None:
        return methods[0 if vector.is_float else 1 if vector.is_signed else 2]

    def emit(builder: Any, vector: Vector, x: Any, y: Any) -> Any:
        return getattr(builder, str(method(vector)))(x, y)

    declare(op, lambda vector: method(vector) is not None, lambda vector: vector, emit)


def declare_comparison(op: Any, sign: str) -> None:
    def emit(builder: Any, vector: Vector, x: Any, y: Any) -> Any:
        if vector.is_float:  # C's rule: a NaN compares false, but != is true
            return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, x, y)
        return (builder.icmp_signed if vector.is_signed else builder.icmp_unsigned)(sign, x, y)

    declare(op, lambda vector: True, lambda vector: Vector(types.boolean, vector.n), emit)


for _op, (_inplace, *_methods) in _ARITHMETIC.items():
    declare_arithmetic(_op, *_methods)
    declare_arithmetic(_inplace, *_methods)
for _op, _sign in _COMPARISONS.items():
    declare_comparison(_op, _sign)


@primitive
def fill(tc: Any, scalar: Any, n: Any) -> Any:
    """fill(np.float32(0), 32): the scalar in every lane."""
    vector = Vector(types.unliteral(scalar), literal(n, "the lane count of fill()"))
    return vector(vector.elt, n), lambda context, builder, sig, args: repeat(builder, args[0], vector)


@primitive
def select(tc: Any, mask: Any, x: Any, y: Any) -> Any:
    """Per lane C's `mask ? x : y`; x or y may be a scalar."""
    vector = common_vector((x, y))
    if vector is None or mask != Vector(types.boolean, vector.n):
        raise TypingError(
            f"select() takes a mask and two vectors (or one and a scalar), not {mask}, {x}, {y}"
        )
    kinds = [x if x == vector else vector.elt, y if y == vector else vector.elt]

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(args[0], *spread(builder, vector, kinds, args[1:]))

    return vector(mask, *kinds), emit


@inlined
def minimum(x: Lanes, y: Lanes) -> Lanes:
    """Per lane C's `x < y ? x : y` (y where either is NaN): one instruction."""
    return select(x < y, x, y)


@inlined
def maximum(x: Lanes, y: Lanes) -> Lanes:
    """Per lane C's `x > y ? x : y` (y where either is NaN): one instruction."""
    return select(x > y, x, y)


def _elementwise(name: str, text: str) -> Any:
    def typing(tc: Any, x: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return call(builder, f"llvm.{name}.{x.suffix}", x.llvm, args)

        return x(x), emit

    typing.__name__, typing.__doc__ = name, text
    return primitive(typing)


sqrt = _elementwise("sqrt", "Correctly rounded square root.")
absolute = _elementwise("fabs", "|x| of floats.")
round_away = _elementwise("round", "C's roundf: to the nearest integer, halves away from zero.")
