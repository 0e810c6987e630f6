"""The rows of the benchmark: two sides that do the same work, and the check that they give the same bits."""

import ctypes as c
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gguf
import gguf.quants
import numba
import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.quants.formats import Format, find_codec
from tools import ggml

Array = NDArray[Any]
COLUMNS = 6144
REPEATS = 10
NAMES = ("q4_k", "q6_k", "q8_0", "q5_0")


class Differ(Exception):
    """The two sides of a row do not give the same bits: there is nothing to time."""


@dataclass(frozen=True)
class Row:
    """One line of the table: run() and peer() do the same work on `weights` weights; check() has compared them.

    prepare : called before each turn, outside the time that is taken
    unit    : what is counted, if not millions of weights
    turns   : of both sides, where more would take too long
    """

    name: str
    against: str
    goal: float | None
    weights: int
    check: Callable[[], None]
    run: Callable[[], Any]
    peer: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    unit: str = "M/s"
    turns: int | None = None


def native_encoder(library: c.CDLL, fmt: str) -> Callable[..., Any]:
    """(x, out, rows, n, imatrix) as addresses and sizes, compiled: no ctypes in the timed call."""
    function = getattr(library, f"quantize_{ggml.native_name(fmt)}")
    function.restype = c.c_size_t
    function.argtypes = [c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_void_p]

    @numba.njit(nogil=True)
    def encode(x: int, out: int, rows: int, n: int, imatrix: int) -> int:
        return function(x, out, rows, n, imatrix)  # type: ignore[no-any-return]

    return encode


def native_decoder(library: c.CDLL, fmt: str) -> Callable[..., Any]:
    """(raw, out, weights) as addresses and a size, compiled."""
    function = getattr(library, f"dequantize_row_{ggml.native_name(fmt)}")
    function.restype = None
    function.argtypes = [c.c_void_p, c.c_void_p, c.c_int64]

    @numba.njit(nogil=True)
    def decode(raw: int, out: int, weights: int) -> None:
        function(raw, out, weights)

    return decode


def draw(rows: int) -> NDArray[np.float32]:
    """Weights as a trained matrix has them, rounded to BF16 as sources are."""
    x = quants.allocate((rows, COLUMNS), np.float32)
    x[:] = np.random.default_rng(0).standard_normal(x.shape) * 0.02
    x.view(np.uint32)[:] &= np.uint32(0xFFFF0000)
    return x


def same(got: Array, want: Array, what: str) -> None:
    if not np.array_equal(got, want):
        raise Differ(f"{what}: {np.count_nonzero(got != want)} of {got.size} elements differ")


def encode_row(library: c.CDLL, fmt: str, goal: float, rows: int, imatrix: Array | None = None) -> Row:
    x, kind = draw(rows), find_codec(fmt)
    out, native_out = (quants.allocate((rows, kind.row_bytes(COLUMNS)), np.uint8) for _ in range(2))
    native, weights = native_encoder(library, fmt), 0 if imatrix is None else imatrix.ctypes.data

    def run() -> None:
        quants.quantize(x, fmt, imatrix, out=out)

    def peer() -> None:
        native(x.ctypes.data, native_out.ctypes.data, rows, COLUMNS, weights)

    def check() -> None:
        run(), peer()
        same(out, native_out, f"encode {fmt}")

    name = f"encode {kind.name.upper()}" + ("" if imatrix is None else ", imatrix")
    return Row(name, "native", goal, x.size, check, run, peer)


def encoded(library: c.CDLL, fmt: Format, rows: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Weights and their blocks; the blocks repeat after 256 rows, so that the slow native encoder is not waited for."""
    x = draw(rows)
    some = quants.quantize(x[:256], fmt, np.ones(x.shape[1], np.float32) if fmt.needy else None)
    raw = quants.allocate((rows, some.shape[1]), np.uint8)
    raw[:] = np.resize(some, raw.shape)
    return x, raw


def decode_row(library: c.CDLL, fmt: str, goal: float, rows: int) -> Row:
    kind = find_codec(fmt)
    x, raw = encoded(library, kind, rows)
    out, native_out = (quants.allocate(x.shape, np.float32) for _ in range(2))
    native = native_decoder(library, fmt)

    def run() -> None:
        quants.dequantize(raw, fmt, out=out)

    def peer() -> None:
        native(raw.ctypes.data, native_out.ctypes.data, x.size)

    def check() -> None:
        run(), peer()
        same(out.view(np.uint32), native_out.view(np.uint32), f"decode {fmt}")

    return Row(f"decode {kind.name.upper()} to memory", "native", goal, x.size, check, run, peer)


def compare_row(library: c.CDLL, fmt: str, goal: float, rows: int) -> Row:
    kind = find_codec(fmt)
    x, raw = encoded(library, kind, rows)
    bits, y, native = (
        (x.view(np.uint32) >> 16).astype(np.uint16),
        np.empty_like(x),
        native_decoder(library, fmt),
    )

    def run() -> Array:
        return quants.compare(raw, fmt, bits)

    def peer() -> tuple[float, float, float]:
        native(raw.ctypes.data, y.ctypes.data, x.size)
        source = (bits.astype(np.uint32) << 16).view(np.float32)
        d = y - source
        return float((d * d).sum()), float((source * source).sum()), float(np.abs(d).max())

    def check() -> None:
        got, few = run(), slice(0, 16)
        same(got[few], quants.compare(raw[few], fmt, bits[few], reference=True), f"compare {fmt}")
        ours = got["sse"].sum(), got["ssx"].sum(), got["max_abs"].max()
        if not np.allclose(ours, peer(), rtol=1e-4):
            raise Differ(f"compare {fmt}: {ours} here, {peer()} by NumPy")

    return Row(
        f"decode and compare {kind.name.upper()} with BF16",
        "native decode, NumPy",
        goal,
        x.size,
        check,
        run,
        peer,
    )


def gguf_decode_row(fmt: str, rows: int) -> Row:
    raw, kind = quants.quantize(draw(rows), fmt), gguf.GGMLQuantizationType[fmt.upper()]
    out = quants.allocate((rows, COLUMNS), np.float32)

    def run() -> Array:
        return quants.dequantize(raw, fmt, out=out)

    def peer() -> Array:
        return gguf.quants.dequantize(raw, kind)

    def check() -> None:
        same(run(), peer(), f"gguf-py decode {fmt}")

    return Row(f"decode {fmt.upper()} to memory", "gguf-py", None, out.size, check, run, peer)


def gguf_encode_row(fmt: str, rows: int) -> Row:
    x, kind = draw(rows), gguf.GGMLQuantizationType[fmt.upper()]
    out = quants.allocate((rows, find_codec(fmt).row_bytes(COLUMNS)), np.uint8)

    def run() -> Array:
        return quants.quantize(x, fmt, out=out)

    def peer() -> Array:
        return gguf.quants.quantize(x, kind)

    def check() -> None:
        same(run(), peer(), f"gguf-py encode {fmt}")

    return Row(f"encode {fmt.upper()}", "gguf-py", None, x.size, check, run, peer)


def thread_row(fmt: str, job: str, goal: float, rows: int) -> Row:
    """Two threads on halves of the rows against one thread on all of them, each REPEATS times over.

    A core that idles takes milliseconds to wake: what counts is work as long as a file's, not one call's.
    """
    x, kind = draw(rows), find_codec(fmt)
    raw = quants.quantize(x, fmt)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    out, y = quants.allocate(raw.shape, np.uint8), quants.allocate(x.shape, np.float32)
    work: Callable[[slice], Any] = {
        "encode": lambda part: quants.quantize(x[part], fmt, out=out[part]),
        "decode": lambda part: quants.dequantize(raw[part], fmt, out=y[part]),
        "compare": lambda part: quants.compare(raw[part], fmt, bits[part]),
    }[job]
    pool, halves = ThreadPoolExecutor(2), (slice(0, rows // 2), slice(rows // 2, rows))

    def again(part: slice) -> Any:
        for _ in range(REPEATS - 1):
            work(part)
        return work(part)

    def run() -> Array:
        return np.concatenate(list(pool.map(again, halves)))

    def peer() -> Array:
        return again(slice(0, rows))

    def check() -> None:
        same(run(), peer(), f"two threads {job} {fmt}")

    return Row(
        f"{job} {kind.name.upper()}, two threads", "one thread", goal, x.size * REPEATS, check, run, peer
    )


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """Every row, to be built only when its turn comes. `rows` of 6,144 weights are encoded; decoding takes more."""
    library, many = ggml.LIBRARY, 16 * rows
    importance = np.random.default_rng(1).uniform(0.1, 3, COLUMNS).astype(np.float32)
    for fmt, goal in (("q4_k", 10.0), ("q6_k", 9.0), ("q8_0", 7.0), ("q5_0", 3.0)):
        yield lambda fmt=fmt, goal=goal: encode_row(library, fmt, goal, rows)
    for fmt, target in (("q4_k", 9.0), ("q6_k", None), ("q5_0", None)):
        yield lambda fmt=fmt, goal=target: encode_row(library, fmt, goal, rows // 2, importance)
    for fmt in NAMES:
        yield lambda fmt=fmt: decode_row(library, fmt, 1.1, many)
    for fmt in NAMES:
        yield lambda fmt=fmt: compare_row(library, fmt, 10.0, many // 2)
    for fmt, job, size in (("q4_k", "encode", rows), ("q6_k", "encode", rows), ("q4_k", "compare", many)):
        yield lambda fmt=fmt, job=job, size=size: thread_row(fmt, job, 1.8, size)
    for fmt in NAMES:
        yield lambda fmt=fmt: gguf_decode_row(fmt, rows)
    for fmt in ("q8_0", "q5_0"):
        yield lambda fmt=fmt: gguf_encode_row(fmt, rows)
