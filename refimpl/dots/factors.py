"""What the dot products of the codebook formats share: the factors that stay outside of their integer sums."""

from types import MappingProxyType

import numpy as np

from refimpl.quants.formats import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS

_F = np.float32
# w[i] = d * factor * scale * code, scale and code integers: see codebooks.py. By the formats' ids.
FACTORS = MappingProxyType(
    {
        IQ2_XXS.id: _F(0.125),
        IQ2_XS.id: _F(0.125),
        IQ2_S.id: _F(0.125),
        IQ3_XXS.id: _F(0.25),
        IQ3_S.id: _F(1),
        IQ1_S.id: _F(0.125),
        IQ1_M.id: _F(0.125),
    }
)
SHIFTED = (IQ1_S.id, IQ1_M.id)  # their codes are eighths: 8 * point + 1 or - 1
EIGHTH = _F(0.125)
