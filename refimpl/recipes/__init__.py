"""Which tensor gets which type: llama.cpp's mixes, versioned, and the protected ones."""

from collections.abc import Mapping

from refimpl.recipes.read import load, names
from refimpl.recipes.recipe import Mismatch, Recipe, Sizes, Stored, conform

__all__ = ["Mismatch", "Recipe", "best", "conform", "load", "names"]


def best(hp: Sizes, tensors: Mapping[str, Stored]) -> tuple[Recipe, list[Mismatch]]:
    """The known recipe that fits these tensors best: fewest of another type, then fewest bytes between."""

    def misfit(fit: tuple[Recipe, list[Mismatch]]) -> tuple[int, int]:
        return len(fit[1]), sum(abs(m.bytes_delta) for m in fit[1])

    fits = [(recipe, conform(recipe, hp, tensors)) for recipe in map(load, names())]
    return min(fits, key=misfit)
