"""Weights and imatrix rows of every kind that a quantizer meets, ordinary and hostile, as float32 arrays."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from refimpl.quants.formats import formats

Floats = NDArray[np.float32]
SUB = 16  # the smallest group that any format scales on its own


def gaussian(rng: Generator, rows: int, n: int, scale: float = 1.0) -> Floats:
    return (rng.standard_normal((rows, n)) * scale).astype(np.float32)


def all_equal(rng: Generator, rows: int, n: int) -> Floats:
    return np.repeat(gaussian(rng, rows, 1), n, 1)


def zero_groups(rng: Generator, rows: int, n: int) -> Floats:
    x = gaussian(rng, rows, n)
    x.reshape(-1, SUB)[rng.random(x.size // SUB) < 0.4] = 0
    x.reshape(-1, 32)[rng.random(x.size // 32) < 0.2] = 0
    return x


def outliers(rng: Generator, rows: int, n: int) -> Floats:
    x = gaussian(rng, rows, n, 0.02)
    x[rng.random(x.shape) < 0.01] *= 1000
    return x


def ties(rng: Generator, rows: int, n: int) -> Floats:
    """Multiples of a half under a step that is a power of two: quotients end in .5 exactly, often."""
    x = (rng.integers(-32, 33, (rows, n)) / 2).astype(np.float32)
    x.reshape(-1, SUB)[:, 0] = -16
    x.reshape(-1, 32)[::3, 1] = -127
    return x


def mixed_scales(rng: Generator, rows: int, n: int) -> Floats:
    """Neighbouring groups that differ by up to 16 orders of magnitude, some around an offset."""
    groups = rows * n // SUB
    x = rng.standard_normal((groups, SUB)) * 10.0 ** rng.uniform(-12, 4, (groups, 1))
    x += (rng.random((groups, 1)) < 0.3) * 10.0 ** rng.uniform(-6, 3, (groups, 1))
    return x.reshape(rows, n).astype(np.float32)


def any_scale(rng: Generator, rows: int, n: int) -> Floats:
    """Groups of every magnitude that float32 has."""
    groups = rows * n // SUB
    x = rng.standard_normal((groups, SUB)) * 10.0 ** rng.uniform(-45, 37.5, (groups, 1))
    return x.reshape(rows, n).astype(np.float32)


def any_bits(rng: Generator, rows: int, n: int) -> Floats:
    """Random bit patterns; where they would be NaN or infinite, the exponent's lowest bit is cleared."""
    bits = rng.integers(0, 2**32, (rows, n), dtype=np.uint32)
    return np.where(bits & 0x7F800000 == 0x7F800000, bits & 0xFF7FFFFF, bits).view(np.float32)


def negative_zeros(rng: Generator, rows: int, n: int) -> Floats:
    x = gaussian(rng, rows, n)
    x[rng.random(x.shape) < 0.3] = -0.0
    x.reshape(-1, 32)[::2] = -0.0
    return x


KINDS: dict[str, Callable[[Generator, int, int], Floats]] = {
    "gaussian": gaussian,
    "heavy-tailed": lambda rng, rows, n: rng.standard_t(2, (rows, n)).astype(np.float32),
    "outliers": outliers,
    "all-equal": all_equal,
    "all-positive": lambda rng, rows, n: np.abs(gaussian(rng, rows, n)),
    "all-negative": lambda rng, rows, n: -np.abs(gaussian(rng, rows, n)),
    "zeros": lambda rng, rows, n: np.zeros((rows, n), np.float32),
    "zero-groups": zero_groups,
    "subnormal": lambda rng, rows, n: gaussian(rng, rows, n, 1e-40),
    "edge-of-subnormal": lambda rng, rows, n: gaussian(rng, rows, n, 3e-38),
    "tiny": lambda rng, rows, n: gaussian(rng, rows, n, 1e-30),
    "near-epsilon": lambda rng, rows, n: gaussian(rng, rows, n, 1e-15),
    "small": lambda rng, rows, n: gaussian(rng, rows, n, 1e-7),
    "huge": lambda rng, rows, n: gaussian(rng, rows, n, 1e30),
    "largest": lambda rng, rows, n: gaussian(rng, rows, n, 5e37),
    "negative-zeros": negative_zeros,
    "ties": ties,
    "two-values": lambda rng, rows, n: rng.choice(np.float32([-1, 1]), (rows, n)),
    "around-minus-one": lambda rng, rows, n: gaussian(rng, rows, n, 1e-7) - np.float32(1),
    "around-one": lambda rng, rows, n: gaussian(rng, rows, n, 1e-7) + np.float32(1),
    "sparse": lambda rng, rows, n: gaussian(rng, rows, n) * (rng.random((rows, n)) < 0.02).astype(np.float32),
    "bf16": lambda rng, rows, n: (gaussian(rng, rows, n).view(np.uint32) & 0xFFFF0000).view(np.float32),
    "mixed-scales": mixed_scales,
    "any-scale": any_scale,
    "any-bits": any_bits,
}

IMPORTANCES: dict[str, Callable[[Generator, int], Floats | None]] = {
    "none": lambda rng, n: None,
    "uniform": lambda rng, n: rng.uniform(0.1, 3, n).astype(np.float32),
    "ones": lambda rng, n: np.ones(n, np.float32),
    "zero": lambda rng, n: np.zeros(n, np.float32),
    "partly-zero": lambda rng, n: (rng.uniform(0.1, 3, n) * (rng.random(n) < 0.5)).astype(np.float32),
    "zero-groups": lambda rng, n: np.repeat(rng.random(n // SUB) < 0.5, SUB).astype(np.float32),
    "wide": lambda rng, n: (10.0 ** rng.uniform(-30, 30, n)).astype(np.float32),
    "heavy-tailed": lambda rng, n: (rng.standard_t(1, n) ** 2).astype(np.float32),
    "subnormal": lambda rng, n: (rng.random(n) * 1e-40).astype(np.float32),
}


def make_weights(kind: str, rng: Generator, rows: int, n: int) -> Floats:
    """Weights of one kind: [rows, n] float32, finite."""
    x = np.ascontiguousarray(KINDS[kind](rng, rows, n), np.float32)
    x[~np.isfinite(x)] = np.float32(3e38)
    return x


def make_importance(kind: str, rng: Generator, n: int) -> Floats | None:
    """One imatrix row of one kind: [n] float32, finite and not negative; None for `none`."""
    return IMPORTANCES[kind](rng, n)


def least_importance(fmt: str, n: int) -> Floats | None:
    """No imatrix, or ones [n] where the format does not go without."""
    return np.ones(n, np.float32) if formats[fmt].needy else None
