"""Two models of any formats, tensor by tensor, after the transforms between a checkpoint and a GGUF.

Bytes are compared where both sides have one type; values, decoded to float32, where they do not or where the
bytes differ. Units of rows run on all cores and are merged in order, so the result is the same for any number.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl import engine, quants
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint
from refimpl.files.source import Model
from refimpl.quants.formats import BF16, F32, Format, formats
from refimpl.writers.difference import Difference, Pair
from refimpl.writers.output import PathLike, Progress

Side = Gguf | Checkpoint

UNIT_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class _Unit:
    """Rows [start, stop) of a pair."""

    pair: Pair
    start: int
    stop: int


@dataclass
class _Found:
    bytes_differ: bool = False
    blocks_differ: int = 0
    weights_differ: int = 0
    sse: float = 0.0
    ssx: float = 0.0
    max_abs: float = 0.0
    first: tuple[int, int, float, float] | None = None
    worst: tuple[int, int, float, float] | None = None


def diff(a: PathLike, b: PathLike, jobs: int | None = None, progress: Progress | None = None) -> Difference:
    """Compare two models: GGUFs, splits, checkpoint directories, .safetensors files.

    Raises BadFile for what cannot be read, Unsupported where a checkpoint of another architecture than GLM-5.1
    meets a GGUF.
    """
    with ExitStack() as stack:
        one, two = (stack.enter_context(closing(model_files.open(path))) for path in (a, b))
        hp = None
        if isinstance(one, Gguf) != isinstance(two, Gguf):
            checkpoint, other = (two, one) if isinstance(one, Gguf) else (one, two)
            assert isinstance(checkpoint, Checkpoint)
            hp = names.hparams(checkpoint if checkpoint.config else other)
        pairs = _pair_up(one, two, hp)
        total = sum(prod(p.shapes[0] or ()) for p in pairs if p.comparable)
        done = 0
        for unit, found in engine.map_units(_units(pairs), lambda u: _compare(one, two, hp, u), jobs):
            _merge(unit, found)
            done += (unit.stop - unit.start) * (unit.pair.shapes[0] or (1,))[-1]
            if progress is not None:
                progress(done, total)
        for pair in pairs:
            _settle(pair)
        return Difference(one.path, two.path, (one.kind, two.kind), pairs, _compare_keys(one, two))


def _pair_up(one: Side, two: Side, hp: Hparams | None) -> list[Pair]:
    """Every tensor of both, A's in its order and then what B alone has."""
    listed = [_list(one, hp), _list(two, hp)]
    pairs = []
    for name in dict.fromkeys([*listed[0], *listed[1]]):
        found = [side.get(name) for side in listed]
        types = tuple(None if f is None else f[0] for f in found)
        shapes = tuple(None if f is None else f[1] for f in found)
        link = next((f[2] for f in found if f is not None and f[2] is not None), None)
        pairs.append(Pair(name, link, types, shapes))  # type: ignore[arg-type]
    return pairs


def _list(model: Side, hp: Hparams | None) -> dict[str, tuple[str, tuple[int, ...], Link | None]]:
    """Type, shape and link of each tensor; a checkpoint's by their GGUF names where the other side is a GGUF."""
    if hp is None or isinstance(model, Gguf):
        return {t.name: (t.format.name, t.shape, None) for t in model.tensors.values()}
    found: dict[str, tuple[str, tuple[int, ...], Link | None]] = {}
    for name, tensor in model.tensors.items():
        known = names.from_hf(name, hp)
        if known is None:
            found[name] = (tensor.format.name, tensor.shape, None)
            continue
        links = [known[0]]
        if known[0].transform == "k_b":
            links += [link for link in [names.link(known[0].gguf.replace("k_b", "v_b"), hp)] if link]
        for link in links:
            shape = names.source_shape(model, link, hp)
            if link.gguf not in found and shape is not None:
                found[link.gguf] = (tensor.format.name, tuple(shape), link)
    return found


def _units(pairs: Sequence[Pair]) -> Iterator[_Unit]:
    """Rows of every pair that both sides have in one shape, none across experts."""
    for pair in pairs:
        shape = pair.shapes[0]
        if not pair.comparable or shape is None or not prod(shape):
            continue
        n = shape[-1] if shape else 1
        rows = prod(shape) // n
        slab = shape[1] if len(shape) == 3 else rows
        step = max(1, UNIT_WEIGHTS // n)
        for first in range(0, rows, slab):
            for start in range(first, first + slab, step):
                yield _Unit(pair, start, min(start + step, first + slab))


def _read(model: Side, hp: Hparams | None, unit: _Unit) -> tuple[NDArray[np.uint8], Format]:
    pair, rows = unit.pair, slice(unit.start, unit.stop)
    if hp is None or isinstance(model, Gguf) or pair.link is None:
        return Model.read(model, pair.name, rows), model.tensors[pair.name].format
    x = np.ascontiguousarray(names.source_rows(model, pair.link, hp, rows))
    return x.view(np.uint8), BF16 if x.dtype == np.uint16 else F32


def _compare(one: Side, two: Side, hp: Hparams | None, unit: _Unit) -> _Found:
    (raw, fmt), (other, kind) = _read(one, hp, unit), _read(two, hp, unit)
    found = _Found()
    if fmt == kind:
        if np.array_equal(raw, other):
            return found
        size = fmt.block.itemsize
        wrong = (raw.reshape(-1, size) != other.reshape(-1, size)).any(axis=1)
        found.blocks_differ = int(np.count_nonzero(wrong))
        found.bytes_differ = True
    if fmt.name not in formats or kind.name not in formats:
        return found
    x, y = quants.dequantize(raw, fmt), quants.dequantize(other, kind)
    with np.errstate(all="ignore"):
        off = (x != y) & ~(np.isnan(x) & np.isnan(y))
        found.ssx = float(np.square(x, dtype=np.float64).sum())
        found.weights_differ = int(np.count_nonzero(off))
        if found.weights_differ:
            d = np.where(off, x.astype(np.float64) - y, 0)
            found.sse = float(np.square(d).sum())
            far = np.where(np.isnan(d), np.inf, np.abs(d))
            found.first = _at(off, x, y, unit.start)
            found.worst = _at(far == far.max(), x, y, unit.start)
            found.max_abs = float(far.max())
    return found


def _at(
    where: NDArray[np.bool_], x: NDArray[Any], y: NDArray[Any], start: int
) -> tuple[int, int, float, float]:
    row, column = (int(i) for i in np.unravel_index(int(where.argmax()), where.shape))
    return start + row, column, float(x[row, column]), float(y[row, column])


def _merge(unit: _Unit, found: _Found) -> None:
    pair, shape = unit.pair, unit.pair.shapes[0] or (1,)
    pair.bytes_differ |= found.bytes_differ
    pair.blocks_differ += found.blocks_differ
    if pair.weights_differ is not None:
        pair.weights_differ += found.weights_differ
    pair.sse, pair.ssx = pair.sse + found.sse, pair.ssx + found.ssx
    if found.max_abs > pair.max_abs:
        pair.max_abs, pair.worst = found.max_abs, found.worst
    pair.first = pair.first or found.first
    if len(shape) == 3 and (found.bytes_differ or found.weights_differ):
        expert = unit.start // shape[1]
        if expert not in pair.experts[-1:]:
            pair.experts.append(expert)


def _settle(pair: Pair) -> None:
    """The status, from what was found."""
    if None in pair.shapes:
        pair.status = "only-b" if pair.shapes[0] is None else "only-a"
        pair.weights_differ = None
    elif not pair.comparable:
        pair.status, pair.weights_differ = "differs", None
    else:
        decoded = all(kind in formats for kind in pair.types)
        alike = pair.types[0] == pair.types[1]
        if alike and pair.types[0] in formats:
            fmt = formats[str(pair.types[0])]
            pair.blocks = prod(pair.shapes[0] or ()) // fmt.weights
        if not decoded:
            pair.weights_differ = None
        if alike and not pair.bytes_differ:
            pair.status = "same"
        elif decoded and not pair.weights_differ:
            pair.status = "same-values"
        else:
            pair.status = "differs"


def _compare_keys(one: Side, two: Side) -> dict[str, list[str]]:
    if not isinstance(one, Gguf) or not isinstance(two, Gguf):
        return {"only_a": [], "only_b": [], "differ": []}
    a, b = one.metadata, two.metadata
    both = a.keys() & b.keys()
    return {
        "only_a": sorted(a.keys() - both),
        "only_b": sorted(b.keys() - both),
        "differ": sorted(k for k in both if a.types[k] != b.types[k] or not _equal(a[k], b[k])),
    }


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, float) and isinstance(y, float):
        return np.float64(x).tobytes() == np.float64(y).tobytes()
    return bool(x == y)
