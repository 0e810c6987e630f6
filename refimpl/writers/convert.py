"""A Hugging Face checkpoint as one GGUF of BF16, F16 or F32: the file that convert_hf_to_gguf writes.

Weights stream through, a few MB at a time, so memory does not depend on the model. BF16 to BF16 is a copy,
NaN and all: whether a checkpoint is sound is asked by quantize and verify.
"""

import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.bits import encode_half
from refimpl.errors import Unsupported, Usage
from refimpl.files import encode, names
from refimpl.files import source as model_files
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint
from refimpl.quants import allocate
from refimpl.quants.formats import BF16, F16, F32, Format, formats
from refimpl.writers import keys, output
from refimpl.writers.checkpoint import ordered_links, without_mtp
from refimpl.writers.output import PathLike, Piece, Progress

OUTTYPES = ("bf16", "f16", "f32")
PIECE_WEIGHTS = 1 << 21
MAGNITUDE = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of one tensor of the output, all of one expert or head."""

    link: Link
    format: Format
    start: int
    stop: int


@dataclass
class Converted:
    """What was written. overflow, underflow: weights that became infinite or zero in F16, by tensor."""

    file: str
    source: str
    outtype: str
    size: int
    tensors: int
    weights: int
    overflow: Counter[str] = field(default_factory=Counter)
    underflow: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """The document of `convert --json`."""
        return {
            "file": {"path": self.file, "bytes": self.size},
            "source": self.source,
            "outtype": self.outtype,
            "tensors": self.tensors,
            "weights": self.weights,
            "overflow": dict(sorted(self.overflow.items())),
            "underflow": dict(sorted(self.underflow.items())),
        }


def convert(
    source: PathLike,
    target: PathLike,
    outtype: str = "bf16",
    name: str | None = None,
    mtp: bool = True,
    provenance: bool = True,
    force: bool = False,
    resume: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the GGUF of a checkpoint.

    source     : a Hugging Face checkpoint directory of GLM-5.1, with tokenizer.json
    name       : general.name; None: found as the converter does
    mtp        : keep the multi-token-prediction block, where there is one
    provenance : add the key refimpl.provenance; without it the file is convert_hf_to_gguf's, byte for byte

    Raises BadFile, Unsupported, or Usage where the output may not be written.
    """
    if outtype not in OUTTYPES:
        raise Usage(f"unknown outtype {outtype!r}; known: {', '.join(OUTTYPES)}")
    with model_files.open(source) as model:
        if not isinstance(model, Checkpoint) or model.kind != "hf":
            raise Unsupported(f"{model.path}: convert needs a checkpoint directory, this is {model.kind}")
        output.check_target(target, model.parts, force)
        hp = names.hparams(model)
        hp = hp if mtp else without_mtp(hp)
        links = ordered_links(model, hp)
        metadata = keys.converted_keys(model, hp, links, keys.FILE_TYPES[outtype], name, mtp)
        if provenance:
            origin = os.path.basename(os.path.abspath(model.path))
            metadata[keys.PROVENANCE] = keys.provenance("convert", source=origin, outtype=outtype)
        tensors = [
            (link.gguf, names.shape(link, hp), F32 if link.f32 else formats[outtype]) for link in links
        ]
        head, offsets, size = encode.header_bytes(metadata, tensors)
        done = Converted(
            os.fspath(target), model.path, outtype, size, len(tensors), sum(prod(t[1]) for t in tensors)
        )
        parts = [
            piece
            for link, (_, shape, fmt), offset in zip(links, tensors, offsets, strict=True)
            for piece in cut(link, shape, fmt, offset)
        ]
        job = {"convert": outtype, "inputs": output.identify(model.parts), "piece": PIECE_WEIGHTS}
        room = threading.local()

        def produce(rows: Rows) -> NDArray[Any]:
            return _convert_rows(model, hp, rows, room, done)

        output.write_pieces(target, head, size, parts, produce, job, resume, jobs, progress)
        return done


def cut(link: Link, shape: tuple[int, ...], fmt: Format, offset: int) -> list[Piece[Rows]]:
    """Pieces of one tensor: rows of one expert or head each, of at most PIECE_WEIGHTS weights (or one row)."""
    n, rows = shape[-1], prod(shape[:-1])
    slab = shape[1] if len(shape) == 3 else rows
    step, row_bytes = max(1, PIECE_WEIGHTS // n), fmt.row_bytes(n)
    return [
        Piece(
            offset + start * row_bytes,
            (min(start + step, first + slab) - start) * row_bytes,
            Rows(link, fmt, start, min(start + step, first + slab)),
        )
        for first in range(0, rows, slab)
        for start in range(first, first + slab, step)
    ]


def _convert_rows(
    model: Checkpoint, hp: Hparams, rows: Rows, room: threading.local, done: Converted
) -> NDArray[Any]:
    if not hasattr(room, "bytes"):
        room.bytes = allocate((4 * PIECE_WEIGHTS,), np.uint8)
    x = names.source_rows(model, rows.link, hp, slice(rows.start, rows.stop), buffer=room.bytes)
    if rows.format is BF16:
        return x if x.dtype == np.uint16 else _round_to_bf16(x.view(np.uint32))
    wide = x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)
    return _round_to_half(wide, rows.link.gguf, done) if rows.format is F16 else wide


def _round_to_bf16(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even; a NaN keeps its upper bits and becomes quiet, as in the gguf package."""
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    quiet = (bits >> 16) | 64
    return np.where((bits & MAGNITUDE) > 0x7F800000, quiet, rounded).astype(np.uint16)


def _round_to_half(x: NDArray[Any], name: str, done: Converted) -> NDArray[np.uint16]:
    half = encode_half(x)
    size = half & 0x7FFF
    over = int(np.count_nonzero((size == 0x7C00) & np.isfinite(x)))
    under = int(np.count_nonzero((size == 0) & (x != 0)))
    if over:
        done.overflow[name] += over
    if under:
        done.underflow[name] += under
    return half
