"""Waiting, outside the GIL, for a number that another thread changes."""

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.jit import jit
from refimpl.arith.simd_memory import load_acquire, pause

MOMENT = 50  # pauses in which the thread that changed the number lets go of the GIL: about a microsecond


@jit
def wait(marks: NDArray[np.int64], index: int, value: int, patience: int) -> bool:
    """Wait until a mark no longer has a value, for so many pauses (each 10 to 40 ns). Is it another?"""
    for _ in range(patience):
        if load_acquire(marks, index) != value:
            for _ in range(MOMENT):
                pause()
            return True
        pause()
    return False
