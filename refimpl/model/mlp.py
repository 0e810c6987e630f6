"""SwiGLU: the dense MLP of the first layers, every routed expert and the shared one."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.model.config import Conventions
from refimpl.model.tap import Tap, silent
from refimpl.model.weights import Matrix, linear

Array = NDArray[Any]


def silu(x: Array) -> Array:  # [...] -> [...]
    """x / (1 + exp(-x)). Rounds: once; it is computed in float64."""
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return (wide / (1 + np.exp(-wide))).astype(x.dtype)


def swiglu(
    x: Array, gate: Matrix, up: Matrix, down: Matrix, conv: Conventions, tap: Tap = silent
) -> Array:  # [T, D] -> [T, D]
    """down(silu(gate x) * (up x))."""
    g, u = tap("ffn_gate", linear(gate, x, conv)), tap("ffn_up", linear(up, x, conv))
    return linear(down, tap("ffn_swiglu", silu(g) * u), conv)
