"""Dot products of the codebook formats, in every order: points of a grid with signs, or (IQ1) with shifts.

w[i] = d * factor * scale * code;  scale = 2 * level + 1, code = sign * point;  of IQ1 code = 8 * point + shift

So all their sums are sums of integers, as those of other formats are. Where ggml adds the points of IQ1 and
their shifts of an eighth apart from each other, so is done here: point = (code + 4) >> 3, shift = code - 8 * point.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_half
from refimpl.arith.fma import fma
from refimpl.dots import avx2, tiled
from refimpl.dots.factors import EIGHTH, FACTORS, SHIFTED
from refimpl.dots.generic import add_blocks, add_product, multiply_codes
from refimpl.dots.planes import Activations, Planes
from refimpl.quants.formats import IQ1_M, IQ1_S, Format, find_reference
from refimpl.quants.grids import load_grid
from refimpl.quants.iq1_m import unpack_step

Floats = NDArray[Any]  # float32
Records = NDArray[Any]


def unpack(raw: NDArray[np.uint8], fmt: Format) -> Planes:
    """Take rows of blocks apart: raw [m, bytes] uint8 of a codebook format. Nothing is rounded."""
    blocks = raw.view(fmt.block).reshape(-1)
    numbers, signs, levels = find_reference(fmt).unpack(blocks)
    points = load_grid("iq1_s" if fmt.id in SHIFTED else fmt.name).points[numbers].reshape(len(blocks), 32, 8)
    if fmt.id in SHIFTED:
        minus = np.asarray(find_minus(blocks, fmt), np.bool_)
        codes = 8 * points + np.where(minus, -1, 1).repeat(32 // minus.shape[1], 1)[..., None]
    else:
        codes = np.where(np.unpackbits(signs[..., None], axis=2, bitorder="little"), -points, points)
    d = decode_half(unpack_step(blocks) if fmt is IQ1_M else blocks["d"].view(np.uint16))
    scales = (2 * levels + 1).repeat(16 // levels.shape[1], 1)
    none = np.empty((len(raw), 0))
    return Planes(
        codes.astype(np.int8).reshape(len(raw), -1), scales.astype(np.int16).reshape(len(raw), -1),
        none.astype(np.int16), d.reshape(len(raw), -1), none.astype(np.float32),
    )  # fmt: skip


def find_minus(blocks: Records, fmt: Format) -> NDArray[Any]:
    """Where the shift is minus an eighth: of IQ1_S [N, 8], of IQ1_M [N, 32]."""
    if fmt is IQ1_S:
        return np.asarray(blocks["qh"] & 0x8000)
    return np.stack([blocks["qh"] & 8, blocks["qh"] & 128], -1).reshape(-1, 32)


def multiply_generic(w: Planes, a: Activations, fmt: int, fused: bool, out: Floats) -> None:
    """The orders generic and generic-fma; as generic.multiply, but for the format's id.

    sum += (d * d') * total, in the end times the factor;  of IQ1 sum += (d * d') * (points + shifts / 8)

    Rounds: d*d'; its product with the total and the sum, fused or not. The rest is exact.
    """
    for t in range(len(out)):
        if fmt in SHIFTED:
            eighths = multiply_codes(w, a, t).sum(2).astype(np.float32) * EIGHTH
            out[t] = 0
            for b in range(w.d.shape[1]):
                out[t] = (fma if fused else add_product)(w.d[:, b] * a.d[t, b], eighths[:, b], out[t])
        else:
            out[t] = FACTORS[fmt] * add_blocks(w, a, t, fma if fused else add_product)


def multiply_avx2(w: Planes, a: Activations, fmt: int, out: Floats) -> None:
    """The order avx2: lanes as in avx2.add_plain, then times the factor.

    IQ1_S: sum = fma(1/8, shifts, lanes), where shifts = fma(d * d', total, shifts) over the blocks;
    IQ1_M: the same, but the shifts have 8 lanes of their own.

    Source: ggml-cpu/arch/x86/quants.c ggml_vec_dot_iq*, llama.cpp 0c1e570.
    """
    points = (w.codes + np.int8(4)) >> 3
    alone, shifts = w._replace(codes=points), w._replace(codes=w.codes - 8 * points)
    for t in range(len(out)):
        if fmt not in SHIFTED:
            out[t] = FACTORS[fmt] * avx2.add_plain(w, a, t)
        elif fmt == IQ1_M.id:
            out[t] = fma(EIGHTH, avx2.add_plain(shifts, a, t), avx2.add_plain(alone, a, t))
        else:
            out[t] = fma(EIGHTH, add_blocks(shifts, a, t, fma), avx2.add_plain(alone, a, t))


def multiply_tiled(w: Planes, a: Activations, fmt: int, out: Floats) -> None:
    """The order tiled: tiled.add_chain of the codes, under d times the factor."""
    for t in range(len(out)):
        out[t] = tiled.add_chain(w._replace(d=w.d * FACTORS[fmt]), a, t)
