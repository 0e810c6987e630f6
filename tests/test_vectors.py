"""The codecs against what ggml wrote and read, kept in golden/vectors/: every text, without the native library."""

import hashlib
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from refimpl import quants
from refimpl.arith.builds import SITED, find_build
from refimpl.quants.formats import CODEBOOKS, find_codec, formats
from tests.bits import assert_same_bits
from tools import manifest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FORMATS = [name for name, fmt in formats.items() if name != "f32" and fmt not in CODEBOOKS]  # test_grids.py
CODED = [name for name in FORMATS if formats[name].weights > 1]
RULED = [name for name in CODED if formats[name].ruled]
Array = np.ndarray[Any, Any]


@cache
def load(name: str) -> dict[str, Array]:
    with np.load(GOLDEN / "vectors" / f"{name}.npz") as file:
        return dict(file)


def find_cases(fmt: str) -> list[tuple[str, Array, Array | None, Array]]:
    """Imatrix, weights of all kinds [rows, n], imatrix [n] or None, and the bytes that ggml wrote for them."""
    inputs, encoded = load("inputs"), load(fmt)["encoded"]
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1])
    names = inputs["importances"][: encoded.shape[1]]
    return [
        (
            f"{fmt}, imatrix {name}, rows in the order of {inputs['kinds'].tolist()}",
            x,
            inputs["imatrix"][i] if i else None,
            encoded[:, i].reshape(len(x), -1),
        )
        for i, name in enumerate(names)
    ]


def test_the_files_are_the_ones_of_the_manifest() -> None:
    entries = list(manifest.files(manifest.read(GOLDEN)["vectors"]))
    assert sorted(e["file"] for e in entries) == sorted(f"vectors/{n}.npz" for n in ["inputs", *FORMATS])
    for entry in entries:
        data = (GOLDEN / entry["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"]), entry[
            "file"
        ]


def test_the_vectors_cover_every_kind_and_differ_by_imatrix() -> None:
    inputs = load("inputs")
    assert inputs["importances"][0] == "none" and len(inputs["kinds"]) >= 20
    for fmt in (name for name in FORMATS if formats[name].weighed):
        encoded = load(fmt)["encoded"]
        assert encoded.shape[:2] == (len(inputs["kinds"]), len(inputs["importances"]))
        assert (encoded[0, 0] != encoded[0, 1]).any()


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_encoding_gives_the_bytes_of_ggml(fmt: str, reference: bool) -> None:
    for what, x, imatrix, want in find_cases(fmt):
        assert_same_bits(quants.quantize(x, fmt, imatrix, reference=reference), want, what)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_decoding_gives_the_weights_of_ggml(fmt: str, reference: bool) -> None:
    assert_same_bits(quants.dequantize(load(fmt)["raw"], fmt, reference=reference), load(fmt)["decoded"], fmt)


@pytest.mark.portable
@pytest.mark.parametrize("fmt", CODED)
def test_the_portable_kernels_give_the_same(fmt: str) -> None:
    """Straight to X_jit, which the public functions pass by where a tuned kernel exists."""
    kernel = importlib.import_module(f"refimpl.quants.{fmt}_jit")
    build = [find_build("strict", fmt)] if fmt in SITED else []
    with np.errstate(all="ignore"):
        for i, (what, rows, imatrix, wanted) in enumerate(find_cases(fmt)):
            some = slice(i, None, 8) if numba.config.DISABLE_JIT else slice(None)
            x, want = rows[some], wanted[some]
            out = np.full(want.shape, 0xAA, np.uint8)
            weights = np.empty((0, x.shape[1]), np.float32) if imatrix is None else imatrix[None]
            kernel.quantize(x, weights, len(x), out, *build)
            assert_same_bits(out, want, what)
        y = np.full(load(fmt)["decoded"].shape, np.nan, np.float32)
        kernel.dequantize(load(fmt)["raw"], y)
    assert_same_bits(y, load(fmt)["decoded"], fmt)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("fmt", RULED)
def test_every_code_that_ggml_wrote_is_nearest(fmt: str, reference: bool) -> None:
    """The claim behind the verdict `rounded`: whatever imatrix chose the scales, the codes follow from them."""
    for what, x, _, raw in find_cases(fmt):
        assert not quants.nearest(raw, fmt, x, reference=reference)["off"].any(), what


def test_some_steps_are_not_finite_and_some_are_zero() -> None:
    """The vectors hold what they are there for: overflowed, NaN and vanished scales."""
    for fmt in CODED:
        if find_codec(fmt).block.fields.get("d", (None,))[0] != np.dtype("<f2"):
            continue
        encoded = load(fmt)["encoded"]
        blocks = encoded.reshape(-1, encoded.shape[-1]).view(find_codec(fmt).block)
        assert np.isinf(blocks["d"]).any() and (blocks["d"] == 0).any(), fmt
    blocks = load("q5_0")["encoded"].reshape(-1, 22).view(find_codec("q5_0").block)
    assert np.isnan(blocks["d"]).any()
