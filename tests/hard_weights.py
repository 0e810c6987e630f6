"""Weights and importance matrices that quantizers find hard, for tests that compare texts of one encoder."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def make_weights(size: int, seed: int = 1) -> dict[str, Floats]:
    """Named sets of `size` finite float32 weights; size is a multiple of 256."""
    rng = np.random.default_rng(seed)

    def gauss(scale: float = 1.0) -> NDArray[np.float64]:
        return rng.standard_normal(size) * scale

    signs, groups = rng.choice([-1.0, 1.0], size), size // 32
    few, spans = rng.random(size) < 0.02, 10.0 ** rng.uniform(-8, 0, (groups, 1))
    sets = {
        f"gauss {scale}": gauss(scale)
        for scale in (1, 0.02, 1e-5, 1e-7, 1e-20, 1e-30, 1e-42, 3e4, 1e15, 1e30)
    }
    sets |= {
        "heavy tails": rng.standard_t(1.2, size),
        "outliers": np.where(few, 100, 1) * gauss(),
        "zeros": np.zeros(size),
        "negative zeros": -np.zeros(size),
        "zeros of both signs": np.where(rng.random(size) < 0.5, -0.0, gauss()),
        "all equal": np.full(size, 0.3),
        "all equal, negative": np.full(size, -0.3),
        "blocks all equal": np.repeat(rng.standard_normal(groups) * 10.0 ** rng.uniform(-10, 3, groups), 32),
        "positive": abs(gauss()),
        "negative": -abs(gauss()),
        "ties": np.round(gauss() * 4),
        "two values": signs,
        "peaks of both signs": np.where(rng.random(size) < 0.3, signs, gauss(0.3)),
        "sparse": np.where(few, gauss(), 0),
        "scales far apart": (gauss().reshape(-1, 32) * spans).ravel(),
        "some groups zero": np.where(np.arange(size) // 32 % 3 == 0, 0, gauss()),
        "some groups tiny": np.where(np.arange(size) // 16 % 5 == 0, 1e-16, 1) * gauss(),
        "tiny spread below": gauss(1e-7) - 1,
        "tiny spread above": gauss(1e-7) + 1,
        "spread on a large offset": gauss(1e-3) - 1000,
        "one step apart": np.where(rng.random(size) < 0.5, -1, np.nextafter(np.float32(-1), np.float32(0))),
        "a few steps apart": move_steps(np.repeat(-(10.0 ** rng.uniform(-3, 5, groups)), 32), rng, 4),
        "mixed": mix(rng, groups),
        "mixed again": mix(rng, groups),
    }
    return {name: np.clip(values, -3e38, 3e38).astype(np.float32) for name, values in sets.items()}


def move_steps(values: NDArray[np.float64], rng: np.random.Generator, steps: int) -> Floats:
    """Move float32 numbers by up to `steps` of their last place."""
    bits = values.astype(np.float32).view(np.int32) + rng.integers(-steps, steps + 1, len(values), np.int32)
    return bits.view(np.float32)


def mix(rng: np.random.Generator, groups: int) -> NDArray[np.float64]:
    """Groups of 32 with spreads of 16 orders of magnitude, a third of them on an offset."""
    spread = rng.standard_normal((groups, 32)) * 10.0 ** rng.uniform(-12, 4, (groups, 1))
    offset = (rng.random((groups, 1)) < 0.3) * 10.0 ** rng.uniform(-6, 3, (groups, 1))
    return (spread + offset * rng.choice([-1, 1], (groups, 1))).ravel()


def make_importance(n: int, seed: int = 2) -> dict[str, Floats]:
    """Named importance rows of n entries; n is a multiple of 256."""
    rng = np.random.default_rng(seed)
    even, index = rng.uniform(0.1, 3, n), np.arange(n)
    rows = {
        "even": even,
        "zero": np.zeros(n),
        "zero in some groups": np.where(index // 32 % 3 == 0, 0, even),
        "zero in some blocks": np.where(index // 256 % 2 == 0, 0, even),
        "zero here and there": np.where(rng.random(n) < 0.5, 0, even),
        "of all sizes": 10.0 ** rng.uniform(-20, 10, n),
        "tiny": even * 1e-40,
        "huge": even * 1e37,
    }
    return {name: row.astype(np.float32) for name, row in rows.items()}


def draw_cases(rows: int, n: int, seed: int = 1) -> Iterator[tuple[str, Floats, Floats]]:
    """(name, x [rows, n], imatrix [0 or 2, n]): every set without an imatrix, and with every kind of one."""
    importance = list(make_importance(n, seed + 1).items())
    pairs = list(zip(importance, importance[1:] + importance[:1], strict=True))
    for name, values in make_weights(rows * n, seed).items():
        x = values.reshape(rows, n)
        yield name, x, np.empty((0, n), np.float32)
        for (first, a), (second, b) in pairs:
            yield f"{name}; importance {first}, {second}", x, np.stack([a, b])
