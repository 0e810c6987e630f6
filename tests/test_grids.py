"""The codebooks, and blocks of their formats written by hand, with the arithmetic in the comments."""

from importlib import import_module

import numpy as np
import pytest

from refimpl import quants
from refimpl.quants import grids
from refimpl.quants.formats import CODEBOOKS, IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, Format
from tests.hard_weights import draw_cases
from tests.weights import gaussian, least_importance

SIZES = {"iq2_xxs": (256, 8), "iq2_xs": (512, 8), "iq2_s": (1024, 8), "iq3_xxs": (256, 4), "iq3_s": (512, 4)}


def decode(block: np.ndarray, fmt: Format) -> np.ndarray:
    """One block by the reference and by the kernel, which must agree."""
    want = import_module(f"refimpl.quants.{fmt.name}").dequantize(block)
    got = np.full((1, 256), np.nan, np.float32)
    import_module(f"refimpl.quants.{fmt.name}_jit").dequantize(block.view(np.uint8).reshape(1, -1), got)
    assert got.tobytes() == want.tobytes()
    return want[0]


@pytest.mark.parametrize("name", [*SIZES, "iq1_s"])
def test_points_are_distinct_and_numbered_by_their_codes(name: str) -> None:
    grid, near = grids.load_grid(name), grids.find_neighbours(name)
    assert grid.codes.shape == SIZES.get(name, (2048, 8))
    levels = int(grid.codes.max()) + 1
    keys = grid.codes.astype(int) @ levels ** np.arange(grid.codes.shape[1])
    assert len(set(keys)) == len(keys)
    assert (near.number[keys] == np.arange(len(keys))).all()
    assert (near.number >= 0).sum() == len(keys)


@pytest.mark.parametrize("name", [*SIZES, "iq1_s"])
def test_neighbours_are_the_points_at_the_smallest_distances_in_order(name: str) -> None:
    """By sorting plain tuples, for some of the missing groups."""
    codes, near = grids.load_grid(name).codes.astype(int), grids.find_neighbours(name)
    levels, n = int(codes.max()) + 1, codes.shape[1]
    missing = np.flatnonzero(near.number < 0)
    for key in np.random.default_rng(1).choice(missing, 40, replace=False):
        group = key // levels ** np.arange(n) % levels
        ordered = sorted((int(((2 * group - 2 * c) ** 2).sum()), i) for i, c in enumerate(codes))
        allowed = sorted({distance for distance, _ in ordered})[: grids.NEAR[name]]
        want = [i for distance, i in ordered if distance in allowed]
        assert near.near[near.start[key] : near.start[key + 1]].tolist() == want
    present = np.flatnonzero(near.number >= 0)
    assert (near.start[present + 1] == near.start[present]).all()


def test_an_eighth_sign_makes_the_minus_signs_even() -> None:
    signs = grids.complete_signs(np.arange(128))
    assert (np.unpackbits(signs[:, None], axis=1).sum(1) % 2 == 0).all()
    assert (signs & 127 == np.arange(128)).all()


def test_iq2_xxs_by_hand() -> None:
    block = np.zeros(1, IQ2_XXS.block)
    block["d"] = 2
    # Point 1 has the codes 2 0 0 0 0 0 0 0: 43 and seven times 8. Weights 8..15: signs 0b0000010, so weight 9 is
    # minus and the eighth, 15, too. Scale 3: 2 * 3.5 / 4 = 1.75.
    block["qs"].view(np.uint8)[0, :8] = [0, 1, 0, 0, *(0b10 << 7 | 3 << 28).to_bytes(4, "little")]
    w = decode(block, IQ2_XXS)
    assert w[:8].tolist() == [14] * 8
    assert w[8:16].tolist() == [75.25, -14, 14, 14, 14, 14, 14, -14]
    assert (w[32:] == 2).all()  # 2 * 0.5 / 4 * 8


def test_iq2_xs_by_hand() -> None:
    block = np.zeros(1, IQ2_XS.block)
    block["d"], block["scales"][0, 7] = 1, 0x51  # weights 224..239: scale 1; 240..255: scale 5
    block["qs"][0, 30] = 1 | 0b1000001 << 9  # point 1: 43, then 8; signs of weights 240 and 246, even already
    w = decode(block, IQ2_XS)
    assert (w[224:240] == 3).all()  # 1.5 / 4 * 8
    assert w[240:248].tolist() == [-59.125, 11, 11, 11, 11, 11, -11, 11]  # 5.5 / 4 = 1.375


def test_iq2_s_uses_the_upper_bits_of_each_number() -> None:
    block = np.zeros(1, IQ2_S.block)
    block["d"] = 4
    for k in range(4):
        block["qs"][0, k], block["qh"][0, 0] = 7, 0b11100100  # numbers 7, 263, 519, 775
    block["qs"][0, 32] = 0x80  # the eighth weight is minus
    w = decode(block, IQ2_S)
    points = grids.load_grid("iq2_s").points[[7, 263, 519, 775]].astype(float)
    points[0, 7] *= -1
    assert w[:32].tolist() == (points * 0.5).reshape(-1).tolist()  # 4 * 0.5 / 4


def test_iq3_xxs_by_hand() -> None:
    block = np.zeros(1, IQ3_XXS.block)
    block["d"] = 1
    block["qs"][0, 1] = 2  # point 2 has the codes 4 0 0 0: 36 and three times 4; its weights are 4..7
    block["qs"][0, 64:68] = list((0b0010000 | 15 << 28).to_bytes(4, "little"))  # minus: 4 and the eighth, 7
    w = decode(block, IQ3_XXS)
    assert w[:8].tolist() == [31, 31, 31, 31, -279, 31, 31, -31]  # 15.5 / 2 = 7.75
    assert (w[32:] == 1).all()


def test_iq3_s_by_hand() -> None:
    block = np.zeros(1, IQ3_S.block)
    block["d"], block["scales"][0, 0] = 0.5, 0xF2  # weights 0..31: 1 + 2 * 2; 32..63: 31
    block["qs"][0, 63], block["qh"][0, 7] = 255, 0x80  # the last point is 511
    block["signs"][0, 31] = 0x10  # weight 252
    w = decode(block, IQ3_S)
    assert (w[:32] == 2.5).all() and (w[32:64] == 15.5).all()
    last = grids.load_grid("iq3_s").points[511] * 0.5
    assert w[252:].tolist() == [-last[0], *last[1:]]


def test_iq1_s_by_hand() -> None:
    block = np.zeros(1, IQ1_S.block)
    block["d"] = 8
    block["qh"][0, 1] = (
        0x8000 | 3 << 12 | 7 << 9
    )  # weights 32..63: 7, minus 1/8; the fourth number is 7 * 256 + qs
    block["qs"][0, 7] = 255
    w = decode(block, IQ1_S)
    assert (w[:32] == -7).all()  # 8 * (-1 + 1/8)
    assert (w[32:56] == -63).all()  # 8 * 7 * (-1 - 1/8)
    assert w[56:64].tolist() == (56 * (grids.load_grid("iq1_s").points[2047] - 0.125)).tolist()


def test_iq1_m_by_hand() -> None:
    block = np.zeros(1, IQ1_M.block)
    half = int(np.array(3.5, np.float16).view(np.uint16))
    for k in range(4):  # d sits in the top four bits of each word, lowest first
        block["scales"][0, k] = (half >> 4 * k & 15) << 12
    block["scales"][0, 3] |= 5 << 9  # weights 240..255: 11
    block["qh"][0, 15] = 0x87  # weights 240..247: number 7 * 256 + qs, plus 1/8; 248..255: minus 1/8
    w = decode(block, IQ1_M)
    assert (w[:240] == 3.5 * (-1 + 0.125)).all()
    assert w[240:248].tolist() == (38.5 * (grids.load_grid("iq1_s").points[1792] + 0.125)).tolist()
    assert (w[248:] == 38.5 * (-1 - 0.125)).all()


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
def test_sizes_are_the_ones_of_gguf(fmt: Format) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(fmt.id)
    assert (fmt.weights, fmt.block.itemsize) == GGML_QUANT_SIZES[kind] and kind.name.lower() == fmt.name


def encode(module: str, fmt: Format, x: np.ndarray, imatrix: np.ndarray, out: np.ndarray) -> int:
    """Encode with one imatrix row for every two rows; the block that is refused, or -1."""
    try:
        import_module(f"refimpl.quants.{fmt.name}_{module}").quantize(x, imatrix, 2, out)
    except grids.Refused as error:
        return error.block
    return -1


@pytest.mark.parametrize("fmt", [f for f in CODEBOOKS if "quantize" in f.tuned], ids=lambda fmt: fmt.name)
def test_vectors_encode_as_the_portable_kernel_does(fmt: Format) -> None:
    """Odd alignments; NaN round the inputs would spread, canaries round the outputs would be overwritten."""
    refused = set()
    for k, (name, x, imatrix) in enumerate(draw_cases(rows=4, n=512, seed=3)):
        if (not len(imatrix) and fmt.needy) or k % 7:
            continue
        got, want = np.full((2, 4 + 2, fmt.row_bytes(512)), 0xA5, np.uint8)
        memory = np.full(x.size + imatrix.size + 48, np.nan, np.float32)
        inner, weights = memory[17 : 17 + x.size].reshape(x.shape), memory[x.size + 32 :][: imatrix.size]
        inner[:], weights[:] = x, imatrix.reshape(-1)
        ends = (
            encode("simd", fmt, inner, weights.reshape(imatrix.shape), got[1:5]),
            encode("jit", fmt, x, imatrix, want[1:5]),
        )
        assert ends[0] == ends[1], name
        refused.add(ends[0] >= 0)
        assert (got[[0, 5]] == 0xA5).all()
        if ends[0] < 0:
            assert np.array_equal(got, want), name
    assert refused == {False, True}


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
def test_weights_that_overflow_are_named(fmt: Format) -> None:
    """IQ2_XXS and IQ1 give up such a block and write zeros (IQ1_M aborts only beyond what a sum of 256 holds)."""
    x = gaussian(np.random.default_rng(6), 3, 1024)
    x[2, 300] = 1e30
    gives_up = fmt.name in ("iq2_xxs", "iq1_s", "iq1_m")
    for reference in (False, True):
        if gives_up:
            raw = quants.quantize(x, fmt, np.ones(1024, np.float32), reference=reference)
            assert not quants.scale_defects(raw, fmt)[:2].any()
            continue
        with pytest.raises(quants.TooLarge, match="weights from row 2, column 256 on are so large") as caught:
            quants.quantize(x, fmt, np.ones(1024, np.float32), reference=reference)
        assert (caught.value.row, caught.value.column) == (2, 256)


def test_iq3_s_moves_what_follows_a_group_of_zeros() -> None:
    """ggml's own slip, byte for byte: the points behind 32 zeros are stored where those of the zeros belong."""
    x = gaussian(np.random.default_rng(7), 1, 256)
    x[0, 32:64] = 0
    raw = quants.quantize(x, "iq3_s")
    y = quants.dequantize(raw, "iq3_s")
    assert np.corrcoef(y[0, :32], x[0, :32])[0, 1] > 0.9
    assert abs(np.corrcoef(y[0, 64:], x[0, 64:])[0, 1]) < 0.5
    block = raw.view(IQ3_S.block)[0, 0]
    assert not block["qs"][56:].any() and not block["signs"][28:].any()


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
def test_a_round_trip_keeps_most_of_the_weights(fmt: Format) -> None:
    x = gaussian(np.random.default_rng(8), 4, 2048)
    y = quants.dequantize(quants.quantize(x, fmt, least_importance(fmt.name, 2048)), fmt)
    error = np.linalg.norm(y - x) / np.linalg.norm(x)
    assert error < {"iq1": 0.6, "iq2": 0.4, "iq3": 0.25}[fmt.name[:3]]
