"""Memory for SIMD kernels: loads, stores, stack scratch, the 16 x 16 transpose, prefetch.

A place is an array or scratch, and a flat index in elements. Arrays must be C-contiguous (a typing error
otherwise); any alignment is legal. Nothing is bounds-checked.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError

from refimpl.arith.simd import I32, I64, IS_ARM64, IS_X86, SCALARS, Vector, call, element, literal, primitive
from refimpl.arith.simd_lanes import shuffle

YIELD = 1  # the number of that hint on arm64


def pointee(place: Any) -> Any:
    """The element type of an array or of scratch. Raises TypingError for anything else."""
    if isinstance(place, types.CPointer):
        return place.dtype
    if isinstance(place, types.Array) and place.layout == "C":
        return place.dtype
    raise TypingError(f"a C-contiguous array or stack() scratch is needed, not {place}")


def address(context: Any, builder: Any, place: Any, value: Any, index: Any, llvm: Any) -> Any:
    """Pointer to what starts at element `index` of a place, to be read or written as the LLVM type `llvm`."""
    if isinstance(place, types.Array):
        value = context.make_array(place)(context, builder, value).data
    at = builder.gep(value, [index], source_etype=SCALARS[place.dtype])
    return builder.bitcast(at, llvm.as_pointer())


@primitive
def stack(tc: Any, dtype: Any, n: Any) -> Any:
    """stack(np.float32, 1024): uninitialised scratch of n elements on the stack, 64-byte aligned."""
    count = literal(n, "the size of stack()")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.goto_entry_block():  # once per call of the function, not once per turn of a loop
            place = builder.alloca(SCALARS[element(dtype)], ir.Constant(I64, count))
            place.align = 64
        return place

    return types.CPointer(element(dtype))(dtype, n), emit


@primitive
def load(tc: Any, place: Any, index: Any, n: Any) -> Any:
    """load(x, i, 32): the n elements from flat index i on."""
    vector = Vector(pointee(place), literal(n, "the lane count of load()"))

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source = address(context, builder, place, args[0], args[1], vector.llvm)
        return builder.load(source, align=1, typ=vector.llvm)

    return vector(place, types.intp, n), emit


@primitive
def store(tc: Any, place: Any, index: Any, vector: Any) -> Any:
    """store(y, i, v): the lanes of v go to the elements from flat index i on."""
    if not isinstance(vector, Vector) or vector.elt != pointee(place):
        raise TypingError(f"cannot store {vector} in {place}")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target = address(context, builder, place, args[0], args[1], args[2].type)
        builder.store(args[2], target, align=1)
        return context.get_dummy_value()

    return types.void(place, types.intp, vector), emit


@primitive
def stream(tc: Any, place: Any, index: Any, vector: Any) -> Any:
    """store() past the caches, to an address that is a multiple of 64: for results too large to stay there."""
    if not isinstance(vector, Vector) or vector.elt != pointee(place):
        raise TypingError(f"cannot store {vector} in {place}")

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target = address(context, builder, place, args[0], args[1], args[2].type)
        stored = builder.store(args[2], target, align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(place, types.intp, vector), emit


@primitive
def fence(tc: Any) -> Any:
    """Make streamed results visible to other threads, in order."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@primitive
def load_acquire(tc: Any, place: Any, index: Any) -> Any:
    """One integer that another thread may change, read anew each time; what that thread wrote before it is seen too."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = SCALARS[place.dtype]
        source = address(context, builder, place, args[0], args[1], scalar)
        return builder.load_atomic(source, "acquire", place.dtype.bitwidth // 8, typ=scalar)

    return pointee(place)(place, types.intp), emit


@primitive
def pause(tc: Any) -> Any:
    """Tell the CPU that this thread waits, so that it saves power and the core's other thread runs."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if IS_X86:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif IS_ARM64:
            call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, YIELD)])
        return context.get_dummy_value()

    return types.void(), emit


@primitive
def is_aligned(tc: Any, place: Any) -> Any:
    """Does an array or scratch start at a multiple of 64 bytes?"""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = address(context, builder, place, args[0], ir.Constant(I64, 0), ir.IntType(8))
        rest = builder.and_(builder.ptrtoint(at, I64), ir.Constant(I64, 63))
        return builder.icmp_unsigned("==", rest, ir.Constant(I64, 0))

    pointee(place)
    return types.boolean(place), emit


@primitive
def get(tc: Any, place: Any, index: Any) -> Any:
    """One element of scratch or of an array, by flat index."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = SCALARS[place.dtype]
        return builder.load(address(context, builder, place, args[0], args[1], scalar), align=1, typ=scalar)

    return pointee(place)(place, types.intp), emit


@primitive
def put(tc: Any, place: Any, index: Any, scalar: Any) -> Any:
    """Set one element of scratch or of an array, by flat index."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target = address(context, builder, place, args[0], args[1], args[2].type)
        builder.store(args[2], target, align=1)
        return context.get_dummy_value()

    return types.void(place, types.intp, pointee(place)), emit


@primitive
def peek(tc: Any, raw: Any, byte: Any, dtype: Any) -> Any:
    """peek(raw, i, np.uint16): the integer whose bytes (machine order) start at byte i."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = SCALARS[element(dtype)]
        return builder.load(address(context, builder, raw, args[0], args[1], scalar), align=1, typ=scalar)

    return element(dtype)(raw, types.intp, dtype), emit


@primitive
def poke(tc: Any, raw: Any, byte: Any, scalar: Any) -> Any:
    """poke(raw, i, np.uint16(v)): store an integer's bytes (machine order) from byte i on."""
    kind = types.unliteral(scalar)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target = address(context, builder, raw, args[0], args[1], args[2].type)
        builder.store(args[2], target, align=1)
        return context.get_dummy_value()

    return types.void(raw, types.intp, kind), emit


@primitive
def prefetch(tc: Any, place: Any, index: Any) -> Any:
    """Ask for the cache line of an element that will be read soon. A hint: any address is legal."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = address(context, builder, place, args[0], args[1], ir.IntType(8))
        shape = ir.FunctionType(ir.VoidType(), [at.type, I32, I32, I32])
        hint = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch.p0")
        builder.call(hint, [at, *(ir.Constant(I32, v) for v in (0, 3, 1))])  # read, keep in all caches, data
        return context.get_dummy_value()

    return types.void(place, types.intp), emit


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 lanes, rows and lanes exchanged: 4 rounds that swap off-diagonal 8, 4, 2, 1-blocks."""
    for h in (8, 4, 2, 1):
        low = [c if not c & h else 16 + c - h for c in range(16)]
        high = [c + h if not c & h else 16 + c for c in range(16)]
        for r in range(16):
            if not r & h:
                x, y = rows[r], rows[r + h]
                rows[r], rows[r + h] = shuffle(builder, x, y, low), shuffle(builder, x, y, high)
    return rows


@primitive
def transpose16(tc: Any, source: Any, i: Any, stride: Any, target: Any, j: Any, target_stride: Any) -> Any:
    """target[j + c*target_stride + r] = source[i + r*stride + c] for r, c < 16 (float32)."""
    if pointee(source) != types.float32 or pointee(target) != types.float32:
        raise TypingError(f"transpose16() moves float32, not {source} to {target}")
    row = ir.VectorType(ir.FloatType(), 16)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def places(place: Any, value: Any, start: Any, step: Any) -> list[Any]:
            starts = [builder.add(start, builder.mul(step, ir.Constant(I64, r))) for r in range(16)]
            return [address(context, builder, place, value, s, row) for s in starts]

        rows = [builder.load(p, align=1, typ=row) for p in places(source, args[0], args[1], args[2])]
        targets = places(target, args[3], args[4], args[5])
        for lanes, p in zip(transposed(builder, rows), targets, strict=True):
            builder.store(lanes, p, align=1)
        return context.get_dummy_value()

    sizes = (types.intp, types.intp)
    return types.void(source, *sizes, target, *sizes), emit
