"""The 4-bit floats (e2m1) of MXFP4 and NVFP4 for kernels: the twin of fp4.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.quants.levels import FP4, FP4_VALUES

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ZERO = np.float32(0)
MAGNITUDES = np.array(FP4, np.float32)


@jit
def decode(qs: Bytes, step: Any, y: Floats) -> None:
    """Multiply out FP4[code] * step. qs : [n] uint8; y : [2n] float32, written."""
    half = qs.size
    for j in range(half):
        y[j] = FP4_VALUES[int(qs[j]) & 15] * step
        y[half + j] = FP4_VALUES[int(qs[j]) >> 4] * step


@jit
def round_code(v: Any, step: Any) -> Any:
    """Find the code of least error, the first of equals."""
    code, size = 0, abs(v)
    best = size
    for m in range(1, 8):
        error = abs(MAGNITUDES[m] * step - size)
        if error < best:
            code, best = m, error
    return code + 8 if v < ZERO and code > 0 else code


@jit
def round_and_pack(x: Floats, step: Any, qs: Bytes) -> None:
    """Round 2n weights, pack their codes. x : [2n] float32; qs : [n] uint8, written."""
    half = qs.size
    for j in range(half):
        qs[j] = round_code(x[j], step) | round_code(x[half + j], step) << 4


@jit
def place(code: Any) -> Any:
    """Place of a code on the ladder -12 .. 12; both zeros are one."""
    return -(code & 7) if code & 8 else code & 7


@jit
def count_apart(qs: Bytes, x: Floats, step: Any) -> Any:
    """Compare 2n stored codes with the nearest. qs : [n] uint8; x : [2n]; return : codes off, largest distance."""
    off, far = 0, 0
    if step == ZERO:
        return off, far
    half = qs.size
    for j in range(x.size):
        stored = int(qs[j % half]) >> j // half * 4 & 15
        code = round_code(x[j], step)
        distance = max(abs(place(stored) - place(code)), int(stored != code))
        off += distance != 0
        far = max(far, distance)
    return off, far
