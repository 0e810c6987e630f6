"""Q4_1: 32 weights in 20 bytes, an fp16 step, an fp16 minimum and 32 codes of 4 bits.

| d: fp16 | m: fp16 | qs: 16 bytes |          w[i] = d * q[i] + m

byte j of qs holds weight j (low nibble) and weight j + 16 (high nibble).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half, truncate
from refimpl.arith.builds import STRICT, Build
from refimpl.arith.fused import add_product
from refimpl.quants.formats import Q4_1, Parts
from refimpl.quants.lines import measure_lines
from refimpl.quants.q4_0 import unpack_codes
from refimpl.quants.q5_0 import weigh
from refimpl.quants.search import fit_scale_min

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

TOP = 15
TRIALS = (-0.9, 0.05, 36)  # trial scales (15 + start + step * k) / spread, k = 0..steps


def dequantize(blocks: Records) -> Floats:
    """Decode Q4_1 blocks to weights.

    w[i] = d * q[i] + m

    blocks : [N] Q4_1 records (formats.Q4_1.block)
    return : [N, 32] float32

    Rounds: the sum, to float32; the product is exact.
    Source: ggml-quants.c dequantize_row_q4_1, llama.cpp 0c1e570.
    """
    d, m = (decode_half(blocks[name].view(np.uint16))[:, None] for name in ("d", "m"))
    return d * unpack_codes(blocks["qs"]).astype(np.float32) + m


def find_low(x: Floats) -> Floats:
    """Find the first of the smallest (of -0 and +0 the one that comes first): [N, n] float32 -> [N]."""
    return np.take_along_axis(x, x.argmin(1)[:, None], 1)[:, 0]


def round_codes(x: Floats, top: int, build: Build = STRICT) -> tuple[Floats, Floats, Codes]:
    """Round each block under 1/d, before d and m become fp16: the encoder without an imatrix.

    m = min x,  d = (max x - m) / top,  q[i] = trunc((x[i] - m) * (1/d) + 0.5); 1/d is 0 for d = 0

    x      : [N, 32] float32
    return : d, m [N] float32, codes [N, 32] int32 in 0..top; 0 where d or 1/d overflowed (INT_MIN's low byte)

    Rounds: every operation, to float32.
    """
    m = find_low(x)
    d = (-find_low(-x) - m) / np.float32(top)  # of -0 and +0 the one that comes first, here too
    inverse = np.where(d != 0, np.float32(1) / d, np.float32(0))
    raised = add_product(build.REF_RND, np.float32(0.5), x - m[:, None], inverse[:, None])
    return d, m, (truncate(raised) & 255).astype(np.int32)


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q4_1 records."""
    d, m = (decode_half(blocks[name].view(np.uint16))[:, None] for name in ("d", "m"))
    return Parts(None, None, d, -m, unpack_codes(blocks["qs"]))


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the encoder's; 0 where the plain rule or a line explains all.

    blocks : [N] Q4_1 records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    return measure_lines(blocks, unpack_codes(blocks["qs"]), x, TOP, round_codes(x, TOP))


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q4_1 blocks.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/32] Q4_1 records

    Rounds: every operation, to float32, but what `build` fuses; d and m once more, to fp16. With an imatrix
    the codes are those of a trial scale and of the minimum found before it, not the nearest under the stored d, m.
    Source: ggml-quants.c quantize_row_q4_1_ref, quantize_row_q4_1_impl, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, Q4_1.weights)
    if imatrix is None:
        d, m, codes = round_codes(groups, TOP, build)
    else:
        d, low, codes = fit_scale_min(
            groups, weigh(x, imatrix, build).reshape(groups.shape), TOP, *TRIALS, build
        )
        m = -low
    blocks = np.zeros(len(groups), Q4_1.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["m"].view(np.uint16)[:] = encode_half(m)
    blocks["qs"] = codes[:, :16] | codes[:, 16:] << 4
    return blocks.reshape(len(x), -1)
