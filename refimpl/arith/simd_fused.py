"""Builds in kernels: fused.py's functions for compiled scalars and vectors, their forms known while compiling.

A Build's Numba type carries its forms, so `build.QK_SUMX` is typed, not loaded, and each build compiles its own code
without a branch. A fused product is LLVM's fma: one instruction where the CPU has it, elsewhere the C library's
fmaf. Interpreted kernels call fused.py itself: the names here are the same functions.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.imputils import lower_constant
from numba.core.typing.templates import (
    AbstractTemplate,
    AttributeTemplate,
    infer_getattr,
    infer_global,
    signature,
)
from numba.extending import (
    NativeValue,
    lower_builtin,
    lower_getattr_generic,
    models,
    register_model,
    typeof_impl,
    unbox,
)

from refimpl.arith.bits import MAGIC
from refimpl.arith.builds import FUSED, ROUNDED, SECOND, SITES, Build, Form
from refimpl.arith.fused import add_product, nearest_product, subtract_product, subtract_products
from refimpl.arith.simd import I32, I64, Vector, call, spread

__all__ = ["add_product", "nearest_product", "subtract_product", "subtract_products"]


class FormType(types.Type):  # type: ignore[misc]
    """The type of one form: a value without content."""

    def __init__(self, form: Form) -> None:
        self.form = form.name
        super().__init__(name=f"Form({form})")


class BuildType(types.Type):  # type: ignore[misc]
    """The type of every build with these forms."""

    def __init__(self, forms: tuple[str, ...]) -> None:
        self.forms = dict(zip(SITES, forms, strict=True))
        super().__init__(name="Build(" + "".join(form[0] for form in forms) + ")")


FORM_TYPES = {form.name: FormType(form) for form in (ROUNDED, FUSED, SECOND)}
register_model(FormType)(models.OpaqueModel)
register_model(BuildType)(models.OpaqueModel)


@typeof_impl.register(Form)  # type: ignore[untyped-decorator]
def _type_form(form: Form, context: Any) -> FormType:
    return FORM_TYPES[form.name]


@cache  # asked at every call of a kernel
def _find_type(build: Build) -> BuildType:
    return BuildType(tuple(build.forms[site].name for site in SITES))


@typeof_impl.register(Build)  # type: ignore[untyped-decorator]
def _type_build(build: Build, context: Any) -> BuildType:
    return _find_type(build)


def _ignore(kind: Any, value: Any, c: Any) -> NativeValue:
    return NativeValue(c.context.get_dummy_value())


def _lower_constant(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


lower_constant(BuildType)(_lower_constant)  # STRICT, named in a kernel
unbox(FormType)(_ignore)
unbox(BuildType)(_ignore)


@infer_getattr
class _BuildSites(AttributeTemplate):  # type: ignore[misc]
    key = BuildType

    def generic_resolve(self, build: BuildType, site: str) -> FormType | None:
        return FORM_TYPES[build.forms[site]] if site in build.forms else None


@lower_getattr_generic(BuildType)  # type: ignore[untyped-decorator]
def _lower_site(context: Any, builder: Any, build: Any, value: Any, site: str) -> Any:
    return context.get_dummy_value()


def common_type(operands: tuple[Any, ...]) -> Any:
    """float32, or the one type of float32 vectors among operands that are either; None for anything else."""
    kinds = {types.unliteral(o) for o in operands} - {types.float32}
    if not kinds:
        return types.float32
    vector = kinds.pop()
    return vector if not kinds and isinstance(vector, Vector) and vector.elt == types.float32 else None


def declare(function: Callable[..., Any], emit: Callable[..., Any], result: Callable[[Any], Any]) -> None:
    """Give a function of fused.py typing and code: emit(builder, form, kind, operands) for operands of one kind."""

    class Typing(AbstractTemplate):  # type: ignore[misc]
        key = function

        def generic(self, args: Any, kws: Any) -> Any:
            if not args or kws or not isinstance(args[0], FormType):
                return None
            kind = common_type(args[1:])
            return None if kind is None else signature(result(kind), args[0], *map(types.unliteral, args[1:]))

    infer_global(function)(Typing)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = common_type(sig.args[1:])
        operands = args[1:] if kind == types.float32 else spread(builder, kind, sig.args[1:], args[1:])
        return emit(builder, sig.args[0].form, kind, *operands)

    for count in (2, 3, 4):
        lower_builtin(function, FormType, *[types.Any] * count)(lower)


def multiply_add(builder: Any, kind: Any, a: Any, b: Any, c: Any) -> Any:
    """LLVM's fma of scalars or vectors."""
    return call(builder, f"llvm.fma.{'f32' if kind == types.float32 else kind.suffix}", a.type, [a, b, c])


def _emit_add(builder: Any, form: str, kind: Any, total: Any, a: Any, b: Any) -> Any:
    if form == ROUNDED.name:
        return builder.fadd(total, builder.fmul(a, b))
    return multiply_add(builder, kind, a, b, total)


def _emit_subtract(builder: Any, form: str, kind: Any, total: Any, a: Any, b: Any) -> Any:
    if form == ROUNDED.name:
        return builder.fsub(total, builder.fmul(a, b))
    return multiply_add(builder, kind, builder.fneg(a), b, total)


def _emit_difference(builder: Any, form: str, kind: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    if form == FUSED.name:
        return multiply_add(builder, kind, a, b, builder.fneg(builder.fmul(c, d)))
    if form == SECOND.name:
        return multiply_add(builder, kind, builder.fneg(c), d, builder.fmul(a, b))
    return builder.fsub(builder.fmul(a, b), builder.fmul(c, d))


def _integers(kind: Any) -> Any:
    return types.int64 if kind == types.float32 else Vector(types.int32, kind.n)


def _emit_nearest(builder: Any, form: str, kind: Any, a: Any, b: Any) -> Any:
    magic = ir.Constant(ir.FloatType(), float(MAGIC))
    bits = I32
    if kind != types.float32:
        magic, bits = ir.Constant(kind.llvm, [float(MAGIC)] * kind.n), ir.VectorType(I32, kind.n)
    raised = builder.bitcast(_emit_add(builder, form, kind, magic, a, b), bits)
    low, middle = (ir.Constant(bits, v if bits is I32 else [v] * kind.n) for v in (0x7FFFFF, 0x400000))
    code = builder.sub(builder.and_(raised, low), middle)
    return builder.sext(code, I64) if kind == types.float32 else code


declare(add_product, _emit_add, lambda kind: kind)
declare(subtract_product, _emit_subtract, lambda kind: kind)
declare(subtract_products, _emit_difference, lambda kind: kind)
declare(nearest_product, _emit_nearest, _integers)
