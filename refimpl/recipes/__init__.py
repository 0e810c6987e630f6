"""Which tensor gets which type: llama.cpp's mixes, versioned, and the protected ones."""

from collections.abc import Mapping
from typing import Any

from refimpl.recipes.read import load, names, override
from refimpl.recipes.recipe import (
    Choice,
    Mismatch,
    Recipe,
    Sizes,
    Stored,
    conform,
    mismatches,
    quantizing_order,
)

__all__ = [
    "Choice",
    "Mismatch",
    "Recipe",
    "best",
    "conform",
    "load",
    "made_with_imatrix",
    "names",
    "override",
    "quantizing_order",
]


def made_with_imatrix(metadata: Mapping[str, Any]) -> bool:
    """Does a GGUF say that it was quantized with an imatrix? Some mixes then give other types."""
    return "quantize.imatrix.entries_count" in metadata


def best(hp: Sizes, tensors: Mapping[str, Stored], imatrix: bool = False) -> tuple[Recipe, list[Mismatch]]:
    """The known recipe that fits these tensors best: fewest of another type, then fewest bytes between."""

    found: tuple[Recipe, list[Mismatch]] | None = None
    for recipe in map(load, names()):
        most = len(tensors) if found is None else len(found[1])
        wrong = mismatches(recipe, hp, tensors, imatrix, most)
        if wrong is not None and (found is None or _misfit(wrong) < _misfit(found[1])):
            found = recipe, wrong
    assert found is not None
    return found


def _misfit(wrong: list[Mismatch]) -> tuple[int, int]:
    return len(wrong), sum(abs(m.bytes_delta) for m in wrong)
