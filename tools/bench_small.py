"""The benchmark's rows for the 4-bit floats and levels and for the ternary and binary formats."""

from collections.abc import Callable, Iterator

import numpy as np

from tools import ggml
from tools.bench_rows import COLUMNS, Row, compare_row, decode_row, encode_row

FOUR_BITS = ("iq4_nl", "iq4_xs", "mxfp4", "nvfp4")
FEWER = ("tq1_0", "tq2_0", "q1_0", "q2_0")


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """Every row, to be built only when its turn comes. `rows` of 6,144 weights are encoded; decoding takes more."""
    library, many = ggml.LIBRARY, 16 * rows
    importance = np.random.default_rng(1).uniform(0.1, 3, COLUMNS).astype(np.float32)
    for fmt in FOUR_BITS:
        yield lambda fmt=fmt: encode_row(library, fmt, 3.0, rows // 4)
    for fmt in ("iq4_nl", "iq4_xs"):
        yield lambda fmt=fmt: encode_row(library, fmt, 3.0, rows // 4, importance)
    for fmt in FEWER:
        yield lambda fmt=fmt: encode_row(library, fmt, None, rows)
    for fmt in FOUR_BITS + FEWER:
        yield lambda fmt=fmt: decode_row(library, fmt, 1.1, many)
    for fmt in FOUR_BITS + FEWER:
        yield lambda fmt=fmt: compare_row(library, fmt, 10.0, many // 2)
