"""The benchmark's rows for the older 4 and 5-bit formats and for the k-quants of 2, 3 and 5 bits."""

from collections.abc import Callable, Iterator

import numpy as np

from tools import ggml
from tools.bench_rows import COLUMNS, Row, decode_row, encode_row

GOALS = (("q5_k", 8.0), ("q2_k", 8.0), ("q3_k", 8.0), ("q4_0", 3.0), ("q4_1", 3.0), ("q5_1", 3.0))


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """Every row, to be built only when its turn comes. `rows` of 6,144 weights are encoded; decoding takes more."""
    library = ggml.LIBRARY
    importance = np.random.default_rng(1).uniform(0.1, 3, COLUMNS).astype(np.float32)
    for fmt, goal in GOALS:
        yield lambda fmt=fmt, goal=goal: encode_row(library, fmt, goal, rows // 4)
        yield lambda fmt=fmt, goal=goal: encode_row(library, fmt, goal, rows // 4, importance)
    for fmt, _ in GOALS:
        yield lambda fmt=fmt: decode_row(library, fmt, 1.1, 16 * rows)
