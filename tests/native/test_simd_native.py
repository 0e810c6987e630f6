"""The vector codecs against ggml itself on the hardest weights, as a caller gets them: degenerate blocks included."""

import numpy as np
import pytest

from refimpl import quants
from tests.bits import assert_same_bits
from tests.hard_weights import draw_cases
from tools import ggml


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("fmt", ["q4_k", "q6_k", "q8_0", "q5_0"])
def test_vectors_write_and_read_the_bytes_of_ggml(fmt: str, seed: int) -> None:
    for name, x, imatrix in draw_cases(rows=4, n=1280, seed=seed):
        experts = np.split(x, max(1, len(imatrix)))
        want = np.concatenate(
            [ggml.quantize(part, fmt, *imatrix[e : e + 1]) for e, part in enumerate(experts)]
        )
        got = quants.quantize(np.stack(experts), fmt, imatrix if len(imatrix) else None).reshape(want.shape)
        assert_same_bits(got, want, name)
        assert_same_bits(quants.dequantize(want, fmt), ggml.dequantize(want, fmt), name)
