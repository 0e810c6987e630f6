"""The log of llama-eval-callback as a trace: what it prints of each activation, and what can be said from that.

Of every axis longer than 6 the log prints the first and the last 3, of each value 4 decimals, and beside them the sum
of all values, added in float32 one after the other:

    common_debug_cb_eval:     k_pe-0 = (f32)   ROPE(k_pe-0{64, 1, 8, 1}, inp_pos{8, 1, 1, 1}}) = {64, 1, 8, 1}
        [
            [
                [     -0.9243,      -0.6092,       0.5557,    ...,       1.4119,       1.1404,       1.9610  ],
                ...,
            ],
        ]
        sum = 60.536137

So no operation can be replayed from it. Printed values and sums are compared with those of a whole trace; a fault that
leaves both alone is not seen. In the last layer llama.cpp goes on with those tokens alone whose logits are asked for,
the last one; and a log may end within a record, for the program does not wait for its log.

Source: common/debug.cpp, llama.cpp 0c1e570.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.crosscheck.bounds import gamma
from refimpl.errors import BadFile, printable

Array = NDArray[Any]

EDGE = 3  # values printed at each end of an axis
LAST_PLACE = 1e-4  # values that lie closer may be printed alike, or as neighbours
MOST = 1 << 16  # values that a record may print; more is no such log
_RECORD = re.compile(
    r"\w+: +(.+) = \((\w+)\) +\w+\(.*\) = \{(\d{1,18}), (\d{1,18}), (\d{1,18}), (\d{1,18})\}"
)
_SUM = re.compile(r"sum = -?(?:\d+\.\d+|inf|nan)")
_NUMBER = re.compile(r"-?(?:\d+\.\d+|inf|nan)")


@dataclass
class Printed:
    """One record of the log.

    shape  : four axes, NumPy order
    values : what is printed, float64, in order
    sum    : of all values; None where the log ends before it
    """

    shape: tuple[int, ...]
    values: Array
    sum: float | None

    @property
    def places(self) -> Array:  # [P, 4]
        """Where each printed value stands."""
        axes = [_shown(n) if axis else range(n) for axis, n in enumerate(self.shape)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)


def _shown(n: int) -> list[int]:
    return list(range(n)) if n <= 2 * EDGE else [*range(EDGE), *range(n - EDGE, n)]


def read_log(path: str) -> list[tuple[str, Printed]]:
    """Names and records of a log in their order; those of quantized tensors, which print nothing, are left out.

    Raises: BadFile where it is no such log, or where a record other than the last is not whole.
    """
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for name, shape, values, total in _records(file, path):
                if values:
                    found.append((name, Printed(shape, np.array(values), total)))
    except OSError as error:
        raise BadFile(path, None, f"no trace: {error}") from None
    if not found:
        raise BadFile(path, None, "no trace: neither a .safetensors nor a log of llama-eval-callback")
    return found


def _records(
    lines: Iterable[str], path: str
) -> Iterator[tuple[str, tuple[int, ...], list[float], float | None]]:
    """(name, shape, values, sum) of every record that is whole."""
    name, shape, values, total = "", tuple[int, ...](), list[float](), None
    for line in lines:
        record = _RECORD.match(line)
        if record is not None:
            if name and _is_whole(name, shape, values, path):
                yield name, shape, values, total
            name, shape, values, total = record[1], tuple(int(n) for n in record.groups()[:1:-1]), [], None
        elif line.strip().startswith("[") and len(values) <= MOST:
            values += [float(number) for number in _NUMBER.findall(line)]
        elif _SUM.fullmatch(line.strip()):
            total = float(line.partition("=")[2])
    if total is not None and _is_whole(name, shape, values, path):
        yield name, shape, values, total


def _is_whole(name: str, shape: tuple[int, ...], values: list[float], path: str) -> bool:
    wanted = prod(min(n, 2 * EDGE) for n in shape[1:]) * shape[0]
    if values and len(values) != wanted:
        raise BadFile(path, None, f"the log prints {len(values)} values of {printable(name)}, not {wanted}")
    return bool(values)


def compare_values(base: str, whole: Array, found: Printed) -> tuple[str, float, int]:
    """Hold what is printed of an activation to A's.

    whole  : A's activation, tokens first
    return : "same" or "differs"; the largest distance as a share of A's largest value, of a selection the share of
             rows that differ; how many values were compared
    """
    if base in ("top_k", "ffn_moe_topk"):
        return _compare_selection(base, whole, found)
    if prod(found.shape) * len(whole) == whole.size:  # of one token: the last
        whole = whole[-1:]
    places = _find_places(base, whole, found)
    if places is None:
        return "differs", float("inf"), 0
    kept, index = places
    mine, theirs = whole.reshape(-1)[index].astype(np.float64), found.values[kept]
    with np.errstate(invalid="ignore"):
        off = np.where((mine == theirs) | (np.isnan(mine) & np.isnan(theirs)), 0.0, np.abs(mine - theirs))
    off = np.where(np.isnan(off), np.inf, off)
    size = np.abs(np.where(np.isfinite(whole), whole, 0)).max(initial=1e-300)
    same = bool((off <= LAST_PLACE + 2.0**-23 * np.abs(mine)).all()) and _adds_up(whole, found)
    return "same" if same else "differs", float(off.max(initial=0.0) / size), len(index)


def _compare_selection(base: str, whole: Array, found: Printed) -> tuple[str, float, int]:
    """Every key or expert that is printed must be among those that A chose for that token."""
    rows = found.places[:, 2] + (len(whole) - found.shape[2] if found.shape[2] == 1 else 0)
    ids = np.where(np.abs(found.values) < 2.0**31, found.values, -1).astype(np.int64)
    if rows.max() >= len(whole):
        return "differs", float("inf"), 0
    if base == "top_k":
        kept = ids <= rows  # where there are too few keys engines fill up with later ones
        rows, ids = rows[kept], ids[kept]
        right = (ids >= 0) & whole[rows, np.maximum(ids, 0)].astype(np.bool_)
    else:
        right = (whole[rows] == ids[:, None]).any(axis=1)
    wrong = len(np.unique(rows[~right]))
    return "differs" if wrong else "same", wrong / len(whole), len(ids)


def _find_places(base: str, whole: Array, found: Printed) -> tuple[Array, Array] | None:
    """Which of the printed values A has, and where, flat; None where the shapes do not fit."""
    at = found.places
    if base == "indexer_score":  # padded with keys that do not exist; later ones are not yet masked
        kept = (at[:, 3] <= at[:, 2]) & (at[:, 2] < len(whole))
        return (kept, at[kept, 2] * whole.shape[1] + at[kept, 3]) if found.shape[2] == len(whole) else None
    if prod(found.shape) != whole.size:
        return None
    every = np.ones(len(at), np.bool_)
    if base == "kqv":  # heads before tokens
        _, heads, tokens, width = found.shape
        return every, np.ravel_multi_index((at[:, 2], at[:, 1], at[:, 3]), (tokens, heads, width))
    return every, np.ravel_multi_index(tuple(at.T), found.shape)


def _adds_up(whole: Array, found: Printed) -> bool:
    """Is the printed sum one that float32 additions of A's values, one after the other, can give?"""
    if found.sum is None or prod(found.shape) != whole.size or not np.isfinite(whole).all():
        return True
    wide = whole.astype(np.float64)
    return bool(abs(found.sum - wide.sum()) <= gamma(wide.size) * np.abs(wide).sum() + LAST_PLACE)
