"""NVFP4 for kernels: the twin of nvfp4.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_ue4m3, encode_ue4m3
from refimpl.arith.jit import jit
from refimpl.quants.formats import NVFP4
from refimpl.quants.fp4_jit import count_apart, decode, round_and_pack

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

WEIGHTS, BYTES = NVFP4.weights, NVFP4.block.itemsize
D, QS = NVFP4.offset("d"), NVFP4.offset("qs")
SUBS, SUB = 4, 16
HALF = SUB // 2
ZERO, SIX = np.float32(0), np.float32(6)


@jit
def dequantize_block(block: Bytes, y: Floats) -> None:
    """Decode one block. block : [36] uint8; y : [64] float32, written."""
    for s in range(SUBS):
        qs = block[QS + HALF * s : QS + HALF * (s + 1)]
        decode(qs, decode_ue4m3(block[D + s]), y[SUB * s : SUB * (s + 1)])


@jit
def quantize_block(x: Floats, block: Bytes) -> None:
    """Encode one block. x : [64] float32; block : [36] uint8, written."""
    for s in range(SUBS):
        sub = x[SUB * s : SUB * (s + 1)]
        peak = ZERO
        for i in range(SUB):
            peak = max(peak, abs(sub[i]))
        d = encode_ue4m3(peak / SIX)
        block[D + s] = d
        round_and_pack(sub, decode_ue4m3(d), block[QS + HALF * s : QS + HALF * (s + 1)])


@jit
def check_block(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [36] uint8; x : [64] float32; return : codes off, largest distance."""
    off, far = 0, 0
    for s in range(SUBS):
        qs = block[QS + HALF * s : QS + HALF * (s + 1)]
        more, most = count_apart(qs, x[SUB * s : SUB * (s + 1)], decode_ue4m3(block[D + s]))
        off += more
        far = max(far, most)
    return off, far


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows. raw : [R, n/64*36] uint8; out : [R, n] float32, written."""
    for r in range(out.shape[0]):
        for b in range(out.shape[1] // WEIGHTS):
            y = out[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            dequantize_block(raw[r, b * BYTES : (b + 1) * BYTES], y)


@jit
def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes) -> None:
    """Encode rows. x : [R, n] float32; the imatrix is ignored; out : [R, n/64*36] uint8, written."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // WEIGHTS):
            quantize_block(x[r, b * WEIGHTS : (b + 1) * WEIGHTS], out[r, b * BYTES : (b + 1) * BYTES])


@jit
def check_codes(raw: Bytes, x: Floats, off: NDArray[np.uint16], far: Bytes) -> None:
    """Count the codes of each block that are not the encoder's. raw : [R, bytes] uint8; x : [R, n] float32.

    off : [R, NB] uint16, written: how many; far : [R, NB] uint8, written: the largest distance in codes
    """
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * BYTES : (b + 1) * BYTES], x[r, b * WEIGHTS : (b + 1) * WEIGHTS]
            off[r, b], far[r, b] = check_block(block, group)
