"""The log of llama-eval-callback against our own trace: what it prints agrees, what is changed in it is found."""

import importlib.resources
import json
import re

import jsonschema
import numpy as np
import pytest

import refimpl
from refimpl.cli.main import run
from refimpl.crosscheck import printed
from refimpl.crosscheck.compare import compare
from refimpl.crosscheck.trace import Trace, read_trace, write_trace
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files.golden import tiny_model

TINY = tiny_model()
LOG = TINY.parent / "llama.cpp" / "eval-callback.log"  # of llama.cpp's own program: tools/make_llama_logs.py
IDS = [40, 77, 265]


@pytest.fixture(scope="module")
def ours():
    return Trace("ours", refimpl.load(TINY / "protected.gguf", engine="llama.cpp", kv="f32").trace(IDS))


def judge(ours, tmp_path, text):
    (tmp_path / "x.log").write_text(text)
    return compare(ours, read_trace(tmp_path / "x.log"))


def test_llama_cpp_s_own_log_agrees_with_our_trace(ours):
    found = compare(ours, read_trace(LOG))
    assert found.passed and not found.judged
    same = [row for row in found.rows if row.verdict == "same"]
    assert len(same) == 101 and {row.name for row in found.rows if row not in same} == {"indexer_weights_raw"}
    assert found.lacking == ["attn_out-0", "attn_out-1", "attn_out-2"]
    assert all(0 < row.printed[0] <= row.printed[1] == ours.values[row.key].size for row in same)
    assert sum(row.printed[0] for row in same) > 2000


EDITS = {
    "a value": (r"( q-1 = .*?\[ +)(-?\d+\.\d{4})", lambda x: f"{float(x) + 3e-4:.4f}", "q-1"),
    "a sum": (r"(kqv_out-0 = .*?sum = )(-?[\d.]+)", lambda x: f"{float(x) * 1.1 + 1:.6f}", "kqv_out-0"),
    "an expert": (r"(ffn_moe_topk-2 = .*?\[ +)([\d.]+)", lambda x: f"{(float(x) + 1) % 16:.4f}", "ffn_moe_topk-2"),
    "an expert that does not exist": (r"(ffn_moe_topk-1 = .*?\[ +)([\d.]+)", lambda x: "-1.0000", "ffn_moe_topk-1"),
    "not a number": (r"( l_out-1 = .*?\[ +)(-?\d+\.\d{4})", lambda x: "nan", "l_out-1"),
    "infinity": (r"(result_output = .*?\[ +)(-?\d+\.\d{4})", lambda x: "-inf", "result_output"),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_what_is_changed_in_a_log_is_found_there_alone(ours, tmp_path, what):
    pattern, change, place = EDITS[what]
    text, count = re.subn(pattern, lambda m: m[1] + change(m[2]), LOG.read_text(), count=1, flags=re.DOTALL)
    assert count == 1
    found = judge(ours, tmp_path, text)
    assert [row.key for row in found.rows if row.verdict == "differs"] == [place] and not found.passed


def test_a_key_that_was_not_selected_is_found(ours, tmp_path):
    """Three keys of three: where A looks at one less, the log's choice is not among A's."""
    fewer = ours.values["top_k-0"].copy()
    fewer[2, 0] = False
    found = compare(Trace("x", ours.values | {"top_k-0": fewer}), read_trace(LOG))
    assert found.first.key == "top_k-0" and found.first.deviation == 1 / 3


def test_an_engine_that_norms_otherwise_differs_from_there_on():
    model = refimpl.load(TINY / "protected.gguf", engine="llama.cpp", kv="f32", latent_eps=1e-3)
    found = compare(Trace("x", model.trace(IDS)), read_trace(LOG))
    assert found.first.key == "qr-0"


def test_values_that_are_not_printed_are_checked_by_their_sum(ours):
    """Not each of them: a fault that leaves the sum alone is beyond a log, and the counts say so."""
    other = ours.values["q-0"].copy()
    other[1, 200] += 1
    assert compare(Trace("x", ours.values | {"q-0": other}), read_trace(LOG)).first.key == "q-0"
    other[1, 201] -= 1
    assert compare(Trace("x", ours.values | {"q-0": other}), read_trace(LOG)).passed


def test_a_log_that_ends_within_a_record_is_read_as_far_as_it_goes(ours, tmp_path):
    text = LOG.read_text()
    cut = text.index("ffn_moe_swiglu-2 =") + 400
    found = judge(ours, tmp_path, text[:cut])
    assert found.passed and "ffn_moe_swiglu-2" in found.lacking and "ffn_moe_up-2" not in found.lacking


HEADER = "common_debug_cb_eval:   q-0 = (f32)  MUL_MAT(w{8, 2, 1, 1}, x{8, 3, 1, 1}}) = {%s, 1, 1}\n"


@pytest.mark.parametrize(
    "text, error",
    [("", BadFile), ("\x00\xff nonsense\n" * 9, BadFile), (HEADER % "8, 1" + "sum = 1.0\n", BadFile),
     (HEADER % "8, 2" + "    [ 1.0000, 2.0000 ],\n    sum = 1.0\n", BadFile),
     (HEADER % "999999999999999999, 999999999999999999" + "    [ 1.0000 ],\n    sum = 1.0\n", BadFile),
     (HEADER % "1, 1" + "    [ 1.0000 ]\n" * 200_000 + "    sum = 1.0\n", BadFile),
     ((HEADER % "1, 1").replace("q-0", "odd") + "    [ 1.0000 ],\n    sum = 1.0\n", Unsupported)],
)  # fmt: skip
def test_what_is_no_log_is_a_clear_error(tmp_path, text, error):
    (tmp_path / "x.log").write_text(text, encoding="latin-1")
    with pytest.raises(error, match=r"log|activation"):
        read_trace(tmp_path / "x.log")


@pytest.mark.parametrize("shape", ["999999999999999999, 999999999999999999", "0, 0", "5, 1", "8, 1"])
def test_sizes_that_do_not_fit_differ_and_nothing_is_allocated_for_them(ours, tmp_path, shape):
    lines = "".join(f"    [ {'1.0000, ' * 6} ],\n" for _ in range(6))
    lines = {"5, 1": "    [ 1.0, 1.0, 1.0, 1.0, 1.0 ],\n", "8, 1": f"    [ {'1.0000, ' * 6} ],\n"}.get(
        shape, lines
    )
    text = HEADER % shape + lines + "    sum = 1.0\n"
    if shape == "0, 0":
        with pytest.raises(BadFile, match="not 0"):
            judge(ours, tmp_path, text)
        return
    assert judge(ours, tmp_path, text).first.verdict == "differs"


def test_a_log_is_b_and_without_the_model(ours):
    log = read_trace(LOG)
    with pytest.raises(Usage, match="it can be B"):
        compare(log, ours)
    with pytest.raises(Usage, match="without --model"):
        compare(ours, log, refimpl.load(TINY / "protected.gguf"))


def test_compare_says_what_a_log_leaves_unchecked(ours, tmp_path, capsys):
    a = tmp_path / "a.safetensors"
    write_trace(a, ours.values, {})
    assert run(["compare", str(a), str(LOG)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"it prints 2,\d{3} of the 161,478 values of 101 activations", said)
    assert "no operation is replayed" in said and "not checked: attn_out-0" in said
    assert run(["compare", str(a), str(LOG), "--json"]) == 0
    schema = importlib.resources.files("refimpl.report").joinpath("schemas/compare.json").read_text()
    document = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(json.loads(schema)).validate(document)
    assert document["lacking"] and document["rows"][0]["printed"][1] == ours.values["inp_embd"].size
    assert run(["compare", str(LOG), str(a)]) == 2
    assert "it can be B" in capsys.readouterr().err


def test_the_last_place_is_what_decides():
    whole = np.array([[0.12341, 2.0]], np.float32)
    for value, verdict in ((0.1234, "same"), (0.1235, "same"), (0.1233, "differs")):
        found = printed.Printed((1, 1, 1, 2), np.array([value, 2.0]), None)
        assert printed.compare_values("q", whole, found)[0] == verdict
