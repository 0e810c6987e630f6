"""The cases of test_twins for the room model."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from refimpl.model import dsa, gather, norm, rope
from refimpl.model.config import conventions
from tests.weights import gaussian

Array = np.ndarray[Any, Any]
Pairs = Iterator[tuple[str, Array, Array]]  # what, got, want


def nan(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def check_norm(twin: ModuleType, draw: Any) -> Pairs:
    for n in (32, 50, 576):
        x = np.ascontiguousarray(draw.weights(-(-n // 32) * 32)[:, :n])
        weight = np.ascontiguousarray(x[0, ::-1])
        out = nan(*x.shape)
        twin.rms_norm(x, weight, 1e-5, out)
        yield f"rms_norm of {n}", out, norm.rms_norm(x, weight, 1e-5, reference=True)


def check_rope(twin: ModuleType, draw: Any) -> Pairs:
    x = draw.weights(32).reshape(draw.rows, 2, 16)
    turn = rope.angles(draw.rng.integers(0, 9999, draw.rows), 12, 1e4)
    wide = rope.angles(draw.rng.integers(0, 9999, draw.rows), 48, 1e4)
    # all channels of a view, some with others behind them, and more than a vector has
    cases = (x[..., :12], turn), (x, turn), (draw.weights(64)[:, None], wide)
    for heads, angles in cases:
        out = nan(*heads.shape)
        given = heads if twin.__name__.endswith("_jit") else np.ascontiguousarray(heads)
        twin.rotate(given, *(part.astype(np.float32) for part in angles), out)
        yield f"rotate {heads.shape[-1]}", out, rope.rotate(heads, angles, reference=True)


def check_dsa(twin: ModuleType, draw: Any) -> Pairs:
    """Scores of tiles that are whole and not; choices with plateaus, zeros of both signs, infinities and NaN."""
    keys = int(draw.rng.integers(5, 23))
    if hasattr(twin, "add_heads"):
        k, (q, weights) = draw.weights(32)[:keys], gaussian(draw.rng, 2, 3 * 4 * 32)
        q, weights = q.reshape(3, 4, 32), weights[:12].reshape(3, 4)
        want = dsa.add_heads(q, k, weights, conventions("refimpl"), reference=True)
        for first in (keys, 0, 2):
            out, seen = nan(3, len(k)), np.arange(len(k)) <= first + np.arange(3)[:, None]
            twin.add_heads(q, k, weights, first, out)
            yield f"add_heads from {first} on", np.where(seen, out, 0), np.where(seen, want, 0)
        return
    x = draw.weights(64)
    out = nan(*x.shape)
    twin.hadamard(x, np.float32(64**-0.5), out)
    yield "hadamard", out, dsa.hadamard(x, reference=True)
    for scores in (gaussian(draw.rng, 3, keys), draw.rng.choice(np.float32(SCORES), (3, keys))):
        for first, count in ((keys - 3, 3), (4, 4)):
            chosen = np.full((3, count), -1)
            twin.select_topk(scores, first, chosen)
            yield (
                f"{count} from {first} on",
                chosen,
                np.array(dsa.select_topk(scores, first, count, reference=True)),
            )


SCORES = (0, -0.0, 0, 1, 1, -1, 1e-45, -1e-45, np.inf, -np.inf, np.nan)


def check_gather(twin: ModuleType, draw: Any) -> Pairs:
    keys, rng = draw.weights(32), draw.rng
    rows = np.sort(rng.integers(0, len(keys), (3, 32)), 1)
    for heads in (1, 2, 3):
        for name, width, made in (("multiply_rows", 32, 32), ("mix_rows", 32, 32)):
            q = gaussian(rng, 3 * heads, width).reshape(3, heads, width)
            got, want = nan(3, heads, made), nan(3, heads, made)
            getattr(twin, name)(q, keys, rows, got)
            getattr(gather, name)(q, keys, rows, want)
            yield f"{name}, {heads} heads", got, want


CASES: dict[str, Callable[[ModuleType, Any], Pairs]] = {
    "model.norm": check_norm,
    "model.rope": check_rope,
    "model.dsa": check_dsa,
    "model.gather": check_gather,
}
