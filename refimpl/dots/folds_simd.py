"""Sums of 16 lanes, many side by side, folded by halves as arith.sums.dot_lanes does."""

from refimpl.arith.simd import Lanes, inlined
from refimpl.arith.simd_lanes import permutation


def _halves(lanes: int, groups: int, high: int) -> list[int]:
    """The lower or upper half of each of so many groups of lanes."""
    return [g * lanes + high * lanes // 2 + k for g in range(groups) for k in range(lanes // 2)]


LOW_8, HIGH_8 = permutation(_halves(16, 4, 0)), permutation(_halves(16, 4, 1))
LOW_4, HIGH_4 = permutation(_halves(8, 4, 0)), permutation(_halves(8, 4, 1))
LOW_2, HIGH_2 = permutation(_halves(4, 4, 0)), permutation(_halves(4, 4, 1))
LOW_1, HIGH_1 = permutation(_halves(2, 4, 0)), permutation(_halves(2, 4, 1))

LOW_8S, HIGH_8S = permutation(_halves(16, 16, 0)), permutation(_halves(16, 16, 1))
LOW_4S, HIGH_4S = permutation(_halves(8, 16, 0)), permutation(_halves(8, 16, 1))
LOW_2S, HIGH_2S = permutation(_halves(4, 16, 0)), permutation(_halves(4, 16, 1))
LOW_1S, HIGH_1S = permutation(_halves(2, 16, 0)), permutation(_halves(2, 16, 1))


@inlined
def fold_four(sums: Lanes) -> Lanes:
    """Four sums of 16 lanes each: float32 [64] -> [4]."""
    sums = LOW_8(sums) + HIGH_8(sums)
    sums = LOW_4(sums) + HIGH_4(sums)
    sums = LOW_2(sums) + HIGH_2(sums)
    return LOW_1(sums) + HIGH_1(sums)


@inlined
def fold_sixteen(sums: Lanes) -> Lanes:
    """Sixteen sums of 16 lanes each: float32 [256] -> [16]."""
    sums = LOW_8S(sums) + HIGH_8S(sums)
    sums = LOW_4S(sums) + HIGH_4S(sums)
    sums = LOW_2S(sums) + HIGH_2S(sums)
    return LOW_1S(sums) + HIGH_1S(sums)
