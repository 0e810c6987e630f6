"""The codebook formats against ggml: every decoded bit, every encoded byte, and that it aborts where we refuse.

CODEBOOK_WEIGHTS sets how many random weights of each format are encoded by ggml (which is slow) and compared.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from refimpl import quants
from refimpl.quants.formats import CODEBOOKS, Format
from refimpl.quants.grids import find_neighbours, load_grid
from tests.bits import assert_same_bits
from tests.weights import IMPORTANCES, KINDS, gaussian, make_importance, make_weights
from tools import ggml

Array = np.ndarray[Any, Any]
WEIGHTS = int(os.environ.get("CODEBOOK_WEIGHTS", 100_000))
BY_FORMAT = pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)


def encode_portably(x: Array, fmt: Format, imatrix: Array | None) -> Array:
    """Encode by X_jit, which the public function passes by where a tuned kernel exists."""
    out = np.full((len(x), fmt.row_bytes(x.shape[1])), 0xAA, np.uint8)
    weights = np.empty((0, x.shape[1]), np.float32) if imatrix is None else imatrix[None]
    import_module(f"refimpl.quants.{fmt.name}_jit").quantize(x, weights, len(x), out)
    return out


def list_importances(fmt: Format, rng: np.random.Generator, n: int) -> Iterator[tuple[str, Array | None]]:
    for name in IMPORTANCES:
        imatrix = make_importance(name, rng, n)
        if imatrix is not None or not fmt.needy:
            yield name, imatrix


@BY_FORMAT
def test_ten_million_weights_decode_as_ggml_decodes_them(fmt: Format) -> None:
    """Random bytes: every point, scale and sign, NaN and infinite steps among them."""
    rng = np.random.default_rng([1, fmt.id])
    for reference in (False, True):
        for _ in range(10 if not reference else 1):
            raw = rng.integers(0, 256, (512, 8 * fmt.block.itemsize), dtype=np.uint8)
            want = ggml.dequantize(raw, fmt.name)
            assert_same_bits(quants.dequantize(raw, fmt, reference=reference), want, fmt.name)


@BY_FORMAT
def test_bytes_equal_ggml_for_every_kind_of_weights_and_imatrix(fmt: Format) -> None:
    """By all texts; the reference of IQ1 is slow and takes a third of the kinds. Refused weights: see below."""
    rng, refused = np.random.default_rng([2, fmt.id]), 0
    for k, kind in enumerate(KINDS):
        x = make_weights(kind, rng, 2, 512)
        for importance, imatrix in list_importances(fmt, rng, x.shape[1]):
            what = f"{fmt.name} {kind} {importance}"
            by_reference = not fmt.name.startswith("iq1") or k % 3 == 0
            try:
                got = quants.quantize(x, fmt, imatrix)
            except quants.TooLarge as error:
                refused += 1
                for encode in (encode_portably, *[quants.quantize] * by_reference):
                    options = {"reference": True} if encode is quants.quantize else {}
                    with pytest.raises((quants.TooLarge, quants.Refused)) as caught:
                        encode(x, fmt, imatrix, **options)
                    block = getattr(caught.value, "block", None)
                    if block is None:
                        assert (caught.value.row, caught.value.column) == (error.row, error.column), what
                continue
            want = ggml.quantize(x, fmt.name, imatrix)
            assert_same_bits(got, want, what)
            assert_same_bits(encode_portably(x, fmt, imatrix), want, f"{what} portable")
            assert not quants.nearest(want, fmt, x)["off"].any(), f"{what}: no imatrix is said to explain it"
            if by_reference:
                assert_same_bits(quants.quantize(x, fmt, imatrix, reference=True), want, f"{what} reference")
    assert (refused > 0) == (fmt.name not in ("iq2_xxs", "iq1_s")) and refused < 40


@BY_FORMAT
def test_many_random_weights_equal_ggml(fmt: Format) -> None:
    """Half of them as BF16 sources have them; the imatrix ordinary, with holes, heavy-tailed or (if it may) none."""
    rng = np.random.default_rng([3, fmt.id])
    kinds, n, done = ["uniform", "partly-zero", "heavy-tailed", *["none"] * (not fmt.needy)], 4096, 0
    while done < WEIGHTS:
        x = gaussian(rng, 4, n) * (10.0 ** rng.uniform(-3, 1, (4, 1))).astype(np.float32)
        if rng.random() < 0.3:
            x = (rng.standard_t(3, x.shape) * 0.02).astype(np.float32)
        if rng.random() < 0.5:
            x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
        imatrix = make_importance(kinds[done // x.size % len(kinds)], rng, n)
        want = ggml.quantize(x, fmt.name, imatrix)
        assert_same_bits(quants.quantize(x, fmt, imatrix), want, fmt.name)
        assert not quants.nearest(want, fmt, x)["off"].any()
        if done % (8 * x.size) == 0:
            assert_same_bits(encode_portably(x, fmt, imatrix), want, f"{fmt.name} portable")
        done += x.size


@BY_FORMAT
def test_each_expert_is_weighed_by_its_own_imatrix_row(fmt: Format) -> None:
    rng = np.random.default_rng(4)
    x = gaussian(rng, 6, 512).reshape(3, 2, 512)
    imatrix = rng.uniform(0.01, 5, (3, 512)).astype(np.float32)
    want = np.stack([ggml.quantize(x[e], fmt.name, imatrix[e]) for e in range(3)])
    for reference in (False, True):
        assert_same_bits(quants.quantize(x, fmt, imatrix, reference=reference), want, fmt.name)


CHILD = """
import sys, numpy as np
from tools import ggml
x, imatrix = (np.frombuffer(bytes.fromhex(a), np.float32) for a in sys.argv[2:])
ggml.quantize(x.reshape(1, -1), sys.argv[1], imatrix if imatrix.size else None)
"""


@pytest.mark.parametrize("size", [1e19, 1e30])
@pytest.mark.parametrize("name", ["iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"])
def test_ggml_aborts_where_we_refuse(name: str, size: float) -> None:
    """In a process of its own. The sum of squares overflows, and with it the error of every point.

    IQ1_M reads beyond its arrays in such a case (squares of 3e38 as weights), so what ggml does there is nobody's
    guess; IQ2_XXS and IQ1_S write zeros.
    """
    x, imatrix = gaussian(np.random.default_rng(5), 1, 256) * np.float32(size), np.ones(256, np.float32)
    with pytest.raises(quants.TooLarge, match="row 0, column 0"):
        quants.quantize(x, name, imatrix)
    words = [name, x.tobytes().hex(), imatrix.tobytes().hex()]
    run = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    assert run.returncode == -signal.SIGABRT, run.stderr
    assert "GGML_ASSERT" in run.stderr


@pytest.mark.parametrize("fmt", [f for f in CODEBOOKS if f.needy], ids=lambda fmt: fmt.name)
def test_an_imatrix_is_needed_where_ggml_says_so(fmt: Format) -> None:
    ask = ggml.LIBRARY.ggml_quantize_requires_imatrix
    ask.restype, ask.argtypes = ctypes.c_bool, [ctypes.c_int]
    assert [f for f in CODEBOOKS if ask(f.id)] == [f for f in CODEBOOKS if f.needy]
    with pytest.raises(ValueError, match=f"{fmt.name} needs an imatrix"):
        quants.quantize(np.ones((1, 256), np.float32), fmt)


def test_the_grids_are_the_ones_inside_the_library() -> None:
    """Each point, decoded by ggml: gguf's data are the library's."""
    for fmt in CODEBOOKS:
        if fmt.name == "iq3_xxs":
            raw = np.zeros((4, fmt.block.itemsize), np.uint8)
            raw.view(fmt.block)["d"] = 4  # 4 * 0.5 * 0.5 = 1
            raw.view(fmt.block)["qs"][:, 0, :64] = np.arange(256).reshape(4, 64)
            got = ggml.dequantize(raw, fmt.name).reshape(256, 4)
            assert (got == load_grid(fmt.name).points).all()
    assert (find_neighbours("iq3_xxs").number >= 0).sum() == 256
