"""The codecs against the vectors of golden/conformance/, which ggml has confirmed: every text, without its library."""

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
Case = dict[str, str]


@cache
def read_index() -> list[Case]:
    """The lines of index.tsv."""
    head, *lines = (GOLDEN / "conformance" / "index.tsv").read_text().splitlines()
    return [dict(zip(head.removeprefix("#").split("\t"), line.split("\t"), strict=True)) for line in lines]


def load(case: Case, role: str, dtype: Any) -> Array:
    """An input of a case (x, y) or what it must give (want)."""
    file, offset, size = (case[f"{role}_{what}"] for what in ("file", "offset", "bytes"))
    data = np.fromfile(GOLDEN / "conformance" / file, np.uint8, int(size), offset=int(offset))
    return data.view(dtype).reshape(int(case["rows"]), -1) if role != "y" else data.view(dtype)


def select(op: str, fmt: str, *texts: str) -> list[Case]:
    return [c for c in read_index() if (c["op"], c["format"]) == (op, fmt) and c["text"] in texts]


@cache
def find_cases(fmt: str) -> list[tuple[str, Array, Array | None, Array]]:
    """Weights of all kinds [rows, n], imatrix [n] or None, and the bytes that ggml writes for them."""
    return [
        (
            case["id"],
            load(case, "x", np.float32),
            load(case, "y", np.float32) if case["y_file"] != "-" else None,
            load(case, "want", np.uint8),
        )
        for case in select("encode", fmt, "strict")
    ]


def find_blocks(fmt: str) -> list[tuple[str, Array, Array]]:
    """Rows of blocks and the weights that they stand for."""
    return [
        (c["id"], load(c, "x", np.uint8), load(c, "want", np.float32)) for c in select("decode", fmt, "any")
    ]


def test_the_files_are_the_ones_of_the_manifest() -> None:
    entries = list(manifest.files(manifest.read(GOLDEN)["conformance"]))
    on_disk = sorted(f"conformance/{path.name}" for path in (GOLDEN / "conformance").iterdir())
    assert sorted(e["file"] for e in entries) == on_disk
    assert {f"conformance/{name}.safetensors" for name in formats if name != "f32"} <= set(on_disk)
    for entry in entries:
        data = (GOLDEN / entry["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"]), entry[
            "file"
        ]


def test_the_vectors_cover_every_kind_and_differ_by_imatrix() -> None:
    for fmt in FORMATS:
        cases = find_cases(fmt)
        assert max(len(x) for _, x, _, _ in cases) >= 24, fmt
        weighed = [(x.shape, want.tobytes()) for _, x, imatrix, want in cases if imatrix is not None]
        assert len(weighed) == (9 if formats[fmt].weighed and fmt in CODED else 0), fmt
        assert not weighed or len({want for _, want in weighed}) >= 6, fmt
        assert len(find_blocks(fmt)) == 4, fmt


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_encoding_gives_the_bytes_of_ggml(fmt: str, reference: bool) -> None:
    for what, x, imatrix, want in find_cases(fmt):
        assert_same_bits(quants.quantize(x, fmt, imatrix, reference=reference), want, what)


@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_decoding_gives_the_weights_of_ggml(fmt: str, reference: bool) -> None:
    for what, raw, want in find_blocks(fmt):
        assert_same_bits(quants.dequantize(raw, fmt, reference=reference), want, what)


@pytest.mark.portable
@pytest.mark.parametrize("fmt", CODED)
def test_the_portable_kernels_give_the_same(fmt: str) -> None:
    """Straight to X_jit, which the public functions pass by where a tuned kernel exists."""
    kernel = importlib.import_module(f"refimpl.quants.{fmt}_jit")
    build = [find_build("strict", fmt)] if fmt in SITED else []
    with np.errstate(all="ignore"):
        for i, (what, rows, imatrix, wanted) in enumerate(find_cases(fmt)):
            some = slice(i % 8 if len(rows) > 8 else 0, None, 8) if numba.config.DISABLE_JIT else slice(None)
            x, want = rows[some], wanted[some]
            out = np.full(want.shape, 0xAA, np.uint8)
            weights = np.empty((0, x.shape[1]), np.float32) if imatrix is None else imatrix[None]
            kernel.quantize(x, weights, len(x), out, *build)
            assert_same_bits(out, want, what)
        for what, raw, decoded in find_blocks(fmt):
            y = np.full(decoded.shape, np.nan, np.float32)
            kernel.dequantize(raw, y)
            assert_same_bits(y, decoded, what)


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
        d = np.concatenate(
            [want.view(find_codec(fmt).block)["d"].reshape(-1) for *_, want in find_cases(fmt)]
        )
        assert np.isinf(d).any() and (d == 0).any(), fmt
        if fmt == "q5_0":
            assert np.isnan(d).any()
