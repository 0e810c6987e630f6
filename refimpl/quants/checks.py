"""What the verifier asks of stored blocks: how far off, are the codes the encoder's, are the scales sane.

Everything works on rows, [R, bytes] uint8 beside [R, n] source, and answers per row or per block.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_bf16, decode_half
from refimpl.quants.formats import Format, find_codec, find_kernel, find_reference

Array = NDArray[Any]
Sums = tuple[Array, Array, Array]

ROW_ERRORS = np.dtype(
    [("sse", "<f8"), ("ssx", "<f8"), ("max_abs", "<f4"), ("worst_sse", "<f8"), ("worst_block", "<i4")]
)
NEAREST = np.dtype([("off", "<u2"), ("far", "u1")])

TILE = 1 << 16  # weights decoded at a time, to be compared while they are in the second-level cache
NO_BITS, NO_VALUES, NO_SSE = np.empty((0, 0), np.uint16), np.empty((0, 0), np.float32), np.empty((0, 0))


def compare(
    raw: Array, fmt: str | Format, source: Array, reference: bool = False, sse: Array | None = None
) -> Array:
    """Measure how far stored rows lie from their source.

    d = float32(decoded) - float32(source);  sse, ssx = sums of d^2 and source^2

    raw    : [R, bytes] uint8
    source : [R, n] uint16 (bf16 bits) or float32
    sse    : [R, NB] float64 or None: filled with the sums of each block
    return : [R] ROW_ERRORS; worst_block is the first with the largest sse, and NaN is larger than any number

    Rounds: d, to float32; squares and sums, to float64. A block adds up in 32 lanes (weight i in lane i mod
    32, ascending), then the lanes by halves; a row adds its blocks in ascending order.
    Raises: ValueError or TypeError for shapes and types that do not fit.
    """
    fmt = find_codec(fmt)
    _check_rows(raw, fmt, source, (np.dtype(np.uint16), np.dtype(np.float32)))
    blocks = source.shape[1] // fmt.weights
    if sse is not None and (sse.dtype != np.float64 or sse.shape != (len(raw), blocks)):
        raise ValueError(f"sse must be float64 {(len(raw), blocks)}, not {sse.dtype} {sse.shape}")
    rows = np.zeros(len(raw), ROW_ERRORS)
    rows["worst_block"] = -1
    if not source.size:
        return rows
    raw, source = np.ascontiguousarray(raw), np.ascontiguousarray(source)
    run = _compare_by_reference if reference else _compare_by_kernel
    sums, rows["max_abs"], rows["worst_block"] = run(raw, fmt, source, sse)
    rows["sse"], rows["ssx"], rows["worst_sse"] = sums.T
    return rows


def _compare_by_reference(raw: Array, fmt: Format, source: Array, sse: Array | None) -> Sums:
    from refimpl.quants import dequantize
    from refimpl.quants.deviation import compare, summarize

    x = decode_bf16(source) if source.dtype == np.uint16 else source
    with np.errstate(all="ignore"):
        errors, squares, max_abs = compare(dequantize(raw, fmt, reference=True), x, fmt.weights)
        sums, worst = summarize(errors, squares)
    if sse is not None:
        sse[:] = errors
    return sums, max_abs, worst


def _compare_by_kernel(raw: Array, fmt: Format, source: Array, sse: Array | None) -> Sums:
    from refimpl.quants import allocate, dequantize

    bits, values = (source, NO_VALUES) if source.dtype == np.uint16 else (NO_BITS, source)
    errors = NO_SSE if sse is None else sse
    sums, max_abs = np.empty((len(raw), 3)), np.empty(len(raw), np.float32)
    worst = np.empty(len(raw), np.int32)
    if fmt.weights == 1:
        from refimpl.quants.deviation_jit import compare_values

        compare_values(dequantize(raw, fmt), bits, values, errors, sums, max_abs, worst)
        return sums, max_abs, worst
    from refimpl.quants.deviation_simd import tiles_kernel

    tile = allocate((min(max(1, TILE // source.shape[1]), len(raw)), source.shape[1]), np.float32)
    raw, source = (np.require(a, requirements=("A", "W")) for a in (raw, source))
    run = tiles_kernel(source.dtype)
    run(find_kernel(fmt, "dequantize"), raw, tile, source, fmt.weights, errors, sums, max_abs, worst)
    return sums, max_abs, worst


def nearest(raw: Array, fmt: str | Format, x: Array, reference: bool = False) -> Array:
    """Count the codes that are not what the encoder gives under the stored scales.

    Of a format that is not ruled count the parts of a block that no importances explain: the scales, eight signs,
    the points of a group (grid_rule.py, ternary_rule.py); far is 1 where there are any.

    raw    : [R, bytes] uint8
    x      : [R, n] float32, finite: the source
    return : [R, NB] NEAREST: off codes of the block, far: the largest distance in code steps

    Raises: ValueError for a format without codes; ValueError or TypeError for shapes and types that do not fit.
    """
    fmt = find_codec(fmt)
    if fmt.weights == 1:
        raise ValueError(f"{fmt.name} has no codes")
    _check_rows(raw, fmt, x, (np.dtype(np.float32),))
    blocks = np.zeros((len(x), x.shape[1] // fmt.weights), NEAREST)
    if not x.size:
        return blocks
    raw, x = np.ascontiguousarray(raw), np.ascontiguousarray(x)
    if reference:
        measure = find_reference(fmt).measure_codes
        with np.errstate(all="ignore"):
            steps = measure(raw.view(fmt.block).reshape(-1), x.reshape(-1, fmt.weights))
        blocks["off"] = np.count_nonzero(steps, 1).reshape(blocks.shape)
        blocks["far"] = steps.max(1).reshape(blocks.shape)
        return blocks
    off, far = np.empty(blocks.shape, np.uint16), np.empty(blocks.shape, np.uint8)
    find_kernel(fmt, "check_codes")(raw, x, off, far)
    blocks["off"], blocks["far"] = off, far
    return blocks


def read_scales(raw: Array, fmt: str | Format) -> NDArray[np.float32]:
    """Read the scales from which all weights of a block derive: d, or what the format has in its place.

    raw    : [R, bytes] uint8
    return : [R, NB, S] float32, S scales that share the block's weights evenly, in their order
    """
    fmt = find_codec(fmt)
    _check_raw(raw, fmt)
    blocks = np.ascontiguousarray(raw).view(fmt.block)
    if "d" in (fmt.block.names or ()) and fmt.block["d"] == np.dtype("<f2"):
        return decode_half(blocks["d"].view(np.uint16))[..., None]
    scales: NDArray[np.float32] = find_reference(fmt).read_scales(blocks.reshape(-1))
    return scales.reshape(*blocks.shape, -1)


def scale_defects(raw: Array, fmt: str | Format) -> NDArray[np.bool_]:
    """Find blocks of which a scale (d, dmin, ...) is NaN or infinite; for float formats the weights that are.

    raw    : [R, bytes] uint8
    return : [R, NB] bool
    """
    fmt = find_codec(fmt)
    _check_raw(raw, fmt)
    blocks = np.ascontiguousarray(raw).view(fmt.block)
    if fmt.name == "bf16":
        return blocks & 0x7F80 == 0x7F80
    if fmt.weights == 1:
        return ~np.isfinite(blocks)
    defects = np.asarray(~np.isfinite(read_scales(raw, fmt)).all(-1))
    for name in fmt.block.names or ():
        if fmt.block[name] == np.dtype("<f2"):
            defects |= ~np.isfinite(blocks[name])
    return defects


def _check_raw(raw: Any, fmt: Format) -> None:
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
        raise TypeError(f"raw must be an array of uint8, not {getattr(raw, 'dtype', type(raw).__name__)}")
    if raw.ndim != 2 or raw.shape[1] % fmt.block.itemsize:
        raise ValueError(f"raw must be rows of {fmt.name} blocks, not of shape {raw.shape}")


def _check_rows(raw: Any, fmt: Format, source: Any, dtypes: tuple[np.dtype[Any], ...]) -> None:
    _check_raw(raw, fmt)
    if not isinstance(source, np.ndarray) or source.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"source must be {allowed}, not {getattr(source, 'dtype', type(source).__name__)}")
    n = raw.shape[1] // fmt.block.itemsize * fmt.weights
    if source.shape != (len(raw), n):
        raise ValueError(f"source has the shape {source.shape}, but the blocks hold {(len(raw), n)}")
