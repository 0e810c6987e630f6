"""Blocks of Q4_0, Q4_1, Q5_1, Q2_K, Q3_K and Q5_K written by hand, with the arithmetic; how their encoders round."""

import numpy as np
import pytest

from refimpl import quants
from refimpl.arith.builds import STRICT
from refimpl.quants import q2_k, q3_k
from refimpl.quants.formats import find_reference, formats
from tests.bits import assert_same_bits
from tests.weights import gaussian

BOTH = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
HALF, ONE, TWO = [0x00, 0x38], [0x00, 0x3C], [0x00, 0x40]  # 0.5, 1 and 2 in fp16, low byte first


def decode(block: list[int], fmt: str, reference: bool) -> np.ndarray:
    return quants.dequantize(np.array(block, np.uint8), fmt, reference=reference)


@BOTH
def test_q4_0_block_by_hand(reference: bool) -> None:
    """d = 2. Byte 0 = 0xA3: weight 0 is 3 - 8 = -5 -> -10, weight 16 is 10 - 8 -> 4. Byte 15 = 0xF0: weight 31
    is 15 - 8 -> 14, weight 15 is -16, as all others.
    """
    y = decode([*TWO, 0xA3, *[0] * 14, 0xF0], "q4_0", reference)
    want = np.full(32, -16.0)
    want[[0, 16, 31]] = -10, 4, 14
    assert y.tolist() == want.tolist()


@BOTH
def test_q4_1_block_by_hand(reference: bool) -> None:
    """d = 2, m = 0.5. Byte 0 = 0xA3: weight 0 is 2 * 3 + 0.5, weight 16 is 20.5; all others 0.5."""
    y = decode([*TWO, *HALF, 0xA3, *[0] * 15], "q4_1", reference)
    want = np.full(32, 0.5)
    want[[0, 16]] = 6.5, 20.5
    assert y.tolist() == want.tolist()


@BOTH
def test_q5_1_block_by_hand(reference: bool) -> None:
    """d = 2, m = 0.5. Byte 0 of qs = 0xA3 with bit 0 of qh: weight 0 is 2 * 19 + 0.5; weight 16 (bit 16 is not
    set) 20.5. Bit 31 of qh alone: weight 31 is 2 * 16 + 0.5.
    """
    y = decode([*TWO, *HALF, 0x01, 0, 0, 0x80, 0xA3, *[0] * 15], "q5_1", reference)
    want = np.full(32, 0.5)
    want[[0, 16, 31]] = 38.5, 20.5, 32.5
    assert y.tolist() == want.tolist()


@BOTH
def test_q2_k_block_by_hand(reference: bool) -> None:
    """d = 2, dmin = 0.5. Sub-block 0: byte 0x43: scale 3, min 4; sub-block 1: scale 1; sub-block 9: scale 15.

    Byte 0 of qs = 0b10_01_11_10: weight 0 has code 2: 2 * 3 * 2 - 0.5 * 4 = 10; weights 32, 64 and 96 have 3, 1
    and 2, but scale 0: 0. Byte 16 = 0b01: weight 16 is 2 * 1 * 1 = 2. Byte 32 + 16 starts weight 144, in
    sub-block 9: code 3: 2 * 15 * 3 = 90. Weight 1: code 0: -2.
    """
    scales, qs = [0] * 16, [0] * 64
    scales[0], scales[1], scales[9] = 0x43, 0x01, 0x0F
    qs[0], qs[16], qs[48] = 0b10_01_11_10, 0b01, 0b11
    y = decode([*scales, *qs, *TWO, *HALF], "q2_k", reference)
    assert [y[0], y[1], y[16], y[17], y[32], y[64], y[96], y[144], y[255]] == [10, -2, 2, 0, 0, 0, 0, 90, 0]


@BOTH
def test_q3_k_block_by_hand(reference: bool) -> None:
    """d = 2. Scale 0: low bits 5 (byte 0), upper bits 0b10 (bits 1..0 of byte 8): 37 - 32 = 5. Scale 8: low bits
    9 (high nibble of byte 0), upper bits 0b01 (bits 5..4 of byte 8): 25 - 32 = -7. All others -32.

    Weight 0: qs[0] bits 1..0 = 3, third bit (bit 0 of hmask[0]) 1: 7 - 4 = 3 -> 2 * 5 * 3 = 30. Weight 1: code
    0: -4 -> -40. Weight 128 (sub-block 8): qs[32] = 2, bit 4 of hmask[0] is 0: 2 - 4 -> 2 * -7 * -2 = 28.
    Weight 255: scale -32, code 0: 2 * -32 * -4 = 256.
    """
    hmask, qs, scales = [0] * 32, [0] * 64, [0] * 12
    scales[0], scales[8] = 0x95, 0b01_00_10
    hmask[0], qs[0], qs[32] = 0b0000_0001, 3, 2
    y = decode([*hmask, *qs, *scales, *TWO], "q3_k", reference)
    assert [y[0], y[1], y[128], y[255]] == [30, -40, 28, 256]


@BOTH
def test_q5_k_block_by_hand(reference: bool) -> None:
    """d = 1, dmin = 0.5; scale 3 and min 4 in sub-block 0, scale 2 in sub-block 1, as in Q4_K.

    Byte 0 of qs = 0x75. Weight 0: 5, and bit 0 of qh[0]: 21: 3 * 21 - 0.5 * 4 = 61. Weight 32: 7, bit 1 of qh[0]
    is not set: 2 * 7 = 14. Weight 33: nibble 0, bit 1 of qh[1]: 16: 32. Weight 1: -2.
    """
    scales, qh, qs = [3, 2, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0], [0] * 32, [0] * 128
    qh[0], qh[1], qs[0] = 1, 2, 0x75
    y = decode([*ONE, *HALF, *scales, *qh, *qs], "q5_k", reference)
    assert [y[0], y[1], y[32], y[33], y[64], y[255]] == [61, -2, 14, 32, 0, 0]


def test_scales_and_codes_survive_packing() -> None:
    rng = np.random.default_rng(1)
    scales = rng.integers(0, 64, (5, 16)).astype(np.int32)
    assert (q3_k.unpack_scales(q3_k.pack_scales(scales)) + 32 == scales).all()
    pairs = rng.integers(0, 4, (5, 256)).astype(np.int32)
    assert (q2_k.unpack_pairs(q2_k.pack_pairs(pairs)) == pairs).all()


@BOTH
def test_q4_0_plain_rounds_a_half_up(reference: bool) -> None:
    """The peak -8 gives d = 1; the code is trunc(x + 8.5): 0, 11 and 6, and 16 becomes 15."""
    x = np.zeros(32, np.float32)
    x[:4] = -8, 2.5, -2.5, 7.9
    raw = quants.quantize(x, "q4_0", reference=reference)
    assert raw[:2].tolist() == ONE
    assert quants.dequantize(raw, "q4_0")[:5].tolist() == [-8, 3, -2, 7, 0]


@BOTH
@pytest.mark.parametrize(("fmt", "top"), [("q4_1", 15), ("q5_1", 31)])
def test_plain_lines_run_from_the_smallest_to_the_largest(fmt: str, top: int, reference: bool) -> None:
    """m = 1 and d = 2: 2.0 lies half a step up and becomes code 1: 3."""
    x = np.full(32, 1.0, np.float32)
    x[:3] = 1 + 2 * top, 2.0, 1.9
    raw = quants.quantize(x, fmt, reference=reference)
    assert raw[:4].tolist() == [*TWO, *ONE]
    assert quants.dequantize(raw, fmt)[:4].tolist() == [1 + 2 * top, 3, 1, 1]


@BOTH
def test_q2_k_weighs_absolute_errors_and_not_their_squares(reference: bool) -> None:
    """The search of plain Q2_K adds w * |error|: by squares it would choose other scales."""
    x = gaussian(np.random.default_rng(2), 8, 256)
    raw = quants.quantize(x, "q2_k", reference=reference)
    subs = x.reshape(-1, 16)
    linear, squared = (
        q2_k.fit_scale_min(subs, np.abs(subs), 3, *q2_k.PLAIN_TRIALS, STRICT, linear=linear)[0]
        for linear in (True, False)
    )
    assert (linear != squared).mean() > 0.1
    d, _ = q2_k.share_scale(linear.reshape(-1, 16), STRICT)
    assert_same_bits(raw.view(formats["q2_k"].block)["d"].reshape(-1).view(np.uint16), q2_k.encode_half(d))


@pytest.mark.parametrize("fmt", ["q4_1", "q5_1"])
def test_an_imatrix_leaves_codes_on_a_line_that_the_stored_scales_do_not_show(fmt: str) -> None:
    """Rounded under the stored d and m, blocks in a hundred would have other codes: Q4_K's rule is not theirs."""
    x = gaussian(np.random.default_rng(3), 40, 512)
    imatrix = np.exp(np.random.default_rng(4).standard_normal(512)).astype(np.float32)
    raw = quants.quantize(x, fmt, imatrix)
    apart = find_reference(formats[fmt]).take_apart(raw.view(formats[fmt].block).reshape(-1))
    near = np.clip(np.rint((x.reshape(-1, 32) + apart.offset) / apart.step), 0, formats[fmt].steps)
    assert (near != apart.codes).any(1).mean() > 0.05
    assert not quants.nearest(raw, fmt, x)["off"].any()


@BOTH
@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "q5_1"])
@pytest.mark.parametrize("importance", [None, "random"])
def test_codes_off_their_line_are_seen(fmt: str, importance: str | None, reference: bool) -> None:
    """One bit flipped in a block: most often no line, or no trial scale, explains it together with the others."""
    rng = np.random.default_rng(5)
    kind = formats[fmt]
    x = gaussian(rng, 160, 32)
    imatrix = None if importance is None else rng.uniform(0.1, 3, 32).astype(np.float32)
    raw = quants.quantize(x, fmt, imatrix)
    assert not quants.nearest(raw, fmt, x, reference=reference)["off"].any()
    for bits, share in ((rng.integers(0, 8, 160), 0.95), (rng.integers(0, 2, 160) * 4, 0.875)):
        bad = raw.copy()
        bad[np.arange(160), kind.offset("qs") + rng.integers(0, 16, 160)] ^= (1 << bits).astype(np.uint8)
        found = quants.nearest(bad, fmt, x, reference=reference)
        assert (found["off"] > 0).mean() > share - 0.04 and (found["off"] <= 2).mean() > 0.9
    moved = raw.copy()
    moved[:, kind.offset("qs") :] = 255 - moved[:, kind.offset("qs") :]
    assert (quants.nearest(moved, fmt, x, reference=reference)["off"] > 8).mean() > 0.9
