"""IQ4_NL on explicit vectors: the bytes of iq4_nl_jit for every input. 64 blocks are searched together."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import Build
from refimpl.arith.jit import jit
from refimpl.arith.simd import inlined
from refimpl.arith.simd_lanes import decode_half, encode_half, first, reinterpret
from refimpl.arith.simd_memory import fence, get, load, prefetch, stack, store
from refimpl.quants import fallback_simd
from refimpl.quants.formats import IQ4_NL
from refimpl.quants.iq4_simd import (
    decode,
    pack_codes,
    search,
    spread_squares,
    sum_squares,
    weigh_by_imatrix,
    weigh_plain,
)
from refimpl.quants.q5_0_simd import lay_out
from refimpl.quants.scale_simd import BOTH, TILES, ScaleSearch, allocate
from refimpl.quants.search_simd import ONE, ZERO, gather, is_streamed, put_weights

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BYTES, QS = IQ4_NL.block.itemsize, IQ4_NL.offset("qs")
LEAST = TILES  # weights
SHARE = np.float32(2 / 32)


def quantize(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode rows of weights: the bytes of iq4_nl_jit.quantize.

    x       : [R, n] float32, finite
    imatrix : [E, n] float32; row r is weighed by imatrix[r // rows_per_expert]; E = 0: none
    out     : [R, n/32*18] uint8, written
    """
    if x.size < LEAST:
        more, importance = fallback_simd.repeat_rows(x, imatrix, rows_per_expert, LEAST)
        raw = np.empty((len(more), out.shape[1]), np.uint8)
        encode(more, importance, 1, raw, build)
        out[:] = raw[: len(x)]
    else:
        encode(x, imatrix, rows_per_expert, out, build)


@jit
def encode(x: Floats, imatrix: Floats, rows_per_expert: int, out: Bytes, build: Build) -> None:
    """Encode 64 or more blocks, 64 at a time; where the last of them are not whole, they reach back."""
    s = allocate()
    wanted = stack(np.float32, TILES)
    subs, per_row = x.size // 32, x.shape[1] // 32
    weighed = imatrix.shape[0] > 0
    squares = np.empty(x.size // 32 if weighed else 0, np.float32)
    if weighed:
        sum_squares(x, 32, squares, build)
    for start in range(0, subs, BOTH):
        sub = min(start, subs - BOTH)
        lay_out(x, sub * 32, s.values)
        if weighed:
            gather(imatrix, rows_per_expert, per_row, sub, BOTH, 32, wanted)
            lay_out(wanted, 0, s.importance)
            spread_squares(s, squares, sub, 1, SHARE)
            weigh_by_imatrix(s, build)
        else:
            weigh_plain(s)
        search(s, build)
        for lane in range(0, BOTH, 1):
            write(x, sub + lane, s, lane, out)


@inlined
def write(x: Floats, block: int, s: ScaleSearch, lane: int, out: Bytes) -> None:
    """A block's bytes: the scale, and codes under it before it is fp16."""
    scale = get(s.scale, lane)
    store(out, block * BYTES, reinterpret(encode_half(load(s.scale, lane, 1)), np.uint8))
    store(out, block * BYTES + QS, pack_codes(x, block * 32, ONE / scale if scale != ZERO else ZERO))


@jit
def dequantize(raw: Bytes, out: Floats) -> None:
    """Decode rows: raw [R, n/32*18] uint8 -> out [R, n] float32: w = d * IQ4[code]."""
    streamed = is_streamed(out)
    for block in range(raw.size // BYTES):
        at = block * BYTES
        prefetch(raw, at + 4096)
        d = first(decode_half(reinterpret(load(raw, at, 2), np.uint16)))
        put_weights(out, block * 32, d * decode(load(raw, at + QS, 16)), streamed)
    fence()
