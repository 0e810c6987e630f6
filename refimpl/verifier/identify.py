"""Whose bytes are these? Name what a misplaced tensor or expert really holds.

A few decoded rows are compared with the rows that other parts of the source hold at the same place, nearest
mistakes first: another expert, the sibling matrix, another layer, a missing transpose, rows in another order.
Quantization moves a row by less than 0.3 of its length; unrelated rows lie near 1.41 apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.files import names
from refimpl.files.gguf import Gguf
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint
from refimpl.verifier.requantize import widen

NEAR = 0.5  # relative distance
SAMPLE_ROWS = 3
CHUNK_WEIGHTS = 1 << 20  # of a source tensor held at once while rows are looked up

Matrix = NDArray[np.float32]
SIBLING = {"gate": "up", "up": "gate"}


@dataclass(frozen=True)
class Fit:
    """What some bytes really encode."""

    source: str  # name in the source, "{e}" filled in
    expert: int | None  # source expert, where it is another one of the same tensor
    how: str  # a phrase for the report


def relative_distance(row: Matrix, candidates: Matrix) -> NDArray[np.float64]:
    """|row - candidate| / |candidate| of each candidate.

    row : [n] float32;  candidates : [B, n] float32
    return : [B] float64, inf where the candidate is zero or anything is not finite
    """
    c = candidates.astype(np.float64)
    norm = np.sqrt(np.square(c).sum(axis=-1))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distance = np.sqrt(np.square(c - row).sum(axis=-1)) / norm
    return np.where(np.isfinite(distance), distance, np.inf)


def sample(f: Gguf, name: str, first: int, rows: int) -> dict[int, Matrix]:
    """Decode a few rows of [first, first + rows): {row within that range: [n] float32}."""
    fmt = f.tensors[name].format
    picks = sorted({0, rows // 2, rows - 1})[:SAMPLE_ROWS]
    return {r: quants.dequantize(f.read(name, slice(first + r, first + r + 1)), fmt)[0] for r in picks}


def source_row(source: Gguf | Checkpoint, link: Link, hp: Hparams, row: int) -> Matrix:
    """One row of a GGUF tensor as the source implies it, [n] float32."""
    row_values: Matrix = widen(names.source_rows(source, link, hp, slice(row, row + 1)))[0]
    return row_values


def row_from(source: Gguf | Checkpoint, link: Link, hp: Hparams, first: int, row: int) -> Matrix:
    """The row `row` after `first`: `partial` makes a candidate of it."""
    return source_row(source, link, hp, first + row)


def fits(have: dict[int, Matrix], candidate: Callable[[int], Matrix]) -> bool:
    """Is every sampled row near the candidate's row of the same place?"""
    for r, row in have.items():
        other = candidate(r)
        if other.shape != row.shape or relative_distance(row, other[None])[0] >= NEAR:
            return False
    return True


def identify(
    f: Gguf, source: Gguf | Checkpoint, hp: Hparams, link: Link, expert: int | None, expected: int | None
) -> Fit | None:
    """Find the part of the source that these bytes encode.

    expert   : the file's expert, or None for a plain tensor
    expected : the source expert that it should be
    return   : None where nothing fits
    """
    tensor = f.tensors[link.gguf]
    rows = tensor.rows if expert is None else tensor.rows // tensor.shape[0]
    have = sample(f, link.gguf, (expert or 0) * rows, rows)
    if not all(np.isfinite(row).all() and row.any() for row in have.values()):
        return None
    for other, j in _candidates(source, link, hp, expected):
        shape = names.source_shape(source, other, hp)
        if shape is None or shape[-1] != tensor.n:
            continue
        first = 0 if j is None else j * (shape[-2])
        total = int(np.prod(shape[:-1], dtype=object)) if len(shape) > 1 else 1
        if first + rows > total:
            continue
        if fits(have, partial(row_from, source, other, hp, first)):
            name = other.hf if j is None else other.hf.format(e=j)
            same = other.gguf == link.gguf
            return Fit(name, j if same else None, f"it holds {name}")
    if link.role == "router_bias":
        return _other_entries(source, link, hp, have[0])
    return _untransposed(source, link, hp, have) or _other_rows(source, link, hp, have, expert, rows)


def _candidates(
    source: Gguf | Checkpoint, link: Link, hp: Hparams, expected: int | None
) -> Iterator[tuple[Link, int | None]]:
    """Other places of the same width, the likeliest mistakes first."""
    experts: list[int | None] = [None]
    if expected is not None:
        experts = [expected, *(j for j in range(hp.n_routed_experts) if j != expected)]
        yield from ((link, j) for j in experts[1:])
    if link.matrix in SIBLING:
        sibling = names.link(link.gguf.replace(f"_{link.matrix}", f"_{SIBLING[link.matrix]}"), hp)
        if sibling is not None:
            yield from ((sibling, j) for j in experts)
    peers = [other for other, _ in names.expected(hp) if other.role == link.role and other.gguf != link.gguf]
    own = link.gguf.split(".")[2:]
    peers.sort(key=lambda other: other.gguf.split(".")[2:] != own)
    for other in peers:
        if ("{e}" in other.hf) == (expected is not None):
            yield other, experts[0]
    for other in peers:
        if "{e}" in other.hf and expected is not None:
            yield from ((other, j) for j in experts[1:])


def _untransposed(source: Gguf | Checkpoint, link: Link, hp: Hparams, have: dict[int, Matrix]) -> Fit | None:
    """attn_k_b as it stands in kv_b_proj, that is, without the transpose that absorbed attention needs."""
    whole = names.link(link.gguf.replace("attn_k_b", "attn_kv_b"), hp)
    if link.transform != "k_b" or whole is None or source.kind == "gguf":
        return None
    heads, nope, v = hp.num_attention_heads, hp.qk_nope_head_dim, hp.v_head_dim
    kv_b = widen(names.source_rows(source, whole, hp, slice(None)))
    flat = kv_b.reshape(heads, nope + v, -1)[:, :nope].reshape(-1)

    def stored(r: int) -> Matrix:
        n = len(next(iter(have.values())))
        return flat[r * n : (r + 1) * n]

    return (
        Fit(link.hf, None, "it holds the k part of kv_b_proj, not transposed") if fits(have, stored) else None
    )


def _other_entries(source: Gguf | Checkpoint, link: Link, hp: Hparams, have: Matrix) -> Fit | None:
    """The selection bias of other experts than the kept ones (the parent's first entries, say)."""
    entries = source_row(source, link, hp, 0)
    places = [np.flatnonzero(entries == value) for value in have]
    if not all(len(found) for found in places):
        return None
    listed = ", ".join(str(found[0]) for found in places)
    return Fit(link.hf, None, f"its entries are those of source experts {listed}")


def _other_rows(
    source: Gguf | Checkpoint, link: Link, hp: Hparams, have: dict[int, Matrix], expert: int | None, rows: int
) -> Fit | None:
    """The right tensor with its rows in another order (halves swapped, heads permuted, rope layout)."""
    if expert is not None or rows == 1:
        return None
    found: dict[int, int] = {}
    step = max(1, CHUNK_WEIGHTS // len(next(iter(have.values()))))
    for start in range(0, rows, step):
        chunk = widen(names.source_rows(source, link, hp, slice(start, min(rows, start + step))))
        for r, row in have.items():
            if chunk.shape[1] == len(row):
                distance = relative_distance(row, chunk)
                if distance.min() < NEAR:
                    found.setdefault(r, start + int(distance.argmin()))
    if len(found) < len(have) or all(r == at for r, at in found.items()):
        return None
    r, at = next((r, at) for r, at in sorted(found.items()) if r != at)
    return Fit(link.hf, None, f"its rows stand in another order: row {r} holds source row {at}")
