"""Encode the source again and compare with the file, block by block.

A unit is some rows of one expert (or of one plain tensor). Blocks whose bytes equal the reference encoder's
(with the imatrix if one was given, or without) are done; every other block is put into exactly one class, worst first:

    nan     a scale of the block is NaN or Inf
    zero    d = 0 although the source block is not zero and the plain encoder's d is not
    scale   no importances make the encoder store this d with these codes (Q5_0, whose codes do not follow d)
    error   its squared error exceeds error_limit times the plain encoder's, and what even steps cost any block
    far     a code lies two or more steps from the nearest under the stored scales
    off     a code lies one step from the nearest under the stored scales
    search  every code is nearest: another scale search (an imatrix, another build) made this block
    unruled the format's codes depend on the imatrix: some imatrix may explain them, and the block's error is bounded

Of a format whose codes depend on the imatrix (not fmt.ruled), `off` is a block that no imatrix explains.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.quants import q5_0
from refimpl.quants.formats import Format
from refimpl.verifier.job import Task

CLASSES = ("nan", "zero", "scale", "error", "far", "off", "search", "unruled")
KEEP = 8  # blocks remembered per class and expert; the counts go on
EXACT = frozenset({"f32", "f16", "bf16"})  # unquantized: copied or not


# per row: squared errors, squared source values; squared errors of the blocks that differ, as stored and as
# the plain encoder has them
SUMS = ("sse", "ssx", "differ", "plain")


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a task's tensor, all of one expert (None: the tensor is not stacked)."""

    task: Task
    expert: int | None
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Does its expert (or its tensor, where none is stacked) end here?"""
        return self.stop % self.task.rows == 0 and (self.task.stacked or self.stop == self.task.tensor.rows)


@dataclass(frozen=True)
class Suspect:
    """One block that differs: what the file holds and what the encoder would have written."""

    block: int  # within the whole tensor
    byte: int  # first differing byte within the block
    stored: int
    expected: int
    off: int  # codes off-nearest
    far: int  # in code steps
    ratio: float  # squared error over the plain encoder's


@dataclass
class Tally:
    """What was counted for one expert of one tensor; merges associatively, in row order."""

    weights: int = 0
    blocks: int = 0
    differ: int = 0  # from the encoder of this build, with the imatrix and without
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    suspects: dict[str, list[Suspect]] = field(default_factory=lambda: {c: [] for c in CLASSES})
    ratio: float = 0.0  # worst error ratio over the blocks that differ
    overflow: int = 0  # finite source values that the file's float type holds as Inf
    underflow: int = 0  # non-zero source values that it holds as 0
    rows: dict[str, list[NDArray[np.float64]]] = field(default_factory=lambda: {s: [] for s in SUMS})
    sums: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in SUMS})  # of complete experts
    max_abs: float = 0.0
    worst_block: int | None = None
    worst_sse: float = -1.0
    source_not_finite: tuple[int, int] | None = None  # first row and column where the source is NaN or Inf

    def merge(self, other: "Tally") -> None:
        """Add the tally of the rows that follow."""
        self.weights += other.weights
        self.blocks += other.blocks
        self.differ += other.differ
        self.overflow += other.overflow
        self.underflow += other.underflow
        self.ratio = max(self.ratio, other.ratio)
        for name in CLASSES:
            self.counts[name] += other.counts[name]
            self.suspects[name] = (self.suspects[name] + other.suspects[name])[:KEEP]
        self.source_not_finite = self.source_not_finite or other.source_not_finite
        for name in SUMS:
            self.rows[name] += other.rows[name]
            self.sums[name] += other.sums[name]
        self.max_abs = _larger(self.max_abs, other.max_abs)
        if other.worst_sse > self.worst_sse:
            self.worst_sse, self.worst_block = other.worst_sse, other.worst_block

    def close(self) -> None:
        """All rows of this expert have come: keep their exactly rounded sums, the same for any partition."""
        for name, rows in self.rows.items():
            self.sums[name].append(_fsum(rows))
            self.rows[name] = []

    def sum(self, name: str) -> float:
        """One of SUMS; NaN where something is not finite."""
        return _fsum([np.array(self.sums[name])])


def _fsum(parts: list[NDArray[np.float64]]) -> float:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return math.fsum(values.tolist()) if np.isfinite(values).all() else math.nan


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def even_error(fmt: Format) -> float:
    """Squared error over squared source that even steps from the largest to the smallest weight cost a block.

    (2r / steps)^2 / 12 / r^2 where the weights are +-r. Blocks that the plain encoder happens to hit (one value,
    two values, mostly zeros) are measured against this: any other search misses them by far more than the limit.
    """
    return 1 / (3 * fmt.steps**2) if fmt.steps else 0.0


def even_importance(n: int, fmt: Format) -> NDArray[np.float32] | None:
    """What stands for the imatrix in the plain encoder: nothing, or ones where the format does not go without."""
    return np.ones(n, np.float32) if fmt.needy else None


def check_rows(
    raw: NDArray[np.uint8],
    fmt: Format,
    source: NDArray[np.uint16] | NDArray[np.float32],
    first_block: int,
    imatrix: NDArray[np.float32] | None,
    build: str,
) -> Tally:
    """Compare rows of the file with the source rows they claim to encode.

    raw         : [R, bytes] uint8 as stored
    source      : [R, n] uint16 (bf16 bits) or float32
    first_block : index of raw[0]'s first block within the tensor
    imatrix     : [n] float32, or None
    Raises quants.NotFinite where the source holds NaN or Inf.
    """
    row = even_importance(source.shape[1], fmt) if imatrix is None else imatrix
    want = quants.quantize(source, fmt, imatrix=row, build=build)
    tally = Tally(weights=source.size, blocks=source.size // fmt.weights)
    if fmt.name in EXACT:
        _count_floats(tally, raw, want, fmt, widen(source), first_block)
        return tally
    rows = quants.compare(raw, fmt, source)
    tally.rows["sse"].append(rows["sse"].copy())
    tally.rows["ssx"].append(rows["ssx"].copy())
    tally.max_abs = float(rows["max_abs"].max())
    worst = int(np.argmax(rows["worst_sse"]))
    tally.worst_sse = float(rows["worst_sse"][worst])
    per_row = source.shape[1] // fmt.weights
    tally.worst_block = first_block + worst * per_row + int(rows["worst_block"][worst])
    if not np.array_equal(raw, want):
        _classify_blocks(tally, raw, want, fmt, source, first_block, imatrix, build)
    return tally


def widen(source: NDArray[np.uint16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """bf16 bits to float32; float32 as it is."""
    if source.dtype == np.uint16:
        x = np.empty(source.shape, np.uint32)
        np.left_shift(source, 16, out=x, dtype=np.uint32)
        return x.view(np.float32)
    return source.astype(np.float32, copy=False)


def _count_floats(
    tally: Tally,
    raw: NDArray[np.uint8],
    want: NDArray[np.uint8],
    fmt: Format,
    x: NDArray[np.float32],
    first_block: int,
) -> None:
    """Unquantized rows: equal to the source after the declared conversion, or not."""
    if np.array_equal(raw, want) and fmt.name != "f16":
        tally.rows["sse"].append(np.zeros(len(x)))
        tally.rows["ssx"].append(np.square(x, dtype=np.float64).sum(axis=1))
        return
    got = quants.dequantize(raw, fmt)
    finite = np.isfinite(got)
    tally.counts["nan"] = int(got.size - finite.sum())
    tally.overflow = int((np.isinf(got) & np.isfinite(x)).sum())
    tally.underflow = int(((got == 0) & (x != 0)).sum())
    with np.errstate(invalid="ignore", over="ignore"):
        error = got.astype(np.float64) - x
        tally.rows["sse"].append(np.square(error).sum(axis=1))
        tally.rows["ssx"].append(np.square(x, dtype=np.float64).sum(axis=1))
        tally.max_abs = float(np.abs(error).max()) if finite.all() else math.nan
    size = fmt.block.itemsize
    differ = (raw.reshape(-1, size) != want.reshape(-1, size)).any(axis=1)
    tally.differ = int(differ.sum())
    tally.counts["error"] = tally.differ
    flat, wanted = raw.reshape(-1, size), want.reshape(-1, size)
    for i in np.flatnonzero(~finite.reshape(-1))[:KEEP]:
        tally.suspects["nan"].append(_suspect(int(i), first_block, flat, wanted))
    for i in np.flatnonzero(differ)[:KEEP]:
        tally.suspects["error"].append(_suspect(int(i), first_block, flat, wanted))


def zeroed(
    raw: NDArray[np.uint8], plain: NDArray[np.uint8], fmt: Format, x: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Blocks with a scale of 0 over weights that are not, where the plain encoder's scale is none: [R, NB]."""
    have, want = quants.read_scales(raw, fmt), quants.read_scales(plain, fmt)
    weights = (x.reshape(*have.shape, -1) != 0).any(axis=3)
    found: NDArray[np.bool_] = ((have == 0) & (want != 0) & weights).any(axis=2)
    return found


def misfits(raw: NDArray[np.uint8], fmt: Format, x: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Q5_0 blocks whose d no importances w >= 0 explain: d = sum(w l x) / sum(w l^2) is a mean of x / l. [R, NB]."""
    shape = (len(x), x.shape[1] // fmt.weights)
    if fmt.name != "q5_0":
        return np.zeros(shape, np.bool_)
    blocks = raw.view(fmt.block).reshape(-1)
    codes = q5_0.unpack_codes(blocks).astype(np.float32) - 16
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales = np.where(codes != 0, x.reshape(codes.shape) / codes, np.nan)
    d = blocks["d"].astype(np.float32)
    slack = np.abs(d) * np.float32(2**-10) + np.float32(2**-24)  # d is rounded to fp16
    found: NDArray[np.bool_] = d < np.fmin.reduce(scales, 1) - slack
    found |= d > np.fmax.reduce(scales, 1) + slack
    return found.reshape(shape)


def _suspect(
    i: int,
    first_block: int,
    raw: NDArray[np.uint8],
    want: NDArray[np.uint8],
    off: int = 0,
    far: int = 0,
    ratio: float = 0.0,
) -> Suspect:
    unequal = np.flatnonzero(raw[i] != want[i])
    byte = int(unequal[0]) if len(unequal) else 0
    return Suspect(first_block + i, byte, int(raw[i, byte]), int(want[i, byte]), off, far, ratio)


def _classify_blocks(
    tally: Tally,
    raw: NDArray[np.uint8],
    want: NDArray[np.uint8],
    fmt: Format,
    source: NDArray[np.uint16] | NDArray[np.float32],
    first_block: int,
    imatrix: NDArray[np.float32] | None,
    build: str,
) -> None:
    """Put every block that differs into its class."""
    size, per_row = fmt.block.itemsize, source.shape[1] // fmt.weights
    differ = (raw.reshape(-1, per_row, size) != want.reshape(-1, per_row, size)).any(axis=2)
    rows = np.flatnonzero(differ.any(axis=1))
    raw, source, differ = raw[rows], source[rows], differ[rows]
    x = widen(source)
    even = even_importance(x.shape[1], fmt)
    plain = want[rows] if imatrix is None else quants.quantize(x, fmt, even, build=build)
    differ &= (raw.reshape(-1, per_row, size) != plain.reshape(-1, per_row, size)).any(axis=2)
    tally.differ = int(differ.sum())
    if not tally.differ:
        return

    sse, sse_plain = np.empty(differ.shape), np.empty(differ.shape)
    quants.compare(raw, fmt, source, sse=sse)
    quants.compare(plain, fmt, source, sse=sse_plain)
    tally.rows["differ"].append(np.where(differ, sse, 0).sum(axis=1))
    tally.rows["plain"].append(np.where(differ, sse_plain, 0).sum(axis=1))
    least = even_error(fmt) * np.square(x, dtype=np.float64).reshape(*differ.shape, -1).sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(sse > sse_plain, sse / sse_plain, np.where(sse <= sse_plain, 1.0, np.inf))
    near = quants.nearest(raw, fmt, x)

    kind = np.full(differ.shape, CLASSES.index("search" if fmt.ruled else "unruled"))
    kind[near["off"] > 0] = CLASSES.index("off")
    kind[near["far"] > 1] = CLASSES.index("far")
    kind[(ratio > fmt.error_limit) & ~(sse <= least)] = CLASSES.index("error")
    kind[misfits(raw, fmt, x)] = CLASSES.index("scale")
    kind[zeroed(raw, plain, fmt, x)] = CLASSES.index("zero")
    kind[quants.scale_defects(raw, fmt)] = CLASSES.index("nan")
    tally.ratio = float(ratio[differ].max())
    raw, want = raw.reshape(-1, size), want[rows].reshape(-1, size)
    for c, name in enumerate(CLASSES):
        found = np.flatnonzero(differ & (kind == c))
        tally.counts[name] = len(found)
        for i in found[:KEEP]:
            row, column = divmod(int(i), per_row)
            place = first_block + int(rows[row]) * per_row + column - int(i)
            here = near[row, column]
            tally.suspects[name].append(
                _suspect(
                    int(i), place, raw, want, int(here["off"]), int(here["far"]), float(ratio[row, column])
                )
            )
