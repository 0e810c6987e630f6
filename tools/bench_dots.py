"""The benchmark's rows of dot products: matrix times one token or many, against the native library's own functions."""

from collections.abc import Callable, Iterator

import numba
import numpy as np

from refimpl import dots, quants
from refimpl.dots import avx2_simd, generic_simd, tiled
from refimpl.dots.planes import split
from refimpl.quants.formats import CODEBOOKS, activations, find_codec
from tools import ggml_dots
from tools.bench_rows import COLUMNS, Row, draw, same

TUNED = tuple(dots.PARTNERS)
TILED = (*sorted(tiled.CHAINED), "iq4_nl", *(fmt.name for fmt in CODEBOOKS))


def draw_blocks(fmt: str, rows: int) -> np.ndarray:
    """Blocks of a format; of a codebook, whose encoder takes long, any bytes under steps of an ordinary size."""
    kind = find_codec(fmt)
    if kind not in CODEBOOKS:
        return quants.quantize(draw(rows), fmt)
    raw = np.random.default_rng(1).integers(0, 256, (rows, kind.row_bytes(COLUMNS)), np.uint8)
    blocks = raw.view(kind.block)
    if "d" in (kind.block.names or ()):
        blocks["d"] = 0.01
    else:  # the upper four bits of four words are those of 0.01
        blocks["scales"] = blocks["scales"] & 0x0FFF | np.array([0xF000, 0x1000, 0x1000, 0x2000], np.uint16)
    return raw


def matvec_row(fmt: str, order: str, goal: float, rows: int) -> Row:
    """One encoded token, as many vec_dots as there are rows; activations are encoded before."""
    kind, partner = find_codec(fmt), dots.PARTNERS[fmt]
    some = draw_blocks(fmt, min(rows, 256))
    raw = quants.allocate((rows, some.shape[1]), np.uint8)
    raw[:] = np.resize(some, raw.shape)
    x = np.random.default_rng(2).standard_normal((1, COLUMNS)).astype(np.float32)
    acts = dots.encode(x, partner, "avx2" if order == "avx2" else "reference")
    a, (out, native_out) = split(acts, activations[partner]), np.empty((2, 1, rows), np.float32)
    function = ggml_dots.vec_dot(fmt, partner, "" if order == "avx2" else "_generic")

    @numba.njit(nogil=True)
    def native(n: int, y: int, w: int, size: int, token: int, m: int) -> None:
        for r in range(m):
            function(n, y + 4 * r, 0, w + r * size, 0, token, 0, 1)

    def run() -> None:
        if order == "avx2":
            avx2_simd.multiply(kind.id, raw, *a, out)
        else:
            generic_simd.multiply(kind.id, raw, *a, True, out)

    def peer() -> None:
        native(COLUMNS, native_out.ctypes.data, raw.ctypes.data, raw.shape[1], acts.ctypes.data, rows)

    def check() -> None:
        run(), peer()
        same(out.view(np.uint32), native_out.view(np.uint32), f"dot {fmt} {order}")

    name = f"one token x {kind.name.upper()}, {order}, {raw.nbytes >> 20} MB"
    return Row(name, "native vec_dot", goal, rows * COLUMNS, check, run, peer)


def prompt_row(fmt: str, tokens: int, goal: float, rows: int) -> Row:
    """Float32 tokens to float32 results, encoding of the activations included on both sides."""
    raw = draw_blocks(fmt, rows)
    x = np.random.default_rng(3).standard_normal((tokens, COLUMNS)).astype(np.float32)
    native = ggml_dots.prepare_mul_mat(raw, fmt, x)

    def run() -> np.ndarray:
        return dots.matmul(raw, fmt, x, dots.PARTNERS[fmt], "tiled")

    def check() -> None:
        same(run().view(np.uint32), native().view(np.uint32), f"{tokens} tokens {fmt}")

    name = f"{tokens} tokens x {fmt.upper()}, tiled"
    return Row(name, "native mul_mat", goal, rows * COLUMNS, check, run, native)


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """In cache, from memory, in ggml's generic order, and prompts."""
    for fmt in TUNED:
        yield lambda fmt=fmt: matvec_row(fmt, "avx2", 1.2, rows)
        yield lambda fmt=fmt: matvec_row(fmt, "avx2", 1.0, 64 * rows)
        if fmt != "q2_0":  # of which the wheel has no generic product
            yield lambda fmt=fmt: matvec_row(fmt, "generic-fma", 0.9, rows)
    for fmt in TILED:
        yield lambda fmt=fmt: prompt_row(fmt, 128, 1.2, 2 * rows)
