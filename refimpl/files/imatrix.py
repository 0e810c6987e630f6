"""Importance matrices: how much each input column of a weight matters, as llama-imatrix writes them.

    GGUF   : per weight NAME two F32 tensors, NAME.in_sum2 [E, n] and NAME.counts [E] (E = 1 where not routed)
             importance[e] = in_sum2[e] / counts[e], and 1 where counts[e] = 0
    legacy : i32 entries, each: name | i32 calls | i32 count, float32 sums; then i32 chunks, the data set
             (a string is i32 length and bytes)
             importance = sums / calls

Values are read when asked for: the matrix of a big model takes a gigabyte.
Source: common/imatrix-loader.cpp and load_imatrix in tools/quantize/quantize.cpp, llama.cpp 0c1e570.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import BadFile
from refimpl.files.gguf import Gguf
from refimpl.files.metadata import Array
from refimpl.files.source import LocalFile, PathLike, Source, Tensor
from refimpl.quants.formats import F32

ENTRIES = 1 << 15
_NAME_BYTES = 1024
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_BLOCK = 256  # a k-quant block: where all of it is zero, the scale search has nothing to weigh

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """Something in an imatrix that makes its use doubtful.

    kind : "not-finite" (llama-quantize refuses the file), "negative", "zero-row", "zero-block" or "unused"
           (an expert that no token reached: llama-quantize weighs all its columns alike)
    """

    tensor: str
    expert: int | None
    kind: str
    message: str


@dataclass(frozen=True)
class _Entry:
    """Where the sums of one weight lie, and what divides them.

    counts : [E] int64 tokens per expert (GGUF); None: the legacy number of calls divides all
    """

    sums: Tensor
    counts: NDArray[np.int64] | None
    calls: int = 0


class Imatrix:
    """An importance matrix; iterates over the names of its weights.

    kind     : "gguf" or "legacy"
    datasets : the texts it was computed on
    chunks   : how many chunks of them
    """

    def __init__(self, path: str, kind: str, source: Source, entries: dict[str, _Entry]) -> None:
        self.path, self.kind, self._source, self._entries = path, kind, source, entries
        self.datasets: list[str] = []
        self.chunks = self.chunk_size = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def values(self, name: str) -> Values:
        """All importances of a weight, [E * n] float32.

        Rounds: the quotient, to float32.
        """
        entry = self._entries[name]
        values = np.empty(entry.sums.n, np.float32)
        self._source.read_into(entry.sums.offset, values.view(np.uint8))
        with np.errstate(invalid="ignore"):  # a NaN stays one; `problems` tells
            if entry.counts is None:
                if entry.calls > 0:
                    values /= np.float32(entry.calls)
                return values
            parts = values.reshape(len(entry.counts), -1)
            used = entry.counts > 0
            parts[used] /= entry.counts[used, None].astype(np.float32)
            parts[~used] = 1
        return values

    def get(self, name: str, n_experts: int | None = None, n: int | None = None) -> Values | None:
        """Importances of a weight as its encoder takes them, or None where the file has none for it.

        n_experts : length of the weight's third axis (experts; heads of attn_k_b), None or 1: it has none
        n         : weights in a row, if known
        return    : [n] float32, or [E, n]

        Raises BadFile where the number of values is not that of the weight, or where one is NaN or Inf:
        llama-quantize stops there too, but goes on without where the embedding's number is wrong.
        """
        if name not in self._entries:
            return None
        values, experts = self.values(name), n_experts or 1
        if len(values) % experts or (n is not None and len(values) != experts * n):
            if name == "token_embd.weight":
                return None
            want = f"{experts} x {n}" if n is not None else f"a multiple of {experts}"
            offset = self._entries[name].sums.offset
            raise BadFile(self.path, offset, f"{name} has {len(values):,} importances, not {want}")
        if not np.isfinite(values).all():
            at = int(np.isfinite(values).argmin())
            defect = f"{name}: importance {at:,} is {values[at]}"
            raise BadFile(self.path, self._entries[name].sums.offset + 4 * at, defect)
        return values if experts == 1 else values.reshape(experts, -1)

    @cached_property
    def problems(self) -> list[Problem]:
        """Everything doubtful in the file, weight by weight; reads all of it once."""
        return [problem for name in self for problem in self._check(name)]

    def _check(self, name: str) -> Iterator[Problem]:
        counts = self._entries[name].counts
        parts = self.values(name).reshape(1 if counts is None else len(counts), -1)
        for e, values in enumerate(parts):
            expert = e if len(parts) > 1 else None
            label = name if expert is None else f"{name}, expert {e}"
            if counts is not None and counts[e] <= 0:
                yield Problem(name, expert, "unused", f"{label}: no token reached it; all columns count 1")
                continue
            bad = ~np.isfinite(values)
            if bad.any():
                words = f"{bad.sum():,} values are NaN or Inf, the first in column {bad.argmax():,}"
                yield Problem(name, expert, "not-finite", f"{label}: {words}")
            if (values < 0).any():
                low = values < 0
                words = f"{low.sum():,} values are negative, the first in column {low.argmax():,}"
                yield Problem(name, expert, "negative", f"{label}: {words}")
            if not values.any():
                yield Problem(name, expert, "zero-row", f"{label}: all {len(values):,} values are zero")
            elif len(values) % _BLOCK == 0:
                empty = ~values.reshape(-1, _BLOCK).any(axis=1)
                if empty.any():
                    words = f"{empty.sum():,} blocks are all zero, the first is block {empty.argmax():,}"
                    yield Problem(name, expert, "zero-block", f"{label}: {words}")

    def close(self) -> None:
        """Give the file descriptor back."""
        self._source.close()

    def __enter__(self) -> "Imatrix":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: PathLike) -> Imatrix:
    """Open an imatrix, GGUF or legacy. Raises BadFile."""
    file = LocalFile(path)
    if file.size >= 4 and file.read(0, 4) == b"GGUF":
        file.close()
        return _read_gguf(path)
    try:
        return _read_legacy(file)
    except BaseException:
        file.close()
        raise


def _read_gguf(path: PathLike) -> Imatrix:
    model = Gguf(path)
    try:
        for defect in model.defects:
            if defect.code != "trailing":
                raise defect
        return _gather(model)
    except BaseException:
        model.close()
        raise


def _gather(model: Gguf) -> Imatrix:
    """Pair sums with counts. Every tensor must belong to a pair, and the three keys must be there."""
    path, metadata = model.path, model.metadata
    missing = [key for key in _KEYS if key not in metadata]
    if missing or len(model.parts) > 1 or not model.tensors:
        words = f"{missing[0]} is missing" if missing else "it is split, or empty"
        raise BadFile(path, 0, f"no imatrix: {words}")
    entries: dict[str, _Entry] = {}
    for key, tensor in model.tensors.items():
        name, _, what = key.rpartition(".")
        if what not in ("in_sum2", "counts"):
            continue
        other = model.tensors.get(f"{name}.{'counts' if what == 'in_sum2' else 'in_sum2'}")
        if other is None or tensor.format is not F32:
            defect = "has no counterpart" if other is None else f"is {tensor.format.name}, not f32"
            raise BadFile(path, tensor.offset, f"{key} {defect}")
        if what == "in_sum2":
            entries[name] = _pair(model, name, tensor, other)
    imatrix = Imatrix(path, "gguf", model.sources[0], dict(sorted(entries.items())))
    datasets, chunks, size = (metadata[key] for key in _KEYS)
    texts = isinstance(datasets, Array) and all(isinstance(text, str) for text in datasets)
    if not texts or not all(isinstance(value, int) for value in (chunks, size)):
        raise BadFile(path, metadata.offsets[_KEYS[0]], "the imatrix keys are not texts and two counts")
    imatrix.datasets, imatrix.chunks, imatrix.chunk_size = list(datasets), chunks, size
    return imatrix


def _pair(model: Gguf, name: str, sums: Tensor, counts: Tensor) -> _Entry:
    values, parts = sums.rows * sums.n, counts.rows * counts.n
    if values % parts or parts > values:
        raise BadFile(model.path, sums.offset, f"{name} has {values:,} sums for {parts:,} counts")
    stored = model.read(counts.name).view(np.float32).reshape(-1).astype(np.float64)
    if not np.isfinite(stored).all() or (abs(stored) >= 2.0**63).any():
        raise BadFile(model.path, counts.offset, f"{counts.name} holds a count that is no number of tokens")
    rounded = np.trunc(stored + np.copysign(0.5, stored)).astype(np.int64)  # as lround: halves away from zero
    flat = Tensor(sums.name, F32, (values,), sums.offset, sums.nbytes)
    return _Entry(flat, rounded)


def _read_legacy(file: LocalFile) -> Imatrix:
    place = 0

    def number(what: str, least: int, most: int) -> int:
        nonlocal place
        start = place
        value = int.from_bytes(file.read(start, 4), "little", signed=True)
        if not least <= value <= most:
            raise BadFile(file.path, start, f"no imatrix: {what} is {value:,}, not {least:,} to {most:,}")
        place += 4
        return value

    def text(what: str, most: int) -> str:
        nonlocal place
        length = number(f"the length of {what}", 0, most)
        raw = file.read(place, length)
        place += length
        try:
            return raw.decode().removesuffix("\0")
        except UnicodeDecodeError:
            raise BadFile(file.path, place - length, f"{what} is not UTF-8") from None

    entries: dict[str, _Entry] = {}
    for _ in range(number("the number of entries", 1, ENTRIES)):
        start = place
        name = text("a name", _NAME_BYTES)
        if not name or "\0" in name or name in entries:
            raise BadFile(file.path, start, f"the name {name!r} is empty, holds a NUL, or occurs twice")
        calls = number("the number of calls", -(2**31), 2**31 - 1)
        count = number("the number of values", 1, 2**31 - 1)
        if count * 4 > file.size - place:
            defect = f"{name} claims {count:,} values, the file has {file.size - place:,} bytes left"
            raise BadFile(file.path, place - 4, defect)
        entries[name] = _Entry(Tensor(name, F32, (count,), place, count * 4), None, calls)
        place += count * 4
    imatrix = Imatrix(file.path, "legacy", file, entries)
    if place + 4 <= file.size:
        imatrix.chunks = number("the number of chunks", -(2**31), 2**31 - 1)
        if place + 4 <= file.size:
            imatrix.datasets = [name] if (name := text("the data set", 1 << 16)) else []
    return imatrix
