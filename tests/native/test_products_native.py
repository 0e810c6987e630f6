"""Every product that llama.cpp computes in a quantized model, on the inputs that it recorded, to the bit."""

from collections import Counter
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

import refimpl
from refimpl.dots import PARTNERS, encode, matmul
from refimpl.files import gguf
from refimpl.model.weights import TILED
from refimpl.quants.formats import CODEBOOKS, find_codec
from tests.dot_inputs import draw_weights
from tools import ggml_dots
from tools.llama_run import Llama

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
IDS = np.random.default_rng(2).integers(0, 1256, 40).tolist()
FLOATS = {
    "ffn_moe_logits",
    "indexer_weights",
}  # the router is float32 in every file, the indexer's proj in one


def with_codebooks(path):
    """The protected model with blocks of any bytes of the codebook types in its feed-forward layers."""
    rng, tensors, kinds = np.random.default_rng(3), [], cycle(CODEBOOKS)
    with refimpl.open(TINY / "protected.gguf") as file:
        for name, t in file.tensors.items():
            raw, kind = file.read(name), t.format
            if "ffn" in name and t.format.name in PARTNERS:
                kind = next(kinds)
                rows = np.prod(t.shape[:-1], dtype=int)
                raw = draw_weights(rng, kind.name, int(rows), t.shape[-1])
            tensors.append((name, t.shape, kind, [raw]))
        gguf.write(path, file.metadata.typed(()), tensors)
    return path


@pytest.fixture(scope="module", params=["stock", "protected", "codebooks"])
def source(request, tmp_path_factory):
    path = TINY / f"{request.param}.gguf"
    if request.param == "codebooks":
        path = with_codebooks(tmp_path_factory.mktemp("model") / path.name)
    with refimpl.open(path) as file:
        yield file


def record(source, tokens):
    llama = Llama(source.path, watch=True)
    llama.decode(IDS[:tokens])
    llama.close()
    return llama.products


def parts(source, product):
    """(weights [m, bytes], tokens [t, n], what came out [t, m]) of each matrix that a product multiplies with."""
    raw = source.read(product.weight).reshape(*source.tensors[product.weight].shape[:-1], -1)
    x, y = product.inputs, product.outputs
    if product.chosen is None:  # one matrix, or one for each head
        for h, matrix in enumerate(raw if raw.ndim == 3 else raw[None]):
            yield matrix, x[0, h].reshape(-1, x.shape[-1]), y[0, h].reshape(-1, y.shape[-1])
        return
    chosen = product.chosen[0, 0]
    for e in np.unique(chosen):
        tokens, slots = np.nonzero(chosen == e)
        yield raw[e], x[0, tokens, slots if x.shape[2] > 1 else 0], y[0, tokens, slots]


def replay(source, product, order=None):
    """Do refimpl's bits equal llama.cpp's? order: by default the one that ggml takes for so many tokens."""
    fmt = source.tensors[product.weight].format.name
    for raw, x, y in parts(source, product):
        takes = order or ("tiled" if len(x) >= TILED else "avx2")
        got = matmul(raw, fmt, np.ascontiguousarray(x), PARTNERS[fmt], takes)
        if not np.array_equal(got.view(np.uint32), np.ascontiguousarray(y).view(np.uint32)):
            return False
    return True


@pytest.mark.parametrize("tokens", [1, 7, 8, 40])
def test_every_quantized_product_has_ggml_s_bits(source, tokens):
    """Up to 7 tokens ggml takes vec_dot; from 8 tokens that meet one matrix, or one expert, its tiles."""
    products = record(source, tokens)
    quantized = [p for p in products if source.tensors[p.weight].format.name in PARTNERS]
    assert {p.name.partition("-")[0] for p in products if p not in quantized} <= FLOATS
    counts = Counter(replay(source, p) for p in quantized)
    print(
        f"{Path(source.path).name}, {tokens} tokens: {counts[True]} of {len(quantized)} products bit for bit"
    )
    assert counts == {True: len(quantized)} and len(quantized) >= 43
    wrong = Counter(replay(source, p, "generic") for p in quantized)
    assert wrong[False] > len(quantized) // 2  # must fail: the textbook's order is not what ggml computes


def test_the_generic_symbols_on_recorded_inputs(source):
    """ggml_vec_dot_*_generic, as gcc compiled it, is the order generic-fma: 64 rows of each product."""
    products = record(source, 3)
    quantized = [p for p in products if source.tensors[p.weight].format.name in PARTNERS]
    for p in quantized:
        fmt = source.tensors[p.weight].format.name
        raw, x, _ = next(parts(source, p))
        raw, x = np.ascontiguousarray(raw[:64]), np.ascontiguousarray(x)
        want = ggml_dots.multiply(raw, fmt, encode(x, PARTNERS[fmt]), PARTNERS[fmt], x.shape[1], "_generic")
        got, plain = (matmul(raw, fmt, x, PARTNERS[fmt], order) for order in ("generic-fma", "generic"))
        assert np.array_equal(got.view(np.uint32), want.view(np.uint32)), p.name
        # must fail: unfused it is something else, wherever more than one block is added up
        several = x.shape[1] > find_codec(fmt).weights
        assert np.array_equal(plain.view(np.uint32), want.view(np.uint32)) is not several, p.name
