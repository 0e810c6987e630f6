"""The table of block formats: the only list of types. Sizes derive from the layout, never the reverse.

Ids and field names are ggml's (ggml-common.h, ggml.h), so that the C can be read side by side. Each format with
scales has the modules X.py (the definition) and X_jit.py (portable kernels), and X_simd.py for the jobs that
its row calls tuned; they are found by the format's name and imported when they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np

CODEC = ("quantize", "dequantize")
JOBS = (*CODEC, "check_codes")


@dataclass(frozen=True)
class Format:
    """One tensor type: `weights` weights are stored in one record of dtype `block`.

    tuned       : the JOBS that X_simd.py does; X_jit.py does the others
    ruled       : do the codes follow from the stored scales (X.measure_codes), whatever search found those? Where
                  not, X.measure_codes counts the parts of a block that no importances explain
    weighed     : does an imatrix change what the encoder writes?
    needy       : does ggml refuse to encode without one?
    steps       : the width of the range of values, in (the widest) steps from one code to the next
    error_limit : times the plain encoder's squared error that another search explains for one block; files
                  that llama-quantize made with an imatrix come to 50 times (k-quants: 20) where one column in
                  a hundred has 10,000 times the others' importance, to 290 (130) times at 10,000,000; below
                  what a block of other weights costs, so that it is found out where codes do not tell
    """

    id: int
    name: str
    weights: int
    block: np.dtype
    tuned: tuple[str, ...] = ()
    ruled: bool = True
    weighed: bool = True
    needy: bool = False
    steps: int = 0
    error_limit: float = 100.0

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block.itemsize / self.weights

    def offset(self, field: str) -> int:
        """Byte offset of a field within the block."""
        assert self.block.fields is not None
        return int(self.block.fields[field][1])

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of n weights. Raises ValueError where n is not a whole number of blocks."""
        if n % self.weights:
            raise ValueError(f"{self.name} rows need a multiple of {self.weights} weights, not {n}")
        return n // self.weights * self.block.itemsize


def _block(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype:
    return np.dtype(list(fields))


F32 = Format(0, "f32", 1, np.dtype("<f4"), weighed=False)
F16 = Format(1, "f16", 1, np.dtype("<f2"), weighed=False)
BF16 = Format(30, "bf16", 1, np.dtype("<u2"), weighed=False)
Q4_0 = Format(2, "q4_0", 32, _block(("d", "<f2"), ("qs", "u1", 16)), tuned=CODEC, steps=15, error_limit=400.0)
Q4_1 = Format(
    3,
    "q4_1",
    32,
    _block(("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)),
    tuned=CODEC,
    steps=15,
    error_limit=400.0,
)
Q5_0 = Format(
    6,
    "q5_0",
    32,
    _block(("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)),
    tuned=CODEC,
    steps=31,
    error_limit=400.0,
)
Q5_1 = Format(
    7,
    "q5_1",
    32,
    _block(("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)),
    tuned=CODEC,
    steps=31,
    error_limit=400.0,
)
Q8_0 = Format(
    8,
    "q8_0",
    32,
    _block(("d", "<f2"), ("qs", "i1", 32)),
    tuned=CODEC,
    weighed=False,
    steps=254,
    error_limit=25.0,
)
Q2_K = Format(
    10,
    "q2_k",
    256,
    _block(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")),
    tuned=CODEC,
    steps=3,
)
Q3_K = Format(
    11,
    "q3_k",
    256,
    _block(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")),
    tuned=CODEC,
    steps=7,
)
Q4_K = Format(
    12,
    "q4_k",
    256,
    _block(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)),
    tuned=JOBS,
    steps=15,
)
Q5_K = Format(
    13,
    "q5_k",
    256,
    _block(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)),
    tuned=CODEC,
    steps=31,
)
Q6_K = Format(
    14,
    "q6_k",
    256,
    _block(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")),
    tuned=JOBS,
    steps=63,
)

IQ4_NL = Format(20, "iq4_nl", 32, _block(("d", "<f2"), ("qs", "u1", 16)), tuned=CODEC, steps=10)
IQ4_XS = Format(
    23,
    "iq4_xs",
    256,
    _block(("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)),
    tuned=CODEC,
    steps=10,
)
TQ1_0 = Format(
    34,
    "tq1_0",
    256,
    _block(("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")),
    tuned=("dequantize",),
    weighed=False,
    steps=2,
    error_limit=3.0,
)
TQ2_0 = Format(
    35,
    "tq2_0",
    256,
    _block(("qs", "u1", 64), ("d", "<f2")),
    tuned=("dequantize",),
    weighed=False,
    steps=2,
    error_limit=3.0,
)
MXFP4 = Format(
    39,
    "mxfp4",
    32,
    _block(("e", "u1"), ("qs", "u1", 16)),
    tuned=CODEC,
    weighed=False,
    steps=6,
    error_limit=25.0,
)
NVFP4 = Format(
    40,
    "nvfp4",
    64,
    _block(("d", "u1", 4), ("qs", "u1", 32)),
    tuned=CODEC,
    weighed=False,
    steps=6,
    error_limit=25.0,
)

Q1_0 = Format(
    41, "q1_0", 128, _block(("d", "<f2"), ("qs", "u1", 16)), weighed=False, steps=1, error_limit=3.0
)
Q2_0 = Format(
    42,
    "q2_0",
    64,
    _block(("d", "<f2"), ("qs", "u1", 16)),
    tuned=("dequantize",),
    weighed=False,
    steps=2,
    error_limit=3.0,
)

# The codebook types: a group of 4 or 8 weights is the number of a point of a grid (grids.py). Which point depends on
# the imatrix, so the codes do not follow from the scales; what every imatrix leaves is in grid_rule.py and
# ternary_rule.py. error_limit: the largest ratio seen where up to 5 % of the columns have up to 100,000 times the
# others' importance is 8.5, 3.3, 19.4, 2.4, 22.0, 5.9, 4.7 (in the order of CODEBOOKS); a doubled d costs most
# blocks 11, 14, 24, 7.5, 42, 17 times the plain encoder's error, other weights 17, 23, 45, 9, 75, 29 times (IQ1_M, of
# Gaussian weights: 8 and 10 times, the median of 150 blocks).
IQ2_XXS = Format(
    16,
    "iq2_xxs",
    256,
    _block(("d", "<f2"), ("qs", "<u2", 32)),
    tuned=CODEC,
    ruled=False,
    needy=True,
    steps=4,
    error_limit=10.0,
)
IQ2_XS = Format(
    17,
    "iq2_xs",
    256,
    _block(("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)),
    tuned=CODEC,
    ruled=False,
    needy=True,
    steps=4,
    error_limit=7.0,
)
IQ3_XXS = Format(
    18,
    "iq3_xxs",
    256,
    _block(("d", "<f2"), ("qs", "u1", 96)),
    tuned=CODEC,
    ruled=False,
    steps=12,
    error_limit=25.0,
)
IQ1_S = Format(
    19,
    "iq1_s",
    256,
    _block(("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)),
    tuned=CODEC,
    ruled=False,
    needy=True,
    steps=2,
    error_limit=4.0,
)
IQ3_S = Format(
    21,
    "iq3_s",
    256,
    _block(("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)),
    tuned=CODEC,
    ruled=False,
    steps=15,
    error_limit=27.0,
)
IQ2_S = Format(
    22,
    "iq2_s",
    256,
    _block(("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("scales", "u1", 8)),
    tuned=CODEC,
    ruled=False,
    steps=4,
    error_limit=8.0,
)
IQ1_M = Format(
    29,
    "iq1_m",
    256,
    _block(("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)),
    tuned=CODEC,
    ruled=False,
    steps=2,
    error_limit=5.0,
)
CODEBOOKS = (IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ3_S, IQ2_S, IQ1_M)

# Activations, quantized before a dot product (refimpl.dots): never the type of a tensor, so not in the table below.
Q8_1 = Format(9, "q8_1", 32, _block(("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)))
Q8_K = Format(15, "q8_k", 256, _block(("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)))
activations = MappingProxyType({f.name: f for f in (Q8_0, Q8_1, Q8_K)})

formats = MappingProxyType(
    {
        f.name: f
        for f in (
            F32,
            F16,
            BF16,
            Q4_0,
            Q4_1,
            Q5_0,
            Q5_1,
            Q8_0,
            Q2_K,
            Q3_K,
            Q4_K,
            Q5_K,
            Q6_K,
            IQ4_NL,
            IQ4_XS,
            TQ1_0,
            TQ2_0,
            MXFP4,
            NVFP4,
            Q1_0,
            Q2_0,
            *CODEBOOKS,
        )
    }
)
by_id = MappingProxyType({f.id: f for f in formats.values()})


class Parts(NamedTuple):
    """A format's blocks taken apart into sub-blocks that share a scale: w = step * code - offset.

    scales, mins : [N, S] integers that multiply d and dmin, or None where the format has none
    step, offset : [N, S] float32; offset None: 0
    codes        : [N, weights] integers: what the step multiplies, so the table's entry where there is a table
    """

    scales: Any
    mins: Any
    step: Any
    offset: Any
    codes: Any


# With an imatrix Q4_1 and Q5_1 round their codes on lines that are not stored (lines.py): the factors of the trials,
# by the largest code, and how far from a code a value may lie that was rounded to it in float32.
LINE_FACTORS = MappingProxyType(
    {
        top: (
            float(top),
            *(
                float(np.float32(-0.9) + np.float32(0.05) * np.float32(k) + np.float32(top))
                for k in range(37)
            ),
        )
        for top in (15, 31)
    }
)
TIE_ON_A_LINE = 0.5 + 2.0**-16


def find_codec(fmt: str | Format) -> Format:
    """The format of that name, if refimpl encodes and decodes it. Raises ValueError where it does not."""
    name = fmt.name if isinstance(fmt, Format) else fmt
    if name not in formats:
        raise ValueError(f"no codec for format {name!r}; there are {', '.join(formats)}")
    return formats[name]


def find_reference(fmt: Format) -> ModuleType:
    """The module X.py of a format with scales."""
    return import_module(f"refimpl.quants.{fmt.name}")


def find_kernel(fmt: Format, job: str) -> Callable[..., Any]:
    """The function that does one of JOBS for a format with scales, tuned or portable."""
    module = import_module(f"refimpl.quants.{fmt.name}_{'simd' if job in fmt.tuned else 'jit'}")
    kernel: Callable[..., Any] = getattr(module, job)
    return kernel


@cache
def known(id: int) -> Format | None:
    """The format with this id, also of a type that refimpl measures but does not decode; None: no such type.

    A type of the gguf package that our table lacks gets a block of opaque bytes, so that sizes still work.
    """
    if id in by_id:
        return by_id[id]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(id)
    except ValueError:
        return None
    weights, size = GGML_QUANT_SIZES[kind]
    return Format(id, kind.name.lower(), weights, np.dtype((np.void, size)))
