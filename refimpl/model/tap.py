"""A tap hands every named activation to whoever listens: a trace, or nobody."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Tap = Callable[[str, NDArray[Any]], NDArray[Any]]


def silent(name: str, value: NDArray[Any]) -> NDArray[Any]:
    """Nobody listens."""
    return value


class Recorder:
    """Keeps what it hears, in order.

    only : the names to keep, without a layer; None: all
    kept : name-layer -> array, as llama.cpp names its callbacks ("attn_norm-0"); "result_norm" has no layer
    """

    def __init__(self, only: frozenset[str] | None = None) -> None:
        self.only, self.kept = only, dict[str, NDArray[Any]]()

    def at(self, layer: int | None) -> Tap:
        """The tap of one layer."""
        return _Ear(self, layer)


@dataclass(frozen=True)
class _Ear:
    recorder: Recorder
    layer: int | None

    def __call__(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        if hears(self, name):
            key, kept = name if self.layer is None else f"{name}-{self.layer}", self.recorder.kept
            assert key not in kept, f"{key} is recorded twice"
            kept[key] = value.copy()
        return value


def hears(tap: Tap, name: str) -> bool:
    """Is it worth computing what a pass without listeners does without?"""
    if isinstance(tap, _Ear):
        return tap.recorder.only is None or name in tap.recorder.only
    return tap is not silent
