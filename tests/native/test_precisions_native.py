"""Precisions of caches and of the indexer, against torch's fp8, ggml's blocks and llama.cpp's own run."""

import ctypes as c
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import refimpl
from refimpl.crosscheck.compare import compare
from refimpl.crosscheck.trace import Trace, read_trace
from refimpl.model import dsa
from refimpl.model.cache import rounded
from refimpl.model.config import conventions
from tests import float_gguf
from tools import ggml
from tools.llama_run import Llama

TINY = Path(__file__).resolve().parent.parent.parent / "golden" / "tiny-glm-dsa"
RANDOM = np.random.default_rng(11)


def draw(*shape):
    """Of every size; some vectors are zero, some have a largest value that makes the scale a power of two."""
    x = RANDOM.standard_normal(shape).astype(np.float32) * np.exp2(RANDOM.integers(-18, 12, (*shape[:-1], 1)))
    x[..., 0, :] = 0
    x[..., 1, :] = np.clip(x[..., 1, :], -56, 56)
    x[..., 1, 3] = 56
    return x.astype(np.float32)


def fp8(x, kind):
    """DeepSeek's act_quant as torch computes it: amax / 448, ue8m0 rounds that up to a power of two."""
    x = torch.tensor(x)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) * torch.tensor(1 / 448, dtype=torch.float32)
    if kind == "fp8-ue8m0":
        bits = scale.view(torch.int32)
        exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).int()
        scale = torch.pow(torch.tensor(2.0, dtype=torch.float64), exponent).float()
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("kind", ["fp8", "fp8-ue8m0"])
def test_the_indexer_s_fp8_codes_are_torch_s(kind):
    x = draw(40, 32, 128)
    codes, scale = fp8(x, kind)
    got, got_scale = dsa.to_fp8(x, kind)
    assert np.array_equal(got_scale, scale.numpy())
    assert np.array_equal(got.view(np.uint32), codes.float().numpy().view(np.uint32))
    assert (np.frexp(got_scale)[0] == 0.5).all() == (kind == "fp8-ue8m0")


@pytest.mark.parametrize("kind", ["fp8", "fp8-ue8m0"])
def test_scores_in_fp8_are_torch_s(kind):
    """q's scales go into the weights, k's to the sum over heads; within what float32 additions cost."""
    q, k, weights = (
        RANDOM.standard_normal((9, 32, 128)),
        RANDOM.standard_normal((30, 128)),
        RANDOM.standard_normal((9, 32)),
    )
    q, k, weights = (v.astype(np.float32) for v in (q, k, weights))
    (q8, q_scale), (k8, k_scale) = fp8(q, kind), fp8(k, kind)
    heads = torch.einsum("thn,sn->ths", q8.double(), k8.double()).relu()
    want = torch.einsum("ths,th->ts", heads, torch.tensor(weights).double() * q_scale[..., 0]) * k_scale[:, 0]
    sizes = torch.einsum("thn,sn->ths", q8.double().abs(), k8.double().abs())
    bound = (
        torch.einsum("ths,th->ts", sizes, torch.tensor(weights).double().abs() * q_scale[..., 0])
        * k_scale[:, 0]
    )
    got = dsa.score(q, k, weights, conventions("deepseek", index=kind))
    share = np.abs(got - want.numpy()) / bound.numpy() / 2.0**-24
    assert share.max() < 128 + 32 + 4
    other = dsa.score(q, k, weights, conventions("deepseek", index="f32"))
    assert (np.abs(other - want.numpy()) / bound.numpy() / 2.0**-24).max() > 1e4  # must fail


def test_a_q8_0_cache_gives_back_what_ggml_stores():
    x = draw(6, 7, 576).reshape(-1, 576)
    x[5, :32] = [
        127,
        *np.arange(31) + 0.5,
    ]  # halves: AVX2 code rounds them to even, the reference away from zero
    raw = np.empty((len(x), 576 // 32 * 34), np.uint8)
    store = ggml.LIBRARY.quantize_row_q8_0
    store.restype, store.argtypes = None, [c.c_void_p, c.c_void_p, c.c_int64]
    store(x.ctypes.data, raw.ctypes.data, x.size)
    want = ggml.dequantize(raw, "q8_0")
    assert np.array_equal(rounded(x, "q8_0").view(np.uint32), want.view(np.uint32))
    assert np.array_equal(rounded(x.astype(np.float64).reshape(6, 7, 576), "q8_0").reshape(-1, 576), want)
    assert not np.array_equal(refimpl.dequantize(refimpl.quantize(x, "q8_0"), "q8_0"), want)  # must fail


def test_llama_cpp_s_f16_caches_are_ours(tmp_path):
    """Its own run, every operation on what it recorded; as f32 or q8_0 caches they are not."""
    path = float_gguf.write(tmp_path / "f32.gguf", TINY)
    llama = Llama(path, kv="f16", watch=True)
    llama.decode(RANDOM.integers(0, 1256, 20).tolist())
    save_file(
        {f"{i:04}.{name}": value for i, (name, value) in enumerate(llama.seen)}, tmp_path / "l.safetensors"
    )
    llama.close()
    trace = Trace("llama.cpp", read_trace(tmp_path / "l.safetensors").values)
    for kv in ("f16", "f32", "q8_0"):
        found = compare(trace, trace, refimpl.load(path, engine="llama.cpp", kv=kv))
        wrong = {row.name for row in found.rows if row.verdict == "wrong"}
        assert wrong == (set() if kv == "f16" else {"indexer_score", "kqv"})
