"""Every order of a dot product against what defines it: our C file without contraction, and ggml's own functions."""

import ctypes as c
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl import dots
from refimpl.dots import tiled
from refimpl.quants.formats import CODEBOOKS, activations
from refimpl.quants.grids import load_grid
from tests.bits import assert_same_bits
from tests.dot_inputs import draw_edges, draw_tokens, draw_weights
from tests.weights import KINDS, make_weights
from tools import ggml, ggml_dots

Array = np.ndarray[Any, Any]
FORMATS = list(dots.PARTNERS)
ENCODERS = {  # ggml's symbol: format, encoder
    "quantize_row_q8_0_ref": ("q8_0", "reference"),
    "quantize_row_q8_0_generic": ("q8_0", "reference"),
    "quantize_row_q8_0": ("q8_0", "avx2"),
    "quantize_row_q8_1_ref": ("q8_1", "reference"),
    "quantize_row_q8_1_generic": ("q8_1", "reference"),
    "quantize_row_q8_1": ("q8_1", "avx2"),
    "quantize_row_q8_K_ref": ("q8_k", "reference"),
    "quantize_row_q8_K_generic": ("q8_k", "reference"),
    "quantize_row_q8_K": ("q8_k", "reference"),
}


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    """tests/native/generic_dots.c, compiled without contraction."""
    library = tmp_path_factory.mktemp("c") / "generic_dots.so"
    source = Path(__file__).with_name("generic_dots.c")
    flags = ["-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True)
    loaded = c.CDLL(str(library))
    for name in (
        "iq2_xxs",
        "iq2_xs",
        "iq2_s",
        "iq3_xxs",
        "iq3_s",
        "iq1_s",
    ):  # cached: they stay where they are
        c.c_void_p.in_dll(loaded, f"grid_{name}").value = load_grid(name).points.ctypes.data
    return loaded


def encode_natively(x: Array, symbol: str) -> Array:
    kind = activations[ENCODERS[symbol][0]]
    function = getattr(ggml.LIBRARY, symbol)
    function.restype, function.argtypes = None, [c.c_void_p, c.c_void_p, c.c_int64]
    out = np.zeros((len(x), kind.row_bytes(x.shape[1])), np.uint8)  # C leaves q8_K's bsums of zeros unwritten
    for t in range(len(x)):
        function(x[t].ctypes.data, out[t].ctypes.data, x.shape[1])
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symbol", ENCODERS)
def test_activations_are_encoded_as_ggml_does(symbol: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    x = make_weights(kind, rng, 4, 1280)
    want = encode_natively(x, symbol)
    for reference in (False, True):
        got = dots.encode(x, *ENCODERS[symbol], reference=reference)
        assert_same_bits(got, want, f"{symbol} {kind} reference={reference}")


def multiply_in_c(library: c.CDLL, fmt: str, raw: Array, x: Array) -> Array:
    function = getattr(library, f"dot_{fmt}")
    function.restype, function.argtypes = c.c_float, [c.c_int, c.c_void_p, c.c_void_p]
    acts = dots.encode(x, dots.PARTNERS[fmt])
    rows = range(len(raw))
    return np.float32([[function(x.shape[1], raw[r].ctypes.data, a.ctypes.data) for r in rows] for a in acts])


def multiply_every_way(raw: Array, fmt: str, x: Array, order: str) -> dict[str, Array]:
    return {
        text: dots.matmul(raw, fmt, x, dots.PARTNERS[fmt], order, reference=text == "reference")
        for text in ("kernel", "reference")
    }


@pytest.mark.parametrize("fmt", FORMATS)
def test_generic_is_c_without_contraction(fmt: str, unfused: c.CDLL) -> None:
    rng = np.random.default_rng(2)
    inputs = [("random", draw_weights(rng, fmt, 40, 2048), draw_tokens(rng, 3, 2048)), *draw_edges(fmt)]
    for what, raw, x in inputs:
        want = multiply_in_c(unfused, fmt, raw, x)
        for text, got in multiply_every_way(raw, fmt, x, "generic").items():
            assert_same_bits(got, want, f"{fmt} {text}, {what}")


WITH_GENERIC_SYMBOL = [f for f in FORMATS if f != "q2_0"]


def test_the_wheel_has_no_generic_q2_0_of_its_own() -> None:
    """On x86 ggml_vec_dot_q2_0_q8_0 is the generic text itself: tested as avx2."""
    with pytest.raises(AttributeError):
        ggml_dots.vec_dot("q2_0", "q8_0", "_generic")


@pytest.mark.parametrize("fmt", WITH_GENERIC_SYMBOL)
def test_generic_fma_is_the_generic_symbol_of_the_wheel(fmt: str) -> None:
    rng = np.random.default_rng(3)
    inputs = [("random", draw_weights(rng, fmt, 40, 2048), draw_tokens(rng, 3, 2048)), *draw_edges(fmt)]
    for what, raw, x in inputs:
        acts = dots.encode(x, dots.PARTNERS[fmt])
        want = ggml_dots.multiply(raw, fmt, acts, dots.PARTNERS[fmt], x.shape[1], "_generic")
        for text, got in multiply_every_way(raw, fmt, x, "generic-fma").items():
            assert_same_bits(got, want, f"{fmt} {text}, {what}")


@pytest.mark.parametrize("fmt", FORMATS)
def test_avx2_is_the_vec_dot_of_the_wheel(fmt: str) -> None:
    rng = np.random.default_rng(5)
    inputs = [("random", draw_weights(rng, fmt, 40, 2048), draw_tokens(rng, 3, 2048)), *draw_edges(fmt)]
    for what, raw, x in inputs:
        acts = dots.encode(x, dots.PARTNERS[fmt], "avx2")
        want = ggml_dots.multiply(raw, fmt, acts, dots.PARTNERS[fmt], x.shape[1])
        for text, got in multiply_every_way(raw, fmt, x, "avx2").items():
            assert_same_bits(got, want, f"{fmt} {text}, {what}")


@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 40])
@pytest.mark.parametrize("fmt", FORMATS)
def test_ggml_mul_mat_is_avx2_for_few_tokens_and_tiled_for_many(fmt: str, tokens: int) -> None:
    """From float32 to float32: the encoders of activations are part of it."""
    rng = np.random.default_rng(6)
    for rows, n in ((40, 2048), (33, 1280), (3, 256)):
        raw, x = draw_weights(rng, fmt, rows, n), draw_tokens(rng, tokens, n)
        want = ggml_dots.mul_mat(raw, fmt, x)
        order = "tiled" if tokens >= (2 if fmt == "iq4_nl" else 8) else "avx2"
        for text, got in multiply_every_way(raw, fmt, x, order).items():
            assert_same_bits(got, want, f"{fmt} {text} {order}, {rows} rows of {n}")


@pytest.mark.parametrize("fmt", FORMATS)
def test_ggml_mul_mat_is_tiled_at_every_edge(fmt: str) -> None:
    for what, raw, x in draw_edges(fmt):
        many = np.tile(x, (4, 1))
        want = ggml_dots.mul_mat(raw, fmt, many)
        for text, got in multiply_every_way(raw, fmt, many, "tiled").items():
            assert_same_bits(got, want, f"{fmt} {text}, {what}")


ALIKE = {  # orders that are one and the same: by default ggml has no other kernel for many tokens
    **{fmt: [] for fmt in (*tiled.CHAINED, "iq4_nl", *(f.name for f in CODEBOOKS))},
    "mxfp4": [{"avx2", "tiled"}, {"generic", "generic-fma"}],  # powers of two: these products are exact
    "q2_0": [{"avx2", "tiled"}, {"avx2", "generic-fma"}, {"tiled", "generic-fma"}],
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_orders_are_not_each_other(fmt: str, unfused: c.CDLL) -> None:
    """The control: a wrong order is seen."""
    rng = np.random.default_rng(4)
    raw, x = draw_weights(rng, fmt, 60, 2048), draw_tokens(rng, 2, 2048)
    results = {order: dots.matmul(raw, fmt, x, dots.PARTNERS[fmt], order) for order in dots.ORDERS}
    for order, got in results.items():
        for other, want in results.items():
            same = order == other or {order, other} in ALIKE.get(fmt, [{"avx2", "tiled"}])
            assert np.array_equal(got, want) == same, (order, other)
