"""A tap hands every named activation to whoever listens: a trace, or nobody."""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

Tap = Callable[[str, NDArray[Any]], NDArray[Any]]


def silent(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """Nobody listens."""
    return value


class Recorder:
    """Keeps what it hears, in order.

    kept : name-layer -> array, as llama.cpp names its callbacks ("attn_norm-0"); "result_norm" has no layer
    """

    def __init__(self) -> None:
        self.kept: dict[str, NDArray[Any]] = {}

    def at(self, layer: int | None) -> Tap:
        """The tap of one layer."""

        def record(name: str, value: NDArray[Any]) -> NDArray[Any]:
            key = name if layer is None else f"{name}-{layer}"
            assert key not in self.kept, f"{key} is recorded twice"
            self.kept[key] = value.copy()
            return value

        return record
