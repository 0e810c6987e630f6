"""Benchmark rows of the codebook formats: encode and decode against the native library."""

from collections.abc import Callable, Iterator

import numpy as np

from refimpl.quants.formats import CODEBOOKS
from tools import ggml
from tools.bench_rows import COLUMNS, Row, decode_row, encode_row


def list_rows(rows: int) -> Iterator[Callable[[], Row]]:
    """Every row, to be built only when its turn comes; ggml encodes these slowly, so few rows of weights do."""
    library, few = ggml.LIBRARY, max(1, rows // 16)
    importance = np.random.default_rng(1).uniform(0.1, 3, COLUMNS).astype(np.float32)
    for fmt in CODEBOOKS:
        library.ggml_quantize_init(fmt.id)
        yield lambda fmt=fmt: encode_row(library, fmt.name, 1.0, few, importance)
        if not fmt.needy:
            yield lambda fmt=fmt: encode_row(library, fmt.name, 1.0, few)
    for fmt in CODEBOOKS:
        yield lambda fmt=fmt: decode_row(library, fmt.name, 1.1, rows)
