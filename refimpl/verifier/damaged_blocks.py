"""Controls that damage codes and scales inside blocks."""

import numpy as np

from refimpl.verifier import mutate
from refimpl.verifier.damage import OUT, Q5, Q6, UP, Bench, Expect, control


def _flip(
    b: Bench, kind: str, tensor: str, field: str, at: int, bit: int, expert: int = 5, i: int = 77
) -> int:
    """Flip one bit of one block; the block's index within the tensor is returned."""
    copy = b.copy(kind)
    part = copy[tensor]
    part.block(i, expert)[field].view(np.uint8).reshape(-1)[at] ^= 1 << bit
    b.write(copy)
    per_expert = part.raw.nbytes // part.shape[0] // part.format.block.itemsize
    return i + (expert * per_expert if len(part.shape) == 3 and tensor != Q5 else 0)


@control
def code_bit_q4_k(b: Bench) -> Expect:
    """the highest bit of one Q4_K code is flipped"""
    block = _flip(b, "stock", UP, "qs", 100, 7)
    return Expect("code-far-off", {UP: "degraded"}, 5, block)


@control
def lowest_code_bit_q4_k(b: Bench) -> Expect:
    """the lowest bit of one Q4_K code is flipped"""
    block = _flip(b, "stock", UP, "qs", 100, 0)
    return Expect("code-off-nearest", {UP: "degraded"}, 5, block)


@control
def lowest_code_bit_imatrix(b: Bench) -> Expect:
    """the lowest bit of one code of a file made with an imatrix that we do not have"""
    block = _flip(b, "imatrix-quantized", UP, "qs", 41, 0)
    return Expect("code-off-nearest", {UP: "degraded"}, 5, block)


@control
def lowest_code_bit_q6_k(b: Bench) -> Expect:
    """the lowest bit of one Q6_K code is flipped"""
    block = _flip(b, "stock", Q6, "ql", 9, 0)
    return Expect("code-off-nearest", {Q6: "degraded"}, 5, block)


@control
def lowest_code_bit_q5_0(b: Bench) -> Expect:
    """the lowest bit of one Q5_0 code is flipped"""
    block = _flip(b, "stock", Q5, "qs", 3, 0, expert=0)
    return Expect("code-off-nearest", {Q5: "degraded"}, None, block)


@control
def lowest_code_bit_q8_0(b: Bench) -> Expect:
    """the lowest bit of one Q8_0 code is flipped"""
    name = "blk.2.attn_output.weight"
    block = _flip(b, "protected", name, "qs", 30, 0)
    return Expect("code-off-nearest", {name: "degraded"}, None, block)


@control
def lowest_scale_bit_q8_0(b: Bench) -> Expect:
    """the lowest bit of one Q8_0 scale is flipped"""
    name = "blk.2.attn_output.weight"
    block = _flip(b, "protected", name, "d", 0, 0)
    return Expect("scale-changed", {name: "degraded"}, None, block)


@control
def scale_byte_q4_k(b: Bench) -> Expect:
    """one byte of a block's packed 6-bit scales is inverted"""
    copy = b.copy()
    copy[UP].block(30, 2)["scales"][0, 1] ^= 0x3F
    b.write(copy)
    return Expect("code-far-off", {UP: "degraded"}, 2, 2 * 256 + 30)


@control
def scale_of_q5_0_imatrix(b: Bench) -> Expect:
    """d of one Q5_0 block is doubled in a file made with an imatrix that we do not have"""
    copy = b.copy("imatrix-quantized")
    copy[Q5].block(77)["d"] *= 2
    b.write(copy)
    return Expect("scale-impossible", {Q5: "degraded"}, None, 77)


@control
def point_of_iq2_xs(b: Bench) -> Expect:
    """one bit of a point's number in an IQ2_XS block, with the imatrix given"""
    copy = b.codebook(given=True)
    copy[OUT].block(9)["qs"][0, 3] ^= 1
    b.write(copy)
    return Expect("block-differs", {OUT: "degraded"}, None, 9)


@control
def point_of_iq2_xs_imatrix(b: Bench) -> Expect:
    """one bit of a point's number in an IQ2_XS block, made with an imatrix that we do not have"""
    copy = b.codebook()
    copy[OUT].block(9)["qs"][0, 3] ^= 64
    b.write(copy)
    return Expect("code-impossible", {OUT: "degraded"}, None, 9)


@control
def sign_of_iq2_xs_imatrix(b: Bench) -> Expect:
    """one sign in an IQ2_XS block, made with an imatrix that we do not have"""
    copy = b.codebook()
    copy[OUT].block(9)["qs"][0, 3] ^= 1 << 9
    b.write(copy)
    return Expect("code-impossible", {OUT: "degraded"}, None, 9)


@control
def scale_of_iq2_xs_imatrix(b: Bench) -> Expect:
    """d of one IQ2_XS block is doubled, made with an imatrix that we do not have"""
    copy = b.codebook()
    copy[OUT].block(9)["d"] *= 2
    b.write(copy)
    return Expect("block-error", {OUT: "degraded"}, None, 9)


@control
def scale_of_iq2_xs_not_finite(b: Bench) -> Expect:
    """d of one IQ2_XS block is NaN"""
    copy = b.codebook(given=True)
    copy[OUT].block(9)["d"] = np.nan
    b.write(copy)
    return Expect("scale-not-finite", {OUT: "corrupt"}, None, 9)


@control
def last_bit_of_a_scale(b: Bench) -> Expect:
    """the last bit of one block's dmin, where every code stays the nearest"""
    copy = b.copy()
    block = mutate.nudge_mins(copy, mutate.source_values(b.golden, UP), UP, every=4096)[0]
    b.write(copy)
    return Expect("scale-changed", {UP: "degraded"}, block // 256, block)


@control
def codes_cut_off(b: Bench) -> Expect:
    """all codes of a tensor are cut off instead of rounded"""
    copy = b.copy()
    mutate.cut_off_codes(copy[UP], mutate.source_values(b.golden, UP))
    b.write(copy)
    return Expect("too-much-error", {UP: "degraded"}, 0)


@control
def scale_not_finite(b: Bench) -> Expect:
    """d of one block is NaN"""
    copy = b.copy()
    copy[UP].block(200, 7)["d"] = np.nan
    b.write(copy)
    return Expect("scale-not-finite", {UP: "corrupt"}, 7, 7 * 256 + 200)
