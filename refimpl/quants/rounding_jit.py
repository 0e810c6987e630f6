"""Count codes that are not the encoder's under the stored scales: the twin of rounding.py."""

from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.quants import q4_k_jit, q5_0_jit, q6_k_jit, q8_0_jit
from refimpl.quants.formats import Q4_K, Q5_0, Q6_K, Q8_0
from refimpl.quants.search_jit import TENTH, ZERO, find_peak, round_code

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]

QS4, QS8 = Q4_K.offset("qs"), Q8_0.offset("qs")
ONE, SIXTEEN = np.float32(1), np.float32(16)
TIE = np.float32(0.5 + 2**-18)


@jit
def check_q8_0(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [34] uint8; x : [32] float32; return : codes off, largest distance."""
    off, far = 0, 0
    _, inverse = q8_0_jit.choose_step(x)
    for i in range(x.size):
        stored, code = int(block[QS8 + i]), q8_0_jit.round_code(x[i], inverse)
        distance = abs(stored - (stored & 128) * 2 - (code - (code & 128) * 2))
        off += distance != 0
        far = max(far, distance)
    return off, far


@jit
def check_q4_k(block: Bytes, x: Floats) -> Any:
    """Check one block. block : [144] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far = 0, 0
    for j in range(q4_k_jit.SUBS):
        step, offset = q4_k_jit.scale_sub(block, j)
        if step == ZERO:
            continue
        for i in range(q4_k_jit.SUB):
            code = round_code((x[j * q4_k_jit.SUB + i] + offset) / step, 0, 15)
            stored = int(block[QS4 + j // 2 * q4_k_jit.SUB + i]) >> j % 2 * 4 & 15
            distance = abs(stored - code)
            off += distance != 0
            far = max(far, distance)
    return off, far


@jit
def check_q6_k(block: Bytes, x: Floats, codes: Bytes) -> Any:
    """Check one block. block : [210] uint8; x : [256] float32; return : codes off, largest distance."""
    off, far = 0, 0
    q6_k_jit.unpack_codes(block, codes)
    for j in range(q6_k_jit.SUBS):
        step = q6_k_jit.scale_sub(block, j)
        if step == ZERO:
            continue
        for i in range(j * q6_k_jit.SUB, (j + 1) * q6_k_jit.SUB):
            distance = abs(int(codes[i]) - round_code(x[i] / step, -32, 31) - 32)
            off += distance != 0
            far = max(far, distance)
    return off, far


@jit
def count_apart(stored: Bytes, codes: Bytes, inverse: Any, x: Floats) -> Any:
    """Compare the 32 codes of a Q5_0 block, ties aside; return : codes off, largest distance."""
    off, far = 0, 0
    for i in range(q5_0_jit.WEIGHTS):
        code = np.int64(stored[i])  # bytes alone would wrap
        if abs(inverse * x[i] - np.float32(code - 16)) <= TIE:
            continue
        distance = abs(int(code - np.int64(codes[i])))
        off += distance != 0
        far = max(far, distance)
    return off, far


@jit
def check_q5_0(block: Bytes, x: Floats, stored: Bytes, codes: Bytes) -> Any:
    """Check one block against the plain rule and 19 trial scales: fewest off, then least far, counts."""
    if decode_half(int(block[0]) | int(block[1]) << 8) == ZERO:
        return 0, 0
    q5_0_jit.unpack_codes(block, stored)
    d = q5_0_jit.round_plain(x, codes)
    off, far = count_apart(stored, codes, ONE / d if d != ZERO else ZERO, x)
    peak = find_peak(x)
    for k in range(-9, 10):
        if off == 0:
            break
        inverse = -(SIXTEEN + TENTH * np.float32(k)) / peak
        for i in range(q5_0_jit.WEIGHTS):
            codes[i] = round_code(inverse * x[i], -16, 15) + 16
        new_off, new_far = count_apart(stored, codes, inverse, x)
        if new_off < off or (new_off == off and new_far < far):
            off, far = new_off, new_far
    return off, far


@jit
def check_q8_0_rows(raw: Bytes, x: Floats, off: Words, far: Bytes) -> None:
    """Check rows of Q8_0 blocks; see nearest."""
    size, weights = q8_0_jit.BYTES, q8_0_jit.WEIGHTS
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * size : (b + 1) * size], x[r, b * weights : (b + 1) * weights]
            off[r, b], far[r, b] = check_q8_0(block, group)


@jit
def check_q5_0_rows(raw: Bytes, x: Floats, off: Words, far: Bytes) -> None:
    """Check rows of Q5_0 blocks; see nearest."""
    size, weights = q5_0_jit.BYTES, q5_0_jit.WEIGHTS
    stored, codes = np.empty(weights, np.uint8), np.empty(weights, np.uint8)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * size : (b + 1) * size], x[r, b * weights : (b + 1) * weights]
            off[r, b], far[r, b] = check_q5_0(block, group, stored, codes)


@jit
def check_q4_k_rows(raw: Bytes, x: Floats, off: Words, far: Bytes) -> None:
    """Check rows of Q4_K blocks; see nearest."""
    size, weights = q4_k_jit.BYTES, q4_k_jit.WEIGHTS
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * size : (b + 1) * size], x[r, b * weights : (b + 1) * weights]
            off[r, b], far[r, b] = check_q4_k(block, group)


@jit
def check_q6_k_rows(raw: Bytes, x: Floats, off: Words, far: Bytes) -> None:
    """Check rows of Q6_K blocks; see nearest."""
    size, weights = q6_k_jit.BYTES, q6_k_jit.WEIGHTS
    codes = np.empty(weights, np.uint8)
    for r in range(off.shape[0]):
        for b in range(off.shape[1]):
            block, group = raw[r, b * size : (b + 1) * size], x[r, b * weights : (b + 1) * weights]
            off[r, b], far[r, b] = check_q6_k(block, group, codes)


CHECKS = MappingProxyType(
    {Q8_0.id: check_q8_0_rows, Q5_0.id: check_q5_0_rows, Q4_K.id: check_q4_k_rows, Q6_K.id: check_q6_k_rows}
)


def nearest(raw: Bytes, id: int, weights: int, x: Floats, off: Words, far: Bytes) -> None:
    """Count, in every block, the codes that are not the encoder's under the stored scales.

    One kernel per format, so that only those in use are compiled.

    raw : [R, bytes] uint8; id and weights are the format's
    x   : [R, n] float32, finite
    off : [R, NB] uint16, written: how many
    far : [R, NB] uint8, written: the largest distance in code steps
    """
    CHECKS[id](raw, x, off, far)
