"""Every build's bytes, as compilers wrote them; and that the bytes would show a wrong choice at a site."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl import quants
from refimpl.arith import builds
from refimpl.arith.builds import BUILDS, FUSED, ROUNDED, SITED, SITES, STRICT, Build, find_build
from refimpl.arith.fma import fma
from refimpl.quants.formats import formats
from tests.bits import assert_same_bits
from tools.make_builds import encode, flip

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FACTS = json.loads((GOLDEN / "builds.json").read_text())
FORMATS = sorted({key.split("/")[1] for key in FACTS["digests"]} & set(formats))
Array = np.ndarray[Any, Any]


@cache
def load() -> dict[str, Array]:
    with np.load(GOLDEN / "builds.npz") as file:
        return {name.replace(".", "/"): file[name] for name in file.files}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("flavour", ["plain", "imatrix"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_bytes_are_the_compilers(fmt, flavour, build):
    """The kernel writes them all; the slower reference every fourth row of them."""
    for kind in ("gauss", "mixed"):
        x, imatrix = load()[f"{kind}/weights_bf16"], load()[f"{kind}/imatrix"]
        weights = imatrix if flavour == "imatrix" else None
        raw = quants.quantize(x, fmt, weights, build)
        digest = hashlib.sha256(raw.tobytes()).hexdigest()
        assert digest == FACTS["digests"][f"{kind}/{fmt}/{flavour}/{build}"], kind
        some = slice(BUILDS.index(build), None, 4)
        assert_same_bits(quants.quantize(x[some], fmt, weights, build, reference=True), raw[some], kind)


def test_the_archive_tells_the_builds_apart():
    for fmt in ("q2_k", "q4_k", "q5_k", "q6_k", "q4_0"):
        for build in BUILDS[1:]:
            flavours = ("plain", "imatrix")
            odd = sum(FACTS["differ"][f"{k}/{fmt}/{f}/{build}"] for k in ("gauss", "mixed") for f in flavours)
            assert odd > 0 or (fmt, build) == ("q4_0", "clang-arm64"), (fmt, build)


@pytest.mark.parametrize("name", FACTS["witnesses"])
def test_a_flipped_site_changes_the_bytes(name):
    """The must-fail control: the policy with one choice turned writes another row than the compiler did."""
    build, site = name.split("/")
    fmt, flavour, kind, row = FACTS["witnesses"][name]
    part = {key: value[row : row + 1] if value.ndim == 2 else value for key, value in load().items()}
    true = find_build(build, fmt)
    want = encode(part, kind, fmt, flavour, true)
    for other in flip(true, site):
        assert not np.array_equal(encode(part, kind, fmt, flavour, other), want)


def test_every_site_has_a_witness_or_is_named_as_unproven():
    for build in BUILDS[1:]:
        proven = {site for site in SITES if f"{build}/{site}" in FACTS["witnesses"]}
        assert proven.isdisjoint(FACTS["unproven"][build])
        assert proven | set(FACTS["unproven"][build]) == set(SITES)
        assert {"REF_RND", "Q3_NI0", "QX_SLX1", "QK_SUMX", "QK_NI1", "QK_D", "ROW_NISC", "NL_SQX1"} <= proven


def test_x_squared_is_exact_in_bf16_so_the_archive_cannot_show_its_sites():
    assert {"ROW_SUMX2", "QP_ISC", "QX_ISC"} <= set(FACTS["unproven"]["gcc-fma"])


def test_sums_of_squares_of_float32_show_row_sumx2():
    """What bf16 cannot show: the site is alive, and only there do strict and strict with it fused part."""
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    from refimpl.quants import q4_k

    fused = STRICT.replace(ROW_SUMX2=FUSED)
    assert not np.array_equal(q4_k.weigh_plain(x[:, :32], fused), q4_k.weigh_plain(x[:, :32], STRICT))


def test_a_format_that_no_build_was_proven_for_is_refused():
    unknown = next(iter(fmt for fmt in formats if fmt not in builds.SITED | builds.SITELESS), None)
    with pytest.raises(ValueError, match="is not supported"):
        find_build("msvc", "q4_k")
    with pytest.raises(ValueError, match="not known"):
        find_build("gcc-fma", unknown or "iq9_z")
    assert find_build("strict", unknown or "iq9_z").forms == STRICT.forms


def test_a_site_that_does_not_exist_is_an_error():
    with pytest.raises(AttributeError, match="QK_NOPE"):
        _ = STRICT.QK_NOPE


def test_builds_with_the_same_forms_share_their_kernels():
    from refimpl.arith.simd_fused import _find_type

    assert _find_type(Build("a copy", STRICT.forms)) == _find_type(STRICT)
    assert _find_type(find_build("gcc-fma", "q4_k")) != _find_type(STRICT)
    assert _find_type(find_build("clang-arm64", "q5_0")) != _find_type(find_build("clang-arm64", "q4_k"))


def test_the_forms_of_a_product():
    a, b, c = (np.float32([v]) for v in (1 + 2**-12, 1 + 2**-12, -1))
    from refimpl.arith import fused

    exact = fma(a, b, c)
    assert fused.add_product(FUSED, c, a, b) == exact != fused.add_product(ROUNDED, c, a, b)
    assert fused.subtract_product(FUSED, -c, a, b) == -exact != fused.subtract_product(ROUNDED, -c, a, b)
    first, second = (fused.subtract_products(form, a, b, a, b) for form in (FUSED, builds.SECOND))
    assert (
        first == 2.0**-24 == -second
    )  # one of the two equal products keeps what rounding takes from the other
    assert SITED and fused.subtract_products(ROUNDED, a, b, a, b) == 0
