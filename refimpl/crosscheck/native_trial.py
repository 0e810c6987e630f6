"""One trial: a function of the library on given inputs, and whether the result is what refimpl defines.

Inputs are arrays whose first axis counts blocks, so that a failing trial can be cut down block by block:

decode        blocks [N, bytes] uint8
encode, row   x [N, weights] float32 in `rows` rows; imatrix [N / rows, weights] float32, or none
activation    x [N, weights] float32
dot           blocks [N, bytes] uint8 in `rows` rows; tokens [N / rows, weights] float32, before they are encoded
product       blocks [N, bytes] uint8 in `rows` rows; tokens [N / rows, weights] of the same type
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.crosscheck.native_library import Outcome
from refimpl.quants.formats import Format

Array = NDArray[Any]

SHARED = ("imatrix", "tokens")  # inputs of one row that all rows share


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
            name: a[start % per_row :][: stop - start] if name in SHARED else a[start:stop]
            for name, a in self.inputs.items()
        }
        return Trial(self.case, inputs, 1, self.shifted)


@dataclass(frozen=True)
class Result:
    """How a trial went."""

    problem: str | None = None  # in a few words; None: as defined
    kind: str = ""  # of the problem: crash, hang, spill, values, signs (of zeros)
    block: int = 0  # the first wrong one
    got: Array | None = None  # bytes [N, bytes], weights [N, weights] or products [rows]
    want: Array | None = None
    ratio: float | None = None  # dots: largest error as a share of its bound

    @property
    def died(self) -> bool:
        """A crash or a hang: there is nothing to compare."""
        return self.kind in ("crash", "hang")


def died(outcome: Outcome, want: Array) -> Result:
    """The result of a call that did not return; `want` is what it should have written."""
    return Result(outcome.crash, "hang" if "hangs" in (outcome.crash or "") else "crash", want=want)


def compared(
    got: Array,
    want: Array,
    differ: Array,
    spill: str | None,
    how: str = "",
) -> Result:
    """The result of a call that returned: `differ` says which blocks are wrong, `spill` what else is."""
    at = np.flatnonzero(differ)
    block = int(at[0]) if len(at) else 0
    if spill is not None:
        return Result(spill, "spill", block, got, want)
    if len(at):
        problem = f"{len(at):,} of {len(differ):,} blocks differ{how}"
        return Result(problem, "signs" if how else "values", block, got, want)
    return Result(None, "", 0, got, want)


def alignment(fmt: Format) -> int:
    """The largest alignment of a block's fields: what C asks of a pointer to it."""
    names = fmt.block.names
    return max(fmt.block[n].base.itemsize for n in names) if names else fmt.block.itemsize
