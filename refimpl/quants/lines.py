"""Codes that were rounded on a line that is not stored: the check that Q4_1 and Q5_1 share.

Without an imatrix they round (x - min x) / d, before d becomes fp16. With one they round f - s * (max x - x):
the factor f is one of 38, and the slope s = f / (max x - b) depends on the importances through the minimum
b <= 0 that the search holds at the time. So codes are the encoder's where some f and s explain all of them:
each code bounds s from both sides, and the bounds must meet. Values within TIE of a code count as rounded to
it: whether a compiler fuses the product, and how s was rounded, decides ties. Codes that nothing explains are
measured from the nearest under the stored scales.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, nearest_int
from refimpl.quants.formats import LINE_FACTORS, TIE_ON_A_LINE

Array = NDArray[Any]

TIE = TIE_ON_A_LINE


def measure_lines(
    blocks: Array, stored: Array, x: Array, top: int, plain: tuple[Array, Array, Array]
) -> Array:
    """Measure how far codes lie from the encoder's; 0 where the plain rule or a line explains the whole block.

    blocks : [N] records with d and m; a block whose d is 0 decodes to one value whatever its codes
    stored : [N, n] int32 in 0..top
    x      : [N, n] float32, finite: the source
    plain  : d, m [N] float32 and codes [N, n] int32 of the plain encoder
    return : [N, n] int32 >= 0, in code steps; 0 where weights lie too close for float32 to tell a line

    Rounds: lines, to float64; the nearest codes as float32 does.
    """
    explained = (blocks["d"] == 0) | follow_plain(stored, x, *plain) | follow_line(stored, x, top)
    d, m = (decode_half(blocks[name].view(np.uint16))[:, None] for name in ("d", "m"))
    near = np.clip(nearest_int((x - m) / d), 0, top)
    return np.where(explained[:, None], 0, np.abs(stored - near))


def follow_plain(stored: Array, x: Array, d: Array, m: Array, codes: Array) -> Array:
    """Are all codes those of the plain encoder, ties aside? [N] bool."""
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0)).astype(np.float64)
    values = (x.astype(np.float64) - m.astype(np.float64)[:, None]) * inverse[:, None]
    return ((stored == codes) | (np.abs(values - stored) <= TIE)).all(1)


def follow_line(stored: Array, x: Array, top: int) -> Array:
    """Is there a line that explains all codes? [N] bool; true where weights lie too close to tell."""
    wide = x.astype(np.float64)
    high = wide.max(1)
    gaps = np.abs(high[:, None] - wide)  # never -0
    found = gaps.max(1) <= np.abs(wide).max(1) * 2.0**-16
    for factor in LINE_FACTORS[top]:
        lower = np.where(stored < top, (factor - stored - TIE) / gaps, 0)
        upper = np.where(stored > 0, (factor - stored + TIE) / gaps, np.inf)
        most = np.where(high > 0, factor / high * (1 + 2.0**-20), np.inf)  # b <= 0
        found |= np.maximum(lower.max(1), 0) <= np.minimum(upper.min(1), most)
    return found
