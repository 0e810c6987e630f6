"""The codebooks of IQ1, IQ2 and IQ3: which groups of codes exist, and which of them lie near those that do not.

A block of these formats stores no code per weight but, for each group of 4 or 8 weights, the number of a point:
one of a few hundred groups of codes that someone chose once. The package gguf ships the points as data; the
neighbours that the encoders search are derived from them here, as ggml derives them.
"""

from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# How many distances from a missing group count as near; ggml's nwant.
NEAR = MappingProxyType({"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3, "iq1_s": 3})


# What a second search does: only points that had to move; all, where any had to; all, always.
MOVED, ANY, ALL = 0, 1, 2

LARGEST = np.float32(np.finfo(np.float32).max)


class Refused(ValueError):
    """ggml aborts on this block: its error sums overflow, or its scale is NaN. Blocks are counted over all rows."""

    def __init__(self, block: int) -> None:
        self.block = block
        super().__init__(f"block {block}: weights so large, times their importance, that no point fits")


def refuse(block: int) -> None:
    """Raise Refused for this block; -1: none."""
    if block >= 0:
        raise Refused(block)


class Plan(NamedTuple):
    """How ggml searches the scale and the points of one of the IQ2 and IQ3 formats."""

    sub: int  # weights that share a scale
    width: int  # weights of a point
    levels: int  # codes 0..levels-1 stand for 1, 3, 5...
    even: bool  # has each eight an even number of minus signs?
    times: int  # a weight counts importance * sqrt(times * mean square of the block + x^2)
    quarter: bool  # without an imatrix: mean / 4 + x^2 instead of x^2
    epsilon: np.float32  # a group whose peak lies below this is zero
    free: bool  # does a search without the grid find the first scale, instead of the peak?
    steps: int  # trial scales to either side of it
    step: np.float32  # from one to the next, in the inverse
    again: int  # MOVED, ANY or ALL


_F = np.float32
PLANS = MappingProxyType(
    {
        "iq2_xxs": Plan(32, 8, 3, True, 1, False, _F(1e-15), True, 6, _F(0.1), ALL),
        "iq2_xs": Plan(16, 8, 3, True, 1, False, _F(1e-15), False, 9, _F(0.1), MOVED),
        "iq2_s": Plan(16, 8, 3, False, 2, True, _F(1e-8), False, 9, _F(0.1), MOVED),
        "iq3_xxs": Plan(32, 4, 8, True, 2, False, _F(1e-8), False, 15, _F(0.2), MOVED),
        "iq3_s": Plan(32, 4, 8, False, 2, False, _F(2.0**-149), False, 9, _F(0.2), ANY),  # only 0 lies below
    }
)


class Grid(NamedTuple):
    """The points of one codebook. IQ1_M uses that of IQ1_S."""

    codes: Bytes  # [G, n] uint8 in 0..levels-1: n is 4 or 8 weights
    points: NDArray[np.int8]  # [G, n] int8: what the codes stand for


class Neighbours(NamedTuple):
    """For every group of codes, read as digits of a number to the base `levels`, the points near it."""

    number: NDArray[np.int32]  # [levels^n]: the point with these codes, or -1
    start: NDArray[np.int32]  # [levels^n + 1]: where in `near` the neighbours of a missing group begin
    near: NDArray[np.int32]  # numbers of points, those of one group by distance, then by number


class Stored(NamedTuple):
    """What N blocks of a codebook format hold beside d."""

    numbers: NDArray[np.int32]  # [N, 256 / width]: of the points
    signs: Bytes  # [N, 32]: a set bit is a minus (IQ1: all 0)
    levels: NDArray[np.int32]  # [N, 256 / sub]: codes of the scales


@cache
def load_grid(name: str) -> Grid:
    """The points of a format, in the order of their numbers."""
    from gguf import quants

    kind = getattr(quants, name.upper())
    kind.init_grid()
    points = kind.grid.reshape(kind.grid_shape).astype(np.int8)
    return Grid(np.searchsorted(kind.grid_map, points).astype(np.uint8), points)


@cache
def find_neighbours(name: str) -> Neighbours:
    """Derive the neighbours of every missing group: the points at its NEAR smallest distances, all of them.

    distance = sum over the group of (2 a - 2 b)^2, a and b the codes: in the levels 1, 3, 5... of the encoder

    Source: ggml-quants.c iq2xs_init_impl and iq3xs_init_impl, llama.cpp 0c1e570: they sort by distance, then
    by number. Groups with a code that no encoder gives are left out.
    """
    codes = load_grid(name).codes.astype(np.int32)
    levels, n = int(codes.max()) + 1, codes.shape[1]
    powers = levels ** np.arange(n)
    number = np.full(levels**n, -1, np.int32)
    number[codes @ powers] = np.arange(len(codes))
    missing = np.flatnonzero(number < 0)
    groups = missing[:, None] // powers % levels
    squares = (groups**2).sum(1)[:, None] + (codes**2).sum(1)
    apart = squares - 2 * (groups.astype(np.float32) @ codes.T.astype(np.float32)).astype(np.int32)
    furthest = np.full((len(missing), 1), -1, np.int32)
    for _ in range(NEAR[name]):
        furthest = np.where(apart > furthest, apart, np.int32(2**30)).min(1, keepdims=True)
    row, point = np.nonzero(apart <= furthest)
    near = point[np.lexsort((point, apart[row, point], row))].astype(np.int32)
    counts = np.zeros(levels**n, np.int64)
    counts[missing] = np.bincount(row, minlength=len(missing))
    return Neighbours(number, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), near)


@cache
def find_reach(name: str) -> NDArray[np.int32]:
    """How far the neighbours of every group lie: a point is one of them where its distance is not larger.

    return : [levels^n] int32, the largest sum of (a - b)^2 over the group, a and b the codes; 0 for a point
    """
    codes, table = load_grid(name).codes.astype(np.int32), find_neighbours(name)
    levels, n = int(codes.max()) + 1, codes.shape[1]
    reach = np.zeros(levels**n, np.int32)
    missing = np.flatnonzero(table.number < 0)
    furthest = codes[table.near[table.start[missing + 1] - 1]]
    reach[missing] = ((missing[:, None] // levels ** np.arange(n) % levels - furthest) ** 2).sum(1)
    return reach


def complete_signs(seven: NDArray[Any]) -> Bytes:
    """Seven stored signs and the eighth, which makes the number of minus signs even. [...] in 0..127 -> uint8."""
    bits = seven.astype(np.uint8)
    odd = bits ^ bits >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return np.asarray(bits | (odd & 1) << 7, np.uint8)


def unpack_signs(signs: NDArray[Any]) -> NDArray[np.float32]:
    """Eight weights' signs from a byte, lowest bit first: 1 stands for minus. [...] uint8 -> [..., 8] float32."""
    return np.float32(1) - 2 * np.unpackbits(signs[..., None], axis=-1, bitorder="little").astype(np.float32)
