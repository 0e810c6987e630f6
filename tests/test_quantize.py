"""quantize writes llama-quantize's file: every mix whose types exist, with and without imatrix, byte for byte."""

import contextlib
import hashlib
import importlib.resources
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl import recipes
from refimpl.cli.main import run
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files import gguf, names
from refimpl.files import imatrix as imatrix_file
from refimpl.files import source as model_files
from refimpl.files.golden import tiny_model
from refimpl.quants.formats import formats
from refimpl.verifier.run import verify
from refimpl.writers import keys
from refimpl.writers.convert import convert
from refimpl.writers.quantize import Encoder, cut, quantize
from tools import check_mixes, synthetic, variants

GOLDEN = tiny_model()
IMATRIX = str(GOLDEN / "imatrix.gguf")
MADE = json.loads((GOLDEN.parent / "writers.json").read_text())
SLOW = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
PLAIN = {"provenance": False, "name": "tiny-glm-dsa"}
PROTECTION = (
    *("attn_=q8_0", "indexer=q8_0", "shexp=q8_0", r"ffn_(gate|up|down)\.weight=q8_0"),
    *(r"^token_embd\.weight$=q8_0", r"^output\.weight$=Q8_0"),
)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def types_of(mix, imatrix, eight=False):
    """The types of a mix on the tiny model, which say whether refimpl can write it."""
    config = json.loads((GOLDEN / "config.json").read_text()) | ({"n_routed_experts": 8} if eight else {})
    hp = names.Hparams.from_config(config)
    return set(
        recipes.load(mix).types(hp, {link.gguf: s for link, s in names.expected(hp)}, imatrix).values()
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The BF16 GGUF, the variant of 8 experts, and the imatrix under the name that llama-quantize was given."""
    folder = tmp_path_factory.mktemp("made")
    convert(GOLDEN, folder / "bf16.gguf", **PLAIN)
    variants.with_eight_experts(GOLDEN.parent, folder / "eight")
    variants.legacy_imatrix(GOLDEN.parent, folder / "legacy.dat")
    (folder / "imatrix.gguf").symlink_to(IMATRIX)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    """Work in that folder: llama-quantize records the imatrix by the name that it was given."""
    monkeypatch.chdir(made)
    return made


@pytest.mark.parametrize("kind", ["converter's", "refimpl's"])
@pytest.mark.parametrize(
    "variant", MADE["convert"], ids=lambda v: f"{v['variant']}-{v['outtype']}{v['flags']}"
)
def test_convert_writes_the_converters_file_for_every_variant(tmp_path, variant, kind):
    make = {"plain": variants.plain, "mtp": variants.with_mtp}[variant["variant"]]
    source = make(GOLDEN.parent, tmp_path / variant["variant"])
    options = {"mtp": "--no-mtp" not in variant["flags"], "provenance": kind == "refimpl's"}
    convert(source, tmp_path / "out.gguf", variant["outtype"], **options)
    assert (digest(tmp_path / "out.gguf") == variant["sha256"]) is (kind == "converter's")


@pytest.mark.parametrize("source", ["bf16.gguf", str(GOLDEN)])
@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("stock.gguf", {}),
        ("protected.gguf", {"recipe": "q4_k_m-protected"}),
        ("protected.gguf", {"tensor_types": PROTECTION}),
        ("imatrix-quantized.gguf", {"imatrix": "imatrix.gguf"}),
    ],
)
def test_the_golden_files_come_out_byte_for_byte(here, tmp_path, source, file, options):
    quantize(source, tmp_path / "out.gguf", **PLAIN, **options)
    assert (tmp_path / "out.gguf").read_bytes() == (GOLDEN / file).read_bytes()


@pytest.mark.parametrize(
    ("mix", "case"),
    [(mix, case) for mix in MADE["mixes"] for case in ("plain", "imatrix")]
    + [(mix, "eight") for mix in ("Q4_K_M", "Q3_K_L", "Q2_K", "IQ4_XS")],  # types of all: real models, below
)
def test_every_mix_is_llama_quantizes_file_byte_for_byte(here, tmp_path, mix, case):
    want = MADE["mixes"][mix][case]
    source = "eight" if case == "eight" else str(GOLDEN)
    imatrix = "imatrix.gguf" if case == "imatrix" else None
    out = tmp_path / "out.gguf"
    lacking = types_of(mix, imatrix is not None, case == "eight") - set(formats)
    if lacking:
        with pytest.raises(Unsupported, match="which refimpl does not write"):
            quantize(source, out, mix, imatrix, **PLAIN)
    elif want is None:
        with pytest.raises(Usage, match="needs importances"):
            quantize(source, out, mix, imatrix, **PLAIN)
    elif types_of(mix, imatrix is not None, case == "eight") & SLOW:
        check_some_tensors(mix, imatrix, case)
    else:
        quantize(source, out, mix, imatrix, **PLAIN)
        assert digest(out) == want["sha256"], differing(out, case)
        return
    assert not out.exists()


def check_some_tensors(mix, imatrix, case):
    """One small tensor of each type: the codebook types take minutes for all of the model."""
    plan = quantize(str(GOLDEN), None, mix, imatrix).plan
    if case == "eight":
        return  # its types are held against llama-quantize's with the real model's, its bytes are the others'
    assert " ".join(t.format.name for t in plan.tensors) == MADE["mixes"][mix][case]["types"]
    with model_files.open(GOLDEN) as model, contextlib.ExitStack() as stack:
        weighed = stack.enter_context(imatrix_file.read(imatrix)) if imatrix else None
        encoder = Encoder(model, names.hparams(model), weighed, "strict")
        for kind in {t.format.name for t in plan.tensors}:
            tensor = min((t for t in plan.tensors if t.format.name == kind), key=lambda t: t.weights)
            raw = b"".join(encoder.encode(piece.what).tobytes() for piece in cut(tensor, 0))
            want = MADE["tensors"][tensor.name][kind][case]
            assert hashlib.sha256(raw).hexdigest()[:32] == want, (tensor.name, kind)


def differing(path, case):
    """Tensors whose bytes are not llama-quantize's, by the digests of MADE."""
    wrong = []
    with gguf.Gguf(path) as f:
        for t in f.tensors.values():
            want = MADE["tensors"].get(t.name, {}).get(t.format.name, {}).get(case)
            got = hashlib.sha256(f.read(t.name).tobytes()).hexdigest()[:32]
            wrong += [] if want == got else [(t.name, t.format.name)]
    return wrong


@pytest.mark.parametrize("label", MADE["options"])
def test_options_give_llama_quantizes_file(here, tmp_path, label):
    *flags, mix = MADE["options"][label]["arguments"]
    pairs = list(zip(flags[::2], flags[1::2], strict=True))
    imatrix = next((value for flag, value in pairs if flag == "--imatrix"), None)
    types = [value for flag, value in pairs if flag == "--tensor-type"]
    if types_of(mix, imatrix is not None) <= set(formats):
        quantize("bf16.gguf", tmp_path / "out.gguf", mix, imatrix, tensor_types=types, provenance=False)
        assert digest(tmp_path / "out.gguf") == MADE["options"][label]["sha256"]
    else:
        with pytest.raises(Unsupported):
            quantize("bf16.gguf", tmp_path / "out.gguf", mix, imatrix, tensor_types=types)


@pytest.mark.parametrize("case", ["plain", "imatrix"])
@pytest.mark.parametrize("label", MADE["real"])
def test_every_mix_gives_the_real_models_tensors_the_types_of_llama_quantize(label, case):
    experts, mtp = int(label.split("-")[0]), label.endswith("mtp")
    config = variants.REAL | {"n_routed_experts": experts, "num_nextn_predict_layers": int(mtp)}
    hp = names.Hparams.from_config(config)
    tensors = {link.gguf: shape for link, shape in names.expected(hp)}
    for mix, cases in MADE["real"][label].items():
        types = recipes.load(mix).types(hp, tensors, case == "imatrix")
        assert dict(Counter(types.values())) == cases[case]["types"], mix
        lines = "".join(f"{name} {kind}\n" for name, kind in sorted(types.items()))
        assert hashlib.sha256(lines.encode()).hexdigest() == cases[case]["sha256"], mix


@pytest.mark.parametrize("jobs", [1, 3])
def test_any_number_of_threads_and_any_piece_size_write_the_same(here, tmp_path, monkeypatch, jobs):
    monkeypatch.setattr("refimpl.writers.quantize.PIECE_WEIGHTS", 5000)
    quantize("bf16.gguf", tmp_path / "out.gguf", imatrix="imatrix.gguf", jobs=jobs, **PLAIN)
    assert (tmp_path / "out.gguf").read_bytes() == (GOLDEN / "imatrix-quantized.gguf").read_bytes()


def test_verify_says_exact_of_what_quantize_writes(here, tmp_path):
    quantize(GOLDEN, tmp_path / "out.gguf", "q4_k_m-protected", "imatrix.gguf")
    report = verify(tmp_path / "out.gguf", GOLDEN, recipe="q4_k_m-protected", imatrix="imatrix.gguf")
    assert (report.verdict, report.passed) == ("exact", True)


def test_another_build_writes_its_own_bytes(here, tmp_path):
    quantize("bf16.gguf", tmp_path / "out.gguf", build="gcc-fma")
    report = verify(tmp_path / "out.gguf", GOLDEN, recipe="q4_k_m", build="gcc-fma")
    assert (report.verdict, report.passed) == ("exact", True)
    assert (tmp_path / "out.gguf").read_bytes() != (GOLDEN / "stock.gguf").read_bytes()
    with pytest.raises(Usage, match="unknown build"):
        quantize("bf16.gguf", tmp_path / "other.gguf", build="icc")


def test_memory_is_bounded_by_pieces_and_not_by_tensors(tmp_path):
    """A stacked tensor of 25 million weights needs 100 MB as float32; so much is not taken."""
    sizes = {"n_routed_experts": 8, "moe_intermediate_size": 512, "intermediate_size": 512}
    sizes |= {"num_attention_heads": 2, "q_lora_rank": 256, "vocab_size": 1280, "index_n_heads": 4}
    source = synthetic.make(tmp_path / "source", **sizes)
    assert sum(f.stat().st_size for f in source.glob("*.safetensors")) > 200_000_000
    code = PEAK.format(golden=str(GOLDEN), source=str(source), target=str(tmp_path / "out.gguf"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 70_000_000, done.stdout


def test_the_file_is_llama_quantizes_but_for_the_documented_key_and_one_wrong_bit_is_seen(here, tmp_path):
    quantize("bf16.gguf", tmp_path / "out.gguf")
    assert check_mixes.compare(tmp_path / "out.gguf", GOLDEN / "stock.gguf") == "same"
    assert check_mixes.control(tmp_path).startswith("bytes of blk.")
    assert check_mixes.compare(GOLDEN / "protected.gguf", GOLDEN / "stock.gguf").startswith("table: ")
    convert(GOLDEN, tmp_path / "other.gguf", name="other")
    quantize(tmp_path / "other.gguf", tmp_path / "third.gguf")
    assert check_mixes.compare(tmp_path / "third.gguf", GOLDEN / "stock.gguf") == "keys"


def test_provenance_keeps_what_came_before(tmp_path):
    convert(GOLDEN, tmp_path / "bf16.gguf")
    quantize(tmp_path / "bf16.gguf", tmp_path / "out.gguf", tensor_types=["attn_=q8_0"])
    with gguf.Gguf(tmp_path / "out.gguf") as f:
        assert list(f.metadata)[-1] == keys.PROVENANCE
        said = json.loads(f.metadata[keys.PROVENANCE])
    assert (said["command"], said["recipe"], said["tensor_types"]) == ("quantize", "q4_k_m", ["attn_=q8_0"])
    assert said["before"]["command"] == "convert"


def test_the_imatrix_is_judged_before_it_is_used(here, tmp_path):
    done = quantize("bf16.gguf", None, imatrix="imatrix.gguf")
    assert [(n.kind, n.tensor) for n in done.plan.notes if n.kind == "lacking"] == [
        ("lacking", "output.weight"),
        ("lacking", "token_embd.weight"),
    ]
    broken = bytearray((here / "legacy.dat").read_bytes())
    name = b"blk.0.attn_k_b.weight"
    at = broken.index(name) + len(name) + 8 + 4 * 5  # behind calls and count
    broken[at : at + 4] = np.float32("nan").tobytes()
    (tmp_path / "nan.dat").write_bytes(broken)
    with pytest.raises(BadFile, match="NaN or Inf"):
        quantize("bf16.gguf", tmp_path / "out.gguf", imatrix=tmp_path / "nan.dat")
    assert not (tmp_path / "out.gguf").exists()


def test_a_source_that_is_not_finite_is_refused_and_named(tmp_path):
    source = variants.plain(GOLDEN.parent, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    w = weights["model.layers.1.mlp.experts.3.up_proj.weight"].astype(np.float32)
    w[7, 9] = np.nan
    weights["model.layers.1.mlp.experts.3.up_proj.weight"] = w.astype(ml_dtypes.bfloat16)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(BadFile, match=r"blk\.1\.ffn_up_exps\.weight.*row 775, column 9 is NaN or infinite"):
        quantize(source, tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_what_is_quantized_already_is_not_quantized_again(tmp_path):
    with pytest.raises(Unsupported, match="only f32, f16 and bf16 are quantized"):
        quantize(GOLDEN / "stock.gguf", tmp_path / "out.gguf", "q8_0")
    quantize(GOLDEN / "stock.gguf", tmp_path / "out.gguf", "q4_k_m", provenance=False)
    assert (tmp_path / "out.gguf").read_bytes() == (GOLDEN / "stock.gguf").read_bytes()


def test_a_fallback_can_be_refused(tmp_path):
    with pytest.raises(Usage, match=r"attn_k_b\.weight and 2 more would fall back from q4_k to q5_0"):
        quantize(GOLDEN, tmp_path / "out.gguf", fallback=False)
    quantize(GOLDEN, tmp_path / "out.gguf", tensor_types=["attn_k_b=q5_0"], fallback=False, **PLAIN)
    assert (tmp_path / "out.gguf").read_bytes() == (GOLDEN / "stock.gguf").read_bytes()
    assert run(["quantize", str(GOLDEN), "--recipe", "q4_k_m", "--dry-run", "--no-fallback"]) == 2


@pytest.mark.parametrize("option", ["attn", "=q8_0", "attn=", "attn=q9_9", "(=q8_0"])
def test_a_malformed_tensor_type_is_a_usage_error(tmp_path, option):
    with pytest.raises(Usage, match="--tensor-type"):
        quantize(GOLDEN, tmp_path / "out.gguf", tensor_types=[option])


def test_an_output_never_overwrites_its_inputs(tmp_path):
    (tmp_path / "stock.gguf").write_bytes((GOLDEN / "stock.gguf").read_bytes())
    (tmp_path / "imatrix.gguf").write_bytes((GOLDEN / "imatrix.gguf").read_bytes())
    for target in ("stock.gguf", "imatrix.gguf"):
        with pytest.raises(Usage, match="never overwrites its input"):
            quantize(
                tmp_path / "stock.gguf", tmp_path / target, imatrix=tmp_path / "imatrix.gguf", force=True
            )
    assert digest(tmp_path / "stock.gguf") == digest(GOLDEN / "stock.gguf")


PEAK = """
import resource
from refimpl.writers.quantize import quantize
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize({golden!r}, {target!r}, "q4_k_m-protected", jobs=2)  # compiles
before = peak()
quantize({source!r}, {target!r}, "q4_k_m-protected", force=True, jobs=2)
print(peak() - before)
"""

KILLED = """
import sys
from refimpl.writers import output, quantize
output.JOURNAL_SECONDS, quantize.PIECE_WEIGHTS = 0, 20000
encode, count = quantize.Encoder.encode, 0
def stop(self, rows):
    global count
    count += 1
    if count == 100:
        print("half", flush=True)
        sys.stdin.read()
    return encode(self, rows)
quantize.Encoder.encode = stop
quantize.quantize(sys.argv[1], sys.argv[2], provenance=False, name="tiny-glm-dsa", jobs=1)
"""


def test_a_killed_run_leaves_no_file_and_resume_finishes_it(tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    args = [sys.executable, "-c", KILLED, str(GOLDEN), str(out)]
    child = subprocess.Popen(args, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    with child.stdout, child.stdin:
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists() and (tmp_path / ".out.gguf.partial").exists()
    monkeypatch.setattr("refimpl.writers.quantize.PIECE_WEIGHTS", 20000)
    with pytest.raises(Usage, match="of another job"):
        quantize(GOLDEN, out, "q8_0", resume=True, **PLAIN)
    done = quantize(GOLDEN, out, resume=True, **PLAIN)
    assert done.done == 99
    assert out.read_bytes() == (GOLDEN / "stock.gguf").read_bytes() and os.listdir(tmp_path) == ["out.gguf"]


def test_the_command_prints_json_of_its_schema(tmp_path, capsys):
    schema = json.loads(
        importlib.resources.files("refimpl.report").joinpath("schemas/quantize.json").read_text()
    )
    args = ["quantize", str(GOLDEN), "--recipe", "q4_k_m", "--imatrix", IMATRIX, "--json", "--quiet"]
    assert run([*args, "--dry-run"]) == 0
    priced = json.loads(capsys.readouterr().out)
    assert run([*args, str(tmp_path / "out.gguf")]) == 0
    written = json.loads(capsys.readouterr().out)
    for document in (priced, written):
        jsonschema.Draft202012Validator(schema).validate(document)
    assert priced["file"] is None and priced | {"file": written["file"]} == written
    assert written["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert sum(row["bytes"] for row in written["classes"]) < written["bytes"]
    assert [f["type"] for f in written["fallbacks"]] == ["q5_0"] * 3
    assert run([*args]) == 2 and run(["quantize", str(GOLDEN), str(tmp_path / "x"), "--json"]) == 2


def test_the_terminal_shows_price_and_fallbacks(capsys):
    assert run(["quantize", str(GOLDEN), "--recipe", "q4_k_m", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "routed" in out and "q5_0 instead of q4_k, for rows of 192 weights" in out and "would be" in out
