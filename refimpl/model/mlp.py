"""SwiGLU: the dense MLP of the first layers, every routed expert and the shared one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.model.config import Conventions
from refimpl.model.tap import Tap, silent
from refimpl.model.weights import Matrix, linear

Array = NDArray[Any]
AT_ONCE = 1 << 13  # numbers, so that what is between stays in the nearest cache


def silu(x: Array) -> Array:  # [...] -> [...]
    """x / (1 + exp(-x)). Rounds: once; it is computed in float64."""
    out, flat = np.empty_like(x, order="C"), x.reshape(-1)
    into = out.reshape(-1)
    with np.errstate(over="ignore"):
        for i in range(0, flat.size, AT_ONCE):
            wide = flat[i : i + AT_ONCE].astype(np.float64)
            below = np.negative(wide)
            np.exp(below, out=below)
            below += 1
            into[i : i + AT_ONCE] = wide / below
    return out


def swiglu(
    x: Array, gate: Matrix, up: Matrix, down: Matrix, conv: Conventions, tap: Tap = silent
) -> Array:  # [T, D] -> [T, D]
    """down(silu(gate x) * (up x))."""
    g, u = tap("ffn_gate", linear(gate, x, conv)), tap("ffn_up", linear(up, x, conv))
    return linear(down, tap("ffn_swiglu", silu(g) * u), conv)
