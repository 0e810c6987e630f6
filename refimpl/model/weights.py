"""Matrices as the file stores them, and the product with one.

A tensor is read when it is first asked for and kept as its own bytes: quantized weights are never decoded as a
whole. Names are GGUF's, without "blk.N." and ".weight"; a checkpoint's tensors come through the map of files/links.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.dots import PARTNERS, matmul, matmul_each
from refimpl.errors import BadFile
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import Hparams
from refimpl.files.links import Link, expected
from refimpl.files.origin import source_rows, source_shape
from refimpl.files.safetensors import Checkpoint
from refimpl.model.config import Conventions
from refimpl.quants import dequantize, quantize
from refimpl.quants.formats import BF16, F32, Format, find_codec

Array = NDArray[Any]

PIECE = 1 << 22  # weights decoded at a time
TILED = 8  # tokens from which on ggml multiplies in tiles


@dataclass(frozen=True, eq=False)
class Matrix:
    """Rows of weights in a block format.

    raw   : [..., bytes] uint8
    shape : [..., n], counted in weights
    """

    name: str
    raw: NDArray[np.uint8]
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """In weights, NumPy order."""
        return (*self.raw.shape[:-1], self.raw.shape[-1] // self.format.block.itemsize * self.format.weights)

    def __getitem__(self, index: int) -> "Matrix":
        """One matrix of a stack, such as one head of k_b."""
        return Matrix(self.name, self.raw[index], self.format)

    def values(self, rows: slice | Array = slice(None)) -> NDArray[np.float32]:
        """Decoded rows."""
        return dequantize(self.raw[rows], self.format)


def product(x: Array, w: Array, conv: Conventions) -> Array:  # [T, n], [m, n] -> [T, m]
    """y = x W^T of two float arrays, in the type of x. A token's result does not depend on the others beside it.

    Rounds: float32 as arith.sums.dot_lanes does; float64 as BLAS does.
    """
    if x.dtype == np.float64:
        return x @ w.T
    return matmul(np.ascontiguousarray(w).view(np.uint8), F32, x, "f32", jobs=conv.jobs)


def linear(w: Matrix, x: Array, conv: Conventions) -> Array:  # [m, n], [T, n] -> [T, m]
    """y = x W^T, in the type of x; W is used as it is stored.

    Rounds: float32 as dots.matmul does, in the conventions' order; float64 as BLAS does.
    """
    if x.dtype == np.float64:
        m, n = w.shape
        step = max(1, PIECE // n)
        pieces = [x @ w.values(slice(r, r + step)).astype(np.float64).T for r in range(0, m, step)]
        return np.concatenate(pieces, axis=1)
    return matmul(w.raw, w.format, *_ggml_inputs(w, x, conv, len(x)), jobs=conv.jobs)


def linear_each(w: Matrix, x: Array, conv: Conventions) -> Array:  # [H, m, n], [T, H, n] -> [T, H, m]
    """Each head's own matrix times its part of x, as `linear`."""
    if x.dtype == np.float64:
        return np.stack([linear(w[h], x[:, h], conv) for h in range(x.shape[1])], axis=1)
    heads = np.ascontiguousarray(x.swapaxes(0, 1))
    y = matmul_each(w.raw, w.format, *_ggml_inputs(w, heads, conv, len(x)), jobs=conv.jobs)
    return np.ascontiguousarray(y.swapaxes(0, 1))


def _ggml_inputs(w: Matrix, x: Array, conv: Conventions, tokens: int) -> tuple[Array, str, str]:
    """The tokens, how they are quantized, and the order of additions."""
    if conv.activations == "float":
        return x, "f32", "generic"
    if w.format.name in ("f16", "bf16"):  # ggml narrows the tokens to the type of the weights
        x = dequantize(quantize(x, w.format), w.format)
    partner = PARTNERS.get(w.format.name, "f32")
    if partner == "f32" or conv.order != "ggml":
        return x, partner, "generic" if partner == "f32" else conv.order
    return x, partner, "tiled" if tokens >= TILED else "avx2"


class Layer:
    """The tensors of one layer (None: those of no layer), read when first asked for."""

    def __init__(self, weights: "Weights", number: int | None) -> None:
        self._weights, self._prefix = weights, "" if number is None else f"blk.{number}."
        self._kept: dict[tuple[str, int | None], Matrix] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def _get(self, name: str, expert: int | None) -> Matrix:
        key = name, expert
        if key not in self._kept:
            self._kept[key] = self._weights.read(self._prefix + name, expert)
        return self._kept[key]

    def __getitem__(self, name: str) -> Matrix:
        return self._get(f"{name}.weight", None)

    def __contains__(self, name: str) -> bool:
        return f"{self._prefix}{name}.weight" in self._weights.links

    def expert(self, name: str, e: int) -> Matrix:
        """One expert's matrix."""
        return self._get(f"{name}.weight", e)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias."""
        if name not in self._vectors:
            ending = "bias" if name == "exp_probs_b" or name.endswith(".bias") else "weight"
            self._vectors[name] = self._get(f"{name.removesuffix('.bias')}.{ending}", None).values()[0]
        return self._vectors[name]


class Weights:
    """The tensors of an open model.

    experts : which experts there are, None: all; the others might as well not be in the file
    """

    def __init__(self, source: Gguf | Checkpoint, hp: Hparams, experts: Sequence[int] | None = None) -> None:
        self.source, self.hp, self.experts = source, hp, experts
        self.links: dict[str, tuple[Link, tuple[int, ...]]] = {
            link.gguf: (link, shape) for link, shape in expected(hp) if source_shape(source, link, hp)
        }

    def read(self, name: str, expert: int | None) -> Matrix:
        """A tensor, or one expert's part of a stack. Raises BadFile where it is missing or of another shape."""
        if name not in self.links:
            raise BadFile(self.source.path, None, f"the tensor {name} is missing")
        link, want = self.links[name]
        found = source_shape(self.source, link, self.hp)
        if found != want:
            raise BadFile(
                self.source.path, None, f"{name} has the shape {list(found or ())}, not {list(want)}"
            )
        rows, lead = slice(None), want[:-1]
        if expert is not None:
            kept = expert if self.experts is None else self.experts[expert]
            rows, lead = slice(kept * want[1], (kept + 1) * want[1]), (want[1],)
        raw, fmt = self._rows(link, rows)
        if expert is None and self.experts is not None:
            if link.role == "router":
                raw, lead = raw[list(self.experts)], (len(self.experts),)
            if link.role == "router_bias":
                raw = raw.view(np.float32)[:, list(self.experts)].view(np.uint8)
        return Matrix(name, raw.reshape(*(lead or (1,)), raw.shape[-1]), fmt)

    def _rows(self, link: Link, rows: slice) -> tuple[NDArray[np.uint8], Format]:
        if isinstance(self.source, Gguf):
            return self.source.read(link.gguf, rows), find_codec(self.source.tensors[link.gguf].format)
        read = source_rows(self.source, link, self.hp, rows)
        return np.ascontiguousarray(read).view(np.uint8), BF16 if read.dtype == np.uint16 else F32
