"""The 4-bit floats (e2m1) of MXFP4 and NVFP4: codes, and the search for the nearest.

code = s e e m: the magnitudes 0..7 stand for FP4 = 0 1 2 3 4 6 8 12 (twice e2m1's values), bit 3 is the sign.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.quants.levels import FP4_VALUES

Floats = NDArray[Any]  # float32
Bytes = NDArray[np.uint8]
Codes = NDArray[np.int32]


def unpack_codes(qs: Bytes) -> Bytes:
    """Unpack codes: of n bytes first all low nibbles, then all high ones. qs : [..., n]; return : [..., 2n]."""
    return np.concatenate([qs & 15, qs >> 4], -1)


def pack_codes(codes: Codes) -> Bytes:
    """Pack codes: the inverse of unpack_codes. codes : [..., 2n]; return : [..., n] uint8."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] | codes[..., half:] << 4).astype(np.uint8)


def decode(codes: Bytes, step: Floats) -> Floats:
    """Multiply out: FP4[code] * step. codes : [N, n]; step : [N] float32; return : [N, n] float32."""
    return FP4_VALUES[codes] * step[:, None]


def round_codes(x: Floats, step: Floats) -> Codes:
    """Find the code of least error; of equals the first, which is the one nearer to zero, and never -0.

    The errors |FP4[m] * step - |x|| are compared as float32: far beyond the largest value many are equal.

    x      : [N, n] float32
    step   : [N] float32 >= 0
    return : [N, n] int32 in 0..15

    Rounds: the product and the difference, to float32.
    Source: ggml-quants.c best_index_mxfp4, llama.cpp 0c1e570 (which tries all 16 signed values).
    """
    values = FP4_VALUES[:8] * step[:, None, None]
    size = np.abs(values - np.abs(x)[..., None]).argmin(-1).astype(np.int32)  # the first
    return np.where((x < 0) & (size > 0), size + 8, size)


def measure_apart(stored: Bytes, x: Floats, step: Floats) -> Codes:
    """Measure how many codes the stored ones lie from the nearest, -0 one from 0; none counts where the step is 0.

    stored : [N, n]; x : [N, n] float32; step : [N] float32; return : [N, n] int32 >= 0
    """

    def place(codes: Any) -> Any:  # on the ladder -12 .. 12; both zeros are one place
        return np.where(codes & 8, -(codes & 7).astype(np.int32), codes & 7)

    codes = round_codes(x, step)
    far = np.maximum(np.abs(place(stored) - place(codes)), stored != codes)
    return np.where((step == 0)[:, None], 0, far).astype(np.int32)
