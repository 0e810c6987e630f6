"""One block, taken apart: fields, scales, codes, values, and the source's values beside them."""

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.arith.bits import decode_half
from refimpl.errors import Unsupported, Usage
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.safetensors import Checkpoint
from refimpl.files.source import Tensor
from refimpl.quants.formats import find_reference, formats
from refimpl.verifier.experts import map_experts
from refimpl.verifier.job import PER_EXPERT, Job, Task
from refimpl.verifier.requantize import widen

PLAIN_VALUES = 32  # of an unquantized tensor that are shown together


@dataclass(frozen=True)
class Field:
    """One field of the block as stored."""

    name: str
    start: int  # byte within the block
    stored: str  # hex
    expected: str | None  # hex, what the encoder writes for the source block; None without a source
    meaning: str


@dataclass(frozen=True)
class Sub:
    """Weights that share a scale: w = step * code - offset."""

    scale: int | None  # the integer that multiplies d, where the format has one
    min: int | None
    step: float
    offset: float
    codes: list[int]
    rmse: float | None


@dataclass(frozen=True)
class Explanation:
    """A block and its source. Values are float32, in stored order; errors are value - source."""

    tensor: str
    format: str
    block: int
    expert: int | None
    row: int  # within the expert or the tensor
    column: int  # of the block's first weight
    offset: int  # absolute, in bytes
    part: str  # the file
    fields: list[Field]
    subs: list[Sub]
    values: list[float]
    source_name: str | None
    source: list[float] | None

    def to_json(self) -> dict[str, Any]:
        """The document of `explain --json`; JSON has no NaN and no Inf, they become null."""
        document = asdict(self)
        for name in ("values", "source"):
            document[name] = document[name] and [_finite(v) for v in document[name]]
        for sub in document["subs"]:
            sub |= {name: _finite(sub[name]) for name in ("step", "offset", "rmse")}
        return document


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def explain(
    file: str | os.PathLike[str], tensor: str, block: int, source: str | os.PathLike[str] | None = None
) -> Explanation:
    """Take one block of a tensor apart.

    block  : index within the whole tensor; of an unquantized one each value is a block
    source : the checkpoint, to lay its values and the encoder's bytes beside the stored ones
    Raises Usage for a tensor or block that the file does not have.
    """
    with model_files.open(file) as f:
        if tensor not in f.tensors:
            raise Usage(f"{f.path} has no tensor {tensor!r}")
        t = f.tensors[tensor]
        if t.format.name not in formats:
            raise Unsupported(f"{tensor} is {t.format.name}, which refimpl does not decode")
        per_row, size = t.n // t.format.weights, t.format.block.itemsize
        if not 0 <= block < t.rows * per_row:
            raise Usage(f"{tensor} has blocks 0 to {t.rows * per_row - 1:,}, not {block:,}")
        row, first = divmod(block, per_row)
        last = first + 1
        if t.format.weights == 1:  # a block is a value, as in verify's findings: show those around it
            first -= first % PLAIN_VALUES
            last = min(first + PLAIN_VALUES, per_row)
        raw = f.read(tensor, slice(row, row + 1))[:, first * size : last * size]
        place = slice(first * t.format.weights, last * t.format.weights)
        source_name = want = x = None
        if source is not None:
            with model_files.open(source) as s:
                source_name, x = _source_block(f, s, t, row, place)
            whole = (
                np.isfinite(x).all() and not t.format.needy
            )  # needs an imatrix, which explain is not given
            want = quants.quantize(x, t.format) if whole else None
        rows = t.rows // t.shape[0] if len(t.shape) == 3 else t.rows
        return Explanation(
            tensor=tensor,
            format=t.format.name,
            block=block,
            expert=row // rows if len(t.shape) == 3 else None,
            row=row % rows,
            column=place.start,
            offset=t.offset + (row * per_row + first) * size,
            part=f.parts[t.part],
            fields=_fields(t, raw, want),
            subs=_subs(t, raw, x),
            values=quants.dequantize(raw, t.format)[0].tolist(),
            source_name=source_name,
            source=None if x is None else x[0].tolist(),
        )


def _source_block(
    f: Gguf | Checkpoint, s: Gguf | Checkpoint, t: Tensor, row: int, place: slice
) -> tuple[str, NDArray[np.float32]]:
    """Name and values [1, weights] of the source block, through the expert map."""
    if not isinstance(f, Gguf):
        raise Unsupported(f"{f.path}: only a GGUF can be laid beside its source")
    job = Job(f, s, names.hparams(f), names.hparams(s))
    link = names.link(t.name, job.hp)
    if link is None:
        raise Unsupported(f"{t.name} has no counterpart in a checkpoint")
    if link.role in PER_EXPERT:
        job.maps, _ = map_experts(job)
    shape = names.source_shape(s, link, job.hp_source, job.kept(link))
    if shape != t.shape:
        there = "no such tensor" if shape is None else f"one of shape {list(shape)}"
        raise Unsupported(f"{t.name} has shape {list(t.shape)}; the source has {there}")
    rows = names.source_rows(s, link, job.hp_source, slice(row, row + 1), job.kept(link))
    task = Task(t, link)
    return job.sources(link)[row // task.rows if task.stacked else 0], widen(rows)[:, place].copy()


def _fields(t: Tensor, raw: NDArray[np.uint8], want: NDArray[np.uint8] | None) -> list[Field]:
    """The record's fields, in stored order."""
    block = t.format.block
    if block.names is None:
        hexes = [None if b is None else b.tobytes().hex() for b in (raw, want)]
        return [
            Field(
                "values",
                0,
                hexes[0] or "",
                hexes[1],
                f"{raw.size // block.itemsize} values of {t.format.name}",
            )
        ]
    said = []
    for name in block.names:
        dtype, start = block.fields[name][:2]  # type: ignore[index]
        stored = raw[0, start : start + dtype.itemsize]
        expected = None if want is None else want[0, start : start + dtype.itemsize].tobytes().hex()
        said.append(Field(name, start, stored.tobytes().hex(), expected, _meaning(name, dtype, stored)))
    return said


FP16_FIELDS = {"d": "scale, or scale of the scales", "dmin": "scale of the mins", "m": "min"}
FIELDS = {
    "d": "scales of the sub-blocks",
    "scales": "scales (and mins) of the sub-blocks",
    "qs": "codes",
    "ql": "codes, lower bits",
    "qh": "codes, upper bits",
}


def _meaning(name: str, dtype: np.dtype[Any], stored: NDArray[np.uint8]) -> str:
    if dtype == np.dtype("<f2"):
        return f"{FP16_FIELDS.get(name, name)}, fp16: {float(decode_half(stored.view(np.uint16))[0]):.6g}"
    return FIELDS.get(name, name)


def _subs(t: Tensor, raw: NDArray[np.uint8], x: NDArray[np.float32] | None) -> list[Sub]:
    """Scales and codes, sub-block by sub-block."""
    if (
        t.format.block.names is None or not t.format.ruled
    ):  # codebook types: their codes are numbers of points
        return []
    record = raw.reshape(-1).view(t.format.block)
    parts = find_reference(t.format).take_apart(record)
    offset = np.zeros_like(parts.step) if parts.offset is None else parts.offset
    count = parts.step.shape[1]
    codes = parts.codes.astype(int).reshape(count, -1)
    error = None
    if x is not None:
        with np.errstate(invalid="ignore", over="ignore"):
            error = (quants.dequantize(raw, t.format).astype(np.float64) - x).reshape(count, -1)
    return [
        Sub(
            scale=None if parts.scales is None else int(parts.scales[0, j]),
            min=None if parts.mins is None else int(parts.mins[0, j]),
            step=float(parts.step[0, j]),
            offset=float(offset[0, j]),
            codes=codes[j].tolist(),
            rmse=None if error is None else float(np.sqrt(np.square(error[j]).mean())),
        )
        for j in range(count)
    ]
