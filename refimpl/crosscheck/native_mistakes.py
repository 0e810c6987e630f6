"""The classic mistakes of a kernel, each as the values that a kernel which makes it would give.

A wrong result that equals one of them has a name. `values` gives the weights [N, weights] float64 that the
mistaken kernel sees in the blocks; decoders round them to float32, dot products use them as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.quants.formats import Format, formats

Array = NDArray[Any]

CODES, HIGH = ("qs", "ql"), ("qh", "scales_h", "signs")
MINS = ("dmin", "m")


@dataclass(frozen=True)
class Mistake:
    """A name, and what it makes of blocks (a record array that may be changed); None where it cannot occur."""

    name: str
    values: Callable[[Format, Array], Array | None]


def exact_weights(fmt: Format, blocks: Array) -> Array:
    """Decode to float64 [N, weights] without any rounding.

    The part that d scales and the part that dmin scales are exact in float32 each (tests prove it); only
    their difference rounds, and here it does not.
    """
    minimum = next((name for name in MINS if name in (fmt.block.names or ())), None)
    if minimum is None:
        return decode(fmt, blocks)
    scaled, offset = blocks.copy(), blocks.copy()
    scaled[minimum] = 0
    offset["d"] = 0
    return decode(fmt, scaled) + decode(fmt, offset)


def without_min(fmt: Format, blocks: Array) -> Array:
    """Decode to float64 [N, weights] what d scales, and leave out the mins."""
    blocks = blocks.copy()
    _drop_min(fmt, blocks)
    return decode(fmt, blocks)


def decode(fmt: Format, blocks: Array) -> Array:
    """dequantize, [N] records to [N, weights] float64."""
    raw = np.ascontiguousarray(blocks).view(np.uint8).reshape(len(blocks), fmt.block.itemsize)
    return read(fmt, raw).astype(np.float64)


def read(fmt: Format, raw: Array) -> Array:
    """dequantize, and what it is for q8_k, which no tensor has: [N, bytes] uint8 to [N, weights] float32."""
    if fmt.name in formats:
        return quants.dequantize(raw, fmt)
    blocks = raw.view(fmt.block).reshape(-1)
    with np.errstate(all="ignore"):
        return np.asarray(blocks["d"][:, None] * blocks["qs"].astype(np.float32))


def find_mistake(fmt: Format, raw: Array, fits: Callable[[Array], bool]) -> str | None:
    """The first mistake whose values explain a result. raw: the inputs, [N, bytes] uint8."""
    with np.errstate(all="ignore"):
        right = exact_weights(fmt, raw.view(fmt.block).reshape(-1))
        for mistake in list_mistakes():
            values = mistake.values(fmt, raw.copy().view(fmt.block).reshape(-1))
            if values is not None and not np.array_equal(values, right, equal_nan=True) and fits(values):
                return mistake.name
    return None


def list_mistakes() -> Iterator[Mistake]:
    """All of them, the more special ones first."""
    yield Mistake("the nibbles are in the wrong order", _changed(_swap_nibbles))
    yield Mistake("the min is added, not subtracted (its sign)", _changed(_negate_min))
    yield Mistake("the mins are left out (bsums forgotten)", _changed(_drop_min))
    yield Mistake("d and dmin are exchanged", _changed(_exchange_steps))
    yield Mistake("the high bits of the codes are left out", _changed(_drop_high_bits))
    yield Mistake("the offset of the codes is left out (bsums forgotten)", _without_offset)
    yield Mistake("signed scales are read as unsigned", _unsigned_scales)
    yield Mistake("signed codes are read as unsigned", _unsigned_codes)
    for how, unpack in _SIX_BITS.items():
        yield Mistake(f"6-bit scales of sub-blocks 4 to 7: {how}", _changed(_repack(unpack)))
    yield Mistake("the last block is skipped", _skip_last)


def _changed(change: Callable[[Format, Array], bool]) -> Callable[[Format, Array], Array | None]:
    """Values of blocks that were changed in place; None where there was nothing to change."""

    def values(fmt: Format, blocks: Array) -> Array | None:
        return exact_weights(fmt, blocks) if change(fmt, blocks) else None

    return values


def _has(fmt: Format, *names: str) -> list[str]:
    return [name for name in names if name in (fmt.block.names or ())]


def _swap_nibbles(fmt: Format, blocks: Array) -> bool:
    fields = [name for name in _has(fmt, *CODES) if fmt.block[name].base == np.uint8]
    for name in fields:
        blocks[name] = blocks[name] << 4 | blocks[name] >> 4
    return bool(fields)


def _negate_min(fmt: Format, blocks: Array) -> bool:
    for name in _has(fmt, *MINS):
        blocks[name] = -blocks[name]
    return bool(_has(fmt, *MINS))


def _drop_min(fmt: Format, blocks: Array) -> bool:
    for name in _has(fmt, *MINS):
        blocks[name] = 0
    return bool(_has(fmt, *MINS))


def _exchange_steps(fmt: Format, blocks: Array) -> bool:
    for name in _has(fmt, *MINS):
        blocks["d"], blocks[name] = blocks[name].copy(), blocks["d"].copy()
    return bool(_has(fmt, *MINS))


def _drop_high_bits(fmt: Format, blocks: Array) -> bool:
    for name in _has(fmt, *HIGH):
        blocks[name] = 0
    return bool(_has(fmt, *HIGH))


def _without_offset(fmt: Format, blocks: Array) -> Array | None:
    """Codes that stand for q - offset, taken as q: what codes of zero decode to is subtracted again."""
    fields = _has(fmt, *CODES, "qh", "hmask")
    if not fields or any(fmt.block[name].base != np.uint8 for name in fields):
        return None
    zeros = blocks.copy()
    for name in fields:
        zeros[name] = 0
    return exact_weights(fmt, blocks) - exact_weights(fmt, zeros)


def _unsigned_scales(fmt: Format, blocks: Array) -> Array | None:
    if not _has(fmt, "scales") or fmt.block["scales"].base != np.int8:
        return None
    scales = blocks["scales"].view(np.uint8).astype(np.float64)
    blocks["scales"] = 1
    return exact_weights(fmt, blocks) * np.repeat(scales, fmt.weights // scales.shape[1], 1)


def _unsigned_codes(fmt: Format, blocks: Array) -> Array | None:
    if not _has(fmt, "qs") or fmt.block["qs"].base != np.int8:
        return None
    codes = blocks["qs"].view(np.uint8).astype(np.float64)
    return blocks["d"].astype(np.float64)[:, None] * codes


def _skip_last(fmt: Format, blocks: Array) -> Array | None:
    values = exact_weights(fmt, blocks)
    values[-1] = 0
    return values


# How the four last pairs of (scale, min) come out of the 12 bytes `s`; the first four are s[j] & 63, s[j + 4] & 63.
_SIX_BITS: dict[str, Callable[[Array, int], tuple[Array, Array]]] = {
    "the upper two bits are left out": lambda s, j: (s[:, j + 4] & 15, s[:, j + 4] >> 4),
    "scale and min are exchanged": lambda s, j: (
        s[:, j + 4] >> 4 | s[:, j] >> 6 << 4,
        s[:, j + 4] & 15 | s[:, j - 4] >> 6 << 4,
    ),
    "the upper two bits of scale and min are exchanged": lambda s, j: (
        s[:, j + 4] & 15 | s[:, j] >> 6 << 4,
        s[:, j + 4] >> 4 | s[:, j - 4] >> 6 << 4,
    ),
    "the lower four bits of scale and min are exchanged": lambda s, j: (
        s[:, j + 4] >> 4 | s[:, j - 4] >> 6 << 4,
        s[:, j + 4] & 15 | s[:, j] >> 6 << 4,
    ),
    "unpacked as the first four are": lambda s, j: (s[:, j] & 63, s[:, j + 4] & 63),
    "the first four are taken again": lambda s, j: (s[:, j - 4] & 63, s[:, j] & 63),
}


def _repack(unpack: Callable[[Array, int], tuple[Array, Array]]) -> Callable[[Format, Array], bool]:
    """Blocks whose 6-bit scales, read rightly, are what a mistaken unpacking makes of these."""

    def change(fmt: Format, blocks: Array) -> bool:
        if not _has(fmt, "scales") or not _has(fmt, "dmin") or fmt.block["scales"].shape != (12,):
            return False
        s = blocks["scales"].copy()
        new = s.copy()
        new[:, :8] &= 63
        for j in range(4, 8):
            scale, minimum = unpack(s, j)
            new[:, j + 4] = scale & 15 | (minimum & 15) << 4
            new[:, j - 4] |= scale >> 4 << 6
            new[:, j] |= minimum >> 4 << 6
        blocks["scales"] = new
        return True

    return change
