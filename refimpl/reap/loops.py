"""The repetition detector: does a text end in a loop? Rule, version 1.

A run is the longest stretch of text in which every character equals the one `period` characters before it,
from the first unit on. The text loops if for some period of 1 to 400 characters a run

    covers       at least 4 * period + 120 characters (124 times one letter, 7 times a line of 40, 5 of 120),
    says         something: its unit holds a letter or a digit (rules, blank lines and padding are layout),
    never ends   it reaches the end of the text, or covers four fifths of it.

The last condition tells a loop from a table, a list of equal numbers or a refrain: who writes those goes on,
a model that loops does not come back before it is cut off. Loops that count or vary as they go are not seen.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 1
LONGEST_PERIOD = 400
LEAST_SPAN = 120
UNITS = 4
LARGEST = 1 << 24  # characters; each period is one pass over the text


@dataclass(frozen=True)
class Loop:
    """A run that makes a text loop.

    start, stop : characters of the text that the run covers
    period      : characters after which it repeats
    unit        : what is repeated
    """

    start: int
    stop: int
    period: int
    unit: str

    @property
    def repeats(self) -> float:
        """How often the unit stands there, the last one perhaps in part."""
        return (self.stop - self.start) / self.period

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "repeats": self.repeats}


def find_loop(text: str) -> Loop | None:
    """Find the loop of the shortest period in a text; None where it has none.

    Raises ValueError for a text of more than 2**24 characters.
    """
    if len(text) > LARGEST:
        raise ValueError(f"a text of {len(text):,} characters is longer than {LARGEST:,}")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    for period in range(1, min(LONGEST_PERIOD, len(points) // UNITS) + 1):
        least = UNITS * period + LEAST_SPAN
        for start, stop in _runs(points, period, least):
            unit = text[start : start + period]
            endless = stop == len(points) or 5 * (stop - start) >= 4 * len(points)
            if endless and any(c.isalnum() for c in unit):
                return Loop(start, stop, period, unit)
    return None


def _runs(points: NDArray[np.uint32], period: int, least: int) -> list[tuple[int, int]]:
    """The maximal stretches of at least `least` characters with that period, in order."""
    same = np.zeros(max(0, len(points) - period) + 2, np.int8)
    same[1:-1] = points[period:] == points[:-period]
    edges = np.flatnonzero(np.diff(same))
    starts, stops = edges[::2], edges[1::2] + period
    long = stops - starts >= least
    return list(zip(starts[long].tolist(), stops[long].tolist(), strict=True))
