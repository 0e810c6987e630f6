"""Every byte that we write and every weight that we read, against ggml itself."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from refimpl import quants
from refimpl.arith.builds import SITED, find_build
from refimpl.quants.formats import CODEBOOKS, formats
from tests.bits import assert_same_bits
from tests.weights import IMPORTANCES, KINDS, gaussian, make_importance, make_weights
from tools import ggml

Array = np.ndarray[Any, Any]
CODED = [
    name for name, fmt in formats.items() if fmt.weights > 1 and fmt not in CODEBOOKS
]  # test_grids_native.py
RULED = [name for name in CODED if formats[name].ruled]
FLOATS = ["f16", "bf16"]
MILLION = 1_000_000
# REFIMPL_MILLIONS=10 pytest tests/native/test_quants_native.py -k million: so many for every type and imatrix
MILLIONS = int(os.environ.get("REFIMPL_MILLIONS", "0"))


def encode_portably(x: Array, fmt: str, imatrix: Array | None) -> Array:
    """Encode by X_jit, which the public function passes by where a tuned kernel exists."""
    out = np.full((len(x), quants.find_codec(fmt).row_bytes(x.shape[1])), 0xAA, np.uint8)
    weights = np.empty((0, x.shape[1]), np.float32) if imatrix is None else imatrix[None]
    build = [find_build("strict", fmt)] if fmt in SITED else []
    import_module(f"refimpl.quants.{fmt}_jit").quantize(x, weights, len(x), out, *build)
    return out


ENCODERS: dict[str, Callable[[Array, str, Array | None], Array]] = {
    "tuned": quants.quantize,
    "portable": encode_portably,
    "reference": lambda x, fmt, imatrix: quants.quantize(x, fmt, imatrix, reference=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", CODED)
def test_bytes_equal_ggml_for_every_kind_of_weights_and_imatrix(fmt: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    x = make_weights(kind, rng, 6, 1536)
    for importance in IMPORTANCES:
        imatrix = make_importance(importance, rng, x.shape[1])
        want = ggml.quantize(x, fmt, imatrix)
        for text, encode in ENCODERS.items():
            assert_same_bits(encode(x, fmt, imatrix), want, f"{fmt} {kind} {importance} {text}")
        decoded = ggml.dequantize(want, fmt)
        for reference in (False, True):
            got = quants.dequantize(want, fmt, reference=reference)
            assert_same_bits(got, decoded, f"{fmt} {kind} {importance} reference={reference}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", FLOATS)
def test_float_formats_equal_ggml(fmt: str, kind: str) -> None:
    x = make_weights(kind, np.random.default_rng(2), 8, 512)
    want = ggml.quantize(x, fmt)
    for reference in (False, True):
        assert_same_bits(quants.quantize(x, fmt, reference=reference), want, kind)
        assert_same_bits(quants.dequantize(want, fmt, reference=reference), ggml.dequantize(want, fmt), kind)


@pytest.mark.parametrize("fmt", CODED)
def test_random_bytes_decode_as_ggml_decodes_them(fmt: str) -> None:
    """Codes, scales and steps that no encoder writes, NaN and infinite steps among them."""
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, (256, 8 * quants.find_codec(fmt).block.itemsize), dtype=np.uint8)
    want = ggml.dequantize(raw, fmt)
    for reference in (False, True):
        assert_same_bits(quants.dequantize(raw, fmt, reference=reference), want, f"reference={reference}")


@pytest.mark.parametrize("importance", ["none", "uniform", "partly-zero"])
@pytest.mark.parametrize("fmt", CODED)
def test_ten_million_random_weights_equal_ggml(fmt: str, importance: str) -> None:
    """Ten million without an imatrix, four with each; half of them as BF16 sources have them."""
    rng = np.random.default_rng([4, CODED.index(fmt)])
    n, remaining = 6144, (MILLIONS or (10 if importance == "none" else 4)) * MILLION
    while remaining > 0:
        x = gaussian(rng, 100, n) * (10.0 ** rng.uniform(-3, 1, (100, 1))).astype(np.float32)
        if rng.random() < 0.5:
            x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
        imatrix = make_importance(importance, rng, n)
        want = ggml.quantize(x, fmt, imatrix)
        for text in ("tuned", "portable"):
            assert_same_bits(ENCODERS[text](x, fmt, imatrix), want, f"{fmt} {text}")
        remaining -= x.size


@pytest.mark.parametrize("fmt", CODED)
def test_half_a_million_random_weights_equal_the_reference(fmt: str) -> None:
    rng = np.random.default_rng(5)
    x = gaussian(rng, 80, 6144)
    for importance in ("none", "heavy-tailed"):
        imatrix = make_importance(importance, rng, x.shape[1])
        got = quants.quantize(x, fmt, imatrix, reference=True)
        assert_same_bits(got, ggml.quantize(x, fmt, imatrix), importance)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", RULED)
def test_every_code_that_ggml_writes_is_nearest(fmt: str, kind: str, reference: bool) -> None:
    """The claim behind the verdict `rounded`, on native bytes, whatever imatrix chose the scales."""
    rng = np.random.default_rng(6)
    x = make_weights(kind, rng, 12, 2048)
    for importance in IMPORTANCES:
        raw = ggml.quantize(x, fmt, make_importance(importance, rng, x.shape[1]))
        found = quants.nearest(raw, fmt, x, reference=reference)
        assert not found["off"].any() and not found["far"].any(), (importance, found[found["off"] > 0][:3])


@pytest.mark.parametrize("importance", ["none", "uniform", "heavy-tailed"])
@pytest.mark.parametrize("fmt", RULED)
def test_every_code_that_ggml_writes_is_nearest_on_many_weights(fmt: str, importance: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(2):
        x = gaussian(rng, 100, 6144, 0.02)
        raw = ggml.quantize(x, fmt, make_importance(importance, rng, x.shape[1]))
        assert not quants.nearest(raw, fmt, x)["off"].any()


@pytest.mark.parametrize("fmt", CODED)
def test_each_expert_is_weighed_by_its_own_imatrix_row(fmt: str) -> None:
    rng = np.random.default_rng(8)
    x = gaussian(rng, 15, 512).reshape(3, 5, 512)
    imatrix = rng.uniform(0.01, 5, (3, 512)).astype(np.float32)
    want = np.stack([ggml.quantize(x[e], fmt, imatrix[e]) for e in range(3)])
    for reference in (False, True):
        assert_same_bits(quants.quantize(x, fmt, imatrix, reference=reference), want, fmt)
