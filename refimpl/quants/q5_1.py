"""Q5_1: 32 weights in 24 bytes, an fp16 step, an fp16 minimum and 32 codes of 5 bits.

| d: fp16 | m: fp16 | qh: 32 bits | qs: 16 bytes |          w[i] = d * q[i] + m

byte j of qs holds the low four bits of weight j (low nibble) and of weight j + 16 (high nibble);
bit i of qh, counted from the lowest bit of its first byte, is the fifth bit of weight i.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.arith.builds import STRICT, Build
from refimpl.quants.formats import Q5_1, Parts
from refimpl.quants.lines import measure_lines
from refimpl.quants.q4_1 import TRIALS, round_codes
from refimpl.quants.q5_0 import unpack_codes, weigh
from refimpl.quants.search import fit_scale_min

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

TOP = 31


def dequantize(blocks: Records) -> Floats:
    """Decode Q5_1 blocks to weights.

    w[i] = d * q[i] + m

    blocks : [N] Q5_1 records (formats.Q5_1.block)
    return : [N, 32] float32

    Rounds: the sum, to float32; the product is exact.
    Source: ggml-quants.c dequantize_row_q5_1, llama.cpp 0c1e570.
    """
    d, m = (decode_half(blocks[name].view(np.uint16))[:, None] for name in ("d", "m"))
    return d * unpack_codes(blocks).astype(np.float32) + m


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] Q5_1 records."""
    d, m = (decode_half(blocks[name].view(np.uint16))[:, None] for name in ("d", "m"))
    return Parts(None, None, d, -m, unpack_codes(blocks))


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the encoder's; 0 where the plain rule or a line explains all.

    blocks : [N] Q5_1 records
    x      : [N, 32] float32, finite: the source
    return : [N, 32] int32 >= 0
    """
    return measure_lines(blocks, unpack_codes(blocks), x, TOP, round_codes(x, TOP))


def quantize(x: Floats, imatrix: Floats | None = None, build: Build = STRICT) -> Records:
    """Encode rows of weights to Q5_1 blocks.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None
    return  : [R, n/32] Q5_1 records

    Rounds: every operation, to float32, but what `build` fuses; d and m once more, to fp16. With an imatrix
    the codes are those of a trial scale and of the minimum found before it, not the nearest under the stored d, m.
    Source: ggml-quants.c quantize_row_q5_1_ref, quantize_row_q5_1_impl, llama.cpp 0c1e570.
    """
    groups = x.reshape(-1, Q5_1.weights)
    if imatrix is None:
        d, m, codes = round_codes(groups, TOP, build)
    else:
        d, low, codes = fit_scale_min(
            groups, weigh(x, imatrix, build).reshape(groups.shape), TOP, *TRIALS, build
        )
        m = -low
    blocks = np.zeros(len(groups), Q5_1.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    blocks["m"].view(np.uint16)[:] = encode_half(m)
    blocks["qs"] = codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4
    blocks["qh"] = np.packbits((codes >> 4).astype(np.uint8), axis=1, bitorder="little")
    return blocks.reshape(len(x), -1)
