"""Rows of activation blocks taken apart on vectors: what planes.split does, in one call."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits_jit import decode_half
from refimpl.arith.jit import jit
from refimpl.arith.simd_lanes import reinterpret
from refimpl.arith.simd_memory import load, peek, put, store
from refimpl.quants.formats import activations

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int8]
Shorts = NDArray[np.int16]
Floats = NDArray[np.float32]

SIZE_0, QS_0 = activations["q8_0"].block.itemsize, activations["q8_0"].offset("qs")
SIZE_1, S, QS_1 = (activations["q8_1"].block.itemsize, *map(activations["q8_1"].offset, ("s", "qs")))
SIZE_K, QS_K, BSUMS = (activations["q8_k"].block.itemsize, *map(activations["q8_k"].offset, ("qs", "bsums")))


@jit
def split_q8_0(raw: Bytes, codes: Codes, d: Floats, s: Floats, bsums: Shorts) -> None:
    for i in range(d.size):
        at = i * SIZE_0
        store(codes, 32 * i, reinterpret(load(raw, at + QS_0, 32), np.int8))
        put(d, i, decode_half(peek(raw, at, np.uint16)))


@jit
def split_q8_1(raw: Bytes, codes: Codes, d: Floats, s: Floats, bsums: Shorts) -> None:
    for i in range(d.size):
        at = i * SIZE_1
        store(codes, 32 * i, reinterpret(load(raw, at + QS_1, 32), np.int8))
        put(d, i, decode_half(peek(raw, at, np.uint16)))
        put(s, i, decode_half(peek(raw, at + S, np.uint16)))


@jit
def split_q8_k(raw: Bytes, codes: Codes, d: Floats, s: Floats, bsums: Shorts) -> None:
    for i in range(d.size):
        at = i * SIZE_K
        for k in range(0, 256, 64):
            store(codes, 256 * i + k, reinterpret(load(raw, at + QS_K + k, 64), np.int8))
        store(bsums, 16 * i, reinterpret(load(raw, at + BSUMS, 32), np.int16))
        store(d, i, reinterpret(load(raw, at, 4), np.float32))
