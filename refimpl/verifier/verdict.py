"""From counts to verdicts: one per expert, per tensor and for the file (design: worst wins).

exact       every block's bytes are the reference encoder's
copied      unquantized and equal to the source after the declared conversion
rounded     every code is nearest under the stored scales; the scales come from another search
equivalent  another quantizer all over: codes one step off in most blocks, error within the format's range; or a
            format whose codes depend on the imatrix (not fmt.ruled), most blocks other than the encoder's: then it
            is judged whether any imatrix explains them, and their error, and a finding says so
degraded    the right tensor, damaged: a few deviating blocks, or more error than the format explains
misplaced   the bytes encode another part of the source
wrong       the bytes encode nothing in the source
corrupt     NaN or Inf, or a region that is not whole
unmatched   the source has nothing of this name;  missing: the source has it and the file does not
"""

import math

from refimpl.files.source import Tensor
from refimpl.quants.formats import Format
from refimpl.verifier.findings import Finding
from refimpl.verifier.requantize import EXACT, Suspect, Tally, even_error
from refimpl.verifier.result import Errors

MOST = 0.5  # of the blocks: a property of the tensor rather than damage
WORST = ("zero", "scale", "error", "far")  # classes of which one block is damage
TOO_MUCH = 3.0  # squared error over the plain encoder's, summed over the blocks that differ
UNRELATED = 0.9  # relative rmse from which bytes no longer resemble their source
RARE = 0.01  # a share of differing blocks that damage could explain, were it not all over the file
SAME_ERROR = 1.1  # error ratio up to which another build's near-tie explains a differing block


def measure(tally: Tally) -> Errors:
    """rmse, rmse relative to the source's rms, largest error and signal-to-noise ratio (dB)."""
    sse, ssx = tally.sum("sse"), tally.sum("ssx")
    if math.isnan(sse) or math.isnan(ssx) or not tally.weights:
        return Errors(None, None, None, None, None)
    worst = tally.worst_block if tally.worst_sse > 0 else None
    return Errors(
        rmse=math.sqrt(sse / tally.weights),
        rel_rmse=math.sqrt(sse / ssx) if ssx else (0.0 if sse == 0 else None),
        max_abs=tally.max_abs,
        snr_db=10 * math.log10(ssx / sse) if sse and ssx else None,
        worst_block=worst,
    )


def classify(tally: Tally, fmt: Format) -> str:
    """The verdict that the counts alone allow; `misplaced` and `wrong` need a look at the source."""
    counts = tally.counts
    if counts["nan"] or tally.source_not_finite:
        return "corrupt"
    if fmt.name in EXACT:
        return "degraded" if tally.differ else "copied"
    if tally.differ == 0:
        return "exact"
    if any(counts[kind] for kind in WORST) or loses_too_much(tally, fmt):
        return "degraded"
    if not fmt.ruled and 0 < counts["off"] <= MOST * tally.blocks:
        return "degraded"
    odd = counts["off"] + counts["unruled"]
    if not fmt.weighed:  # the scale follows from the source alone: no imatrix explains another one
        odd += counts["search"]
    if odd:
        return "equivalent" if odd > MOST * tally.blocks else "degraded"
    return "rounded"


def loses_too_much(tally: Tally, fmt: Format) -> bool:
    """Do the blocks that differ cost far more than the plain encoder's would, all of them together?

    Codes that are cut off instead of rounded cost 4 times the squared error, codes one step too high 13 times,
    scales twice too large 4 times; an imatrix whose importances spread over e^3 at most 2.5 times, over e^2
    1.5 times; learned rounding less than 2.
    """
    even = even_error(fmt) * tally.sum("ssx")
    return tally.sum("differ") > max(TOO_MUCH * tally.sum("plain"), even)


def looks_foreign(tally: Tally, fmt: Format) -> bool:
    """Is so much of it off that the bytes may belong to something else?"""
    counts = tally.counts
    if fmt.name in EXACT:
        return tally.differ > MOST * tally.blocks
    return sum(counts[kind] for kind in WORST) > MOST * tally.blocks


def is_sporadic(tally: Tally, fmt: Format, own: bool) -> bool:
    """A few blocks of another scale search: damage, unless another build's near-ties explain them.

    own : this encoder made all the rest of the file, so that no other build is there to explain anything
    """
    few = tally.differ < RARE * tally.blocks and tally.ratio > SAME_ERROR
    return few or ((own or not fmt.weighed) and tally.differ <= MOST * tally.blocks)


def describe_damage(
    tally: Tally, tensor: Tensor, expert: int | None, sporadic: bool = False
) -> list[Finding]:
    """Say what the blocks of each bad class look like, one finding a class, the first block as example."""
    name, fmt = tensor.name, tensor.format
    said = _float_ranges(tally, tensor)
    if not any(tally.suspects[kind] for kind in WORST) and loses_too_much(tally, fmt):
        factor = tally.sum("differ") / (tally.sum("plain") or math.nan)
        words = f"{'it' if expert is None else f'expert {expert}'} costs {factor:.3g} times the squared error"
        said.append(Finding("too-much-error", "error", f"{words} of the plain encoder", name, expert))
    for kind, code, phrase in _DAMAGE:
        suspects, count = tally.suspects[kind], tally.counts[kind]
        if not suspects or (kind == "search" and not sporadic):
            continue
        if kind == "unruled" and count > MOST * tally.blocks:
            continue
        if fmt.name in EXACT:
            code = "value-not-finite" if kind == "nan" else "value-differs"
            phrase = "not finite" if kind == "nan" else "not the source's"
        if kind == "off" and not fmt.ruled:
            code, phrase = _IMPOSSIBLE
        unit = "value" if fmt.name in EXACT else "block"
        first = suspects[0]
        where = "" if expert is None else f"expert {expert}, "
        more = "" if count == 1 else f" (the first of {count:,} {unit}s like it)"
        message = f"{where}{unit} {first.block:,}: {phrase}; {_detail(first, fmt)}{more}"
        place = tensor.offset + first.block * fmt.block.itemsize + first.byte
        said.append(Finding(code, "error", message, name, expert, first.block, place))
    return said


def describe_doubt(tally: Tally, tensor: Tensor, expert: int | None) -> Finding:
    """Say of a format whose codes depend on the imatrix what was checked without it, and what was not."""
    who, odd = "it" if expert is None else f"expert {expert}", tally.counts["off"]
    others = "" if not odd else f"; {odd:,} of them no imatrix explains: another quantizer made them"
    signs = "" if tensor.format.name.startswith("iq1") else "their signs are the source's, "
    message = (
        f"{tally.differ:,} of {tally.blocks:,} blocks of {who} are not the encoder's{others}. Without the imatrix that "
        f"made them the codes of {tensor.format.name} cannot be checked one by one; checked was that "
        f"{'in the rest ' if odd else ''}{signs}their points are ones that its search can reach, and their error"
    )
    return Finding("codes-unchecked", "warning", message, tensor.name, expert)


_DAMAGE = (
    ("nan", "scale-not-finite", "a scale is NaN or Inf"),
    ("zero", "zero-scale", "the scale is zero although the source is not"),
    ("scale", "scale-impossible", "no importances make the encoder store this scale with these codes"),
    ("error", "block-error", "its error is far above what the format explains"),
    ("far", "code-far-off", "codes lie two or more steps from the nearest"),
    ("off", "code-off-nearest", "codes are not the nearest under the stored scales"),
    ("search", "scale-changed", "its scales are not the encoder's, unlike those all around it"),
    ("unruled", "block-differs", "it is not the encoder's, unlike those all around it"),
)


_IMPOSSIBLE = "code-impossible", "no importances make the encoder store these points, signs and scales"


def _detail(s: Suspect, fmt: Format) -> str:
    parts = [f"byte {s.byte} is 0x{s.stored:02x}, the encoder writes 0x{s.expected:02x}"]
    if s.off and not fmt.ruled:
        parts.append(f"{s.off} part{'s' * (s.off > 1)} of it unexplained")
    elif s.off:
        parts.append(f"{s.off} code{'s' * (s.off > 1)} off by up to {s.far} step{'s' * (s.far > 1)}")
    if s.ratio > 1:
        parts.append(f"error {math.sqrt(s.ratio):.3g} times the encoder's")
    return ", ".join(parts)


def _float_ranges(tally: Tally, tensor: Tensor) -> list[Finding]:
    """Values that the file's float type cannot hold."""
    said, kind = [], tensor.format.name
    if tally.overflow:
        message = f"{tally.overflow:,} finite source values are Inf in {kind}"
        said.append(Finding("overflow", "error", message, tensor.name))
    if tally.underflow:
        message = f"{tally.underflow:,} non-zero source values are 0 in {kind}"
        said.append(Finding("underflow", "warning", message, tensor.name))
    return said
