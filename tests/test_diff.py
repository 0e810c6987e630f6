"""diff says what is the same, what is the same in another type, and what differs: how much and where."""

import importlib.resources
import json

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl import quants
from refimpl.cli.main import run
from refimpl.errors import BadFile
from refimpl.files import gguf
from refimpl.files.golden import tiny_model
from refimpl.quants.formats import formats
from refimpl.verifier.mutate import Copy
from refimpl.writers.convert import convert
from refimpl.writers.diff import diff
from refimpl.writers.quantize import quantize
from refimpl.writers.slice import slice_model
from tools import variants

GOLDEN = tiny_model()
STOCK, PROTECTED = GOLDEN / "stock.gguf", GOLDEN / "protected.gguf"
UP = "blk.1.ffn_up_exps.weight"


def by_name(found):
    return {p.name: p for p in found.pairs}


def test_a_file_is_the_same_as_itself():
    found = diff(STOCK, STOCK)
    assert found.same and found.counts() == {"same": 67}


def test_one_bit_of_one_block_is_found_and_measured(tmp_path):
    copy = Copy(STOCK)
    copy[UP].block(77, 5)["qs"][0, 100] ^= 1
    found = diff(STOCK, copy.write(tmp_path / "model.gguf"))
    assert not found.same and found.counts() == {"same": 66, "differs": 1}
    pair = by_name(found)[UP]
    assert (pair.blocks_differ, pair.weights_differ, pair.experts) == (1, 1, [5])
    row, column, a, b = pair.first
    assert pair.first == pair.worst and row == 5 * 256 + 77 and pair.max_abs == pytest.approx(abs(a - b))
    assert column == 192 + 100 % 32 and pair.rmse() == pytest.approx(abs(a - b) / np.sqrt(16 * 256 * 256))


def test_a_checkpoint_and_its_gguf_have_the_same_values(tmp_path):
    convert(GOLDEN, tmp_path / "bf16.gguf")
    for a, b in ((GOLDEN, tmp_path / "bf16.gguf"), (tmp_path / "bf16.gguf", GOLDEN / "model.safetensors")):
        found = diff(a, b)
        assert found.same and set(found.counts()) == {"same", "same-values"}
        assert by_name(found)["blk.1.attn_k_b.weight"].status == "same"
        assert by_name(found)["blk.1.attn_norm.weight"].types in (("bf16", "f32"), ("f32", "bf16"))
    convert(GOLDEN, tmp_path / "f32.gguf", "f32")
    found = diff(tmp_path / "bf16.gguf", tmp_path / "f32.gguf")
    assert set(found.counts()) == {"same", "same-values"} and not found.same  # two GGUFs of other types
    assert found.keys["differ"] == ["general.file_type", "refimpl.provenance"]


def test_quantization_error_is_measured_against_the_source(tmp_path):
    found = by_name(diff(GOLDEN, PROTECTED))
    pair = found[UP]
    assert pair.status == "differs" and pair.types == ("bf16", "q4_k") and len(pair.experts) == 16
    relative = pair.to_json()["rel_rmse"]
    assert 0.03 < relative < 0.15
    assert found["blk.0.attn_q_a.weight"].to_json()["rel_rmse"] < 0.02
    assert found["output_norm.weight"].status == "same-values"


def test_two_files_of_one_recipe_differ_by_blocks(tmp_path):
    found = by_name(diff(STOCK, GOLDEN / "imatrix-quantized.gguf"))
    pair = found[UP]
    assert pair.status == "differs" and 0 < pair.blocks_differ <= pair.blocks == 16 * 256
    assert found["output.weight"].status == "same"


def test_two_builds_of_one_recipe_differ_in_some_blocks_of_the_types_that_a_compiler_changes(tmp_path):
    a, b = tmp_path / "strict.gguf", tmp_path / "fma.gguf"
    for path, build in ((a, "strict"), (b, "gcc-fma")):
        quantize(GOLDEN, path, "q8_0", build=build, tensor_types=["ffn_up_exps=q4_k"])
    found = diff(a, b)
    assert not found.same and found.counts() == {"same": 65, "differs": 2}  # Q8_0 rounds alike in both
    assert found.keys == {"only_a": [], "only_b": [], "differ": ["refimpl.provenance"]}
    size = formats["q4_k"].block.itemsize
    with gguf.Gguf(a) as one, gguf.Gguf(b) as two:
        for pair in (p for p in found.pairs if p.status == "differs"):
            assert "ffn_up_exps" in pair.name and pair.types == ("q4_k", "q4_k")
            raw, other = (f.read(pair.name) for f in (one, two))
            blocks = (raw.reshape(-1, size) != other.reshape(-1, size)).any(axis=1)
            x, y = (quants.dequantize(r, "q4_k").astype(np.float64) for r in (raw, other))
            assert pair.blocks_differ == blocks.sum() and 0.02 < blocks.mean() < 0.15  # README: about 7 %
            assert pair.weights_differ == (x != y).sum() and pair.max_abs == np.abs(x - y).max()
            assert pair.rmse() == pytest.approx(np.sqrt(np.square(x - y).mean()), rel=1e-12)
            row, column = (int(i) for i in np.unravel_index(np.abs(x - y).argmax(), x.shape))
            assert pair.worst == (row, column, x[row, column], y[row, column])
            assert pair.experts == sorted({int(i) for i in np.argwhere(x != y)[:, 0] // 256})


def test_other_experts_and_layers_differ_in_shape_or_stand_alone(tmp_path):
    slice_model(STOCK, tmp_path / "small.gguf", "0:2", "0:8")
    found = diff(STOCK, tmp_path / "small.gguf")
    pairs = by_name(found)
    assert pairs[UP].status == "differs" and pairs[UP].shapes == ((16, 256, 256), (8, 256, 256))
    assert pairs["blk.2.attn_norm.weight"].status == "only-a"
    assert by_name(diff(tmp_path / "small.gguf", STOCK))["blk.2.attn_norm.weight"].status == "only-b"
    assert found.keys["only_b"] == ["refimpl.provenance"]
    assert by_name(diff(GOLDEN, tmp_path / "small.gguf"))[UP].status == "differs"


def test_nan_is_a_difference_and_no_number(tmp_path):
    source = variants.plain(GOLDEN.parent, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    w = weights["lm_head.weight"].astype(np.float32)
    w[3, 4] = np.nan
    weights["lm_head.weight"] = w.astype(ml_dtypes.bfloat16)
    save_file(weights, source / "model.safetensors")
    assert diff(source, source).same
    pair = by_name(diff(GOLDEN, source))["lm_head.weight"]
    document = pair.to_json()
    assert pair.weights_differ == 1 and document["rmse"] is None and document["max_abs"] is None
    assert document["worst"]["b"] is None and (pair.worst[0], pair.worst[1]) == (3, 4)


def test_types_that_are_not_decoded_are_compared_by_bytes(tmp_path):
    for name, value in (("a", 1), ("b", 2), ("c", 1)):
        save_file({"x": np.full((4, 4), value, np.int32)}, tmp_path / f"{name}.safetensors")
    assert diff(tmp_path / "a.safetensors", tmp_path / "c.safetensors").same
    [pair] = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").pairs
    assert (pair.status, pair.weights_differ, pair.rmse()) == ("differs", None, None)


def test_any_number_of_threads_says_the_same(monkeypatch):
    monkeypatch.setattr("refimpl.writers.diff.UNIT_WEIGHTS", 10_000)
    one, many = diff(GOLDEN, PROTECTED, jobs=1), diff(GOLDEN, PROTECTED, jobs=3)
    assert one.to_json() == many.to_json()


def test_a_broken_file_is_one_error(tmp_path):
    (tmp_path / "short.gguf").write_bytes(STOCK.read_bytes()[:300_000])
    with pytest.raises(BadFile):
        diff(STOCK, tmp_path / "short.gguf")


def test_the_command_prints_json_of_its_schema(tmp_path, capsys):
    schema = json.loads(importlib.resources.files("refimpl.report").joinpath("schemas/diff.json").read_text())
    quantize(GOLDEN, tmp_path / "out.gguf", "q8_0")
    slice_model(tmp_path / "out.gguf", tmp_path / "small.gguf", "0", "0:8")
    for a, b, code in ((STOCK, STOCK, 0), (STOCK, tmp_path / "small.gguf", 1), (GOLDEN, PROTECTED, 1)):
        assert run(["diff", str(a), str(b), "--json", "--quiet"]) == code
        document = json.loads(capsys.readouterr().out)
        jsonschema.Draft202012Validator(schema).validate(document)
        assert document["same"] is (code == 0)
    assert run(["diff", str(STOCK), str(PROTECTED), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "q4_k and q8_0" in out and "different   " in out
