"""A small, whole model out of a big file: some layers, some experts, everything else as it is.

Layers are numbered anew in their order; router rows and bias follow the experts. Only the ranges that the
result needs are read. A GGUF's bytes are copied, whatever their type; a checkpoint's weights become BF16.
"""

import os
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from gguf import size_label
from gguf.constants import GGUFValueType as Kind
from numpy.typing import NDArray

from refimpl import quants
from refimpl.errors import Unsupported, Usage
from refimpl.files import encode, names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import ARCHITECTURE
from refimpl.files.metadata import Array
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint
from refimpl.quants.formats import BF16, F32, Format
from refimpl.writers import keys, output
from refimpl.writers.checkpoint import ordered_links
from refimpl.writers.output import PathLike, Piece, Progress

PIECE_BYTES = 1 << 22
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
BY_EXPERT = ("routed", "router", "router_bias")


@dataclass(frozen=True)
class Part:
    """One tensor of the slice: its new name and shape, its old name, and what it is."""

    name: str
    shape: tuple[int, ...]
    format: Format
    old: str
    link: Link | None

    @property
    def by_expert(self) -> bool:
        """Is its first axis the expert?"""
        return self.link is not None and self.link.role in BY_EXPERT


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the source's tensor, none across experts; stop 0: the bias, whose columns are chosen."""

    part: Part
    start: int
    stop: int


@dataclass
class Sliced:
    """What was written. layers, experts: numbers in the source."""

    file: str
    source: str
    size: int
    tensors: int
    weights: int
    layers: list[int]
    experts: list[int]
    bytes_read: int

    def to_json(self) -> dict[str, Any]:
        """The document of `slice --json`."""
        return {
            "file": {"path": self.file, "bytes": self.size},
            "source": self.source,
            "tensors": self.tensors,
            "weights": self.weights,
            "layers": self.layers,
            "experts": self.experts,
            "bytes_read": self.bytes_read,
        }


def slice_model(
    source: PathLike,
    target: PathLike,
    layers: str | None = None,
    experts: str | None = None,
    force: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Sliced:
    """Write a GGUF of some layers and experts.

    source : a GGUF (one shard of a split stands for all) or a checkpoint directory of GLM-5.1
    layers : half-open ranges such as "0,3:5"; the MTP block is the last layer; None: all
    experts: the same of routed experts; None: all

    Raises BadFile, Unsupported, or Usage.
    """
    with closing(model_files.open(source)) as model:
        output.check_target(target, model.parts, force)
        hp = names.hparams(model)
        kept = parse_ranges(layers, hp.layers, "layers")
        chosen = parse_ranges(experts, hp.n_routed_experts, "experts")
        if kept[0] >= hp.num_hidden_layers:
            raise Usage("a model needs a layer besides its multi-token-prediction block")
        if hp.n_group != 1 and len(chosen) != hp.n_routed_experts:
            raise Unsupported(f"{model.path}: experts in {hp.n_group} groups are not sliced")
        small = _shrink(hp, kept, chosen)
        parts = _parts(model, hp, kept, len(chosen))
        metadata = _metadata(model, hp, small, kept, parts)
        said: dict[str, Any] = {"source": os.path.basename(os.path.abspath(model.path))}
        said |= {"layers": kept, "experts": chosen}
        before = keys.parse_provenance(model.metadata) if isinstance(model, Gguf) else None
        said |= {"before": before} if before is not None else {}
        metadata[keys.PROVENANCE] = keys.provenance("slice", **said)
        alignment = metadata.get("general.alignment", (Kind.UINT32, 32))[1]
        listed = [(p.name, p.shape, p.format) for p in parts]
        head, offsets, size = encode.header_bytes(metadata, listed, alignment)
        pieces = [
            piece for p, at in zip(parts, offsets, strict=True) for piece in _cut(model, hp, p, chosen, at)
        ]

        def produce(rows: Rows) -> NDArray[Any]:
            return _read(model, hp, rows, chosen)

        job = {"slice": [kept, chosen], "inputs": output.identify(model.parts)}
        output.write_pieces(target, head, size, pieces, produce, job, False, jobs, progress)
        weights = sum(prod(p.shape) for p in parts)
        read = sum(piece.nbytes for piece in pieces)
        return Sliced(os.fspath(target), model.path, size, len(parts), weights, kept, chosen, read)


def parse_ranges(text: str | None, most: int, what: str) -> list[int]:
    """Numbers below `most` from half-open ranges such as "0,3:5"; None: all. Raises Usage."""
    if text is None:
        return list(range(most))
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*:\s*(\d{1,6}))?\s*", part, re.ASCII)
        if match is None:
            raise Usage(f'--{what} takes ranges such as "0,3:5", not {text!r}')
        first = int(match[1])
        found += range(first, int(match[2]) if match[2] else first + 1)
    if not found or found != sorted(set(found)) or found[-1] >= most:
        raise Usage(f"--{what} {text}: ascending numbers below {most:,}, each once")
    return found


def _shrink(hp: Hparams, layers: list[int], experts: list[int]) -> Hparams:
    trunk = sum(layer < hp.num_hidden_layers for layer in layers)
    return replace(
        hp,
        num_hidden_layers=trunk,
        num_nextn_predict_layers=len(layers) - trunk,
        first_k_dense_replace=sum(layer < hp.first_k_dense_replace for layer in layers),
        n_routed_experts=len(experts),
        num_experts_per_tok=min(hp.num_experts_per_tok, len(experts)),
    )


def _parts(model: Gguf | Checkpoint, hp: Hparams, layers: list[int], experts: int) -> list[Part]:
    """The tensors that stay, in the source's order."""
    number = {old: str(new) for new, old in enumerate(layers)}
    found: list[tuple[str, tuple[int, ...], Format, Link | None]] = []
    if isinstance(model, Checkpoint):
        links = ordered_links(model, hp)
        found = [(k.gguf, names.shape(k, hp), F32 if k.f32 else BF16, k) for k in links]
    else:
        found = [(t.name, t.shape, t.format, names.link(t.name, hp)) for t in model.tensors.values()]
    parts = []
    for old, shape, fmt, link in found:
        match = re.match(r"blk\.(\d+)\.", old)
        if match is not None and int(match[1]) not in number:
            continue
        name = old if match is None else f"blk.{number[int(match[1])]}.{old[match.end() :]}"
        part = Part(name, shape, fmt, old, link)
        if part.by_expert:
            if shape[0] != hp.n_routed_experts:
                raise Unsupported(
                    f"{model.path}: {old} has {shape[0]:,} experts, not {hp.n_routed_experts:,}"
                )
            part = replace(part, shape=(experts, *shape[1:]))
        parts.append(part)
    return parts


def _metadata(
    model: Gguf | Checkpoint, hp: Hparams, small: Hparams, layers: list[int], parts: Sequence[Part]
) -> keys.Keys:
    """The source's keys, with the sizes of the slice."""
    if isinstance(model, Checkpoint):
        links = ordered_links(model, hp)
        metadata = keys.converted_keys(model, hp, links, keys.FILE_TYPES["bf16"], None, True)
    else:
        metadata = model.metadata.typed((*SPLIT_KEYS, keys.PROVENANCE))
    for key, value, before in (
        ("block_count", small.layers, hp.layers),
        ("leading_dense_block_count", small.first_k_dense_replace, hp.first_k_dense_replace),
        ("expert_count", small.n_routed_experts, hp.n_routed_experts),
        ("expert_used_count", small.num_experts_per_tok, hp.num_experts_per_tok),
        ("nextn_predict_layers", small.num_nextn_predict_layers, hp.num_nextn_predict_layers),
    ):
        if value != before:
            metadata[f"{ARCHITECTURE}.{key}"] = (Kind.UINT32, value)
    for key, (kind, values) in metadata.items():
        if kind == Kind.ARRAY and key.startswith(f"{ARCHITECTURE}."):  # one value for each layer
            listed = np.asarray(values.values() if isinstance(values, Array) else values)
            if len(listed) in (hp.num_hidden_layers, hp.layers):
                metadata[key] = (kind, listed[[layer for layer in layers if layer < len(listed)]])
    if "general.size_label" in metadata:
        stacked = [prod(p.shape[1:]) for p in parts if p.link is not None and p.link.role == "routed"]
        shared = sum(prod(p.shape) for p in parts) - sum(stacked) * small.n_routed_experts
        count = small.n_routed_experts if stacked else 0
        label = size_label(shared + sum(stacked) * count, shared, sum(stacked), count)
        metadata["general.size_label"] = (Kind.STRING, label)
    return metadata


def _cut(
    model: Gguf | Checkpoint, hp: Hparams, part: Part, experts: list[int], offset: int
) -> list[Piece[Rows]]:
    """Pieces of one tensor, each of rows that lie together in the source."""
    n, row_bytes = part.shape[-1], part.format.row_bytes(part.shape[-1])
    if part.link is not None and part.link.role == "router_bias":
        return [Piece(offset, row_bytes, Rows(part, 0, 0))]
    rows = prod(part.shape[:-1])
    if part.by_expert:
        slab = rows // part.shape[0]
        starts = [(e * slab, slab) for e in experts]
    elif isinstance(model, Checkpoint) and len(part.shape) == 3:
        slab = part.shape[1]
        starts = [(h * slab, slab) for h in range(part.shape[0])]
    else:
        starts = [(0, rows)]
    step, pieces, place = max(1, PIECE_BYTES // (4 * n)), [], offset
    for first, count in starts:
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            pieces.append(Piece(place, (stop - start) * row_bytes, Rows(part, start, stop)))
            place += (stop - start) * row_bytes
    return pieces


def _read(model: Gguf | Checkpoint, hp: Hparams, rows: Rows, experts: list[int]) -> NDArray[Any]:
    part = rows.part
    whole = slice(rows.start, rows.stop) if rows.stop else slice(None)
    if isinstance(model, Checkpoint):
        assert part.link is not None
        x = names.source_rows(model, part.link, hp, whole)
        raw = quants.quantize(x, part.format)
    else:
        raw = model.read(part.old, whole)
    if rows.stop:
        return raw
    each = part.format.block.itemsize
    return np.ascontiguousarray(raw.reshape(-1, each)[experts])
