"""The two norms of GLM-5.1. Sums run in float64 lanes (arith/sums.py), whatever the arrays' type."""

from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.sums import add_lanes

Array = NDArray[Any]


def rms_norm(x: Array, weight: Array, eps: float, reference: bool = False) -> Array:  # [T, n], [n] -> [T, n]
    """Scale each token to root mean square 1, then each channel by its weight.

    y = x * (1 / sqrt(mean(x^2) + eps)) * weight

    reference : True takes the NumPy text for float32 too

    Rounds: the scale once, each of the two products, to the type of x.
    """
    if x.dtype == np.float32 and x.ndim == 2 and not reference:
        out = np.empty_like(x)
        import_module("refimpl.model.norm_jit").rms_norm(x, weight, float(eps), out)
        return out
    mean = add_lanes(x.astype(np.float64) ** 2) / x.shape[-1]
    scale = (1 / np.sqrt(mean + eps)).astype(x.dtype)
    return x * scale[..., None] * weight.astype(x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:  # [T, n], [n], [n] -> [T, n]
    """Bring each token to mean 0 and variance 1, then scale and shift each channel.

    y = (x - mean) * (1 / sqrt(mean((x - mean)^2) + eps)) * weight + bias

    Rounds: the difference, the scale, each product and the sum, to the type of x.
    """
    centred = x - (add_lanes(x.astype(np.float64)) / x.shape[-1])[..., None]
    variance = add_lanes(centred**2) / x.shape[-1]
    with np.errstate(divide="ignore"):
        scale = (1 / np.sqrt(variance + eps)).astype(x.dtype)
    return centred.astype(x.dtype) * scale[..., None] * weight.astype(x.dtype) + bias.astype(x.dtype)
