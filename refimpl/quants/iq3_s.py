"""IQ3_S: 256 weights in 110 bytes, 3.44 bits each: points of a grid of 512 and a scale for 32 weights.

| d: fp16 | qs: 64 bytes | qh: 8 bytes | signs: 32 bytes | scales: 8 of 4 bits |

w[i] = d * (1 + 2 * scale) * point[i] * sign[i]        point[i] is one of 1, 3, 5 ... 15

A point is four weights; bit l of qh[j] is the ninth bit of the number of point 8 j + l. The low half of
scales[j] belongs to the first 32 weights of 64, the high half to the other 32.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half, encode_half
from refimpl.quants import grid_rule, grid_search
from refimpl.quants.formats import IQ3_S
from refimpl.quants.grids import Stored, load_grid, unpack_signs

Records = NDArray[Any]
Floats = NDArray[Any]  # float32

RAISED = np.float32(1.033)


def unpack(blocks: Records) -> Stored:
    """Take the fields apart. blocks : [N] IQ3_S records."""
    ninth = np.unpackbits(blocks["qh"], axis=1, bitorder="little").astype(np.int32)
    levels = np.stack([blocks["scales"] & 15, blocks["scales"] >> 4], -1).reshape(-1, 8)
    return Stored(blocks["qs"] | ninth << 8, blocks["signs"], levels.astype(np.int32))


def dequantize(blocks: Records) -> Floats:
    """Decode IQ3_S blocks to weights.

    w[i] = d * (1 + 2 * scale[i // 32]) * point[i] * sign[i]

    blocks : [N] IQ3_S records (formats.IQ3_S.block)
    return : [N, 256] float32

    Rounds: each product, to float32, in the order written.
    Source: ggml-quants.c dequantize_row_iq3_s, llama.cpp 0c1e570.
    """
    numbers, signs, levels = unpack(blocks)
    d = decode_half(blocks["d"].view(np.uint16))
    step = d[:, None] * (1 + 2 * levels).astype(np.float32)
    point = load_grid("iq3_s").points[numbers].astype(np.float32).reshape(-1, 32, 8)
    return np.asarray((step.repeat(4, 1)[..., None] * point * unpack_signs(signs)).reshape(-1, 256))


def measure_codes(blocks: Records, x: Floats) -> NDArray[np.int32]:
    """Count what no importances explain: see grid_rule.py. x : [N, 256] float32; return : [N, checks] int32.

    The low bits of numbers and the signs are moved back behind the groups of zeros that the encoder skipped.
    """
    numbers, signs, levels = unpack(blocks)
    dead = np.asarray(~x.reshape(-1, 8, 32).any(2))
    place = dead[..., None].argsort(1, kind="stable").argsort(1, kind="stable")
    low = np.take_along_axis((numbers & 255).reshape(-1, 8, 8), place, 1).reshape(-1, 64)
    signs = np.take_along_axis(signs.reshape(-1, 8, 4), place, 1).reshape(-1, 32)
    d = decode_half(blocks["d"].view(np.uint16))
    return grid_rule.measure("iq3_s", d, Stored(low | numbers & 256, signs, levels), x)


def quantize(x: Floats, imatrix: Floats | None = None) -> Records:
    """Encode rows of weights to IQ3_S blocks.

    19 trial scales around peak / 15 for each 32 weights; where any point had to move (or no trial serves), all
    are searched once more under the best. The stored d is raised by 1.033.

    Mind the gap: ggml's encoder does not step over 32 weights that are all zero in qs and signs (in qh and scales
    it does), so what follows them in the block moves up by a group and decodes to other weights. The bytes here
    are those that ggml writes.

    x       : [R, n] float32, finite
    imatrix : [R, n] float32, or None: each weight's error counts by its square
    return  : [R, n/256] IQ3_S records

    Rounds: every operation, to float32; d once more, to fp16.
    Raises: grids.Refused where ggml aborts.
    Source: ggml-quants.c quantize_row_iq3_s_impl, llama.cpp 0c1e570.
    """
    found = grid_search.search("iq3_s", x, imatrix)
    d, levels = grid_search.round_scales(found.scales, 16)
    living_first = found.dead[..., None].argsort(1, kind="stable")
    low = np.take_along_axis((found.numbers & 255).reshape(-1, 8, 8), living_first, 1)
    signs = np.take_along_axis(found.signs.reshape(-1, 8, 4), living_first, 1)
    blocks = np.zeros(len(d), IQ3_S.block)
    blocks["d"].view(np.uint16)[:] = encode_half(d * RAISED)
    blocks["qs"] = low.reshape(-1, 64)
    blocks["qh"] = np.packbits(found.numbers >> 8, axis=1, bitorder="little")
    blocks["signs"] = signs.reshape(-1, 32)
    blocks["scales"] = levels[:, ::2] | levels[:, 1::2] << 4
    return blocks.reshape(len(x), -1)
