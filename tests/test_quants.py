"""Blocks written by hand, with the arithmetic beside them, and what callers get for wrong arguments."""

import numpy as np
import pytest

import refimpl
from refimpl import quants
from refimpl.arith import bits
from refimpl.quants import NotFinite, q4_k, q6_k
from refimpl.quants.formats import find_reference, formats, known
from tests.bits import assert_same_bits
from tests.weights import gaussian, least_importance

CODED = [name for name, fmt in formats.items() if fmt.weights > 1]
BOTH = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
HALF, ONE, TWO = [0x00, 0x38], [0x00, 0x3C], [0x00, 0x40]  # 0.5, 1 and 2 in fp16, low byte first


def decode(block: list[int], fmt: str, reference: bool) -> np.ndarray:
    return quants.dequantize(np.array(block, np.uint8), fmt, reference=reference)


@BOTH
def test_q8_0_block_by_hand(reference: bool) -> None:
    """d = 0.5; codes 1, 127, -128 (0x80), -1 (0xFF) -> 0.5, 63.5, -64, -0.5."""
    y = decode([*HALF, 1, 0x7F, 0x80, 0xFF, *[0] * 28], "q8_0", reference)
    assert y.tolist() == [0.5, 63.5, -64, -0.5] + [0] * 28


@BOTH
def test_q5_0_block_by_hand(reference: bool) -> None:
    """d = 2. Weight 0: low nibble 3 of byte 0, fifth bit 1 (bit 0 of qh): 19 - 16 = 3 -> 6.

    Weight 16: high nibble 10 of byte 0, fifth bit 0: 10 - 16 = -6 -> -12.
    Weight 31: high nibble 15 of byte 15, fifth bit 1 (bit 31): 31 - 16 = 15 -> 30.
    All others: 0 - 16 -> -32.
    """
    y = decode([*TWO, 0x01, 0, 0, 0x80, 0xA3, *[0] * 14, 0xF0], "q5_0", reference)
    want = np.full(32, -32.0)
    want[[0, 16, 31]] = 6, -12, 30
    assert y.tolist() == want.tolist()


def q4_k_block(scales: list[int], qs: list[int]) -> list[int]:
    return [*ONE, *HALF, *scales, *qs, *[0] * (128 - len(qs))]


@BOTH
def test_q4_k_scale_and_min_of_the_first_sub_blocks(reference: bool) -> None:
    """d = 1, dmin = 0.5. Sub-block 0: scale 3 (byte 0), min 4 (byte 4); byte 0 of qs is 0x75.

    Weight 0: 3 * 5 - 0.5 * 4 = 13. Weight 32 is its high nibble, in sub-block 1: scale 2, min 0: 2 * 7 = 14.
    Weight 1 has code 0: -2. Sub-block 2 has scale 0 and min 0: zeros.
    """
    y = decode(q4_k_block([3, 2, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0], [0x75]), "q4_k", reference)
    assert [y[0], y[1], y[32], y[33], y[64], y[255]] == [13, -2, 14, 0, 0, 0]


@BOTH
def test_q4_k_min_uses_the_upper_bits(reference: bool) -> None:
    """Sub-block 4: byte 8 = 0x21 holds the low nibbles: scale 1, min 2. Byte 0 = 0x80: its upper two bits, 2,
    sit above the scale: 2 * 16 + 1 = 33. Byte 4 = 0x40: 1 above the min: 16 + 2 = 18.

    Weight 128 (low nibble of byte 64 of qs, 1): 33 * 1 - 0.5 * 18 = 24. Byte 0's lower six bits are 0, so
    sub-block 0 is untouched: 0.
    """
    qs = [0] * 64 + [0x01]
    y = decode(q4_k_block([0x80, 0, 0, 0, 0x40, 0, 0, 0, 0x21, 0, 0, 0], qs), "q4_k", reference)
    assert [y[128], y[129], y[0]] == [24, -9, 0]


@BOTH
def test_q4_k_last_sub_block(reference: bool) -> None:
    """Sub-block 7: byte 11 = 0xF5: scale 5 + 16 * 3 (byte 3 = 0xC0) = 53, min 15 + 16 * 3 (byte 7) = 63.

    Weight 255: high nibble of the last byte, 15: 53 * 15 - 0.5 * 63 = 763.5.
    """
    scales = [0, 0, 0, 0xC0, 0, 0, 0, 0xC0, 0, 0, 0, 0xF5]
    y = decode(q4_k_block(scales, [0] * 127 + [0xF0]), "q4_k", reference)
    assert [y[255], y[224]] == [763.5, -31.5]


@BOTH
def test_iq4_nl_block_by_hand(reference: bool) -> None:
    """d = 0.5. Byte 0 = 0xF8: weight 0 has code 8: 0.5 * 1; weight 16 has code 15: 0.5 * 113. Code 0: 0.5 * -127."""
    y = decode([*HALF, 0xF8, *[0] * 15], "iq4_nl", reference)
    assert [y[0], y[16], y[1], y[31]] == [0.5, 56.5, -63.5, -63.5]


@BOTH
def test_iq4_xs_block_by_hand(reference: bool) -> None:
    """d = 2. Scale 0: low nibble of scales_l[0] = 0x10 is 0, bits 1..0 of scales_h = 0b11_00_10: 2: 32 - 32 = 0.

    Scale 1: high nibble 1, bits 3..2 are 0: 1 - 32 = -31. Scale 2: nibble 0, bits 5..4 are 3: 48 - 32 = 16.
    Codes are 0 (-127) but the first of sub-block 1, low nibble 9 (13), and the last of 2, high nibble 7 (-10).
    """
    qs = [0] * 128
    qs[16], qs[47] = 0x09, 0x70
    y = decode([*TWO, 0b110010, 0, 0x10, 0, 0, 0, *qs], "iq4_xs", reference)
    assert [y[0], y[32], y[33], y[64], y[95]] == [
        0,
        2 * -31 * 13,
        2 * -31 * -127,
        2 * 16 * -127,
        2 * 16 * -10,
    ]
    assert y[96] == 2 * -32 * -127  # scale 3 is 0 - 32


@BOTH
def test_mxfp4_block_by_hand(reference: bool) -> None:
    """e = 128: the step is 1. Byte 0 = 0xF3: weight 0: 3; weight 16: code 15: -12. Byte 1 = 0x85: 6, and -0 is 0.

    e = 0 and 1 are the subnormal 2^-128 and 2^-127.
    """
    y = decode([128, 0xF3, 0x85, *[0] * 14], "mxfp4", reference)
    assert [y[0], y[16], y[1], y[2]] == [3, -12, 6, 0]
    assert_same_bits(y[17], np.float32(0))
    for e in (0, 1, 2, 255):
        assert decode([e, 0x01, *[0] * 15], "mxfp4", reference)[0] == np.float32(2.0 ** (e - 128))


@BOTH
def test_nvfp4_block_by_hand(reference: bool) -> None:
    """Steps: 0x38 = 0111_000 is 2^0 / 2; 0x41 = 1000_001 is 2 * 9/8 / 2; 0x03 is 3 * 2^-9 / 2; 0x7F is 0."""
    qs = [0] * 32
    qs[0], qs[8], qs[16], qs[24] = 0x17, 0x92, 0x02, 0x77
    y = decode([0x38, 0x41, 0x03, 0x7F, *qs], "nvfp4", reference)
    assert [y[0], y[8], y[16], y[24], y[32], y[48]] == [6, 0.5, 2.25, -1.125, 3 * 2.0**-9, 0]


@BOTH
def test_tq1_0_block_by_hand(reference: bool) -> None:
    """d = 0.5. Digits 2 0 1 0 2: 2*81 + 9 + 2 = 173 of 243, of 256: 182.25, rounded up: 183. A byte 0 is five 0: -d."""
    qs, qh = [0] * 48, [0] * 4
    qs[1] = qs[33] = qh[3] = 183
    y = decode([*qs, *qh, *HALF], "tq1_0", reference)
    digits = [0.5, -0.5, 0, -0.5, 0.5]
    assert [y[1 + 32 * k] for k in range(5)] == digits
    assert [y[161 + 16 * k] for k in range(5)] == digits
    assert [y[243 + 4 * k] for k in range(4)] == digits[:4]
    assert y[0] == -0.5


@BOTH
def test_tq2_0_block_by_hand(reference: bool) -> None:
    """d = 2. Byte 1 = 0b11_10_01_00: weights 1, 33, 65, 97: -2, 0, 2, 4. Byte 32 is weight 128."""
    qs = [0b01010101] * 64
    qs[1], qs[32] = 0b11100100, 0b01010110
    y = decode([*qs, *TWO], "tq2_0", reference)
    assert [y[1], y[33], y[65], y[97], y[128], y[0]] == [-2, 0, 2, 4, 2, 0]


@BOTH
def test_q1_0_and_q2_0_blocks_by_hand(reference: bool) -> None:
    y = decode([*TWO, 0b101, *[0] * 14, 0x80], "q1_0", reference)
    assert [y[0], y[1], y[2], y[126], y[127]] == [2, -2, 2, -2, 2]
    y = decode([*HALF, 0b11100100, *[0b01010101] * 15], "q2_0", reference)
    assert y[:5].tolist() == [-0.5, 0, 0.5, 1, 0]


@BOTH
def test_mxfp4_takes_its_power_of_two_from_the_largest_weight(reference: bool) -> None:
    """7.5: log2 is 2.9, so e = 2 + 125 and the step 2^-1: 15 halves are nearest to 12. 1.25 is 2.5 halves: a tie,
    and the smaller wins: 2. -0.2 is 0.4 halves: 0, and no -0. A hair below 8, log2f says 3: the step is 1."""
    x = np.zeros(32, np.float32)
    x[:3] = 7.5, 1.25, -0.2
    block = quants.quantize(x, "mxfp4", reference=reference)
    assert block[:4].tolist() == [127, 7, 2, 0]
    x[0] = np.nextafter(np.float32(8), np.float32(0))
    assert quants.quantize(x, "mxfp4", reference=reference)[0] == 128


@BOTH
def test_ternary_weights_survive_without_loss(reference: bool) -> None:
    x = np.random.default_rng(1).choice(np.float32([-0.25, 0, 0.25]), (2, 512))
    for fmt in ("tq1_0", "tq2_0", "q2_0"):
        raw = quants.quantize(x, fmt, reference=reference)
        assert_same_bits(quants.dequantize(raw, fmt, reference=reference) + np.float32(0), x)


def test_q4_k_scales_survive_packing() -> None:
    scales = np.arange(8)[None] * 9
    mins = 63 - scales
    back = q4_k.unpack_scales(q4_k.pack_scales(scales.astype(np.int32), mins.astype(np.int32)))
    assert (back[0] == scales).all() and (back[1] == mins).all()


@BOTH
def test_q6_k_block_by_hand(reference: bool) -> None:
    """d = 2, every scale 1 but scale 2 (weights 32..47) = -3.

    Weight 0: low nibble of ql[0] = 0xB1 -> 1; bits 1..0 of qh[0] = 0b01_10_11_10 -> 2: 33 - 32 = 1 -> 2.
    Weight 32: low nibble of ql[32] = 0x5F -> 15; bits 3..2 -> 3: 63 - 32 = 31 -> 2 * -3 * 31 = -186.
    Weight 64: high nibble of ql[0] -> 11; bits 5..4 -> 2: 43 - 32 = 11 -> 22.
    Weight 96: high nibble of ql[32] -> 5; bits 7..6 -> 1: 21 - 32 = -11 -> -22.
    Weight 128 starts the second half: ql[64] = 7, qh[32] = 0: 7 - 32 -> -50.
    """
    ql, qh, scales = [0] * 128, [0] * 64, [1] * 16
    ql[0], ql[32], ql[64], qh[0], scales[2] = 0xB1, 0x5F, 7, 0b01_10_11_10, 256 - 3
    y = decode([*ql, *qh, *scales, *TWO], "q6_k", reference)
    assert [y[0], y[32], y[64], y[96], y[128]] == [2, -186, 22, -22, -50]
    assert y[1] == -64 and y[33] == 192 and y[255] == -64


def test_q6_k_codes_survive_packing() -> None:
    codes = np.random.default_rng(1).integers(0, 64, (3, 256)).astype(np.int32)
    blocks = np.zeros(3, q6_k.Q6_K.block)
    q6_k.pack_codes(blocks, codes)
    assert (q6_k.unpack_codes(blocks) == codes).all()


@BOTH
def test_float_formats_by_hand(reference: bool) -> None:
    assert decode([*HALF, 0, 0xC0, 1, 0], "f16", reference).tolist() == [0.5, -2, 2.0**-24]
    assert decode([0x80, 0x3F, 0x40, 0xC0], "bf16", reference).tolist() == [1, -3]
    assert decode([0, 0, 0x80, 0x3F], "f32", reference).tolist() == [1]
    x = np.float32([1 + 2**-8, 65519, -0.0])
    assert quants.quantize(x, "bf16", reference=reference).view(np.uint16).tolist() == [
        0x3F80,
        0x4780,
        0x8000,
    ]
    assert quants.quantize(x, "f16", reference=reference).view(np.uint16).tolist() == [0x3C04, 0x7BFF, 0x8000]
    assert_same_bits(quants.quantize(x, "f32", reference=reference).view(np.float32), x)


@BOTH
def test_q8_0_rounds_ties_away_from_zero(reference: bool) -> None:
    """max = 127: d = 1 and 1/d = 1. 62.5 -> 63 (to even: 62), -2.5 -> -3, 0.49 -> 0."""
    x = np.zeros(32, np.float32)
    x[:4] = 127, 62.5, -2.5, 0.49
    block = quants.quantize(x, "q8_0", reference=reference)
    assert block[:6].view(np.int8).tolist() == [0x00, 0x3C, 127, 63, -3, 0]


@BOTH
def test_q5_0_plain_rounds_a_half_up(reference: bool) -> None:
    """The peak -16 gives d = 1; the code is trunc(x + 16.5): 0, 19 and 14, and 32 becomes 31."""
    x = np.zeros(32, np.float32)
    x[:4] = -16, 2.5, -2.5, 15.9
    codes = quants.quantize(x, "q5_0", reference=reference)
    assert codes[:2].tolist() == ONE
    assert (quants.dequantize(codes, "q5_0")[:5]).tolist() == [-16, 3, -2, 15, 0]


@BOTH
@pytest.mark.parametrize("fmt", CODED)
def test_zeros_encode_to_zeros(fmt: str, reference: bool) -> None:
    raw = quants.quantize(
        np.zeros((2, 512), np.float32), fmt, least_importance(fmt, 512), reference=reference
    )
    assert not quants.dequantize(raw, fmt).any()


@BOTH
@pytest.mark.parametrize("fmt", list(formats))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(fmt: str, value: float, reference: bool) -> None:
    x = np.ones((2, 3, 512), np.float32)
    x[1, 2, 300] = value
    with pytest.raises(NotFinite, match="row 5, column 300") as error:
        quants.quantize(x, fmt, least_importance(fmt, 512), reference=reference)
    assert (error.value.row, error.value.column) == (5, 300)


@BOTH
@pytest.mark.parametrize("fmt", list(formats))
def test_bf16_bits_encode_as_the_weights_they_stand_for(fmt: str, reference: bool) -> None:
    x = bits.decode_bf16(bits.encode_bf16(gaussian(np.random.default_rng(3), 10, 512)))
    narrow = bits.encode_bf16(x)
    want = quants.quantize(x, fmt, least_importance(fmt, 512), reference=reference)
    assert_same_bits(quants.quantize(narrow, fmt, least_importance(fmt, 512), reference=reference), want)
    narrow[4, 100] = 0xFF80
    with pytest.raises(NotFinite, match="row 4, column 100 is -inf"):
        quants.quantize(narrow, fmt, least_importance(fmt, 512), reference=reference)


@pytest.mark.parametrize(
    ("x", "fmt", "options", "error", "says"),
    [
        (np.zeros(256), "q4_k", {}, TypeError, "x must be an array of float32 or uint16, not float64"),
        (np.zeros(256, ">f4"), "q4_k", {}, TypeError, "not >f4"),
        ([0.0] * 256, "q4_k", {}, TypeError, "not list"),
        (np.zeros((), np.float32), "q4_k", {}, ValueError, "at least 1 axes"),
        (np.zeros(255, np.float32), "q4_k", {}, ValueError, "multiple of 256 weights, not 255"),
        (np.zeros(256, np.float32), "q9_z", {}, ValueError, "no codec for format 'q9_z'"),
        (np.zeros(256, np.float32), known(24), {}, ValueError, "no codec for format 'i8'"),
        (np.zeros(256, np.float32), "q4_k", {"build": "msvc"}, ValueError, "build 'msvc' is not supp"),
        (
            np.zeros(256, np.float32),
            "q4_k",
            {"imatrix": np.ones(255, np.float32)},
            ValueError,
            "imatrix of sh",
        ),
        (np.zeros(256, np.float32), "q4_k", {"imatrix": np.ones(256)}, TypeError, "imatrix must be an array"),
        (
            np.zeros((2, 1, 256), np.float32),
            "q4_k",
            {"imatrix": np.ones((3, 256), np.float32)},
            ValueError,
            "imatrix of shape (3, 256) does not fit weights of shape (2, 1, 256)",
        ),
        (
            np.zeros((2, 256), np.float32),
            "q4_k",
            {"imatrix": np.ones((2, 256), np.float32)},
            ValueError,
            "does not fit",
        ),
        (
            np.zeros(256, np.float32),
            "q4_k",
            {"imatrix": np.full(256, np.nan, np.float32)},
            ValueError,
            "imatrix holds NaN or infinity",
        ),
        (
            np.zeros(256, np.float32),
            "q4_k",
            {"out": np.zeros(143, np.uint8)},
            ValueError,
            "out has the shape",
        ),
        (
            np.zeros(256, np.float32),
            "q4_k",
            {"out": np.zeros(144, np.int8)},
            TypeError,
            "out must be an array",
        ),
    ],
)
def test_wrong_arguments_are_refused(x, fmt, options, error, says) -> None:
    with pytest.raises(error) as caught:
        quants.quantize(x, fmt, **options)
    assert says in str(caught.value)


def test_bytes_that_are_no_whole_block_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 144 bytes, not 143"):
        quants.dequantize(np.zeros(143, np.uint8), "q4_k")
    with pytest.raises(TypeError, match="raw must be an array of uint8, not int8"):
        quants.dequantize(np.zeros(144, np.int8), "q4_k")


@BOTH
@pytest.mark.parametrize("fmt", list(formats))
def test_shapes_strides_and_outputs(fmt: str, reference: bool) -> None:
    """Any leading axes, views with steps, empty arrays and the caller's own buffer give the same rows."""
    x = gaussian(np.random.default_rng(1), 12, 512)
    raw = quants.quantize(x, fmt, least_importance(fmt, 512), reference=reference)
    y = quants.dequantize(raw, fmt, reference=reference)
    cube = x.reshape(2, 3, 2, 512)
    assert_same_bits(
        quants.quantize(cube, fmt, least_importance(fmt, 512), reference=reference), raw.reshape(2, 3, 2, -1)
    )
    assert_same_bits(quants.quantize(x[::2], fmt, least_importance(fmt, 512), reference=reference), raw[::2])
    assert_same_bits(quants.quantize(x[3], fmt, least_importance(fmt, 512), reference=reference), raw[3])
    assert_same_bits(
        quants.quantize(np.asfortranarray(x), fmt, least_importance(fmt, 512), reference=reference), raw
    )
    assert_same_bits(quants.dequantize(raw[::2], fmt, reference=reference), y[::2])
    assert_same_bits(quants.dequantize(raw[3], fmt, reference=reference), y[3])
    for shape in ((0, 512), (3, 0), (2, 0, 512)):
        nothing = quants.quantize(
            np.zeros(shape, np.float32), fmt, least_importance(fmt, shape[-1]), reference=reference
        )
        assert nothing.shape == (*shape[:-1], formats[fmt].row_bytes(shape[-1]))
        assert quants.dequantize(nothing, fmt, reference=reference).shape == shape
    out = np.full((12, 2, raw.shape[1]), 0xAA, np.uint8)
    assert quants.quantize(x, fmt, least_importance(fmt, 512), reference=reference, out=out[:, 1]).base is out
    assert_same_bits(out[:, 1], raw)
    assert (out[:, 0] == 0xAA).all()
    values = np.full((12, 1024), np.nan, np.float32)
    quants.dequantize(raw, fmt, reference=reference, out=values[:, 512:])
    assert_same_bits(values[:, 512:], y)
    assert np.isnan(values[:, :512]).all()


@pytest.mark.parametrize("fmt", CODED)
def test_an_imatrix_row_for_all_equals_the_same_row_for_each(fmt: str) -> None:
    rng = np.random.default_rng(2)
    x, row = gaussian(rng, 6, 512).reshape(3, 2, 512), rng.random(512).astype(np.float32)
    want = quants.quantize(x, fmt, row)
    assert_same_bits(quants.quantize(x, fmt, np.repeat(row[None], 3, 0)), want)
    plain = quants.quantize(x, fmt, least_importance(fmt, 512))
    assert (plain == want).all() if not formats[fmt].weighed else (plain != want).any()


def test_new_arrays_are_aligned_for_vector_stores() -> None:
    assert quants.dequantize(np.zeros((3, 144), np.uint8), "q4_k").ctypes.data % 64 == 0


def test_the_public_names_are_the_functions() -> None:
    """Importing a module of the package must not replace a function of the same package."""
    assert refimpl.quantize is quants.quantize and refimpl.dequantize is quants.dequantize
    for name in quants.__all__:
        assert not hasattr(getattr(quants, name), "__path__") and not hasattr(
            getattr(quants, name), "__file__"
        )


@pytest.mark.parametrize("fmt", [name for name in CODED if formats[name].ruled])
def test_parts_multiply_out_to_the_weights(fmt: str) -> None:
    kind = formats[fmt]
    raw = quants.quantize(gaussian(np.random.default_rng(4), 3, 512), fmt, np.ones(512, np.float32))
    parts = find_reference(kind).take_apart(raw.reshape(-1).view(kind.block))
    codes = np.asarray(parts.codes, np.float32).reshape(*parts.step.shape, -1)
    offset = np.float32(0) if parts.offset is None else parts.offset[..., None]
    assert_same_bits(
        (parts.step[..., None] * codes - offset).reshape(3, -1) + np.float32(0),
        quants.dequantize(raw, fmt) + np.float32(0),
    )
