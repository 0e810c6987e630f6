"""The comparison of twins can fail: each classic way to get a quantizer almost right is caught by it.

A mutant is the text of a kernel module with one slip in it, compiled as the kernels are. Decoding Q4_K and
Q6_K is exact in float32 whatever one does wrong, so the slips sit in scale searches and in ordered sums.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from refimpl.arith.builds import ROUNDED, STRICT
from refimpl.arith.sums import add_lanes, add_up
from refimpl.quants import deviation, deviation_jit, q4_k, q5_0, q6_k, search, search_jit
from tests.bits import assert_same_bits
from tests.weights import gaussian

RNG = np.random.default_rng(1)
GROUPS = gaussian(RNG, 3000, 32)
GROUPS[::3] = np.round(GROUPS[::3] * 4) / 4  # many quotients close to a tie
WEIGHTS = np.abs(gaussian(RNG, 3000, 32)) + np.float32(0.1)


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """One rounding for a product and a sum, as a contracting compiler emits it."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


def mutate(module: ModuleType, *slips: tuple[str, str], **options: Any) -> ModuleType:
    """Compile a kernel module's text after replacements, each of which must match."""
    source = inspect.getsource(module)
    for right, wrong in slips:
        assert right in source, f"the tripwire no longer finds {right!r}"
        source = source.replace(right, wrong)
    mutant = ModuleType(f"mutant_{module.__name__}")
    mutant.__dict__["fma"] = fma
    source = source.replace("from refimpl.arith.jit import jit\n", "")
    mutant.__dict__["jit"] = lambda f: numba.njit(f, error_model="numpy", **options)
    exec(compile(source, mutant.__name__, "exec"), mutant.__dict__)
    return mutant


def run_fit(module: ModuleType, name: str, *arguments: Any, scratch: int = 0) -> Any:
    """Run one search of search_jit or of a mutant over all groups."""
    codes = np.zeros(GROUPS.shape, np.uint8)
    spare = [np.zeros(32, np.uint8)] * scratch
    fit = getattr(module, name)
    found = [fit(GROUPS[i], WEIGHTS[i], *arguments, codes[i], *spare, STRICT) for i in range(len(GROUPS))]
    return np.float32(found), codes


def fit_both(module: ModuleType) -> None:
    """Compare all searches of a module with the reference. Raises AssertionError where they differ."""
    start, step = np.float32(-1), np.float32(0.1)
    scales, codes = run_fit(module, "fit_scale_min", 15, start, step, 20, scratch=1)
    scale, low, want = search.fit_scale_min(GROUPS, WEIGHTS, 15, -1.0, 0.1, 20, STRICT)
    assert_same_bits(scales, np.stack([scale, low], 1))
    assert_same_bits(codes, want.astype(np.uint8))
    # An error rarely decides between two trials, so compare it as such.
    errors = [
        module.measure_error(GROUPS[i], WEIGHTS[i], scale[i], low[i], codes[i], ROUNDED, ROUNDED)
        for i in range(len(GROUPS))
    ]
    wanted = search.measure_error(GROUPS, WEIGHTS, scale, low, want, ROUNDED, ROUNDED)
    assert_same_bits(np.float32(errors), wanted)
    scales, codes = run_fit(module, "fit_scale", 32)
    scale, want = search.fit_scale(GROUPS, WEIGHTS, 32, STRICT)
    assert_same_bits(scales, scale)
    assert_same_bits(codes, want.astype(np.uint8))


ROUND = "clip(nearest_product(build.QK_NI1, inverse, x[i] - low), 0, top)"
LOOP = f"for i in range(x.size):\n            code = {ROUND}"
ERROR, SQUARE = "error = add_product(err, error, weights[i], ", "abs(off) if linear else off * off"
SXL = "sum_xl = add_product(build.QK_SXL, sum_xl, weights[i] * q, x[i])"
BITS = "np.float32(fma(inverse, x[i] - low, np.float32(12582912))).view(np.int32)"
SLIPS: dict[str, tuple[str, str]] = {
    "sums run downwards": (LOOP, LOOP.replace("range(x.size)", "range(x.size - 1, -1, -1)")),
    "a float64 accumulator": (f"{ERROR}{SQUARE})", f"error = np.float64(error) + weights[i] * ({SQUARE})"),
    "a float64 product": (
        "sum_lx = add_product(slx, sum_lx, weights[i] * x[i], q)",
        "sum_lx = np.float32(sum_lx + np.float64(weights[i]) * x[i] * q)",
    ),
    "an integer that promotes": (SXL, "sum_xl = np.float32(sum_xl + weights[i] * code * x[i])"),
    "products reassociated": (
        "sum_l2, weights[i] * q, q)\n            sum_xl",
        "sum_l2, weights[i], q * q)\n            sum_xl",
    ),
    "a contracted sum": (SXL, "sum_xl = fma(weights[i] * q, x[i], sum_xl)"),
    "a contracted error": (f"{ERROR}{SQUARE})", f"error = fma(weights[i], {SQUARE}, error)"),
    "a contracted rounding": (ROUND, f"max(0, min(top, (int({BITS}) & 0x7FFFFF) - 0x400000))"),
    "a contracted determinant": (
        "subtract_products(build.QK_D, sum_w, sum_l2, sum_l, sum_l)",
        "fma(sum_w, sum_l2, -(sum_l * sum_l))",
    ),
    "ties rounded up": (ROUND, "clip(int(np.floor(inverse * (x[i] - low) + np.float32(0.5))), 0, top)"),
    "the spread is not renewed": ("levels / (high - low)", "levels / (high - x.min())"),
}


def test_the_unchanged_text_passes() -> None:
    fit_both(mutate(search_jit))


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_a_scale_search_is_caught(slip: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        fit_both(mutate(search_jit, SLIPS[slip]))


def test_fastmath_is_caught() -> None:
    with pytest.raises(AssertionError, match="differ"):
        fit_both(mutate(search_jit, fastmath=True))


def compare_rows(module: ModuleType) -> None:
    """Compare the error sums of a module with the reference. Raises AssertionError where they differ."""
    x = gaussian(np.random.default_rng(2), 40, 1024)
    raw = q4_k.quantize(x).view(np.uint8)
    y = q4_k.dequantize(raw.view(q4_k.Q4_K.block).reshape(-1)).reshape(x.shape)
    errors, squares = deviation.compare(y, x, 256)[:2]
    sse, sums = np.zeros(errors.shape), np.zeros((len(x), 3))
    rest = np.zeros(len(x), np.float32), np.zeros(len(x), np.int32)
    module.compare(y, np.empty((0, 0), np.uint16), x, 256, sse, sums, *rest)
    assert_same_bits(sse, errors)
    assert_same_bits(sums, deviation.summarize(errors, squares)[0])


SUM_SLIPS = {
    "lanes folded in another order": ("lanes[k] += lanes[k + half]", "lanes[0] += lanes[k + half]"),
    "float32 squares": ("np.float64(d) * np.float64(d)", "np.float64(d * d)"),
    "a float64 difference": (
        "d = y[start + k] - s[start + k]",
        "d = np.float64(y[start + k]) - s[start + k]",
    ),
    "float32 sums": ("sums[r, 0] += sse", "sums[r, 0] = np.float32(sums[r, 0] + sse)"),
    "a row left out": ("for r in range(y.shape[0])", "for r in range(y.shape[0] - 1)"),
}


def test_the_unchanged_error_sums_pass() -> None:
    compare_rows(mutate(deviation_jit))


@pytest.mark.parametrize("slip", SUM_SLIPS)
def test_a_slip_in_the_error_sums_is_caught(slip: str) -> None:
    with pytest.raises(AssertionError, match="differ"):
        compare_rows(mutate(deviation_jit, SUM_SLIPS[slip]))


@pytest.mark.parametrize(
    "add", [lambda t: t.sum(-1), lambda t: t.astype(np.float64).sum(-1).astype(np.float32)]
)
def test_numpy_sums_are_not_ordered_sums(add: Callable[[Any], Any]) -> None:
    terms = gaussian(RNG, 300, 256)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(add(terms), add_up(terms))


def test_lanes_are_not_a_plain_sum() -> None:
    terms = RNG.standard_normal((300, 256))
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(terms.sum(-1), add_lanes(terms))


@pytest.mark.parametrize("fmt", [q4_k, q5_0, q6_k])
def test_a_byte_that_a_kernel_leaves_out_is_caught(fmt: ModuleType) -> None:
    x = gaussian(RNG, 1, 256)
    want = fmt.quantize(x).view(np.uint8)
    for at in range(want.size):
        got = want.copy()
        got[0, at] = 0xAA if want[0, at] != 0xAA else 0x55
        with pytest.raises(AssertionError, match="1 of"):
            assert_same_bits(got, want)


def test_equality_sees_the_sign_of_zero_and_forgives_nan_payloads_only() -> None:
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(np.float32([-0.0]), np.float32([0.0]))
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(np.float32([np.nan]), np.float32([1.0]))
    assert_same_bits(np.uint32([0x7FC00001]).view(np.float32), np.uint32([0xFFC00000]).view(np.float32))
    with pytest.raises(AssertionError):
        assert_same_bits(np.float64([1.0]), np.float32([1.0]))


def test_a_twin_without_a_case_fails_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import twins

    found = [*twins.find_twins(), "quants.q9_z_jit"]
    monkeypatch.setattr(twins, "find_twins", lambda: found)
    path = importlib.util.spec_from_file_location(
        "collected", inspect.getfile(twins).replace("twins", "test_twins")
    )
    assert path and path.loader
    with pytest.raises(LookupError, match="q9_z_jit has no case"):
        path.loader.exec_module(importlib.util.module_from_spec(path))


def test_the_leg_with_bounds_checks_does_check(tmp_path: Path) -> None:
    """Rows of 34 bytes cannot fill 64 weights: without the check the kernel would read past the end."""
    program = (
        "import numpy as np; from refimpl.quants import q8_0_jit as k;"
        "k.dequantize(np.zeros((1, 34), np.uint8), np.zeros((1, 64), np.float32))"
    )
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1 and "IndexError" in ran.stderr
