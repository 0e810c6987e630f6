"""IQ4_XS for kernels: the twin of iq4_xs.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half, encode_half
from refimpl.arith.builds import Build
from refimpl.arith.fused import nearest_product
from refimpl.arith.jit import jit
from refimpl.quants.formats import IQ4_XS
from refimpl.quants.iq4_jit import (
    count_apart,
    decode,
    fit_scale,
    round_and_pack,
    weigh_by_imatrix,
    weigh_plain,
)
from refimpl.quants.search_jit import find_peak

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = IQ4_XS.weights, IQ4_XS.block.itemsize
HIGH, LOW, QS = IQ4_XS.offset("scales_h"), IQ4_XS.offset("scales_l"), IQ4_XS.offset("qs")
SUBS, SUB = 8, 32
ZERO, ONE, BOTTOM = np.float32(0), np.float32(1), np.float32(-32)


@jit
def read_d(block: Bytes) -> Any:
    """Read d of one block."""
    return decode_half(int(block[0]) | int(block[1]) << 8)


@jit
def unpack_scale(block: Bytes, s: int) -> Any:
    """Unpack the scale of sub-block s, -32..31, as float32."""
    high = int(block[HIGH + s // 4]) >> s % 4 * 2 & 3
    return np.float32((int(block[LOW + s // 2]) >> s % 2 * 4 & 15 | high << 4) - 32)


@jit
def pack_scale(block: Bytes, s: int, scale: int) -> None:
    """Pack a scale in -32..31 into bytes that were 0."""
    code = scale + 32
    block[HIGH + s // 4] = int(block[HIGH + s // 4]) | code >> 4 << s % 4 * 2
    block[LOW + s // 2] = int(block[LOW + s // 2]) | (code & 15) << s % 2 * 4


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [136] uint8; y : [256] float32, written."""
    d = read_d(block)
    for s in range(SUBS):
        qs = block[QS + 16 * s : QS + 16 * (s + 1)]
        decode(qs, d * unpack_scale(block, s), y[SUB * s : SUB * (s + 1)])


@jit
def quantize_block(x: Floats, weights: Floats, block: Bytes, build: Build) -> None:
    """Encode one block. x, weights : [256] float32; block : [136] uint8, written."""
    found = np.empty(SUBS, np.float32)
    for s in range(SUBS):
        found[s] = fit_scale(x[SUB * s : SUB * (s + 1)], weights[SUB * s : SUB * (s + 1)], build)
    d = find_peak(found) / BOTTOM
    inverse = ONE / d if d != ZERO else ZERO
    half = encode_half(d)
    block[0], block[1] = half & 255, half >> 8
    for i in range(HIGH, QS):
        block[i] = 0
    for s in range(SUBS):
        scale = max(-32, min(31, nearest_product(build.NL_NI, inverse, found[s])))
        pack_scale(block, s, scale)
        step = d * np.float32(scale)
        qs = block[QS + 16 * s : QS + 16 * (s + 1)]
        round_and_pack(x[SUB * s : SUB * (s + 1)], ONE / step if step != ZERO else ZERO, qs)


@jit
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [136] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far, d = 0, 0, read_d(block)
    for s in range(SUBS):
        qs = block[QS + 16 * s : QS + 16 * (s + 1)]
        more, most = count_apart(qs, x[SUB * s : SUB * (s + 1)], d, unpack_scale(block, s))
        off += more
        far = max(far, most)
    return off, far


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/256*136] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/256*136] uint8, written
    """
    weights = np.empty(WEIGHTS, np.float32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            part = slice(b * WEIGHTS, (b + 1) * WEIGHTS)
            if imatrix.shape[0] > 0:
                weigh_by_imatrix(x[r, part], imatrix[r // rows_per_expert, part], weights, build)
            else:
                weigh_plain(x[r, part], weights)
            quantize_block(x[r, part], weights, out[r, b * BYTES : (b + 1) * BYTES], build)


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in codes
    """
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group)
