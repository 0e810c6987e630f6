"""TQ1_0: 256 weights of -1, 0 or 1 times d in 54 bytes, five to a byte.

| qs: 48 bytes | qh: 4 bytes | d: fp16 |          w[i] = d * (q[i] - 1)

A byte holds digits t0 .. t4 of base 3, the first on top, as the fraction 0.t0t1t2t3t4 of 256, rounded up: digit k is
read by multiplying by 3^k, keeping 8 bits, and taking what carries over when that is multiplied by 3.

    qs[j], j < 32     t0 .. t4 are the codes of weights j, 32 + j, 64 + j, 96 + j, 128 + j
    qs[32 + j]                              of weights 160 + j, 176 + j, .. 224 + j,  j < 16
    qh[j]             t0 .. t3 are those    of weights 240 + j, 244 + j, 248 + j, 252 + j; t4 is 0
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants.formats import TQ1_0, Parts
from refimpl.quants.ternary import measure_apart, round_codes

Records = NDArray[Any]
Floats = NDArray[Any]  # float32
Codes = NDArray[np.int32]

POWERS = 3 ** np.arange(5)


def unpack_codes(blocks: Records) -> Codes:
    """Unpack the codes. blocks : [N] TQ1_0 records; return : [N, 256] int32 in 0..2."""
    parts = []
    for held, digits in ((blocks["qs"][:, :32], 5), (blocks["qs"][:, 32:], 5), (blocks["qh"], 4)):
        rest = held[:, None, :].astype(np.int32) * POWERS[:digits, None] & 255
        parts.append((rest * 3 >> 8).reshape(len(blocks), -1))
    return np.concatenate(parts, 1)


def pack_codes(blocks: Records, codes: Codes) -> None:
    """Pack codes [N, 256] in 0..2 into blocks: the inverse of unpack_codes."""
    first, second, last = (
        codes[:, :160].reshape(-1, 5, 32),
        codes[:, 160:240].reshape(-1, 5, 16),
        codes[:, 240:],
    )
    blocks["qs"] = np.concatenate([_pack_digits(first), _pack_digits(second)], 1)
    blocks["qh"] = _pack_digits(
        np.concatenate([last.reshape(-1, 4, 4), np.zeros((len(codes), 1, 4), int)], 1)
    )


def _pack_digits(codes: Codes) -> Codes:
    """Bytes of five digits each: ceil(number * 256 / 243). codes : [N, 5, n]; return : [N, n]."""
    number = (codes * POWERS[::-1, None]).sum(1)
    return (number * 256 + 242) // 243


def read_d(blocks: Records) -> Floats:
    """Read d. blocks : [N] TQ1_0 records; return : [N] float32."""
    return decode_half(blocks["d"].view(np.uint16))


def dequantize(blocks: Records) -> Floats:
    """Decode TQ1_0 blocks to weights.

    w[i] = d * (q[i] - 1)

    blocks : [N] TQ1_0 records (formats.TQ1_0.block)
    return : [N, 256] float32

    Rounds: never.
    Source: ggml-quants.c dequantize_row_tq1_0, llama.cpp 0c1e570.
    """
    return (unpack_codes(blocks) - 1).astype(np.float32) * read_d(blocks)[:, None]


def take_apart(blocks: Records) -> Parts:
    """Take blocks apart for display. blocks : [N] TQ1_0 records."""
    return Parts(None, None, read_d(blocks)[:, None], None, unpack_codes(blocks) - 1)


def measure_codes(blocks: Records, x: Floats) -> Codes:
    """Measure how many steps each stored code lies from the nearest under d, as it was before it became fp16.

    blocks : [N] TQ1_0 records
    x      : [N, 256] float32, finite: the source
    return : [N, 256] int32 >= 0
    """
    return measure_apart(unpack_codes(blocks), x, read_d(blocks), 2)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to TQ1_0 blocks. An imatrix changes nothing.

    d = max|x|,  q[i] = round(x[i] / d) + 1: exact where all weights are -s, 0 or s, as in models trained so

    x       : [R, n] float32, finite
    imatrix : ignored
    return  : [R, n/256] TQ1_0 records

    Rounds: every operation, to float32; d once more, to fp16, after the codes are taken under 1/d.
    Source: ggml-quants.c quantize_row_tq1_0_ref, llama.cpp 0c1e570.
    """
    d, codes = round_codes(x.reshape(-1, TQ1_0.weights), 1)
    blocks = np.zeros(len(d), TQ1_0.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d)
    pack_codes(blocks, codes)
    return blocks.reshape(len(x), -1)
