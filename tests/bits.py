"""Equality as refimpl means it: the same bits, with any NaN equal to any other."""

import numpy as np
from numpy.typing import ArrayLike


def assert_same_bits(got: ArrayLike, want: ArrayLike, what: str = "") -> None:
    """Raise AssertionError unless both arrays agree in dtype, shape and every bit; NaN payloads are free."""
    got, want = np.asarray(got), np.asarray(want)
    shapes = (got.dtype, got.shape), (want.dtype, want.shape)
    assert shapes[0] == shapes[1], f"{what}: {shapes}"
    if got.dtype.names:
        for name in got.dtype.names:
            assert_same_bits(got[name], want[name], f"{what}.{name}")
        return
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    differ = np.atleast_1d(got).view(f"u{got.itemsize}") != np.atleast_1d(want).view(f"u{got.itemsize}")
    if got.dtype.kind == "f":
        differ &= ~np.atleast_1d(np.isnan(got) & np.isnan(want))
    at = np.argwhere(differ)
    assert not len(at), f"{what}: {len(at)} of {differ.size} differ, first at {tuple(at[0])}: " + " ".join(
        str(a.reshape(differ.shape)[tuple(at[0])]) for a in (got, want)
    )
