"""Whose bytes are these? Name what a misplaced tensor or expert really holds.

A few decoded rows are compared with the rows that other parts of the source hold at the same place, nearest
mistakes first: another expert, the sibling matrix, another layer, a transpose too many or too few, rows in
another order. Quantization moves a row by less than 0.3 of its length; unrelated rows lie near 1.41 apart.
Rows of one model can lie near each other (norms, experts that grew from one), so whatever is named must also
be twice as near as the rows that belong there.
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
from refimpl.verifier.job import Job
from refimpl.verifier.requantize import widen

NEAR = 0.5  # relative distance
CHUNK_WEIGHTS = 1 << 20  # of a source tensor held at once while rows are looked up

Matrix = NDArray[np.float32]
Within = dict[int, float]
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
    """Decode the first, middle and last row of [first, first + rows): {row within that range: [n] float32}.

    Rows of zeros, and of NaN or Inf, are left out: they resemble nothing.
    """
    fmt = f.tensors[name].format
    picks = sorted({0, rows // 2, rows - 1})
    decoded = {r: quants.dequantize(f.read(name, slice(first + r, first + r + 1)), fmt)[0] for r in picks}
    return {r: row for r, row in decoded.items() if np.isfinite(row).all() and row.any()}


def source_row(source: Gguf | Checkpoint, link: Link, hp: Hparams, row: int) -> Matrix:
    """One row of a GGUF tensor as the source implies it, [n] float32."""
    row_values: Matrix = widen(names.source_rows(source, link, hp, slice(row, row + 1)))[0]
    return row_values


def row_from(source: Gguf | Checkpoint, link: Link, hp: Hparams, first: int, row: int) -> Matrix:
    """The row `row` after `first`: `partial` makes a candidate of it."""
    return source_row(source, link, hp, first + row)


def fits(have: dict[int, Matrix], candidate: Callable[[int], Matrix], within: Within | None = None) -> bool:
    """Is every sampled row near the candidate's row of the same place? (There must be one.)"""
    for r, row in have.items():
        other = candidate(r)
        limit = NEAR if within is None else within[r]
        if other.shape != row.shape or relative_distance(row, other[None])[0] >= limit:
            return False
    return bool(have)


@dataclass(frozen=True)
class Question:
    """Some bytes that do not encode what they should.

    link  : the tensor;  first, rows : its rows in the source that should be there
    have  : {row within them: what the file holds}
    within: {row: how near a candidate must come}
    """

    source: Gguf | Checkpoint
    hp: Hparams
    link: Link
    expert: int | None  # the source expert
    first: int
    rows: int
    n: int
    have: dict[int, Matrix]
    within: Within

    def chunks(self, link: Link, first: int, rows: int) -> Iterator[tuple[int, Matrix]]:
        """Source rows [first, first + rows) of a tensor, piece by piece: (first of the piece, piece)."""
        step = max(1, CHUNK_WEIGHTS // self.n)
        for at in range(first, first + rows, step):
            place = slice(at, min(at + step, first + rows))
            yield at, widen(names.source_rows(self.source, link, self.hp, place))


def identify(job: Job, link: Link, expert: int | None, everywhere: bool = True) -> Fit | None:
    """Find the part of the source that these bytes encode.

    expert     : the file's expert, or None for a plain tensor
    everywhere : also among the other experts of other layers, which are many
    return     : None where nothing fits
    """
    tensor, kept, hp = job.f.tensors[link.gguf], job.kept(link), job.hp_source
    rows = tensor.rows if expert is None else tensor.rows // tensor.shape[0]
    begin = (expert or 0) * rows
    have = sample(job.f, link.gguf, begin, rows)
    within = {}
    for r, row in have.items():
        own = widen(names.source_rows(job.source, link, hp, slice(begin + r, begin + r + 1), kept))
        within[r] = min(NEAR, relative_distance(row, own)[0] / 2)
    expected = None if expert is None else (kept[expert] if kept else expert)
    first = 0 if expected is None else expected * rows
    q = Question(job.source, hp, link, expected, first, rows, tensor.n, have, within)
    if not have:
        return None
    for other, j in _candidates(q, everywhere):
        shape = names.source_shape(job.source, other, hp)
        if shape is None or shape[-1] != tensor.n:
            continue
        start = 0 if j is None else j * (shape[-2])
        total = int(np.prod(shape[:-1], dtype=object)) if len(shape) > 1 else 1
        if start + rows > total:
            continue
        if fits(have, partial(row_from, job.source, other, hp, start), within):
            name = other.hf if j is None else other.hf.format(e=j)
            same = other.gguf == link.gguf
            return Fit(name, j if same else None, f"it holds {name}")
    if link.role == "router_bias":
        return _other_entries(q)
    if rows == 1:
        return None
    return _transposed(q) or _other_window(q) or _other_rows(q)


def _candidates(q: Question, everywhere: bool) -> Iterator[tuple[Link, int | None]]:
    """Other places of the same width, the likeliest mistakes first."""
    link, hp, expected = q.link, q.hp, q.expert
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
    for other in peers if everywhere else ():
        if "{e}" in other.hf and expected is not None:
            yield from ((other, j) for j in experts[1:])


def _transposed(q: Question) -> Fit | None:
    """The right weights, transposed where they should not be, or not where they should (attn_k_b's heads).

    Stored that way, entry k of the flat matrix is X[k mod rows, k div rows].
    """
    heads = q.hp.num_attention_heads if q.link.transform in ("k_b", "v_b") else 1
    rows = q.rows // heads  # of one matrix
    found = {r: np.empty(q.n, np.float32) for r in q.have}
    for r, row in found.items():
        head, r_in_head = divmod(r, rows)
        j, i = np.divmod(np.arange(r_in_head * q.n, (r_in_head + 1) * q.n), rows)
        start = q.first + head * rows
        for at, chunk in q.chunks(q.link, start, rows):
            inside = (i >= at - start) & (i < at - start + len(chunk))
            row[inside] = chunk[i[inside] - (at - start), j[inside]]
    if not fits(q.have, found.__getitem__, q.within):
        return None
    if q.link.transform == "k_b":
        return Fit(q.link.hf, None, "it holds the k part of kv_b_proj, not transposed")
    name = q.link.hf if q.expert is None else q.link.hf.format(e=q.expert)
    return Fit(name, None, f"it holds {name}, transposed")


def _other_window(q: Question) -> Fit | None:
    """attn_k_b from other rows of kv_b_proj's heads than the first ones: from the v part, say."""
    whole = names.link(q.link.gguf.replace("attn_k_b", "attn_kv_b"), q.hp)
    if q.link.transform != "k_b" or whole is None or isinstance(q.source, Gguf):
        return None
    hp = q.hp
    kv_b = widen(names.source_rows(q.source, whole, hp, slice(None)))
    heads = kv_b.reshape(hp.num_attention_heads, -1, hp.kv_lora_rank)
    starts = set()
    for r, row in q.have.items():
        head, column = divmod(r, hp.kv_lora_rank)
        distance = relative_distance(
            row, np.lib.stride_tricks.sliding_window_view(heads[head, :, column], q.n)
        )
        starts.add(int(distance.argmin()) if distance.min() < q.within[r] else -1)
    if len(starts) > 1 or -1 in starts:
        return None
    start = starts.pop()
    how = f"it holds rows {start} to {start + q.n - 1} of each head of kv_b_proj, not the first {q.n}"
    return Fit(q.link.hf, None, how)


def _other_entries(q: Question) -> Fit | None:
    """The selection bias of other experts than the kept ones (the parent's first entries, say)."""
    entries = source_row(q.source, q.link, q.hp, 0)
    places = [np.flatnonzero(entries == value) for value in q.have[0]]
    if not all(len(found) for found in places):
        return None
    listed = ", ".join(str(found[0]) for found in places)
    return Fit(q.link.hf, None, f"its entries are those of source experts {listed}")


def _other_rows(q: Question) -> Fit | None:
    """The right tensor with its rows in another order (halves swapped, heads permuted, rope layout).

    The rows of attn_v_b are looked up in all of kv_b_proj, where those of the k part lie between them.
    """
    link, first, rows = q.link, q.first, q.rows
    whole = names.link(link.gguf.replace("attn_v_b", "attn_kv_b"), q.hp)
    if link.transform == "v_b" and whole is not None and isinstance(q.source, Checkpoint):
        link, first, rows = whole, 0, q.hp.num_attention_heads * (q.hp.qk_nope_head_dim + q.hp.v_head_dim)
    found: dict[int, int] = {}
    for at, chunk in q.chunks(link, first, rows):
        for r, row in q.have.items():
            distance = relative_distance(row, chunk)
            if distance.min() < q.within[r]:
                found.setdefault(r, at - first + int(distance.argmin()))
    if not found or any(r not in found and 2 * limit >= NEAR for r, limit in q.within.items()):
        return None  # a sampled row is neither elsewhere nor in its place
    r, at = min(found.items())
    name = link.hf if q.expert is None else link.hf.format(e=q.expert)
    return Fit(name, None, f"its rows stand in another order: row {r} holds row {at} of {name}")
