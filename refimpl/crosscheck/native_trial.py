"""One trial: a function of the library on given inputs, and whether the result is what refimpl defines.

Inputs are arrays whose first axis counts blocks, so that a failing trial can be cut down block by block:

decode        blocks [N, bytes] uint8
encode, row   x [N, weights] float32 in `rows` rows; imatrix [N / rows, weights] float32, or none
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.crosscheck.native_library import NULL, Argument, Buffer, Library, Outcome
from refimpl.crosscheck.native_symbols import Symbol
from refimpl.quants.formats import Format

Array = NDArray[Any]


@dataclass(frozen=True)
class Trial:
    """Inputs of one call."""

    case: str  # what it tries
    inputs: Mapping[str, Array]
    rows: int = 1
    shifted: bool = False  # pointers are aligned as little as the ABI allows

    @property
    def blocks(self) -> int:
        """Number of blocks, N."""
        return len(next(iter(self.inputs.values())))

    def cut(self, start: int, stop: int) -> "Trial":
        """These blocks alone, in one row."""
        per_row = self.blocks // self.rows
        inputs = {
            name: a[start % per_row :][: stop - start] if name == "imatrix" else a[start:stop]
            for name, a in self.inputs.items()
        }
        return Trial(self.case, inputs, 1, self.shifted)


@dataclass(frozen=True)
class Result:
    """How a trial went."""

    problem: str | None = None  # in a few words; None: as defined
    kind: str = ""  # of the problem: crash, hang, spill, values, signs (of zeros)
    block: int = 0  # the first wrong one
    got: Array | None = None  # bytes [N, bytes] or weights [N, weights]
    want: Array | None = None
    builds: frozenset[str] = field(default_factory=frozenset)  # encoders: whose bytes these are
    ratio: float | None = None  # dots: largest error as a share of its bound

    @property
    def died(self) -> bool:
        """A crash or a hang: there is nothing to compare."""
        return self.kind in ("crash", "hang")


def run(library: Library, symbol: Symbol, trial: Trial, builds: frozenset[str]) -> Result:
    """Call the function and compare; `builds` are those that an encoder may still be of."""
    match symbol.kind:
        case "decode":
            return _decode(library, symbol, trial)
        case "encode" | "row":
            return _encode(library, symbol, trial, builds)
        case kind:
            raise ValueError(f"no trial for functions of the kind {kind}")


def _decode(library: Library, symbol: Symbol, trial: Trial) -> Result:
    raw, fmt = trial.inputs["blocks"], symbol.format
    n = len(raw) * fmt.weights
    shift = (_alignment(fmt), 4) if trial.shifted else (0, 0)
    arguments: list[Argument] = [Buffer(raw, shift[0]), Buffer(4 * n, shift[1]), ("l", n)]
    outcome = library.call(symbol.name, "v", arguments)
    want = quants.dequantize(raw, fmt).reshape(-1, fmt.weights)
    if outcome.crash is not None or outcome.output is None:
        return _died(outcome, want)
    got = outcome.output.view(np.float32).reshape(want.shape)
    odd = (got != want) & ~(np.isnan(got) & np.isnan(want))
    if not odd.any():
        signs = (got == 0) & (np.signbit(got) != np.signbit(want))
        return _compared(got, want, signs.any(1), outcome.spill, " in the sign of zeros")
    return _compared(got, want, odd.any(1), outcome.spill)


def _encode(library: Library, symbol: Symbol, trial: Trial, builds: frozenset[str]) -> Result:
    fmt, rows = symbol.format, trial.rows
    x = np.ascontiguousarray(trial.inputs["x"])
    n = x.size // rows
    size = rows * fmt.row_bytes(n)
    imatrix = trial.inputs.get("imatrix")
    shift = (4, _alignment(fmt)) if trial.shifted else (0, 0)
    arguments: list[Argument] = [Buffer(x.view(np.uint8), shift[0]), Buffer(size, shift[1])]
    if symbol.kind == "row":
        outcome = library.call(symbol.name, "v", [*arguments, ("l", n)])
    else:
        weights: Argument = NULL
        if imatrix is not None:
            weights = Buffer(np.ascontiguousarray(imatrix).view(np.uint8), shift[0])
        outcome = library.call(symbol.name, "z", [*arguments, ("l", rows), ("l", n), weights])
    row = None if imatrix is None else imatrix.reshape(-1)
    wants = {
        build: quants.quantize(x.reshape(rows, n), fmt, row, build=build).reshape(-1, fmt.block.itemsize)
        for build in sorted(builds, key=list(quants.BUILDS).index)
    }
    first = next(iter(wants.values()))
    if outcome.crash is not None or outcome.output is None:
        return _died(outcome, first)
    got = outcome.output.reshape(first.shape)
    fitting = [build for build, want in wants.items() if (got == want).all()]
    spill = outcome.spill
    if spill is None and symbol.kind == "encode" and outcome.value != size:
        spill = f"returns {outcome.value}, not the {size} bytes written"
    differ = np.zeros(len(got), bool) if fitting else (got != first).any(1)
    return _compared(got, first, differ, spill, builds=frozenset(fitting))


def _died(outcome: Outcome, want: Array) -> Result:
    return Result(outcome.crash, "hang" if "hangs" in (outcome.crash or "") else "crash", want=want)


def _compared(
    got: Array,
    want: Array,
    differ: Array,
    spill: str | None,
    how: str = "",
    builds: frozenset[str] = frozenset(),
) -> Result:
    at = np.flatnonzero(differ)
    block = int(at[0]) if len(at) else 0
    if spill is not None:
        return Result(spill, "spill", block, got, want, builds)
    if len(at):
        problem = f"{len(at):,} of {len(differ):,} blocks differ{how}"
        return Result(problem, "signs" if how else "values", block, got, want, builds)
    return Result(None, "", 0, got, want, builds)


def _alignment(fmt: Format) -> int:
    """The largest alignment of a block's fields: what C asks of a pointer to it."""
    names = fmt.block.names
    return max(fmt.block[n].base.itemsize for n in names) if names else fmt.block.itemsize
