"""Weights and activations for dot products: random ones, and blocks at every edge that a format has."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl import dots, quants
from refimpl.quants.formats import CODEBOOKS, IQ1_M, activations, find_codec

Array = np.ndarray[Any, Any]
STEPS = {"subnormal": 5e-8, "smallest normal": 6.2e-5, "usual": 0.0173, "largest": 65504.0, "negative": -0.31}
FILLS = {"all bits clear": 0, "all bits set": 255, "largest signed": 0x7F, "smallest signed": 0x80}


def draw_tokens(rng: np.random.Generator, tokens: int, n: int) -> Array:
    """Activations with an outlier now and then, as models have them."""
    x = rng.standard_normal((tokens, n)) * 10.0 ** rng.uniform(-2, 1, (tokens, 1))
    return np.where(rng.random(x.shape) < 0.002, x * 50, x).astype(np.float32)


def draw_weights(rng: np.random.Generator, fmt: str, rows: int, n: int) -> Array:
    """Blocks as an encoder writes them, of codebooks any with steps of such a size: [rows, bytes] uint8."""
    if find_codec(fmt) in CODEBOOKS:  # whose encoders take seconds
        raw = rng.integers(0, 256, (rows, find_codec(fmt).row_bytes(n)), np.uint8)
        set_steps(raw, fmt, rng.uniform(0.001, 0.01, (rows, n // 256)))
        return raw
    return quants.quantize((rng.standard_normal((rows, n)) * 0.02).astype(np.float32), fmt)


def set_steps(raw: Array, fmt: str, value: Any) -> None:
    """Write every fp16 step of the blocks."""
    kind = find_codec(fmt)
    if kind is IQ1_M:  # whose d is the upper four bits of four words
        words = raw.view(kind.block)["scales"]
        halves = np.asarray(value, np.float16).view(np.uint16)[..., None] >> np.arange(0, 16, 4)
        words[:] = words & 0x0FFF | (halves & 15) << 12
    for name in ("d", "dmin", "m"):
        if name in (kind.block.names or ()) and kind.block[name] == np.dtype("<f2"):
            raw.view(kind.block)[name] = value


def draw_edges(fmt: str, rows: int = 3) -> Iterator[tuple[str, Array, Array]]:
    """What it is, blocks [rows, bytes] uint8, tokens [2, n] float32: every step with every fill, odd block counts."""
    rng = np.random.default_rng(11)
    size = max(find_codec(fmt).weights, activations[dots.PARTNERS[fmt]].weights)
    for blocks in (1, 3, 5):
        n = blocks * size
        for step, value in STEPS.items():
            x = draw_tokens(rng, 2, n)
            x[1] = np.where(rng.random(n) < 0.5, np.float32(1), np.float32(-1))  # codes of 127 and -127 alone
            for fill, byte in FILLS.items():
                raw = np.full((rows, find_codec(fmt).row_bytes(n)), byte, np.uint8)
                set_steps(raw, fmt, value)
                yield f"{blocks} blocks, step {step}, {fill}", raw, x
            raw = rng.integers(0, 256, raw.shape, dtype=np.uint8)
            set_steps(raw, fmt, value)
            yield f"{blocks} blocks, step {step}, random bytes", raw, x
