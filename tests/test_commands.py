"""verify, explain, demo and selftest as a user meets them: exit codes, JSON against the schemas, safe text."""

import importlib.resources
import json
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from refimpl.cli.main import run
from refimpl.files.golden import tiny_model
from refimpl.verifier import controls, mutate
from refimpl.verifier.damage import UP
from refimpl.verifier.mutate import Copy

GOLDEN = tiny_model()
STOCK = str(GOLDEN / "stock.gguf")
SOURCE = ["--source", str(GOLDEN)]


def check_schema(name, text):
    schema = importlib.resources.files("refimpl.report").joinpath(f"schemas/{name}.json").read_text()
    document = json.loads(text)
    jsonschema.Draft202012Validator(json.loads(schema)).validate(document)
    return document


@pytest.fixture
def damaged(tmp_path):
    copy = Copy(GOLDEN / "stock.gguf")
    copy[UP].block(77, 5)["qs"][0, 100] ^= 1
    return str(copy.write(tmp_path / "damaged.gguf"))


def test_verify_exits_0_and_says_pass(capsys):
    assert run(["verify", STOCK, *SOURCE, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "PASS · exact · faithful to the source" in out and "67 tensors" in out


def test_verify_exits_1_with_the_damage_on_top(capsys, damaged):
    assert run(["verify", damaged, *SOURCE, "--quiet"]) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "1 finding that fails the run" in lines[0] and UP in lines[1]
    assert "expert 5, block 1,357" in lines[2] and f"explain {damaged} {UP} --block 1357" in " ".join(lines)
    assert "FAIL · degraded" in out


def test_verify_json_is_one_document_of_its_schema(capsys, damaged):
    assert run(["verify", damaged, *SOURCE, "--json"]) == 1
    document = check_schema("verify", capsys.readouterr().out)
    assert document["verdict"] == "degraded" and document["passed"] is False
    [finding] = [f for f in document["findings"] if f["severity"] != "note"]  # a note names the build
    assert (finding["tensor"], finding["expert"], finding["block"]) == (UP, 5, 1357)
    with open(damaged, "rb") as file:
        file.seek(finding["offset"])
        assert file.read(1)[0] != int(finding["message"].split("encoder writes 0x")[1][:2], 16)


def test_verify_json_says_errors_as_json(capsys, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert run(["verify", str(tmp_path / "bad.gguf"), *SOURCE, "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "bad-file" and error["file"].endswith("bad.gguf") and error["offset"] is not None


@pytest.mark.parametrize(
    "args, code",
    [
        (["verify", STOCK, "--source", "/no/such/place"], 3),
        (["verify", "/no/such.gguf", *SOURCE], 3),
        (["verify", str(GOLDEN), *SOURCE], 4),
        (["verify", STOCK], 2),
        (["verify", STOCK, *SOURCE, "--build", "icc"], 2),
        (["verify", STOCK, *SOURCE, "--memory", "lots"], 2),
        (["explain", STOCK, "no.such.tensor"], 2),
        (["explain", STOCK, UP, "--block", "99999999"], 2),
    ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(capsys, args, code):
    assert run(args) == code
    err = capsys.readouterr().err
    assert err.startswith("refimpl: ") and "Traceback" not in err and len(err.splitlines()) <= 2


def test_a_hostile_tensor_name_cannot_write_to_the_terminal(capsys, tmp_path):
    copy = Copy(GOLDEN / "stock.gguf")
    name = "blk.0.\x1b]0;owned\x07\x1b[2Jattn"
    copy.parts = {name if n == UP else n: part for n, part in copy.parts.items()}
    assert run(["verify", str(copy.write(tmp_path / "model.gguf")), *SOURCE, "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "owned" in out


def test_explain_shows_stored_and_expected_bytes(capsys, damaged):
    assert run(["explain", damaged, UP, "--block", "1357", *SOURCE]) == 0
    out = capsys.readouterr().out
    assert (
        "expert 5, row 77, columns 0 to 255" in out and "model.layers.1.mlp.experts.5.up_proj.weight" in out
    )
    assert "encoder: 116: " in out


@pytest.mark.parametrize(
    "name", [UP, "blk.1.attn_k_b.weight", "blk.2.ffn_down_exps.weight", "blk.1.attn_norm.weight"]
)
def test_explain_json_values_are_step_times_code_minus_offset(capsys, name):
    assert run(["explain", STOCK, name, "--block", "3", *SOURCE, "--json"]) == 0
    document = check_schema("explain", capsys.readouterr().out)
    codes = [(sub, code) for sub in document["subs"] for code in sub["codes"]]
    for value, (sub, code) in zip(document["values"], codes, strict=bool(codes)):
        assert value == pytest.approx(sub["step"] * code - sub["offset"], abs=1e-6)
    assert len(document["source"]) == len(document["values"])


def test_explain_maps_a_renumbered_expert_to_its_source(capsys, tmp_path):
    copy = Copy(GOLDEN / "stock.gguf")
    mutate.prune(copy, [7, 3, 11, 2])
    path = str(copy.write(tmp_path / "child.gguf"))
    assert run(["explain", path, UP, "--block", "256", *SOURCE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source_name"] == "model.layers.1.mlp.experts.3.up_proj.weight"


def test_explain_a_corrupt_block_is_still_json(capsys, tmp_path):
    copy = Copy(GOLDEN / "stock.gguf")
    copy[UP].block(0)["d"] = float("nan")
    assert run(["explain", str(copy.write(tmp_path / "model.gguf")), UP, *SOURCE, "--json"]) == 0
    assert check_schema("explain", capsys.readouterr().out)["values"][0] is None


@pytest.mark.parametrize("block", [0, 37, 255])
def test_explain_takes_the_index_that_verify_gives_a_value(capsys, block):
    assert run(["explain", STOCK, "blk.1.attn_norm.weight", "--block", str(block), *SOURCE, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["column"] == block // 32 * 32 and document["values"] == document["source"]


def test_explain_beside_a_source_with_nan_or_of_another_shape(capsys, tmp_path):
    source = mutate.copy_source(GOLDEN, tmp_path / "source")
    mutate.set_source_value(source, "model.layers.1.mlp.experts.0.up_proj.weight", 5, 0x7FC0)
    assert run(["explain", STOCK, UP, "--source", str(source), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["source"][5] is None and document["fields"][0]["expected"] is None
    copy = Copy(GOLDEN / "stock.gguf")
    copy[UP].shape, copy[UP].raw = (17, 256, 256), np.pad(copy[UP].raw, ((0, 256), (0, 0)))
    path = str(copy.write(tmp_path / "model.gguf"))
    assert run(["explain", path, UP, "--block", "4100", *SOURCE]) == 4
    assert "the source has one of shape [16, 256, 256]" in capsys.readouterr().err


def test_the_demo_tells_the_whole_story(capsys):
    assert run(["demo"]) == 0
    out = capsys.readouterr().out
    for word in ("67 of 67 tensors equal llama.cpp's bytes", "PASS · exact", "FAIL · degraded", UP):
        assert word in out


@pytest.fixture
def few_controls(monkeypatch):
    """Three of them: test_controls runs each, and CI the whole command."""
    assert len(controls.CONTROLS) >= 25
    monkeypatch.setattr(controls, "CONTROLS", dict(list(controls.CONTROLS.items())[:3]))


@pytest.mark.usefixtures("few_controls")
def test_selftest_exits_0_and_its_json_has_its_schema(capsys):
    assert run(["selftest", "--json"]) == 0
    document = check_schema("selftest", capsys.readouterr().out)
    assert document["passed"] and len(document["controls"]) == 3


@pytest.mark.usefixtures("few_controls")
def test_selftest_exits_1_when_the_verifier_is_broken(capsys, monkeypatch):
    from refimpl.verifier import verdict

    monkeypatch.setattr(verdict, "classify", lambda tally, fmt: "exact")
    assert run(["selftest", "--quiet"]) == 1
    assert "FAILED" in capsys.readouterr().out


PUBLIC = """
import refimpl, numpy as np
x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
for _ in range(2):
    raw = refimpl.quantize(x, "q4_k")
    assert refimpl.dequantize(raw, "q4_k").shape == x.shape
    assert refimpl.formats["q4_k"].block.itemsize == raw.shape[1]
    f = refimpl.open({model!r})
    assert f.read(next(iter(f.tensors)), rows=slice(0, 1)).shape[0] == 1
    assert refimpl.verify({model!r}, source={source!r}).passed
    y = refimpl.matmul(raw, "q4_k", x)
    assert y.shape == (2, 2) and (y == refimpl.matmul(raw, "q4_k", x, reference=True)).all()
    assert refimpl.load({model!r}).logits([1, 2]).shape[0] == 2
    assert refimpl.__version__
names = "__version__ dequantize formats load matmul open quantize verify"
assert set(refimpl.__all__) == set(names.split())
"""


def test_every_public_name_works_twice_in_a_new_process():
    code = PUBLIC.format(model=STOCK, source=str(GOLDEN))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
