"""What diff finds: two models side by side, and each tensor of both."""

from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any, Literal

import numpy as np

from refimpl.files.names import Link

Status = Literal["same", "same-values", "differs", "only-a", "only-b"]

LISTED = 64  # experts that are listed as different


@dataclass
class Pair:
    """One tensor of both models, and what was found out about it.

    types, shapes  : on both sides, None where there is none; shapes after the transform
    weights_differ : decoded values that differ; None where one side is of a type that is not decoded
    sse, ssx       : sums of squared differences and of A's squares
    first, worst   : row, column, and both values
    experts        : of three axes: along the first, which hold a difference
    """

    name: str
    link: Link | None
    types: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    status: Status = "same"
    bytes_differ: bool = False
    blocks: int = 0
    blocks_differ: int = 0
    weights_differ: int | None = 0
    sse: float = 0.0
    ssx: float = 0.0
    max_abs: float = 0.0
    first: tuple[int, int, float, float] | None = None
    worst: tuple[int, int, float, float] | None = None
    experts: list[int] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        return self.shapes[0] == self.shapes[1] and self.shapes[0] is not None

    def rmse(self) -> float | None:
        """Root of the mean squared difference; None where values were not compared."""
        shape = self.shapes[0]
        if not self.comparable or self.weights_differ is None or shape is None or not prod(shape):
            return None
        return sqrt(self.sse / prod(shape)) if np.isfinite(self.sse) else None

    def to_json(self) -> dict[str, Any]:
        rmse = self.rmse()
        relative = sqrt(self.sse / self.ssx) if rmse is not None and self.ssx > 0 else None
        return {
            "name": self.name,
            "status": self.status,
            "types": list(self.types),
            "shapes": [None if s is None else list(s) for s in self.shapes],
            "blocks": self.blocks,
            "blocks_differ": self.blocks_differ,
            "weights_differ": self.weights_differ,
            "rmse": rmse,
            "rel_rmse": relative,
            "max_abs": self.max_abs if np.isfinite(self.max_abs) else None,
            "first": _place(self.first),
            "worst": _place(self.worst),
            "experts": self.experts[:LISTED],
        }


def _place(place: tuple[int, int, float, float] | None) -> dict[str, Any] | None:
    if place is None:
        return None
    a, b = (value if np.isfinite(value) else None for value in place[2:])
    return {"row": place[0], "column": place[1], "a": a, "b": b}


@dataclass
class Difference:
    """Two models side by side. keys: of two GGUFs, {"only_a", "only_b", "differ"}: sorted names."""

    a: str
    b: str
    kinds: tuple[str, str]
    pairs: list[Pair]
    keys: dict[str, list[str]]

    @property
    def same(self) -> bool:
        """Nothing differs: same bytes, or between a checkpoint and a GGUF the same values."""
        fine = {"same"} if self.kinds[0] == self.kinds[1] else {"same", "same-values"}
        return all(p.status in fine for p in self.pairs) and not any(self.keys.values())

    def counts(self) -> dict[str, int]:
        """Tensors of each status that occurs."""
        order: tuple[Status, ...] = ("same", "same-values", "differs", "only-a", "only-b")
        found = {status: sum(p.status == status for p in self.pairs) for status in order}
        return {status: number for status, number in found.items() if number}

    def to_json(self) -> dict[str, Any]:
        """The document of `diff --json`."""
        return {
            "a": {"path": self.a, "kind": self.kinds[0]},
            "b": {"path": self.b, "kind": self.kinds[1]},
            "same": self.same,
            "counts": self.counts(),
            "keys": self.keys,
            "tensors": [p.to_json() for p in self.pairs],
        }
