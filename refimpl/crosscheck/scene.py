"""One layer of a recorded trace, as the operations are judged on it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.crosscheck import bounds
from refimpl.crosscheck.bounds import Judged
from refimpl.files.hparams import Hparams
from refimpl.model import dsa
from refimpl.model.config import Conventions
from refimpl.model.rope import angles
from refimpl.model.weights import Layer

Array = NDArray[Any]


@dataclass
class Scene:
    """One layer of a trace: recorded values, as float64, beside weights and conventions."""

    values: dict[str, Array]
    w: Layer
    top: Layer
    hp: Hparams
    conv: Conventions

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    @property
    def positions(self) -> Array:
        """[T], from 0 on."""
        return np.arange(len(next(iter(self.values.values()))))

    @property
    def latent_eps(self) -> float:
        """eps of the norms inside attention."""
        return self.hp.rms_norm_eps if self.conv.latent_eps is None else self.conv.latent_eps

    def turned(self, x: Array) -> Judged:
        """Rotary positions."""
        hp = self.hp
        turn = angles(self.positions, x.shape[-1], hp.rope_theta, self.conv.angles)
        return bounds.rotate(x, turn, self.positions, hp.rope_theta)

    def turned_first(self, x: Array) -> Judged:
        """Rotary positions on the first channels, and the Hadamard rotation where there is one."""
        n = self.hp.qk_rope_head_dim
        head, off = self.turned(x[..., :n])
        y, bound = x.copy(), np.zeros_like(x)
        y[..., :n], bound[..., :n] = head, off
        return bounds.hadamard(y, bound, dsa.hadamard(y)) if self.conv.hadamard else (y, bound)

    def heads(self, name: str, x: Array) -> Judged:  # [T, H, n] -> [T, H, m]
        """Each head's own matrix."""
        found = [bounds.linear(self.w[name][h], x[:, h], self.conv) for h in range(x.shape[1])]
        return np.stack([y for y, _ in found], 1), np.stack([b for _, b in found], 1)
