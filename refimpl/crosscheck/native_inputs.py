"""What a kernel is tried on: weights for encoders and blocks for decoders, ordinary ones and those at the edges."""

from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from refimpl.quants.formats import Format

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

SEED = 20260101
# d = 0, the smallest and the largest subnormal, one, the largest number of fp16, and some with a sign
STEPS = np.array([0x0000, 0x0001, 0x03FF, 0x3C00, 0x7BFF, 0x8001, 0xFBFF], np.uint16).view(np.float16)
FILLS = (0x00, 0xFF, 0x7F, 0x80, 0x3F, 0x0F, 0xF0)
# What stands for a step of one (or of another power of two) where steps are no floating-point fields.
UNITS = {"mxfp4": ("e", 128), "nvfp4": ("d", 0x38)}


def step_fields(fmt: Format) -> list[str]:
    """The floating-point fields of a block: d, dmin, m."""
    names = fmt.block.names or ()
    return [name for name in names if fmt.block[name].base.kind == "f"]


def random_blocks(fmt: Format, rng: Generator, count: int) -> Blocks:
    """Blocks of random bytes with steps of ordinary size: [count, bytes]."""
    raw = rng.integers(0, 256, (count, fmt.block.itemsize), dtype=np.uint8)
    blocks = raw.view(fmt.block).reshape(count)
    for name in step_fields(fmt):
        sizes = 2.0 ** rng.uniform(-12, 2, (count, *fmt.block[name].shape))
        blocks[name] = sizes * rng.choice([-1, 1], sizes.shape)
    return raw


def unit_blocks(fmt: Format, rng: Generator, count: int, full: bool = False) -> Blocks:
    """Blocks of integers, but for a power of two: steps of one, codes random or (some of) all 0 and all 1."""
    raw = rng.integers(0, 256, (count, fmt.block.itemsize), dtype=np.uint8)
    if full:
        raw[::2], raw[1::4] = 0xFF, 0x00
    blocks = raw.view(fmt.block).reshape(count)
    for name in step_fields(fmt):
        blocks[name] = 1
    if fmt.name in UNITS:
        name, one = UNITS[fmt.name]
        blocks[name] = one
    if fmt.name == "iq1_m":  # d is an fp16 in the upper four bits of four words
        blocks["scales"] = blocks["scales"] & 0x0FFF | np.array([0, 0, 0xC000, 0x3000], np.uint16)
    return raw


def edge_blocks(fmt: Format, rng: Generator) -> Blocks:
    """Every step at its limits, times every other field all 0, all 1, at its sign's limits and random."""
    fields = [name for name in fmt.block.names or () if name not in step_fields(fmt)]
    fills = list(product((*FILLS, None), repeat=min(len(fields), 2)))
    count = len(STEPS) * len(fills)
    raw = rng.integers(0, 256, (count, fmt.block.itemsize), dtype=np.uint8)
    blocks = raw.view(fmt.block).reshape(count)
    for name in step_fields(fmt):
        shift = rng.integers(0, len(STEPS)) if name != "d" else 0
        blocks[name] = np.roll(np.repeat(STEPS, len(fills)), shift * len(fills)).reshape(
            count, *[1] * len(fmt.block[name].shape)
        )
    for i, chosen in enumerate(fills * len(STEPS)):
        for name, fill in zip(fields, chosen * len(fields), strict=False):
            if fill is not None:
                at = fmt.offset(name)
                raw[i, at : at + fmt.block[name].itemsize] = fill
    return raw


def list_blocks(fmt: Format, most: int) -> Iterator[tuple[str, Blocks, bool]]:
    """(what it tries, blocks, whether pointers are aligned as little as the ABI allows)."""
    rng = np.random.default_rng([SEED, fmt.id])
    yield "one block", random_blocks(fmt, rng, 1), False
    yield "257 blocks", random_blocks(fmt, rng, 257), False
    yield "steps and codes at their limits", edge_blocks(fmt, rng), False
    yield "random bytes", rng.integers(0, 256, (1001, fmt.block.itemsize), dtype=np.uint8), False
    yield "pointers of the least alignment", random_blocks(fmt, rng, 33), True
    yield f"{most:,} blocks", random_blocks(fmt, rng, most), False


def list_weights(fmt: Format, most: int) -> Iterator[tuple[str, Floats, bool]]:
    """(what it tries, weights [rows, n], whether pointers are aligned as little as the ABI allows)."""
    rng = np.random.default_rng([SEED, fmt.weights, 1])  # formats of one block size share them
    size = max(fmt.weights, 32)
    yield "one block", rng.standard_normal((1, size), np.float32), False
    for name, x in _kinds(rng, 5 * size):
        yield name, np.clip(x, -3e38, 3e38).astype(np.float32), False
    yield "pointers of the least alignment", rng.standard_normal((3, 3 * size), np.float32), True
    wide = max(1, 32 // (size // fmt.weights)) * size
    rows = -(-most * fmt.weights // wide)
    yield f"{rows * wide // fmt.weights:,} blocks", rng.standard_normal((rows, wide), np.float32), False


def _kinds(rng: Generator, n: int) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Weights of three rows of every magnitude and shape that float32 has, but for NaN and infinity."""
    shape, groups = (3, n), (3 * n // 16, 1)
    even = rng.standard_normal(shape)
    yield "ordinary weights", even
    yield "heavy tails", rng.standard_t(2, shape)
    yield "outliers", np.where(rng.random(shape) < 0.01, 1000, 1) * even
    yield "all equal", np.repeat(even[:, :1], n, 1)
    yield "all positive", abs(even)
    yield "all negative", -abs(even)
    yield "zeros", np.zeros(shape)
    yield "zeros of both signs", np.where(rng.random(shape) < 0.5, np.where(even > 0, -0.0, 0.0), even)
    yield "groups of zeros", np.where(np.repeat(rng.random(groups) < 0.4, 16, 1).reshape(shape), 0, even)
    for scale in (1e-40, 3e-38, 1e-15, 1e-7, 3e4, 1e15, 5e37):
        yield f"weights of size {scale:g}", even * scale
    yield "rounding ties", _ties(rng, shape)
    yield "two values", np.sign(even)
    yield "a tiny spread below -1", even * 1e-7 - 1
    yield "a tiny spread above 1", even * 1e-7 + 1
    spread = rng.standard_normal((groups[0], 16)) * 10.0 ** rng.uniform(-12, 4, groups)
    yield (
        "scales far apart",
        (spread + (rng.random(groups) < 0.3) * 10.0 ** rng.uniform(-6, 3, groups)).reshape(shape),
    )
    yield "few that are not zero", even * (rng.random(shape) < 0.02)
    any_size = rng.standard_normal((groups[0], 16)) * 10.0 ** rng.uniform(-45, 37.5, groups)
    yield "groups of every magnitude", any_size.reshape(shape)
    bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
    bits = np.where(bits & 0x7F800000 == 0x7F800000, bits & 0xFF7FFFFF, bits)  # but NaN and infinity
    yield "any bits", bits.view(np.float32).astype(np.float64)


def list_importances(fmt: Format, n: int) -> Iterator[tuple[str, Floats]]:
    """Imatrix rows [n] of every kind: ordinary, constant, with holes, of all sizes."""
    rng = np.random.default_rng([SEED, fmt.weights, 2])
    even = rng.uniform(0.1, 3, n)
    yield "uniform imatrix", even.astype(np.float32)
    yield "imatrix of ones", np.ones(n, np.float32)
    yield "imatrix with zeros", np.where(rng.random(n) < 0.5, 0, even).astype(np.float32)
    yield "imatrix with groups of zeros", np.repeat(rng.random(n // 16) < 0.5, 16).astype(np.float32)
    yield "imatrix of all zeros", np.zeros(n, np.float32)
    yield "imatrix of all sizes", (10.0 ** rng.uniform(-20, 10, n)).astype(np.float32)
    yield "imatrix with heavy tails", (rng.standard_t(1, n) ** 2).astype(np.float32)
    yield "subnormal imatrix", (rng.random(n) * 1e-40).astype(np.float32)


def _ties(rng: Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Halves under steps that are powers of two: many quotients lie exactly between two codes."""
    x = rng.integers(-14, 15, shape) / 2
    x[:, ::16] = -8
    x[:, ::64] = -16
    x[:, ::96] = 127
    return x
