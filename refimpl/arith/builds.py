"""Builds: which products and sums of ggml-quants.c each compiler fused into one rounding. Data, and what reads it.

Two correct builds of one C source write different bytes: a compiler may compute `a*b + c` with one rounding instead
of two. Where a text of quants/ has such a place it names a *site* (`build.QK_SUMX`), and the site's *form* decides:

ROUNDED   the product is rounded, then the sum: what C says
FUSED     one rounding; of two products (`a*b - c*d`) the first goes into the fma, the second is rounded
SECOND    of two products the second goes into the fma, the first is rounded

A build is named for the compiler; other levels and targets move a few sites (README). One row below is one site.
Source: ggml-quants.c, llama.cpp 0c1e570; the choices were read from the compilers' output (gcc 12.2 -O3, clang
14.0.6 -O3, aarch64) and proven by the bytes of those builds.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType


class Form:
    """How a site is computed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


ROUNDED, FUSED, SECOND = Form("ROUNDED"), Form("FUSED"), Form("SECOND")

BUILDS = ("strict", "gcc-fma", "clang-arm64")

_POLICY = """
site         gcc-fma  clang-arm64   the statement

QK_SUMX      F        F             fit_scale_min: sum_x += w*x
QK_NI0       F        -             nearest_int(inverse*(x - low)), the scale to beat
QK_DIFF0     F        F             scale*q + low - x
QK_ERR0      F        F             error += w*off^2
QK_ISC       F        F             start + step*k + top
QK_NI1       F        -             nearest_int(inverse*(x - low)), each trial
QK_SL        -        -             sum_l += w*q
QK_SL2       F        -             sum_l2 += w*q*q
QK_SXL       F        -             sum_xl += w*q*x
QK_D         F        F             sum_w*sum_l2 - sum_l*sum_l
QK_TS        S        F             sum_w*sum_xl - sum_x*sum_l
QK_TM        F        F             sum_l2*sum_x - sum_l*sum_xl
QK_DIFF1     F        F             scale*q + low - x, each trial
QK_ERR1      F        F             error += w*off^2

QX_NI0       F        -             fit_scale: nearest_int(inverse*x), the first scale
QX_SLX0      F        F             sum_lx += w*x*q
QX_SL20      F        F             sum_l2 += w*q*q
QX_ISC       F        -             top + 0.1*k
QX_NI1       F        -             nearest_int(inverse*x), each trial
QX_SLX1      -        F             sum_lx += w*x*q
QX_SL21      -        F             sum_l2 += w*q*q
QX_NI2       F        -             nearest_int(inverse*x), the codes kept

QP_NI0       F        -             fit_positive: nearest_int(inverse*x), the first scale
QP_DIFF0     F        F             x - scale*q
QP_ERR0      F        -             error += w*off*off
QP_ISC       F        F             0.1*k + top
QP_NI1       F        -             nearest_int(inverse*x), each trial
QP_DIFF1     F        F             x - scale*q
QP_ERR1      F        -             error += w*off*off
QP_NI2       F        -             nearest_int(inverse*x), the codes kept
QP_SLX       F        -             sum_lx += w*x*q
QP_SL2       F        -             sum_l2 += w*q*q
QP_SLXSUB    F        F             sum_lx - w*x*q, one code moves
QP_SL2SUB    F        F             sum_l2 - w*q*q
QP_SLXADD    F        F             rest_lx + w*x*q
QP_SL2ADD    F        F             rest_l2 + w*q*q

Q3_NI0       F        -             make_q3_quants: nearest_int(inverse*x)
Q3_SLX       F        F             sum_lx += w*x*q
Q3_SL2       F        F             sum_l2 += w*q*q
Q3_SLXSUB    F        F             sum_lx - w*x*q, one code moves
Q3_SL2SUB    F        F             sum_l2 - w*q*q
Q3_SLXADD    F        F             rest_lx + w*x*q
Q3_SL2ADD    F        F             rest_l2 + w*q*q

ROW_SUMX2    F        F             rows and blocks: sum += x*x
ROW_W        F        F             sigma2 + x*x
ROW_NISC     F        -             nearest_int(inverse*scale)
REF_RND      F        -             x*inverse + half

NL_SQX0      F        F             iq4: sum_qx += w*q*x, the first scale
NL_SQ20      F        F             sum_q2 += w*q*q
NL_SQX1      F        F             sum_qx += w*q*x, each trial
NL_SQ21      F        F             sum_q2 += w*q*q
NL_NI        F        -             nearest_int(inverse*scale)
"""

# Formats whose encoders have sites, and those without: there every build writes the same bytes. What no build but
# strict has been proven for is in neither.
SITED = frozenset(
    {"q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"}
)
SITELESS = frozenset(
    {
        "f32",
        "f16",
        "bf16",
        "q8_0",
        "mxfp4",
        "nvfp4",
        "tq1_0",
        "tq2_0",
        "q1_0",
        "q2_0",
    }  # level*step is exact in fp4
)

# What a build does otherwise in one format: clang vectorized these loops, and a vector's products stand alone.
_EXCEPTIONS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("clang-arm64", "q4_0"): ("QX_SLX0", "QX_SL20", "QX_SLX1", "QX_SL21"),
        ("clang-arm64", "q5_0"): ("QX_SLX0", "QX_SL20", "QX_SLX1", "QX_SL21"),
        ("clang-arm64", "iq4_nl"): ("ROW_SUMX2",),
        ("clang-arm64", "iq4_xs"): ("ROW_SUMX2",),
    }
)


def _read_policy() -> dict[str, dict[str, Form]]:
    """The table above: build -> site -> form."""
    rows = [line.split(None, 3) for line in _POLICY.strip().splitlines() if line]
    letters = {"-": ROUNDED, "F": FUSED, "S": SECOND}
    _, *names, _ = rows[0]
    read = {name: {row[0]: letters[row[1 + i]] for row in rows[1:]} for i, name in enumerate(names)}
    return {"strict": dict.fromkeys(read[names[0]], ROUNDED), **read}


_FORMS = _read_policy()
SITES = tuple(_FORMS["strict"])


class Build:
    """One compiler's choices for one format: `build.QK_SUMX` is the form of that site.

    In kernels a build has a Numba type that carries all forms, so that every build compiles to its own code, without
    a branch; builds with the same forms share it.
    """

    def __init__(self, name: str, forms: Mapping[str, Form]) -> None:
        self.name, self.forms = name, MappingProxyType(dict(forms))

    def __getattr__(self, site: str) -> Form:
        try:
            return self.__dict__["forms"][site]
        except KeyError:
            raise AttributeError(f"there is no site {site!r}") from None

    def __repr__(self) -> str:
        return f"Build({self.name})"

    def replace(self, **forms: Form) -> "Build":
        """The same build with other forms at some sites."""
        return Build(f"{self.name} but {forms}", {**self.forms, **forms})


def list_builds(fmt: str) -> tuple[str, ...]:
    """The builds under which a format's encoder is proven, strict first."""
    return BUILDS if fmt in SITED or fmt in SITELESS else BUILDS[:1]


@cache
def find_build(name: str, fmt: str) -> Build:
    """The build of that name as it compiles the encoder of a format.

    Raises: ValueError for unknown names, and for formats whose encoder is not proven under that build.
    """
    if name not in BUILDS:
        raise ValueError(f"build {name!r} is not supported; there is {', '.join(BUILDS)}")
    if name not in list_builds(fmt):
        raise ValueError(f"what the build {name} writes is not known for {fmt}, only what strict does")
    forms = dict(_FORMS[name])
    for site in _EXCEPTIONS.get((name, fmt), ()):
        forms[site] = ROUNDED
    return Build(name, forms)


STRICT = find_build("strict", "f32")
