"""What a GGUF tensor holds according to its source: the transforms of links.py, applied to ranges.

The source is a checkpoint, or a GGUF of BF16, F16 or F32 that convert wrote from one. Only the rows asked for
are read, at most one head of kv_b_proj beyond them.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import BadFile, Unsupported
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import Hparams
from refimpl.files.links import Link, shape
from refimpl.files.safetensors import CONFIG, Checkpoint
from refimpl.files.source import Tensor
from refimpl.quants.formats import BF16, F16, F32

Rows = NDArray[np.uint16] | NDArray[np.float32]


def hparams(model: Gguf | Checkpoint) -> Hparams:
    """The hyperparameters of an open model."""
    if isinstance(model, Gguf):
        return Hparams.from_metadata(model.metadata)
    return Hparams.from_config(model.config, f"{model.path}/{CONFIG}")


def source_shape(
    source: Gguf | Checkpoint, link: Link, hp: Hparams, kept: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """The shape that the GGUF tensor gets from this source; None where the source lacks a part of it.

    kept : source expert of each file expert; None: all that the source has, in their order
    """
    checkpoint = isinstance(source, Checkpoint)
    if checkpoint and link.transform == "stack":
        experts = range(_count_experts(source, link)) if kept is None else kept
        found = [source.tensors.get(link.hf.format(e=e)) for e in experts]
        if not found or None in found:
            return None
        first = found[0].shape  # type: ignore[union-attr]
        for tensor in found:
            if tensor is not None and tensor.shape != first:
                raise BadFile(
                    source.parts[tensor.part],
                    tensor.offset,
                    f"{tensor.name} is not {list(first)}",
                )
        return (len(found), *first)
    tensor = source.tensors.get(link.hf if checkpoint else link.gguf)
    if tensor is None:
        return None
    if checkpoint and link.transform in ("k_b", "v_b"):
        nope, v = hp.qk_nope_head_dim, hp.v_head_dim
        if len(tensor.shape) != 2 or tensor.shape[0] % (nope + v):
            return tensor.shape
        heads, rank = tensor.shape[0] // (nope + v), tensor.shape[1]
        return (heads, rank, nope) if link.transform == "k_b" else (heads, v, rank)
    if kept is not None and _by_expert(link):
        inside = all(0 <= e < tensor.shape[0] for e in kept)
        return (len(kept), *tensor.shape[1:]) if inside else None
    return tensor.shape


def _by_expert(link: Link) -> bool:
    return link.role in ("routed", "router", "router_bias")


def _count_experts(source: Gguf | Checkpoint, link: Link) -> int:
    count = 0
    while link.hf.format(e=count) in source.tensors:
        count += 1
    return count


def source_rows(
    source: Gguf | Checkpoint,
    link: Link,
    hp: Hparams,
    rows: slice,
    kept: Sequence[int] | None = None,
    buffer: NDArray[np.uint8] | None = None,
) -> Rows:
    """Rows of a GGUF tensor as convert computes them from the source; only what they need is read.

    rows   : which rows of the GGUF tensor, leading axes counted together
    kept   : source expert of each file expert; None: the same
    buffer : [B] uint8; rows that lie together in the source are read into it where they fit, and returned from it
    return : [R, n] uint16, BF16 bits, or float32 where the source (or a part of it) is F32 or F16

    Rounds: never; F16 is widened.
    """
    want = shape(link, hp)
    if kept is not None and _by_expert(link):
        want = (len(kept), *want[1:])
    first, last, step = rows.indices(prod(want[:-1]))
    if step != 1:
        raise ValueError(f"rows need step 1, not {step}")
    if first >= last:
        one = source_rows(source, link, hp, slice(0, 1), kept)
        return one[:0]
    if link.role == "router_bias":
        whole = _read(source, [(_name(source, link, 0), 0, 1)], None)
        chosen = list(range(want[0])) if kept is None else list(kept)
        if max(chosen) >= whole.shape[1] or (kept is None and whole.shape[1] != want[0]):
            raise BadFile(source.path, None, f"{link.hf} has {whole.shape[1]} experts, not those asked for")
        return whole[:, chosen][first:last]
    if link.transform == "k_b" and isinstance(source, Checkpoint):
        return _transposed(source, link, hp, first, last)
    spans = []
    per_unit, lead, stride = _units(source, link, hp, want)
    while first < last:
        unit, row = divmod(first, per_unit)
        count = min(per_unit - row, last - first)
        expert = kept[unit] if kept is not None and _by_expert(link) else unit
        start = row + (expert * stride + lead if stride else 0)
        spans.append((_name(source, link, expert), start, start + count))
        first += count
    return _read(source, spans, want[-1], buffer)


def _name(source: Gguf | Checkpoint, link: Link, expert: int) -> str:
    return link.hf.format(e=expert) if isinstance(source, Checkpoint) else link.gguf


def _units(source: Gguf | Checkpoint, link: Link, hp: Hparams, want: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows that lie together in the source, rows before them, rows from one unit to the next (0: no next)."""
    if isinstance(source, Checkpoint) and link.transform == "v_b":
        return hp.v_head_dim, hp.qk_nope_head_dim, hp.qk_nope_head_dim + hp.v_head_dim
    if link.role == "router":
        return 1, 0, 1
    if link.role == "routed":
        return want[1], 0, 0 if isinstance(source, Checkpoint) else want[1]
    return max(prod(want[:-1]), 1), 0, 0


def _read(
    source: Gguf | Checkpoint,
    spans: list[tuple[str, int, int]],
    n: int | None,
    buffer: NDArray[np.uint8] | None = None,
) -> Rows:
    """Concatenate rows of several tensors; where their types differ, all become float32."""
    pieces: list[tuple[Tensor, int, int]] = []
    for name, first, last in spans:
        tensor = source.tensors.get(name)
        if tensor is None:
            raise BadFile(source.path, None, f"the tensor {name} is missing")
        if (n is not None and tensor.n != n) or last > tensor.rows:
            defect = f"{name} has shape {list(tensor.shape)}, too small or not of rows of {n}"
            raise BadFile(source.parts[tensor.part], tensor.offset, defect)
        if pieces and pieces[-1][0] == tensor and pieces[-1][2] == first:
            pieces[-1] = (tensor, pieces[-1][1], last)
        else:
            pieces.append((tensor, first, last))
    formats = {tensor.format.name for tensor, _, _ in pieces}
    if not formats <= {F32.name, F16.name, BF16.name}:
        words = f"{pieces[0][0].name} is {' and '.join(sorted(formats))}, not f32, f16 or bf16"
        raise Unsupported(f"{source.path}: {words}: no source")
    if len(pieces) == 1:
        tensor, first, last = pieces[0]
        size = (last - first) * tensor.row_bytes
        room = None
        if buffer is not None and size <= buffer.size:
            room = buffer[:size].reshape(last - first, tensor.row_bytes)
        return _decode(source.read(tensor.name, slice(first, last), room), tensor.format.name)
    count = sum(last - first for _, first, last in pieces)
    if len(formats) == 1:
        raw, at = np.empty((count, pieces[0][0].row_bytes if pieces else 0), np.uint8), 0
        for tensor, first, last in pieces:
            source.read(tensor.name, slice(first, last), raw[at : at + last - first])
            at += last - first
        return _decode(raw, pieces[0][0].format.name)
    return np.concatenate(
        [_widen(_decode(source.read(t.name, slice(a, b)), t.format.name)) for t, a, b in pieces]
    )


def _decode(raw: NDArray[np.uint8], name: str) -> Rows:
    if name == BF16.name:
        return raw.view(np.uint16)
    return raw.view(np.float32) if name == F32.name else raw.view(np.float16).astype(np.float32)


def _widen(x: Rows) -> NDArray[np.float32]:
    """BF16 bits as float32."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.view(np.float32)


def _transposed(source: Checkpoint, link: Link, hp: Hparams, first: int, last: int) -> Rows:
    """Rows [H * rank] of k_b: each head's nope rows, transposed."""
    rank, head = hp.kv_lora_rank, hp.qk_nope_head_dim + hp.v_head_dim
    blocks = []
    while first < last:
        h, c = divmod(first, rank)
        count = min(rank - c, last - first)
        rows = _read(source, [(link.hf, h * head, h * head + hp.qk_nope_head_dim)], rank)
        blocks.append(rows.T[c : c + count])
        first += count
    return np.ascontiguousarray(np.concatenate(blocks))
