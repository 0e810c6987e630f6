"""What the kernels of the codebook formats share: fields of a block, and one point decoded. See grids.py."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.quants.grids import Plan

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]


class Stored(NamedTuple):
    """What one block holds beside d: see grids.Stored. Written in place."""

    numbers: Integers  # [256 / width]
    signs: Bytes  # [32]
    levels: Bytes  # [256 / sub]


@jit
def make_stored(plan: Plan) -> Stored:
    """Room for one block."""
    numbers = np.zeros(256 // plan.width, np.int32)
    return Stored(numbers, np.zeros(32, np.uint8), np.zeros(256 // plan.sub, np.uint8))


@jit
def read_word(block: Bytes, at: int) -> Any:
    """Two bytes of a block, the lower first."""
    return int(block[at]) | int(block[at + 1]) << 8


@jit
def read_step(block: Bytes) -> Any:
    """d, the fp16 that a block begins with."""
    return decode_half(read_word(block, 0))


@jit
def complete_signs(seven: Any) -> Any:
    """Seven stored signs and the eighth, which makes the number of minus signs even."""
    odd = seven ^ seven >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return seven | (odd & 1) << 7


@jit
def write_point(points: Any, number: int, signs: int, step: Any, y: Floats) -> None:
    """y[i] = step * point[i], negated where bit i of signs is set. points : [G, n] int8; y : [n] float32."""
    for i in range(y.size):
        value = step * np.float32(points[number, i])
        y[i] = -value if signs >> i & 1 else value


@jit
def write_shifted(points: Any, number: int, shift: Any, step: Any, y: Floats) -> None:
    """y[i] = step * (point[i] + shift). points : [G, 8] int8; y : [8] float32."""
    for i in range(y.size):
        y[i] = step * (np.float32(points[number, i]) + shift)
