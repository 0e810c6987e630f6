"""The uneven levels that 4-bit codes stand for: data that references and kernels share."""

from itertools import pairwise

import numpy as np

# IQ4_NL and IQ4_XS, and half the way from each to the next.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(IQ4))

# MXFP4 and NVFP4: e2m1, doubled so that all are integers; bit 3 of a code is the sign.
FP4 = (0, 1, 2, 3, 4, 6, 8, 12)

IQ4_VALUES = np.array(IQ4, np.float32)
FP4_VALUES = np.array([*FP4, *(-v for v in FP4)], np.float32) + np.float32(0)  # code 8 is +0
