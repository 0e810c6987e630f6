"""verify on llama.cpp's own files: verdicts, JSON, determinism, bounds."""

import json
import tracemalloc

import numpy as np
import pytest

import refimpl
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files.golden import tiny_model
from refimpl.files.source import Tensor
from refimpl.quants.formats import CODEBOOKS, known
from refimpl.verifier import mutate
from refimpl.verifier.damage import KEPT, NORM, ROUTER, STACKED, UP
from refimpl.verifier.explain import explain
from refimpl.verifier.mutate import Copy
from refimpl.verifier.requantize import check_rows, widen
from refimpl.verifier.run import verify
from refimpl.verifier.verdict import classify, describe_damage, describe_doubt, looks_foreign

GOLDEN = tiny_model()
STOCK = GOLDEN / "stock.gguf"
PROTECTED = GOLDEN / "protected.gguf"
IMATRIX = GOLDEN / "imatrix-quantized.gguf"

WEIGHED = ["q4_k", "q6_k", "q5_0", "q4_0", "q4_1", "q5_1", "q2_k", "q3_k", "q5_k"]


def verdicts(report, *, quantized=True):
    return {t.verdict for t in report.tensors if (t.format not in ("f32", "f16", "bf16")) == quantized}


@pytest.mark.parametrize("file", [STOCK, PROTECTED])
def test_llama_cpp_output_is_exact_under_the_strict_build(file):
    report = verify(file, GOLDEN)
    assert report.passed and report.verdict == "exact"
    assert verdicts(report) == {"exact"} and verdicts(report, quantized=False) == {"copied"}
    assert [f.code for f in report.findings] == ["build"]


def test_an_imatrix_file_is_rounded_without_the_imatrix():
    report = verify(IMATRIX, GOLDEN)
    assert report.passed and report.verdict == "rounded"
    assert report.counts["rounded"] > report.counts.get("exact", 0)


def test_an_imatrix_file_is_exact_with_the_imatrix():
    report = verify(IMATRIX, GOLDEN, imatrix=GOLDEN / "imatrix.gguf", require="exact")
    assert report.passed and report.verdict == "exact"


def test_require_exact_fails_a_rounded_file():
    assert not verify(IMATRIX, GOLDEN, require="exact").passed


def test_the_wrong_imatrix_does_not_make_a_plain_file_fail():
    report = verify(STOCK, GOLDEN, imatrix=GOLDEN / "imatrix.gguf")
    assert report.passed and report.verdict == "exact"


def test_recipes_are_named_and_enforced():
    assert verify(PROTECTED, GOLDEN).recipe == "q4_k_m-protected"
    assert verify(PROTECTED, GOLDEN, recipe="q4_k_m-protected").conforms is True
    other = verify(PROTECTED, GOLDEN, recipe="q4_k_m")
    assert other.conforms is False and not other.passed and other.verdict == "exact"
    assert {f.code for f in other.findings} == {"build", "recipe-mismatch"}


def test_a_renumbered_child_passes_and_its_map_is_named(tmp_path):
    copy = Copy(STOCK)
    mutate.prune(copy, KEPT)
    report = verify(copy.write(tmp_path / "child.gguf"), GOLDEN)
    assert report.passed and report.verdict == "exact"
    assert report.maps == {1: KEPT, 2: KEPT}
    assert (report.experts, report.source_experts) == (12, 16)
    assert [f.code for f in report.findings if f.severity == "note"] == ["build", "experts-kept"]


def test_a_bf16_gguf_serves_as_source(tmp_path):
    copy = Copy(STOCK)
    for name, part in copy.parts.items():
        if part.format.name not in ("f32",):
            mutate.replace_values(part, mutate.source_values(GOLDEN, name), refimpl.formats["bf16"])
    report = verify(STOCK, copy.write(tmp_path / "bf16.gguf"))
    assert report.verdict == "exact" and report.source_kind == "gguf"
    assert verify(tmp_path / "bf16.gguf", GOLDEN).counts == {"copied": len(copy.parts)}


def test_json_is_the_same_bytes_for_any_number_of_threads_and_memory(tmp_path):
    copy = Copy(IMATRIX)
    mutate.swap_experts(copy, [UP], 1, 2)
    path = copy.write(tmp_path / "model.gguf")
    runs = [
        json.dumps(verify(path, GOLDEN, jobs=jobs, memory=memory).to_json())
        for jobs, memory in ((1, 2 << 30), (2, 2 << 30), (8, 2 << 30), (2, 16 << 20))
    ]
    assert len(set(runs)) == 1


@pytest.mark.parametrize("memory", [16 << 20, 64 << 20])
def test_memory_stays_below_the_bound(memory):
    verify(PROTECTED, GOLDEN, memory=memory)  # whatever compiles or is imported, first
    tracemalloc.start()
    try:
        assert verify(PROTECTED, GOLDEN, jobs=2, memory=memory).passed
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < memory


def test_a_bound_that_holds_no_row_is_refused():
    with pytest.raises(Usage, match="memory bound"):
        verify(STOCK, GOLDEN, memory=10_000)


def test_learned_rounding_is_equivalent_not_damage(tmp_path):
    copy = Copy(STOCK)
    rng = np.random.default_rng(3)
    codes = copy[UP].raw.reshape(-1).view(copy[UP].format.block)["qs"]
    low = codes & 15
    nudge = rng.integers(-1, 2, low.shape) * (rng.random(low.shape) < 0.1)
    codes[:] = (codes & 0xF0) | np.clip(low + nudge, 0, 15).astype(np.uint8)
    report = verify(copy.write(tmp_path / "model.gguf"), GOLDEN)
    assert report.passed and report.verdict == "equivalent"
    assert {t.name: t.verdict for t in report.tensors}[UP] == "equivalent"


def test_nan_in_the_source_is_named(tmp_path):
    source = mutate.copy_source(GOLDEN, tmp_path / "source")
    hf = "model.layers.1.mlp.experts.4.up_proj.weight"
    mutate.set_source_value(source, hf, 256 * 9 + 5, 0x7FC0)
    report = verify(STOCK, source)
    assert not report.passed
    [finding] = [f for f in report.findings if f.code == "source-not-finite"]
    assert finding.tensor == UP and "row 9, column 5" in finding.message and hf in finding.message


def test_the_api_is_the_documented_one():
    report = refimpl.verify(str(STOCK), source=str(GOLDEN), recipe="q4_k_m")
    assert report.verdict == "exact"
    document = report.to_json()
    assert list(document) == [
        "refimpl", "file", "source", "recipe", "verdict", "passed", "build", "counts", "experts", "tensors",
        "findings",
    ]  # fmt: skip
    assert document["tensors"][0].keys() >= {
        "name",
        "format",
        "build",
        "shape",
        "source",
        "verdict",
        "blocks",
    }


def test_bad_arguments_are_usage_errors():
    with pytest.raises(Usage):
        verify(STOCK, GOLDEN, build="icc")
    with pytest.raises(Usage):
        verify(STOCK, GOLDEN, require="perfect")
    with pytest.raises(Usage):
        verify(STOCK, GOLDEN, recipe="no-such-recipe")


def test_a_file_that_is_not_there_or_not_a_gguf_is_one_error(tmp_path):
    with pytest.raises(BadFile):
        verify(tmp_path / "none.gguf", GOLDEN)
    with pytest.raises(Unsupported):
        verify(GOLDEN, GOLDEN)


def test_nan_in_the_source_gives_the_same_json_for_any_memory(tmp_path):
    source = mutate.copy_source(GOLDEN, tmp_path / "source")
    mutate.set_source_value(source, "model.layers.1.mlp.experts.4.up_proj.weight", 256 * 99 + 5, 0x7F80)
    copy = Copy(STOCK)
    copy[UP].block(7, 4)["qs"][0, 0] ^= 16
    path = copy.write(tmp_path / "model.gguf")
    runs = {json.dumps(verify(path, source, memory=m).to_json(), allow_nan=False) for m in (2 << 30, 1 << 20)}
    assert len(runs) == 1


@pytest.mark.parametrize("name", [UP, "blk.1.ffn_gate_inp.weight", "blk.1.attn_norm.weight"])
def test_a_type_that_we_do_not_decode_is_unsupported_by_name(tmp_path, name):
    copy = Copy(STOCK)
    part = copy[name]
    part.format = known(24)  # I8
    part.raw = np.zeros((len(part.raw), part.format.row_bytes(256)), np.uint8)
    with pytest.raises(Unsupported, match=f"{name}: refimpl does not decode"):
        verify(copy.write(tmp_path / "model.gguf"), GOLDEN)


@pytest.mark.parametrize("shape", [None, (256,), (2, 2, 4, 256)])
def test_experts_are_compared_in_order_where_the_router_is_gone_or_misshapen(tmp_path, shape):
    copy = Copy(STOCK)
    if shape is None:
        del copy.parts[ROUTER]
    else:
        copy[ROUTER].shape = shape
        copy[ROUTER].raw = copy[ROUTER].raw[: int(np.prod(shape[:-1], dtype=int))]
    mutate.swap_experts(copy, STACKED, 2, 9)
    report = verify(copy.write(tmp_path / "model.gguf"), GOLDEN)
    bad = {t.name: t.verdict for t in report.tensors if t.verdict not in ("exact", "copied")}
    assert bad == dict.fromkeys(STACKED, "misplaced") | {ROUTER: "missing" if shape is None else "wrong"}


def test_an_imatrix_with_nan_is_a_bad_file(tmp_path):
    copy = Copy(GOLDEN / "imatrix.gguf")
    copy.parts[f"{UP}.in_sum2"].raw.view(np.float32)[3, 7] = np.nan
    path = copy.write(tmp_path / "imatrix.gguf")
    with pytest.raises(BadFile, match="importance 775 is nan"):
        verify(IMATRIX, GOLDEN, imatrix=path)


@pytest.mark.parametrize(
    ("key", "value"), [("expert_used_count", 8), ("expert_weights_norm", False), ("rope.freq_base", 10000.0)]
)
def test_hyperparameters_that_no_tensor_shows_are_compared(tmp_path, key, value):
    copy = Copy(STOCK)
    copy.set(f"glm-dsa.{key}", value)
    report = verify(copy.write(tmp_path / "model.gguf"), GOLDEN)
    assert not report.passed and [f.code for f in report.findings] == ["hparam-differs", "build"]


def test_a_file_whose_near_ties_fell_otherwise_all_over_is_rounded(tmp_path):
    copy = Copy(STOCK)
    for name, part in copy.parts.items():
        if part.format.name == "q4_k":
            mutate.nudge_mins(copy, mutate.source_values(GOLDEN, name), name, every=200)
    report = verify(copy.write(tmp_path / "model.gguf"), GOLDEN)
    assert report.passed and report.verdict == "rounded" and report.counts["rounded"] > 10


def test_an_f16_source_that_lost_its_smallest_weights_condemns_no_file(tmp_path):
    source = Copy(STOCK)
    for name, part in source.parts.items():
        if part.format.name != "f32":
            mutate.replace_values(part, mutate.source_values(GOLDEN, name), refimpl.formats["f16"])
    assert verify(STOCK, source.write(tmp_path / "f16.gguf")).passed


def test_rows_made_with_and_without_the_imatrix_are_exact_for_any_memory(tmp_path):
    copy, plain = Copy(IMATRIX), Copy(STOCK)
    copy[UP].raw[::3] = plain[UP].raw[::3]
    path = copy.write(tmp_path / "model.gguf")
    for memory in (2 << 30, 1 << 20):
        assert verify(path, GOLDEN, imatrix=GOLDEN / "imatrix.gguf", memory=memory).verdict == "exact"


def degenerate(kind, rng):
    """Weights [64, 512] that the plain encoder happens to hit, or that no scale of the format reaches."""
    each = rng.standard_normal((64, 1))
    signs = np.where(rng.random((64, 512)) < 0.5, 0.5, -0.25)
    x = {
        "one value a row": np.repeat(each, 512, axis=1),
        "two values a row": signs * each,
        "below the smallest scale": rng.standard_normal((64, 512)) * 1e-8,
        "hardly a number": rng.standard_normal((64, 512)) * 1e-31,
        "dead rows": np.where(each > 0, signs, 0),
    }[kind]
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("fmt", WEIGHED)
@pytest.mark.parametrize(
    "kind",
    [
        "one value a row",
        "two values a row",
        "below the smallest scale",
        "hardly a number",
        "dead rows",
    ],
)
def test_an_imatrix_over_degenerate_weights_is_no_damage(kind, fmt):
    rng = np.random.default_rng(5)
    source, importance = degenerate(kind, rng), np.exp(rng.standard_normal(512)).astype(np.float32)
    raw = refimpl.quantize(widen(source), fmt, imatrix=importance)
    tally = check_rows(raw, refimpl.formats[fmt], source, 0, None, "strict")
    tally.close()
    assert classify(tally, refimpl.formats[fmt]) in ("exact", "rounded")


def test_a_norm_with_a_little_noise_is_degraded_though_other_norms_lie_near(tmp_path):
    copy = Copy(STOCK)
    values = copy[NORM].raw.view(np.float32)
    values *= 1 + 1e-3 * np.random.default_rng(2).standard_normal(values.shape).astype(np.float32)
    report = verify(copy.write(tmp_path / "model.gguf"), GOLDEN)
    assert {t.name: t.verdict for t in report.tensors if t.verdict not in ("exact", "copied")} == {
        NORM: "degraded"
    }


def test_experts_shuffled_in_every_layer_do_not_make_another_source(tmp_path):
    copy = Copy(STOCK)
    perm = np.random.default_rng(4).permutation(16)
    for name, part in copy.parts.items():
        if "_exps." in name:
            part.raw = np.concatenate([part.expert(e) for e in perm])
    copy["token_embd.weight"].raw = copy["token_embd.weight"].raw[::-1].copy()
    report = verify(copy.write(tmp_path / "model.gguf"), GOLDEN)
    assert report.verdict == "misplaced" and "other-source" not in {f.code for f in report.findings}


def test_experts_whose_router_rows_are_equal_are_told_apart_by_their_content(tmp_path):
    source = mutate.copy_source(GOLDEN, tmp_path / "source")
    copy = Copy(STOCK)
    for i, value in enumerate(copy[ROUTER].raw.view(np.uint32)[4] >> 16):
        mutate.set_source_value(source, "model.layers.1.mlp.gate.weight", 256 * 5 + i, int(value))
    copy[ROUTER].raw[5] = copy[ROUTER].raw[4]
    mutate.prune(copy, [5, 4, *range(6, 16)])
    report = verify(copy.write(tmp_path / "model.gguf"), source)
    assert report.passed and report.maps[1] == [5, 4, *range(6, 16)]


@pytest.mark.parametrize("fmt", WEIGHED)
def test_an_imatrix_with_outliers_is_no_damage(fmt):
    """One column in a hundred with 10,000 times the others' importance, as attention sinks make them."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((256, 2048)).astype(np.float32)
    source = (x.view(np.uint32) >> 16).astype(np.uint16)
    importance = np.exp(rng.standard_normal(2048)) * np.where(rng.random(2048) < 0.01, 1e4, 1)
    raw = refimpl.quantize(widen(source), fmt, imatrix=importance.astype(np.float32))
    tally = check_rows(raw, refimpl.formats[fmt], source, 0, None, "strict")
    tally.close()
    assert classify(tally, refimpl.formats[fmt]) == "rounded"
    raw[5, refimpl.formats[fmt].offset("ql" if fmt == "q6_k" else "qs")] ^= 0x55
    tally = check_rows(raw, refimpl.formats[fmt], source, 0, None, "strict")
    tally.close()
    assert classify(tally, refimpl.formats[fmt]) == "degraded"


@pytest.mark.parametrize("case", ["imatrix", "a few blocks", "noise", "other weights"])
def test_a_codebook_is_judged_by_what_no_imatrix_explains_and_says_so(case):
    """An imatrix passes as equivalent, never as rounded; damage fails; noise of 0.2 is another quantizer's at best."""
    rng = np.random.default_rng(12)
    x = rng.standard_normal((16, 1024)).astype(np.float32)
    source = (x.view(np.uint32) >> 16).astype(np.uint16)
    importance, fmt = np.exp(rng.standard_normal(1024)).astype(np.float32), refimpl.formats["iq2_xs"]
    plain = refimpl.quantize(source, fmt, np.ones(1024, np.float32))
    raw = refimpl.quantize(source, fmt, importance)
    if case == "a few blocks":
        raw[1:] = plain[1:]
    elif case == "noise":
        noise = widen(source) + rng.standard_normal(x.shape).astype(np.float32) * np.float32(0.2)
        raw = refimpl.quantize(noise, fmt, importance)
    elif case == "other weights":
        raw = raw[::-1].copy()
    tally = check_rows(raw, fmt, source, 0, None, "strict")
    tally.close()
    assert classify(tally, fmt) == ("equivalent" if case in ("imatrix", "noise") else "degraded")
    assert looks_foreign(tally, fmt) == (case == "other weights")
    tensor = Tensor("some.weight", fmt, x.shape, 0, raw.nbytes)
    if case in ("imatrix", "noise"):
        doubt = describe_doubt(tally, tensor, None)
        assert (doubt.code, doubt.severity) == ("codes-unchecked", "warning")
        assert ("another quantizer made them" in doubt.message) == (case == "noise")
        assert (tally.counts["off"] > 60) == (case == "noise") and tally.counts["off"] + tally.counts[
            "unruled"
        ] == 64
    else:
        codes = {f.code for f in describe_damage(tally, tensor, None)}
        assert codes == {{"a few blocks": "block-differs"}.get(case, "block-error")}
    assert classify(check_rows(plain, fmt, source, 0, None, "strict"), fmt) == "exact"


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
def test_the_error_bound_finds_a_wrong_scale_in_every_codebook(fmt):
    """d four times too large in one block; an imatrix of e^(2 gauss) with a column of 10,000 times passes."""
    rng = np.random.default_rng(15)
    source = (rng.standard_normal((4, 1024)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    importance = np.exp(2 * rng.standard_normal(1024)).astype(np.float32)
    importance[77] *= 1e4
    raw = refimpl.quantize(source, fmt, importance)
    tally = check_rows(raw, fmt, source, 0, None, "strict")
    tally.close()
    assert classify(tally, fmt) == "equivalent" and tally.counts["unruled"] == tally.differ
    block = raw.view(fmt.block)[1]
    if fmt.name == "iq1_m":
        block["scales"][3, 3] += 2 << 12  # the upper bits of d's exponent
    else:
        block["d"][3] *= 4
    tally = check_rows(raw, fmt, source, 0, None, "strict")
    tally.close()
    assert classify(tally, fmt) == "degraded" and [s.block for s in tally.suspects["error"]] == [7]


@pytest.mark.parametrize("case", ["other weights", "one code bit", "one scale of zero"])
@pytest.mark.parametrize("fmt", ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4", "tq1_0", "tq2_0", "q1_0", "q2_0"])
def test_damage_is_seen_in_every_small_format(fmt, case):
    """Must-fail controls: blocks of other weights look foreign, a flipped bit and a zeroed scale are damage."""
    rng, kind = np.random.default_rng(13), refimpl.formats[fmt]
    source = (rng.standard_normal((64, 2048)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    raw = refimpl.quantize(source, fmt)
    tally = check_rows(raw, kind, source, 0, None, "strict")
    assert classify(tally, kind) == "exact"
    if case == "other weights":
        raw = raw[::-1].copy()
    elif case == "one code bit":
        raw.view(kind.block)["qs"][9, 3, 2] ^= 4 if fmt == "tq1_0" else 1
    else:
        raw.view(kind.block)["e" if fmt == "mxfp4" else "d"][9, 3] = 0
    tally = check_rows(raw, kind, source, 0, None, "strict")
    tally.close()
    assert classify(tally, kind) == "degraded"
    assert looks_foreign(tally, kind) == (case == "other weights")


@pytest.mark.parametrize("fmt", ["iq4_nl", "iq4_xs"])
def test_an_imatrix_leaves_nearest_levels_and_a_bit_of_one_is_seen(fmt):
    rng, kind = np.random.default_rng(14), refimpl.formats[fmt]
    source = (rng.standard_normal((64, 2048)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    importance = np.exp(rng.standard_normal(2048)).astype(np.float32)
    raw = refimpl.quantize(widen(source), fmt, imatrix=importance)
    for flip, verdict in ((0, "rounded"), (1, "degraded")):
        raw.view(kind.block)["qs"][9, 3, 2] ^= flip
        tally = check_rows(raw, kind, source, 0, None, "strict")
        tally.close()
        assert classify(tally, kind) == verdict


@pytest.mark.parametrize("fmt", ["iq4_xs", "nvfp4"])
def test_a_file_with_small_formats_is_verified_and_explained(tmp_path, fmt):
    copy = Copy(STOCK)
    values = mutate.source_values(GOLDEN, UP)
    mutate.replace_values(copy[UP], values, refimpl.formats[fmt])
    path = copy.write(tmp_path / "model.gguf")
    assert {t.verdict for t in verify(path, GOLDEN).tensors if t.name == UP} == {"exact"}
    block = explain(path, UP, 3, GOLDEN)
    assert [f.stored for f in block.fields] == [f.expected for f in block.fields]
    copy[UP].block(3)["qs"][0, 5] ^= 1
    (bad,) = (t for t in verify(copy.write(path), GOLDEN).tensors if t.name == UP)
    assert bad.verdict == "degraded"
