"""compare, nearest and scale_defects: the sums by hand, damage found, wrong arguments refused."""

import numpy as np
import pytest

from refimpl import quants
from refimpl.quants import q5_0
from refimpl.quants.formats import CODEBOOKS, IQ3_S, Format, formats
from tests.bits import assert_same_bits
from tests.weights import gaussian, least_importance

CODED = [name for name, fmt in formats.items() if fmt.weights > 1]
RULED = [name for name in CODED if formats[name].ruled]
BOTH = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])


@BOTH
def test_squared_errors_by_hand(reference: bool) -> None:
    """Two Q8_0 blocks. First: d = 1, codes 3 and -4, source 2.5 and -4: errors 0.5 and 0: 0.25.

    Second: all zero against 2 and -1: 4 + 1 = 5. Squares of the source: 6.25 + 16, then 4 + 1: 27.25.
    """
    raw = np.zeros((1, 2, 34), np.uint8)
    raw[0, 0, :4] = 0x00, 0x3C, 3, 256 - 4
    source = np.zeros((1, 64), np.float32)
    source[0, [0, 1, 32, 33]] = 2.5, -4, 2, -1
    sse = np.full((1, 2), np.nan)
    (row,) = quants.compare(raw.reshape(1, -1), "q8_0", source, reference=reference, sse=sse)
    assert row.tolist() == (5.25, 27.25, 2.0, 5.0, 1)
    assert sse.tolist() == [[0.25, 5.0]]
    bits = (source.view(np.uint32) >> 16).astype(np.uint16)
    assert quants.compare(raw.reshape(1, -1), "q8_0", bits, reference=reference)[0] == row


@BOTH
def test_a_block_adds_up_by_lanes_and_the_lanes_by_halves(reference: bool) -> None:
    """Zeros against 2^27 and 31 ones: squares 2^54 and 1. By halves 2^54 + 28 (test_bits has the steps); one
    after the other, every 1 would vanish below 2^54."""
    source = np.ones((1, 32), np.float32)
    source[0, 0] = 2.0**27
    (row,) = quants.compare(np.zeros((1, 34), np.uint8), "q8_0", source, reference=reference)
    assert row["sse"] == row["ssx"] == 2.0**54 + 28


@BOTH
def test_the_difference_rounds_to_float32_first(reference: bool) -> None:
    """1 - 2^-26 rounds to 1 in float32 (steps of 2^-24 below 1), so the error is 1 and not a little less."""
    raw = np.zeros((1, 34), np.uint8)
    raw[0, :3] = 0x00, 0x3C, 1
    source = np.zeros((1, 32), np.float32)
    source[0, 0] = 2.0**-26
    (row,) = quants.compare(raw, "q8_0", source, reference=reference)
    assert row["sse"] == 1 and row["max_abs"] == 1


@BOTH
def test_a_row_adds_its_blocks_in_ascending_order(reference: bool) -> None:
    """2^54 then twice 2: each 2 is half a step beside an even sum, and is lost. From behind: 2^54 + 4."""
    raw, source = np.zeros((2, 3 * 34), np.uint8), np.zeros((2, 3, 32), np.float32)
    source[0, :, :2] = [[2.0**27, 0], [1, 1], [1, 1]]
    source[1] = source[0, ::-1]
    first, second = quants.compare(raw, "q8_0", source.reshape(2, -1), reference=reference)
    assert first["sse"] == 2.0**54 and second["sse"] == 2.0**54 + 4
    assert (first["worst_block"], second["worst_block"]) == (0, 2)


@BOTH
def test_the_worst_block_is_the_first_of_equals_and_nan_is_worst(reference: bool) -> None:
    raw, source = np.zeros((3, 4 * 34), np.uint8), np.zeros((3, 128), np.float32)
    source[0, [40, 100]] = 1, -1
    raw[1, [34, 35]] = 0xFF, 0x7F  # NaN step in block 1
    raw[1, [102, 103]] = 0xFF, 0x7F  # and in block 3
    source[1, 0] = 9
    raw[2, [68, 69]], raw[2, 70] = (0x00, 0x7C), 1  # infinite step: infinity once, NaN for the codes of 0
    rows = quants.compare(raw, "q8_0", source, reference=reference)
    assert rows["worst_block"].tolist() == [1, 1, 2]
    assert rows["worst_sse"][0] == 1 and np.isnan(rows["worst_sse"][1:]).all()
    assert np.isnan(rows["sse"][1:]).all() and np.isnan(rows["max_abs"][1:]).all()
    assert rows["ssx"].tolist() == [2, 81, 0]


@BOTH
@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16"])
def test_float_formats_compare_weight_by_weight(fmt: str, reference: bool) -> None:
    x = np.float32([[1, 2, -4], [0.5, 0, 8]])
    raw = quants.quantize(x, fmt)
    source = x.copy()
    source[0, 1], source[1, 2] = 5, 7.5
    sse = np.full((2, 3), np.nan)
    rows = quants.compare(raw, fmt, source, reference=reference, sse=sse)
    assert rows.tolist() == [(9, 42, 3, 9, 1), (0.25, 56.5, 0.5, 0.25, 2)]
    assert sse.tolist() == [[0, 9, 0], [0, 0, 0.25]]


@pytest.mark.parametrize("fmt", list(formats))
def test_sums_do_not_depend_on_how_rows_are_split(fmt: str) -> None:
    x = gaussian(np.random.default_rng(1), 9, 768)
    raw = quants.quantize(x, fmt, least_importance(fmt, 768))
    whole = quants.compare(raw, fmt, x)
    assert_same_bits(
        np.concatenate([quants.compare(raw[i : i + 2], fmt, x[i : i + 2]) for i in range(0, 9, 2)]), whole
    )
    assert_same_bits(quants.compare(raw, fmt, x, reference=True), whole)
    assert quants.compare(raw[:0], fmt, x[:0]).shape == (0,)


@BOTH
@pytest.mark.parametrize("importance", [None, "random"])
@pytest.mark.parametrize(
    "fmt", [name for name in RULED if name not in ("q4_0", "q4_1", "q5_1")]
)  # see test_blocks
def test_every_flipped_code_bit_is_off(fmt: str, importance: str | None, reference: bool) -> None:
    """Each bit of the code fields flipped once: exactly its block has one code off; scales are left alone."""
    rng = np.random.default_rng(2)
    kind = formats[fmt]
    x = gaussian(rng, 1, kind.weights)
    imatrix = None if importance is None else rng.uniform(0.1, 3, x.shape[1]).astype(np.float32)
    raw = quants.quantize(x, fmt, imatrix)
    assert not quants.nearest(raw, fmt, x, reference=reference)["off"].any()
    fields = [name for name in kind.block.names or () if name in ("qs", "ql", "qh", "hmask")]
    starts = [(kind.offset(name), kind.block[name].itemsize) for name in fields]
    flips = [(at, bit) for start, size in starts for at in range(start, start + size) for bit in range(8)]
    damaged, rows = np.repeat(raw, len(flips), 0), np.repeat(x, len(flips), 0)
    for i, (at, bit) in enumerate(flips):
        damaged[i, at] ^= 1 << bit
    found = quants.nearest(damaged, fmt, rows, reference=reference)
    if fmt == "tq1_0":  # a byte holds five codes, and some bytes hold the same five
        differ = (quants.dequantize(damaged, fmt) != quants.dequantize(raw, fmt)).any(1)
        assert (found["off"][differ] >= 1).all() and differ.sum() > len(flips) / 2
        return
    assert (found["off"] == 1).all() and (found["far"] >= 1).all()
    if fmt not in ("q5_0", "mxfp4", "nvfp4", "tq2_0", "q2_0"):  # signs, and what another trial scale explains
        assert set(np.unique(found["far"]).tolist()) <= {1, 2, 4, 8, 16, 32, 64, 128}


@BOTH
@pytest.mark.parametrize("fmt", [name for name in RULED if name not in ("q8_0", "q1_0", "mxfp4", "nvfp4")])
def test_a_step_of_zero_makes_every_code_nearest(fmt: str, reference: bool) -> None:
    kind = formats[fmt]
    raw = np.random.default_rng(3).integers(0, 256, (1, kind.block.itemsize), dtype=np.uint8)
    raw[0, kind.offset("d") : kind.offset("d") + 2] = 0, 0x80  # -0
    x = gaussian(np.random.default_rng(4), 1, kind.weights)
    assert quants.nearest(raw, fmt, x, reference=reference)["off"].tolist() == [[0]]


@BOTH
def test_nearest_counts_and_measures(reference: bool) -> None:
    """Q8_0, max 127 so that codes are the rounded weights: two codes off, by 1 and by 5."""
    x = np.float32([[127, 10, 20, *[0] * 29]])
    raw = quants.quantize(x, "q8_0")
    raw[0, 3] += 1
    raw[0, 4] -= 5
    assert quants.nearest(raw, "q8_0", x, reference=reference).tolist() == [[(2, 5)]]


@pytest.mark.parametrize("fmt", CODED)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0x7C01])
def test_scales_that_are_not_finite_are_found(fmt: str, bits: int) -> None:
    kind = formats[fmt]
    x = gaussian(np.random.default_rng(5), 3, 4 * kind.weights)
    raw = quants.quantize(x, fmt, least_importance(fmt, x.shape[1]))
    assert not quants.scale_defects(raw, fmt).any()
    for field in ("d", "m", "dmin"):
        if field in (kind.block.names or ()) and kind.block[field] == np.dtype("<f2"):
            bad = raw.copy()
            bad.view(kind.block)[field].view(np.uint16)[1, 2] = bits
            assert np.argwhere(quants.scale_defects(bad, fmt)).tolist() == [[1, 2]]


def test_the_power_of_two_that_stands_for_nan_is_found() -> None:
    raw = quants.quantize(gaussian(np.random.default_rng(5), 3, 128), "mxfp4")
    assert not quants.scale_defects(raw, "mxfp4").any()
    raw.view(formats["mxfp4"].block)["e"][1, 2] = 255
    assert np.argwhere(quants.scale_defects(raw, "mxfp4")).tolist() == [[1, 2]]


def test_float_weights_that_are_not_finite_are_found() -> None:
    x = np.float32([[1, np.nan, 3], [np.inf, 65519, -0.0]])
    want = [[False, True, False], [True, False, False]]
    assert quants.scale_defects(x.view(np.uint8), "f32").tolist() == want
    assert quants.scale_defects(x.astype(np.float16).view(np.uint8), "f16").tolist() == want
    assert (
        quants.scale_defects((x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), "bf16").tolist()
        == want
    )


FLIPS_SEEN = {
    "iq2_xxs": 0.6,
    "iq2_xs": 0.6,
    "iq3_xxs": 0.8,
    "iq1_s": 0.5,
    "iq3_s": 0.85,
    "iq2_s": 0.85,
    "iq1_m": 0.5,
}


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
def test_no_imatrix_explains_most_flipped_bits_of_a_codebook(fmt: Format) -> None:
    """A bit of one field but d and the scales flipped in every block, and blocks exchanged: all of these are seen.

    Which point a block holds depends on the imatrix, so some flips give another block that the search may leave.
    """
    rng = np.random.default_rng(16)
    x, imatrix = gaussian(rng, 8, 4096), rng.uniform(0.1, 3, 4096).astype(np.float32)
    raw = quants.quantize(x, fmt, imatrix)
    assert not quants.nearest(raw, fmt, x)["off"].any()
    blocks = raw.view(fmt.block)
    swapped = quants.nearest(np.roll(blocks, 1, 1).view(np.uint8), fmt, x)
    assert (swapped["off"] >= 4).all() and (swapped["far"] == 1).all()
    codes = blocks["qs"].view(np.uint8).reshape(-1, blocks["qs"].nbytes // blocks.size)
    flips = np.uint8(1) << rng.integers(0, 8, len(codes), dtype=np.uint8)
    damaged = blocks.copy()
    damaged["qs"].view(np.uint8).reshape(codes.shape)[
        np.arange(len(codes)), rng.integers(0, codes.shape[1], len(codes))
    ] ^= flips
    assert (quants.nearest(damaged.view(np.uint8), fmt, x)["off"] > 0).mean() > FLIPS_SEEN[fmt.name]


def test_a_sign_that_is_not_the_source_s_is_seen_in_iq3_s_always() -> None:
    """And the highest code among the scales must be there: without it the block's step were another."""
    rng = np.random.default_rng(17)
    x = gaussian(rng, 1, 256)
    raw = quants.quantize(x, "iq3_s")
    damaged, rows = np.repeat(raw, 256, 0), np.repeat(x, 256, 0)
    for i in range(256):
        damaged.view(IQ3_S.block)["signs"][i, 0, i // 8] ^= 1 << i % 8
    for reference in (False, True):
        assert (quants.nearest(damaged[:8], "iq3_s", rows[:8], reference=reference)["off"] == 1).all()
    assert (quants.nearest(damaged, "iq3_s", rows)["off"] == 1).all()
    raw.view(IQ3_S.block)["scales"] &= 0x77
    assert quants.nearest(raw, "iq3_s", x)["off"][0, 0] >= 1


def test_wrong_arguments_are_refused() -> None:
    raw, x = np.zeros((2, 144), np.uint8), np.zeros((2, 256), np.float32)
    for call in (quants.compare, quants.nearest):
        with pytest.raises(
            ValueError, match=r"source has the shape \(1, 256\), but the blocks hold \(2, 256\)"
        ):
            call(raw, "q4_k", x[:1])
        with pytest.raises(TypeError, match="not float64"):
            call(raw, "q4_k", x.astype(np.float64))
        with pytest.raises(ValueError, match="rows of q4_k blocks, not of shape"):
            call(raw[:, :143], "q4_k", x)
    with pytest.raises(TypeError, match="source must be float32, not uint16"):
        quants.nearest(raw, "q4_k", x.astype(np.uint16))
    with pytest.raises(ValueError, match="f16 has no codes"):
        quants.nearest(x.view(np.uint8), "f16", np.zeros((2, 512), np.float32))
    with pytest.raises(ValueError, match="sse must be float64"):
        quants.compare(raw, "q4_k", x, sse=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="rows of q4_k blocks"):
        quants.scale_defects(raw[0], "q4_k")


@BOTH
def test_a_compiler_that_fuses_leaves_no_q5_0_code_off(reference: bool) -> None:
    """trunc(fma(x, 1/d, 16.5)) instead of two roundings: ties fall otherwise in some blocks."""
    x = np.random.default_rng(8).standard_normal((64, 4096)).astype(np.float32).view(np.uint32) >> 16 << 16
    x = x.view(np.float32)
    raw = quants.quantize(x, "q5_0")
    groups = x.reshape(-1, 32)
    d = groups[np.arange(len(groups)), np.abs(groups).argmax(1)] / np.float32(-16)
    sums = (groups.astype(np.float64) * (np.float32(1) / d)[:, None] + 16.5).astype(np.float32)
    codes = np.minimum(sums.astype(np.int32), 31)
    blocks = raw.reshape(-1).view(formats["q5_0"].block)
    changed = np.flatnonzero((codes != q5_0.unpack_codes(blocks)).any(axis=1))
    low = codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4
    blocks["qs"] = low.astype(np.uint8)
    blocks["qh"] = np.packbits(codes >> 4, axis=1, bitorder="little")
    assert len(changed) > 3
    assert not quants.nearest(raw, "q5_0", x, reference=reference)["off"].any()
