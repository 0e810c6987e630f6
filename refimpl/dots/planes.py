"""What rows of blocks and of activations say, taken apart into planes: codes, scales, mins, and the floats.

A dot product multiplies and adds integers exactly and rounds floats in a named order (orders.py). Here every format
gives up its packing, so that the orders need not know it.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import decode_e8m0_half, decode_half, decode_ue4m3
from refimpl.quants import fp4, iq4
from refimpl.quants import iq4_xs as iq4xs
from refimpl.quants import q1_0 as q10
from refimpl.quants import q2_0 as q20
from refimpl.quants import q2_k as q2k
from refimpl.quants import q3_k as q3k
from refimpl.quants import q4_0 as q40
from refimpl.quants import q4_k as q4k
from refimpl.quants import q5_0 as q50
from refimpl.quants import q5_k as q5k
from refimpl.quants import q6_k as q6k
from refimpl.quants import tq1_0 as tq1
from refimpl.quants import tq2_0 as tq2
from refimpl.quants.formats import Format
from refimpl.quants.levels import FP4_VALUES, IQ4_VALUES

Records = NDArray[Any]
GROUP = 16  # codes under one scale; a sub-block of 32 says its scale twice


class Planes(NamedTuple):
    """m rows of weights, each of them of n weights in n/size blocks.

    w[i] = d * scale * code - dmin * min, with what the format lacks left out; q4_1 and q5_1 add dmin
    """

    codes: NDArray[np.int8]  # [m, n] signed
    scales: NDArray[np.int16]  # [m, n/16], or [m, 0]
    mins: NDArray[np.int16]  # [m, n/16], or [m, 0]
    d: NDArray[np.float32]  # [m, n/size]; of nvfp4 [m, n/16]
    dmin: NDArray[np.float32]  # [m, n/size], or [m, 0]


class Activations(NamedTuple):
    """t tokens of n activations each: x[i] = d * code."""

    codes: NDArray[np.int8]  # [t, n]
    d: NDArray[np.float32]  # [t, n/size]
    s: NDArray[np.float32]  # [t, n/32] of q8_1: d times the sum of a block's codes; [t, 0]
    bsums: NDArray[np.int16]  # [t, n/16] of q8_k: sums of 16 codes; [t, 0]


def unpack_q8_0(blocks: Records) -> tuple[Any, ...]:
    """Take Q8_0 apart: the codes are what is stored."""
    return blocks["qs"], None, None, _halves(blocks["d"]), None


def unpack_q5_0(blocks: Records) -> tuple[Any, ...]:
    """Take Q5_0 apart: codes around 0."""
    return q50.unpack_codes(blocks) - 16, None, None, _halves(blocks["d"]), None


def unpack_q4_0(blocks: Records) -> tuple[Any, ...]:
    """Take Q4_0 apart: codes around 0."""
    return q40.unpack_codes(blocks["qs"]) - 8, None, None, _halves(blocks["d"]), None


def unpack_q4_1(blocks: Records) -> tuple[Any, ...]:
    """Take Q4_1 apart: dmin stands for its m, which is added."""
    return q40.unpack_codes(blocks["qs"]), None, None, _halves(blocks["d"]), _halves(blocks["m"])


def unpack_q5_1(blocks: Records) -> tuple[Any, ...]:
    """Take Q5_1 apart: dmin stands for its m, which is added."""
    return q50.unpack_codes(blocks), None, None, _halves(blocks["d"]), _halves(blocks["m"])


def unpack_q2_k(blocks: Records) -> tuple[Any, ...]:
    """Take Q2_K apart: 16 scales and mins."""
    scales, codes = blocks["scales"], q2k.unpack_pairs(blocks["qs"])
    return codes, scales & 15, scales >> 4, _halves(blocks["d"]), _halves(blocks["dmin"])


def unpack_q3_k(blocks: Records) -> tuple[Any, ...]:
    """Take Q3_K apart: codes around 0, 16 signed scales."""
    scales = q3k.unpack_scales(blocks["scales"])
    return q3k.unpack_codes(blocks) - 4, scales, None, _halves(blocks["d"]), None


def unpack_q5_k(blocks: Records) -> tuple[Any, ...]:
    """Take Q5_K apart: 8 scales and mins, each for two groups."""
    scales, mins = (v.repeat(2, 1) for v in q4k.unpack_scales(blocks["scales"]))
    return q5k.unpack_codes(blocks), scales, mins, _halves(blocks["d"]), _halves(blocks["dmin"])


def unpack_iq4_nl(blocks: Records) -> tuple[Any, ...]:
    """Take IQ4_NL apart: the levels that its codes stand for."""
    return IQ4_VALUES[iq4.unpack_codes(blocks["qs"])], None, None, _halves(blocks["d"]), None


def unpack_iq4_xs(blocks: Records) -> tuple[Any, ...]:
    """Take IQ4_XS apart: levels, and 8 signed scales, each for two groups."""
    scales = iq4xs.unpack_scales(blocks).repeat(2, 1)
    return IQ4_VALUES[iq4.unpack_codes(blocks["qs"])], scales, None, _halves(blocks["d"]), None


def unpack_mxfp4(blocks: Records) -> tuple[Any, ...]:
    """Take MXFP4 apart: doubled levels under halved steps."""
    return FP4_VALUES[fp4.unpack_codes(blocks["qs"])], None, None, decode_e8m0_half(blocks["e"]), None


def unpack_nvfp4(blocks: Records) -> tuple[Any, ...]:
    """Take NVFP4 apart: doubled levels under halved steps, one for 16 weights."""
    codes = fp4.unpack_codes(blocks["qs"].reshape(-1, 8))
    return FP4_VALUES[codes], None, None, decode_ue4m3(blocks["d"]), None


def unpack_tq1_0(blocks: Records) -> tuple[Any, ...]:
    """Take TQ1_0 apart: -1, 0 and 1."""
    return tq1.unpack_codes(blocks) - 1, None, None, _halves(blocks["d"]), None


def unpack_tq2_0(blocks: Records) -> tuple[Any, ...]:
    """Take TQ2_0 apart: -1, 0 and 1; and 2, which no encoder writes."""
    return tq2.unpack_codes(blocks) - 1, None, None, _halves(blocks["d"]), None


def unpack_q1_0(blocks: Records) -> tuple[Any, ...]:
    """Take Q1_0 apart: 1 and -1."""
    return q10.unpack_codes(blocks).astype(np.int8) * 2 - 1, None, None, _halves(blocks["d"]), None


def unpack_q2_0(blocks: Records) -> tuple[Any, ...]:
    """Take Q2_0 apart: -1 to 2."""
    return q20.unpack_codes(blocks) - 1, None, None, _halves(blocks["d"]), None


def unpack_q4_k(blocks: Records) -> tuple[Any, ...]:
    """Take Q4_K apart: 8 scales and mins, each for two groups."""
    scales, mins = q4k.unpack_scales(blocks["scales"])
    codes = q4k.unpack_codes(blocks["qs"])
    return (
        codes,
        scales.repeat(2, 1),
        mins.repeat(2, 1),
        _halves(blocks["d"]),
        _halves(blocks["dmin"]),
    )


def unpack_q6_k(blocks: Records) -> tuple[Any, ...]:
    """Take Q6_K apart: codes around 0, 16 signed scales."""
    return q6k.unpack_codes(blocks) - 32, blocks["scales"], None, _halves(blocks["d"]), None


# Each takes [N] records and gives codes [N, size], scales [N, size/16] or None, mins the same, d [N], dmin [N] or None.
UNPACK: MappingProxyType[str, Callable[[Records], tuple[Any, ...]]] = MappingProxyType(
    {
        "q8_0": unpack_q8_0,
        "q4_0": unpack_q4_0,
        "q4_1": unpack_q4_1,
        "q5_0": unpack_q5_0,
        "q5_1": unpack_q5_1,
        "q2_k": unpack_q2_k,
        "q3_k": unpack_q3_k,
        "q4_k": unpack_q4_k,
        "q5_k": unpack_q5_k,
        "q6_k": unpack_q6_k,
        "iq4_nl": unpack_iq4_nl,
        "iq4_xs": unpack_iq4_xs,
        "mxfp4": unpack_mxfp4,
        "nvfp4": unpack_nvfp4,
        "tq1_0": unpack_tq1_0,
        "tq2_0": unpack_tq2_0,
        "q1_0": unpack_q1_0,
        "q2_0": unpack_q2_0,
    }
)


def unpack(raw: NDArray[np.uint8], fmt: Format) -> Planes:
    """Take rows of blocks apart.

    raw    : [m, bytes] uint8
    return : their planes; nothing is rounded
    """
    dtypes = (np.int8, np.int16, np.int16, np.float32, np.float32)
    fields = UNPACK[fmt.name](raw.view(fmt.block).reshape(-1))
    return Planes(*(_plane(f, len(raw), dtype) for f, dtype in zip(fields, dtypes, strict=True)))


def split(raw: NDArray[np.uint8], fmt: Format) -> Activations:
    """Take rows of activation blocks apart: raw [t, bytes] uint8 of q8_0, q8_1 or q8_k."""
    blocks = raw.view(fmt.block)
    d = blocks["d"] if fmt.name == "q8_k" else _halves(blocks["d"])
    s = _halves(blocks["s"]) if fmt.name == "q8_1" else None
    bsums = blocks["bsums"] if fmt.name == "q8_k" else None
    fields = zip((blocks["qs"], d, s, bsums), (np.int8, np.float32, np.float32, np.int16), strict=True)
    return Activations(*(_plane(f, len(raw), dtype) for f, dtype in fields))


def _plane(field: Any, rows: int, dtype: Any) -> NDArray[Any]:
    return (
        np.empty((rows, 0), dtype) if field is None else np.ascontiguousarray(field, dtype).reshape(rows, -1)
    )


def _halves(bits: NDArray[Any]) -> NDArray[np.float32]:
    return decode_half(np.ascontiguousarray(bits).view(np.uint16))
