"""The cases of test_twins for arith.fma and the room dots."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from refimpl import dots
from refimpl.arith import fma
from refimpl.dots import avx2, codebooks, encoders, floats, generic, planes, tiled
from refimpl.quants.formats import CODEBOOKS, activations, find_codec

Array = np.ndarray[Any, Any]
Pairs = Iterator[tuple[str, Array, Array]]  # what, got, want
SIZES = {"q8_0": 32, "q8_1": 32, "q8_k": 256}


def check_fma(twin: ModuleType, draw: Any) -> Pairs:
    x = draw.weights(32).reshape(-1)
    a, b = x, draw.bytes((x.size, 4)).view(np.float32).reshape(-1)
    for c in (b[::-1], -(a * b), np.nextafter(-(a * b), np.float32(1))):
        got = np.array([twin.fma(*v) for v in zip(a, b, c, strict=True)], np.float32)
        yield "fma", got, fma.fma(a, b, c)


def check_floats(twin: ModuleType, draw: Any) -> Pairs:
    n = 16 * int(draw.rng.integers(1, 5))
    w, x = draw.weights(n), draw.weights(n)[: draw.rows]
    many = ((13, 1), (5, 7), (3, 9), (16, 4), (1, 5), (22, 22), (16, 18), (3, 17))
    shapes = ((1, 1), (2, 2)) if draw.rows == 2 else many
    for rows, tokens in shapes:
        got, want = (np.full((tokens, rows), np.nan, np.float32) for _ in range(2))
        twin.multiply(w[:rows], x[:tokens], got)
        floats.multiply(w[:rows], x[:tokens], want)
        yield f"multiply {rows} rows, {tokens} tokens", got, want


def check_encoders(twin: ModuleType, draw: Any) -> Pairs:
    for name in ("q8_0", "q8_1", "q8_0_avx2", "q8_1_avx2", "q8_k"):
        kind = activations[name.removesuffix("_avx2")]
        if not hasattr(twin, f"encode_{name}"):
            continue
        x = draw.weights(kind.weights * int(draw.rng.integers(1, 4)))
        got = np.full((len(x), kind.row_bytes(x.shape[1])), 0xAA, np.uint8)
        getattr(twin, f"encode_{name}")(x, got)
        want = np.ascontiguousarray(getattr(encoders, f"encode_{name}")(x)).view(np.uint8)
        yield f"encode {name}", got, want.reshape(got.shape)


def draw_pair(draw: Any, name: str) -> tuple[Array, Array, int]:
    """Blocks of any bytes, some with a tame step, and two encoded tokens; and the weights in a row."""
    kind, partner = find_codec(name), activations[dots.PARTNERS[name]]
    n = max(kind.weights, partner.weights) * int(draw.rng.integers(1, 4))
    raw = draw.bytes((3, kind.row_bytes(n)))
    for half in ("d", "dmin"):
        if half in (kind.block.names or ()) and draw.rng.random() < 0.7:
            view = raw.view(kind.block)[half]
            view[:] = draw.rng.standard_normal(view.shape) * 0.01
    acts = dots.encode(draw.weights(n)[:2], partner.name, reference=True)
    return raw, acts, n


def check_planes(twin: ModuleType, draw: Any) -> Pairs:
    for name in map(str, draw.rng.choice(list(planes.UNPACK), 4, replace=False)):
        kind = find_codec(name)
        raw, _, n = draw_pair(draw, name)
        want = planes.unpack(raw, kind)
        got = [np.full(p[0].shape, 99, p.dtype) if p.size else np.empty(n // 16, p.dtype) for p in want]
        twin.unpack_row(kind.id, raw[0], *got, np.empty(256, np.uint8))
        for field, a, b in zip(planes.Planes._fields, got, want, strict=True):
            if b.size:
                yield f"{name} {field}", a, b[0]


def check_orders(twin: ModuleType, draw: Any) -> Pairs:
    """The twin of one order. Only generic has two: fused or not."""
    order = twin.__name__.rpartition(".")[2].partition("_")[0]
    text = {"generic": generic, "avx2": avx2, "tiled": tiled}[order]
    for name in draw.rng.choice(list(dots.PARTNERS), 3, replace=False):
        kind, partner = find_codec(str(name)), dots.PARTNERS[str(name)]
        raw, acts, _ = draw_pair(draw, kind.name)
        a = planes.split(acts, activations[partner])
        w = (codebooks if kind in CODEBOOKS else planes).unpack(raw, kind)
        for fused in ([False], [True]) if order == "generic" else ([],):
            got, want = (np.full((len(acts), len(raw)), np.nan, np.float32) for _ in range(2))
            twin.multiply(kind.id, raw, *a, *fused, got)
            text.multiply(w, a, kind.name, *fused, want)
            yield f"{name} {order} {fused}", got, want


def check_codebooks(twin: ModuleType, draw: Any) -> Pairs:
    for i in draw.rng.choice(len(CODEBOOKS), 2, replace=False):
        kind = CODEBOOKS[i]
        raw, acts, _ = draw_pair(draw, kind.name)
        a, w = planes.split(acts, activations["q8_k"]), codebooks.unpack(raw, kind)
        parts = w.codes, w.scales, w.d
        got = [np.full(p[0].shape, 99, p.dtype) for p in parts]
        twin.unpack_row(kind.id, raw[0], *got)
        for part, have, want in zip(("codes", "scales", "d"), got, parts, strict=True):
            yield f"{kind.name} {part}", have, want[0]
        for order, fused in (("generic", [False]), ("generic", [True]), ("avx2", []), ("tiled", [])):
            out, want = (np.full((len(acts), len(raw)), np.nan, np.float32) for _ in range(2))
            getattr(twin, f"multiply_{order}")(kind.id, raw, *a[:2], *fused, out)
            getattr(codebooks, f"multiply_{order}")(w, a, kind.id, *fused, want)
            yield f"{kind.name} {order} {fused}", out, want


CASES: dict[str, Callable[[ModuleType, Any], Pairs]] = {
    "arith.fma": check_fma,
    "dots.floats": check_floats,
    "dots.encoders": check_encoders,
    "dots.planes": check_planes,
    "dots.codebooks": check_codebooks,
    "dots.generic": check_orders,
    "dots.avx2": check_orders,
    "dots.tiled": check_orders,
}
