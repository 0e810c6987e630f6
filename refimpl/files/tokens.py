"""Tokens as commands take them: a list such as 3,1,4, or a .npy of integers."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.errors import BadFile, Usage


def read_tokens(given: str) -> NDArray[np.int64]:  # -> [N, T]
    """Token ids of N sequences that do not see each other; a list, or a .npy of one axis, is one sequence.

    given : "3,1,4", or the name of a .npy of integers [T] or [N, T]

    Raises: BadFile for a .npy that is none or of another shape or type, Usage for a list that is none.
    """
    if not given.endswith(".npy"):
        try:
            return np.array([[int(part) for part in given.split(",")]], np.int64)
        except (ValueError, OverflowError):
            raise Usage(f"{given!r} is neither a .npy nor a list such as 3,1,4") from None
    ids = _load(given)
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise BadFile(given, None, f"tokens are integers [T] or [N, T], not {ids.dtype} {list(ids.shape)}")
    return np.atleast_2d(ids).astype(np.int64)


def _load(path: str | os.PathLike[str]) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadFile(path, None, f"no array of tokens: {error}") from None
    if not isinstance(found, np.ndarray):  # an .npz under this name
        raise BadFile(path, None, "no array of tokens, but an archive of several")
    return found
