"""One test covers all twins: reference, compiled, interpreted and tuned kernel give the same bits.

compiled != interpreted is a promotion slip; both != reference is order or algorithm. Every buffer that a
kernel writes is poisoned first (0xAA, NaN), so a byte that it leaves out shows. A twin without a case stops
collection.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refimpl.arith import bits
from refimpl.arith.builds import BUILDS, SITED, find_build
from refimpl.quants import (
    deviation,
    floats,
    fp4,
    grid_rule,
    grid_search,
    grids,
    iq4,
    lines,
    q4_1,
    q5_0,
    read_scales,
    rounding,
    search,
    ternary,
    ternary_rule,
    ternary_search,
)
from refimpl.quants.formats import BF16, CODEBOOKS, F16, Q4_1, Q5_1, Format, find_reference, formats
from tests.bits import assert_same_bits
from tests.dots_twins import CASES as DOTS
from tests.model_twins import CASES as MODEL
from tests.twins import find_twins, load_compiled, load_interpreted
from tests.weights import IMPORTANCES, KINDS, gaussian, make_importance, make_weights

Array = np.ndarray[Any, Any]
Pairs = Iterator[tuple[str, Array, Array]]  # what, got, want
CODED = [fmt for fmt in formats.values() if fmt.weights > 1 and fmt not in CODEBOOKS]


def poison(shape: tuple[int, ...] | int, dtype: Any) -> Array:
    """An array that nobody has written: NaN, or 0xAA in every byte."""
    out = np.empty(shape, dtype)
    if out.dtype.kind == "f":
        out.fill(np.nan)
    else:
        out.view(np.uint8).fill(0xAA)
    return out


def check_codec(fmt: Format) -> Callable[[ModuleType, "Draw"], Pairs]:
    """All JOBS of one block format; a module that lacks some of them is checked for the others."""

    def check(twin: ModuleType, draw: "Draw") -> Pairs:
        reference = find_reference(fmt)
        x, imatrix = draw.weights(fmt.weights * int(draw.rng.integers(1, 4))), draw.imatrix
        experts = np.empty((0, x.shape[1]), np.float32) if imatrix is None else imatrix
        per_expert = max(1, len(x) // max(1, len(experts)))
        spread = None if imatrix is None else imatrix[np.arange(len(x)) // per_expert]
        build = [find_build(draw.build, fmt.name)] if fmt.name in SITED else []
        blocks = reference.quantize(x, spread, *build)
        raw = blocks.view(np.uint8)
        if hasattr(twin, "quantize"):
            out = poison(raw.shape, np.uint8)
            twin.quantize(x, experts, per_expert, out, *build)
            yield f"quantize {draw.build}", out, raw
        if hasattr(twin, "dequantize"):
            for what, source in (("dequantize", raw), ("dequantize any bytes", draw.bytes(raw.shape))):
                y = poison(x.shape, np.float32)
                twin.dequantize(source, y)
                want = reference.dequantize(source.view(fmt.block).reshape(-1)).reshape(x.shape)
                yield what, y, want
        if hasattr(twin, "check_codes"):
            shape = (len(x), x.shape[1] // fmt.weights)
            for what, source in (
                ("check_codes", draw.damage(raw)),
                ("check any bytes", draw.bytes(raw.shape)),
            ):
                off, far = poison(shape, np.uint16), poison(shape, np.uint8)
                twin.check_codes(source, x, off, far)
                steps = reference.measure_codes(
                    source.view(fmt.block).reshape(-1), x.reshape(-1, fmt.weights)
                )
                yield f"{what} off", off, np.count_nonzero(steps, 1).reshape(shape).astype(np.uint16)
                yield f"{what} far", far, steps.max(1).reshape(shape).astype(np.uint8)

    return check


def check_codebook(fmt: Format) -> Callable[[ModuleType, "Draw"], Pairs]:
    """Decode of a codebook format, and in some examples encode: these references are slow."""
    share = (0.02 if fmt.name.startswith("iq1") else 0.05) if numba.config.DISABLE_JIT else 0.2

    def check(twin: ModuleType, draw: "Draw") -> Pairs:
        raw = draw.bytes((draw.rows, 2 * fmt.block.itemsize))
        y = poison((draw.rows, 2 * fmt.weights), np.float32)
        if hasattr(twin, "dequantize"):
            twin.dequantize(raw, y)
            want = find_reference(fmt).dequantize(raw.view(fmt.block).reshape(-1)).reshape(y.shape)
            yield "dequantize any bytes", y, want
        if hasattr(twin, "quantize") and draw.rng.random() < share:
            draw.rows = 1
            x = draw.weights(fmt.weights)
            yield from compare_codes(twin, fmt, raw[:1, : fmt.block.itemsize], x, "any bytes")
            rows = draw.imatrix[:1] if draw.imatrix is not None else None
            rows = np.ones_like(x) if rows is None and fmt.needy else rows
            out = poison((1, fmt.block.itemsize), np.uint8)
            experts = np.empty((0, fmt.weights), np.float32) if rows is None else rows
            yield "quantize", *encode_or_refuse(twin, fmt, x, rows, experts, out)
            if not (out == 0xAA).all():  # not refused
                yield from compare_codes(twin, fmt, out, x, "its own")
                out[0, draw.rng.integers(out.size)] ^= 1 << draw.rng.integers(8)
                yield from compare_codes(twin, fmt, out, x, "a bit of its own")

    return check


def compare_codes(twin: ModuleType, fmt: Format, raw: Array, x: Array, what: str) -> Pairs:
    """What no importances explain, of one block."""
    if hasattr(twin, "check_codes"):
        off, far = poison((1, 1), np.uint16), poison((1, 1), np.uint8)
        twin.check_codes(raw, x, off, far)
        parts = find_reference(fmt).measure_codes(raw.view(fmt.block).reshape(-1), x)
        yield f"off in {what}", off, parts.sum(1, keepdims=True).astype(np.uint16)
        yield f"far in {what}", far, parts.max(1, keepdims=True).astype(np.uint8)


def encode_or_refuse(
    twin: ModuleType, fmt: Format, x: Array, rows: Array | None, experts: Array, out: Array
) -> tuple[Array, Array]:
    """The bytes of kernel and reference, or the block that each of them refuses."""
    try:
        want = find_reference(fmt).quantize(x, rows).view(np.uint8)
    except grids.Refused as error:
        with pytest.raises(grids.Refused) as caught:
            twin.quantize(x, experts, 1, out)
        return np.array(caught.value.block), np.array(error.block)
    twin.quantize(x, experts, 1, out)
    return out, want


def check_grids(twin: ModuleType, draw: "Draw") -> Pairs:
    seven = np.arange(128)
    got = np.array([twin.complete_signs(int(s)) for s in seven], np.uint8)
    yield "complete_signs", got, grids.complete_signs(seven)


def check_grid_search(twin: ModuleType, draw: "Draw") -> Pairs:
    """The parts; whole searches run as the formats' encoders."""
    x, mean = draw.weights(256)[:1], np.float32(draw.rng.random())
    imatrix = np.abs(draw.weights(256)[:1])
    yield "mean_square", np.float32([twin.mean_square(x[0], 2)]), grid_search.mean_squares(x, 2)[:, 0]
    for name, plan in grids.PLANS.items():
        group, signs = twin.make_group(plan), poison(plan.sub // 8, np.uint8)
        part, n = x[:, : plan.sub], plan.sub
        for row in (imatrix[0], imatrix[0, :0]):
            twin.weigh(plan, part[0], row[:n], mean, group)
            want = grid_search.weigh(x, imatrix if row.size else None, np.float32([[mean]]), plan.quarter)
            yield f"weigh {name}", group.weights, want[0, :n]
        (twin.split_even_signs if plan.even else twin.split_signs)(part[0], group, signs)
        split = (
            grid_search.split_even_signs(part, want[:, :n]) if plan.even else grid_search.split_signs(part)
        )
        yield f"values {name}", group.values, split[0][0]
        yield f"signs {name}", signs, split[1][0]
    scales = np.abs(draw.weights(256)[0, :16])
    step, codes = grid_search.round_scales(scales[None], 16)
    yield "find_step", np.float32([twin.find_step(scales, 16)]), step
    if scales.max() > 0:
        inverse = np.float32(1) / step[0]
        yield "round_scale", np.int32([[twin.round_scale(v, inverse, 16) for v in scales]]), codes


def draw_stored(draw: "Draw", name: str) -> tuple[Array, Array, grids.Stored]:
    """Weights, and a block that their search left, now and then with a bit flipped: x, d, Stored; one of each."""
    fmt = formats[name]
    x = draw.weights(256)[:1]
    imatrix = np.ones((1, 256), np.float32) if fmt.needy or draw.imatrix is None else draw.imatrix[:1]
    raw = poison((1, fmt.block.itemsize), np.uint8)
    try:
        load_compiled(f"quants.{name}_jit").quantize(x, imatrix, 1, raw)
    except grids.Refused:
        raw = draw.bytes(raw.shape)
    raw[0, draw.rng.integers(raw.size)] ^= draw.rng.integers(0, 2) << draw.rng.integers(8)
    block, module = raw.view(fmt.block).reshape(-1), find_reference(fmt)
    return x, read_scales(raw, fmt)[0, 0], module.unpack(block)


def check_grid_rule(twin: ModuleType, draw: "Draw") -> Pairs:
    name = draw.rng.choice([n for n in grids.PLANS if n != "iq3_s"])
    x, d, stored = draw_stored(draw, name)
    rule = twin.make_rule(twin.load_rule(name), grids.PLANS[name])
    for mine, theirs in zip(rule.stored, stored, strict=True):
        mine[:] = theirs[0]
    got = twin.check_block(grids.PLANS[name], rule, d[0], x[0])
    yield f"check_block {name}", np.array([got]), grid_rule.measure(name, d, stored, x).sum(1)


def check_ternary_rule(twin: ModuleType, draw: "Draw") -> Pairs:
    name = draw.rng.choice(["iq1_s", "iq1_m"])
    x, d, stored = draw_stored(draw, name)
    module = find_reference(formats[name])
    rule = twin.make_rule(module.SUB)
    rule.numbers[:], rule.levels[:] = stored.numbers[0], stored.levels[0]
    got = twin.check_block(rule, d[0], x[0], module.EPSILON)
    want = ternary_rule.measure(d, stored, x, module.SUB, module.EPSILON)
    yield f"check_block {name}", np.array([got]), want.sum(1)


def check_ternary_search(twin: ModuleType, draw: "Draw") -> Pairs:
    search = twin.make_search(32)
    search.x[:] = draw.weights(256)[0, :32]
    order, _ = ternary_search.sort_sums(search.x[None], np.abs(search.x[None]))
    twin.sort(search)
    yield "sort", search.order, order[0].astype(np.int32)
    first, second = sorted(draw.rng.integers(0, 33, 2).tolist())
    twin.cut(search, first, second)
    want = ternary_search.cut(search.x[None], order, np.array([first]), np.array([second]))
    yield "cut", search.codes, want[0].astype(np.uint8)


def check_bits(twin: ModuleType, draw: "Draw") -> Pairs:
    x = draw.weights(32).reshape(-1)
    with_nan = np.where(draw.bytes(x.shape) < 8, np.float32(np.nan), x * np.float32(1e3))
    halves = draw.bytes((64, 2)).view(np.uint16).reshape(-1)
    for name, values, dtype in (
        ("encode_half", with_nan, np.uint16),
        ("decode_half", halves, np.float32),
        ("encode_bf16", x, np.uint16),
        ("decode_bf16", halves, np.float32),
        ("nearest_int", with_nan, np.int32),
        ("truncate", with_nan, np.int32),
        ("round_half_away", x, np.float32),
    ):
        got = np.array([getattr(twin, name)(v) for v in values], dtype)
        yield name, got, getattr(bits, name)(values)
    anything, every = bits.decode_bf16(halves), np.arange(256, dtype=np.uint8)
    positive = np.abs(np.where(anything == 0, np.float32(1), anything))
    positive = np.concatenate([positive[np.isfinite(positive)], np.abs(x[x != 0]), BELOW_POWERS])
    for name, values, dtype in (
        ("decode_e8m0_half", every, np.float32),
        ("decode_ue4m3", every, np.float32),
        ("encode_ue4m3", np.concatenate([x, positive, every.astype(np.float32) / 512]), np.int32),
        ("floor_log2", positive, np.int32),
    ):
        got = np.array([getattr(twin, name)(v) for v in values], dtype)
        yield name, got, getattr(bits, name)(values)
    for end in (with_nan, x):
        yield "find_not_finite", np.array(twin.find_not_finite(end)), np.array(bits.find_not_finite(end))
    for values in (halves, bits.encode_bf16(x)):
        out, want = poison(values.shape, np.float32), poison(values.shape, np.float32)
        first = bits.widen_bf16s(values, want)
        yield "widen_bf16s' index", np.array(twin.widen_bf16s(values, out)), np.array(first)
        yield "widen_bf16s", out, want


BELOW_POWERS = (
    np.concatenate(  # what lies up to 100 last places below powers of two, subnormal ones among them
        [
            (np.float32(2.0**k).view(np.uint32) - np.arange(101, dtype=np.uint32)).view(np.float32)
            for k in range(-126, 128, 7)
        ]
    )
)


def check_floats(twin: ModuleType, draw: "Draw") -> Pairs:
    x = draw.weights(32)
    for fmt, name in ((F16, "halves"), (BF16, "bf16s")):
        out = poison(x.shape, np.uint16)
        getattr(twin, f"encode_{name}")(x, out)
        yield f"encode_{name}", out, floats.quantize(x, fmt).view(np.uint16)
        values = draw.bytes((2, 64)).view(np.uint16)
        y = poison(values.shape, np.float32)
        getattr(twin, f"decode_{name}")(values, y)
        yield f"decode_{name}", y, floats.dequantize(values.view(fmt.block), fmt)


def check_search(twin: ModuleType, draw: "Draw") -> Pairs:
    x = draw.weights(32).reshape(-1, 16)[:4]
    weights = np.abs(draw.weights(32).reshape(-1, 16)[-len(x) :])

    build = find_build(draw.build, "q4_k")

    def run(fit: Callable[..., Any], *arguments: Any, scratch: int = 1, **options: Any) -> list[Array]:
        results, codes = [], poison(x.shape, np.uint8)
        for i in range(len(x)):
            spare = [poison(x.shape[1], np.uint8)] * (scratch - 1)
            results.append(fit(x[i], weights[i], *arguments, codes[i], *spare, build, **options))
        return [*np.float32(results).reshape(len(x), -1).T, codes.astype(np.int32)]

    scales, lows = gaussian(draw.rng, 2, len(x))
    codes = draw.bytes(x.shape) & 15
    forms = build.QK_DIFF1, build.QK_ERR1
    found = [
        twin.measure_error(x[i], weights[i], scales[i], lows[i], codes[i], *forms) for i in range(len(x))
    ]
    yield "measure_error", np.float32(found), search.measure_error(x, weights, scales, lows, codes, *forms)
    start, step = np.float32(-0.9), np.float32(0.05)
    got = run(twin.fit_scale_min, 15, start, step, 36, scratch=2)
    for g, w in zip(got, search.fit_scale_min(x, weights, 15, -0.9, 0.05, 36, build), strict=True):
        yield "fit_scale_min", g, w
    got = run(twin.fit_scale_min, 3, start, step, 36, scratch=2, linear=True)
    for g, w in zip(
        got, search.fit_scale_min(x, weights, 3, -0.9, 0.05, 36, build, linear=True), strict=True
    ):
        yield "fit_scale_min, linear", g, w
    moved = poison(x.shape, np.uint8)
    scales = np.float32([twin.fit_by_moves(x[i], 4, moved[i], build) for i in range(len(x))])
    for g, w in zip((scales, moved.astype(np.int32)), search.fit_by_moves(x, 4, build), strict=True):
        yield "fit_by_moves", g, w
    for name, top in (("fit_scale", 32), ("fit_scale", 16), ("fit_positive", 63), ("fit_positive", 15)):
        want = getattr(search, name)(x, weights, top, build)
        for g, w in zip(run(getattr(twin, name), top), want, strict=True):
            yield name, g, w


def check_deviation(twin: ModuleType, draw: "Draw") -> Pairs:
    for weights in (32, 64, 256):
        x = draw.weights(weights * 3)
        halves = bits.encode_bf16(x)
        y = draw.damage((x * np.float32(0.9)).view(np.uint8)).view(np.float32)
        for words, values, s in (
            (halves, np.empty((0, 0), np.float32), bits.decode_bf16(halves)),
            (np.empty((0, 0), np.uint16), x, x),
        ):
            sse, squares, want_max = deviation.compare(y, s, weights)
            want_sums, want_worst = deviation.summarize(sse, squares)
            for errors in (poison(sse.shape, np.float64), np.empty((0, 0))):
                sums, largest = poison((len(x), 3), np.float64), poison(len(x), np.float32)
                worst = poison(len(x), np.int32)
                twin.compare(y, words, values, weights, errors, sums, largest, worst)
                yield f"compare {weights} sums", sums, want_sums
                yield f"compare {weights} max", largest, want_max
                yield f"compare {weights} worst", worst, want_worst
                if errors.size:
                    yield f"compare {weights} sse", errors, sse
    if not hasattr(twin, "compare_values"):
        return
    y = draw.damage(x.view(np.uint8).copy()).view(np.float32)
    sse, squares, want_max = deviation.compare(y, x, 1)
    want_sums, want_worst = deviation.summarize(sse, squares)
    errors, sums = poison(sse.shape, np.float64), poison((len(x), 3), np.float64)
    largest, worst = poison(len(x), np.float32), poison(len(x), np.int32)
    twin.compare_values(y, np.empty((0, 0), np.uint16), x, errors, sums, largest, worst)
    yield "compare_values sse", errors, sse
    yield "compare_values sums", sums, want_sums
    yield "compare_values max", largest, want_max
    yield "compare_values worst", worst, want_worst


def check_rounding(twin: ModuleType, draw: "Draw") -> Pairs:
    halves = bits.decode_half(draw.bytes((64, 2)).view(np.uint16).reshape(-1))
    spread = np.float32([twin.spread_half(d) for d in halves])
    yield "spread_half", spread, np.stack(rounding.spread_half(halves), 1)
    for top in (16, 8):
        x = draw.weights(64).reshape(-1, 32)
        d, codes = q5_0.round_codes(x)
        codes = np.minimum(codes, 2 * top - 1)
        stored = draw.damage(codes.astype(np.uint8)) & np.uint8(2 * top - 1)
        steps = rounding.measure_trials(stored.astype(np.int32), x, top, d, codes)
        plain = codes.astype(np.uint8)
        found = [twin.check_trials(stored[i], x[i], top, d[i], plain[i]) for i in range(len(x))]
        want = np.stack([np.count_nonzero(steps, 1), steps.max(1)], 1)
        yield f"check_trials {top}", np.array(found, np.int64), want.astype(np.int64)


def check_fp4(twin: ModuleType, draw: "Draw") -> Pairs:
    """Whatever the step, also one that has nothing to do with the weights."""
    x = draw.weights(64).reshape(-1, 16)
    for step in (
        np.abs(x).max(1) / np.float32(12),
        np.abs(gaussian(draw.rng, 1, len(x)))[0],
        np.zeros(len(x), np.float32),
    ):
        codes, qs = fp4.round_codes(x, step), poison((len(x), 8), np.uint8)
        for i in range(len(x)):
            twin.round_and_pack(x[i], step[i], qs[i])
        yield "round_and_pack", qs, fp4.pack_codes(codes)
        stored = draw.bytes(qs.shape)
        far = fp4.measure_apart(fp4.unpack_codes(stored), x, step)
        found = [twin.count_apart(stored[i], x[i], step[i]) for i in range(len(x))]
        yield (
            "count_apart",
            np.array(found, np.int64),
            np.stack([np.count_nonzero(far, 1), far.max(1)], 1).astype(np.int64),
        )


def check_iq4(twin: ModuleType, draw: "Draw") -> Pairs:
    x = draw.weights(64).reshape(-1, 32)
    weights = np.abs(draw.weights(64).reshape(-1, 32))
    values = np.concatenate(
        [x.reshape(-1), iq4.MIDDLES, iq4.IQ4_VALUES, np.float32([np.nan, np.inf, -np.inf])]
    )
    values = np.concatenate(
        [values, np.nextafter(iq4.MIDDLES, np.float32(-999)), np.nextafter(iq4.MIDDLES, np.float32(999))]
    )
    yield "round_code", np.array([twin.round_code(v) for v in values], np.int32), iq4.round_codes(values)
    build = find_build(draw.build, "iq4_nl")
    found = np.float32([twin.fit_scale(x[i], weights[i], build) for i in range(len(x))])
    yield f"fit_scale {draw.build}", found, iq4.fit_scale(x, weights, build)


def check_ternary(twin: ModuleType, draw: "Draw") -> Pairs:
    x = draw.weights(64)
    for lost in (0, 1):
        codes = poison(x.shape, np.uint8)
        d = np.float32([twin.round_codes(x[i], lost, codes[i]) for i in range(len(x))])
        want_d, want = ternary.round_codes(x, lost)
        yield "d", d, want_d
        yield "round_codes", codes, want.astype(np.uint8)
    stored = draw.bytes(x.shape) & np.uint8(3)
    for scale in (want_d, bits.decode_half(bits.encode_half(want_d)), gaussian(draw.rng, 1, len(x))[0]):
        far = ternary.measure_apart(stored.astype(np.int32), x, scale, 3)
        found = [twin.count_apart(stored[i], x[i], scale[i], 3) for i in range(len(x))]
        yield (
            "count_apart",
            np.array(found, np.int64),
            np.stack([np.count_nonzero(far, 1), far.max(1)], 1).astype(np.int64),
        )


def check_lines(twin: ModuleType, draw: "Draw") -> Pairs:
    for fmt, top in ((Q4_1, 15), (Q5_1, 31)):
        x = draw.weights(64).reshape(-1, 32)
        d, m, codes = q4_1.round_codes(x, top)
        blocks = np.frombuffer(draw.bytes((len(x), fmt.block.itemsize)).tobytes(), fmt.block)
        stored = (draw.damage(codes.astype(np.uint8)) & np.uint8(top)).astype(np.int32)
        steps = lines.measure_lines(blocks, stored, x, top, (d, m, codes))
        raw, given, plain = (
            blocks.view(np.uint8).reshape(len(x), -1),
            stored.astype(np.uint8),
            codes.astype(np.uint8),
        )
        found = [twin.check_lines(raw[i], given[i], x[i], top, d[i], m[i], plain[i]) for i in range(len(x))]
        want = np.stack([np.count_nonzero(steps, 1), steps.max(1)], 1)
        yield f"check_lines {top}", np.array(found, np.int64), want.astype(np.int64)


CASES: dict[str, Callable[[ModuleType, "Draw"], Pairs]] = {
    **DOTS,
    **MODEL,
    "arith.bits": check_bits,
    "quants.floats": check_floats,
    "quants.search": check_search,
    "quants.grids": check_grids,
    "quants.grid_search": check_grid_search,
    "quants.ternary_search": check_ternary_search,
    "quants.grid_rule": check_grid_rule,
    "quants.ternary_rule": check_ternary_rule,
    "quants.deviation": check_deviation,
    "quants.rounding": check_rounding,
    "quants.fp4": check_fp4,
    "quants.iq4": check_iq4,
    "quants.ternary": check_ternary,
    "quants.lines": check_lines,
    **{f"quants.{fmt.name}": check_codec(fmt) for fmt in CODED},
    **{f"quants.{fmt.name}": check_codebook(fmt) for fmt in CODEBOOKS},
}
for _name in find_twins():
    if _name.rpartition("_")[0] not in CASES:
        raise LookupError(f"refimpl.{_name} has no case in test_twins: what is it the twin of?")


class Draw:
    """One example of the inputs: a seed, a kind of weights and of imatrix, and weights of Hypothesis."""

    def __init__(self, seed: int, kind: str, importance: str, given: Array, build: str = "strict") -> None:
        self.rng, self.kind, self.given = np.random.default_rng(seed), kind, given
        self.importance, self.imatrix, self.build = importance, None, build
        self.rows = 2  # the interpreter is slow; vector kernels get more, or they leave it all to scalar code

    def weights(self, n: int) -> Array:
        """[rows, n] float32; the first of them are Hypothesis' own. The imatrix follows their width."""
        x = make_weights(self.kind, self.rng, self.rows, n)
        x.reshape(-1)[: min(x.size, self.given.size)] = self.given[: x.size]
        rows = [make_importance(self.importance, self.rng, n) for _ in range(int(self.rng.integers(1, 3)))]
        self.imatrix = None if rows[0] is None else np.stack(rows)
        return x

    def bytes(self, shape: tuple[int, ...]) -> Array:
        return self.rng.integers(0, 256, shape, dtype=np.uint8)

    def damage(self, raw: Array) -> Array:
        """Flip a bit in every 40 bytes or so."""
        flips = np.uint8(1) << self.rng.integers(0, 8, raw.shape, dtype=np.uint8)
        return raw ^ np.where(self.rng.random(raw.shape) < 0.025, flips, np.uint8(0))


FINITE = hnp.arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**32 - 1)).map(
    lambda b: np.where(b & 0x7F800000 == 0x7F800000, b & 0xFF7FFFFF, b).view(np.float32)
)
DRAWS = st.builds(
    Draw,
    st.integers(0, 2**32),
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(IMPORTANCES)),
    FINITE,
    st.sampled_from(BUILDS[:1] if numba.config.BOUNDSCHECK else BUILDS),  # no index depends on the build
)
SLOW = numba.config.DISABLE_JIT or numba.config.BOUNDSCHECK  # CI's repetitions of the portable kernels
QUIET = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(QUIET, max_examples=15 if SLOW else 120)
NAMES = [pytest.param(n, marks=[pytest.mark.portable] * n.endswith("_jit")) for n in find_twins()]


def check_all(name: str, twin: ModuleType, draw: Draw) -> None:
    if name.endswith("_simd"):
        draw.rows = 22
    with np.errstate(all="ignore"):
        for what, got, want in CASES[name.rpartition("_")[0]](twin, draw):
            assert_same_bits(
                got, want, f"{name} {what}, {draw.kind}, imatrix {draw.importance}, {draw.build}"
            )


@pytest.mark.parametrize("name", NAMES)
@MANY
@given(draw=DRAWS)
def test_kernel_equals_reference(name: str, draw: Draw) -> None:
    check_all(name, load_compiled(name), draw)


@pytest.mark.parametrize("name", [name for name in find_twins() if name.endswith("_jit")])
@QUIET
@given(draw=DRAWS)
def test_interpreted_kernel_equals_reference(name: str, draw: Draw) -> None:
    check_all(name, load_interpreted()[name], draw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_reference_for_every_kind(name: str, kind: str) -> None:
    importances = list(IMPORTANCES)[:: 4 if SLOW else 1]
    for seed, importance in enumerate(importances):
        check_all(name, load_compiled(name), Draw(seed, kind, importance, np.empty(0, np.float32)))


def test_interpreted_modules_are_plain_python() -> None:
    """The interpreted leg would prove nothing if some inner function were compiled after all."""
    for name, module in load_interpreted().items():
        compiled = [key for key, value in vars(module).items() if hasattr(value, "py_func")]
        assert not compiled, (name, compiled)
