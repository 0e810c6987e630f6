"""`refimpl native` on a library of ours: sound, it passes; with each classic mistake, it is caught and named."""

import importlib.resources
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from refimpl.cli.main import run
from refimpl.crosscheck.native import Judgement, Report, judge

SOURCE = Path(__file__).with_name("classic_mistakes.c")
Q4, Q5, Q6 = "dequantize_row_q4_K", "dequantize_row_q5_0", "dequantize_row_q6_K"
Q8, ROW = "dequantize_row_q8_0", "quantize_row_q8_0_ref"

DOT4, DOT6, DOT8 = (f"ggml_vec_dot_{pair}" for pair in ("q4_K_q8_K", "q6_K_q8_K", "q8_0_q8_0"))

# name in the C file and where it is looked for: function, verdict, what the report must say about it
MISTAKES = {
    "NIBBLES in a dot product": (DOT4, "wrong", "the nibbles are in the wrong order"),
    "MIN_SIGN in a dot product": (DOT4, "wrong", "the min is added, not subtracted (its sign)"),
    "NO_BSUMS": (DOT4, "wrong", "the mins are left out (bsums forgotten)"),
    "NO_BSUMS of an offset": (DOT6, "wrong", "the offset of the codes is left out (bsums forgotten)"),
    "SKIP_LAST in a dot product": (DOT4, "wrong", "the last block is skipped"),
    "SIX_BITS in a dot product": (DOT4, "wrong", "sub-blocks 4 to 7: the upper two bits are left out"),
    "SHORT_SUM": (DOT8, "wrong", "products are wrong"),
    "TRUNCATED": ("quantize_row_q8_0", "wrong", "blocks differ"),
    "NIBBLES": (Q4, "wrong", "the nibbles are in the wrong order"),
    "UNSIGNED_SCALE": (Q6, "wrong", "signed scales are read as unsigned"),
    "MIN_SIGN": (Q4, "wrong", "the min is added, not subtracted (its sign)"),
    "SKIP_LAST": (Q4, "wrong", "the last block is skipped"),
    "SIX_BITS": (Q4, "wrong", "6-bit scales of sub-blocks 4 to 7: the upper two bits are left out"),
    "SIX_BITS_ODD": (Q4, "wrong", "6-bit scales of sub-blocks 4 to 7 are unpacked wrongly"),
    "CRASH": (Q4, "crashed", "crashes: SIGSEGV"),
    "HANG": (Q4, "crashed", "hangs: no answer within 0.5 s"),
    "SPILL": (Q4, "wrong", "writes past the end of its output: 12 bytes"),
    "SPILL_BEFORE": (Q4, "wrong", "writes 4 bytes before its output"),
    "WRITE_INPUT": (Q4, "wrong", "writes into its input"),
    "UNSIGNED_CODE": (Q8, "wrong", "signed codes are read as unsigned"),
    "HIGH_BITS": (Q5, "wrong", "the high bits of the codes are left out"),
    "ROUNDING": (ROW, "wrong", "blocks differ"),
    "SIZE": ("quantize_q8_0", "wrong", "returns 33, not the 34 bytes written"),
    "TABLE_OF_128": (Q4, "wrong", "of 257 blocks differ"),
}


def build(folder: Path, mistake: str = "NONE") -> Path:
    """Compile the library; without a C compiler the tests fail, for they would show nothing."""
    assert shutil.which("gcc"), "these tests compile a library: they need gcc"
    path = folder / f"lib{mistake.lower()}.so"
    options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", f"-DMISTAKE={mistake}"]
    subprocess.run(["gcc", *options, str(SOURCE), "-o", str(path), "-lm"], check=True)
    return path


def find(report: Report, symbol: str) -> Judgement:
    return next(j for j in report.judgements if j.symbol == symbol)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sound"))


def test_a_sound_library_passes_and_what_it_lacks_is_absent(sound: Path, tmp_path: Path) -> None:
    report = judge(str(sound), tmp_path / "reproducers", blocks=2000)
    assert report.passed and not (tmp_path / "reproducers").exists()
    same = {j.symbol for j in report.judgements if j.verdict == "same bits"}
    assert {Q4, Q5, Q6, Q8, ROW, "quantize_q8_0"} <= same
    bounded = {j.symbol: j.ratio for j in report.judgements if j.verdict == "inside the bound"}
    assert set(bounded) == {
        DOT4,
        DOT6,
        DOT8,
        "quantize_row_q8_0",
    }  # other orders, another rounding: all sound
    assert all(ratio is not None and 0 < ratio < 1 for ratio in bounded.values())
    assert find(report, ROW).against == "strict" and find(report, Q4).weights > 2000 * 256
    absent = find(report, "quantize_q4_K")
    assert (absent.verdict, absent.cases) == ("absent", 0)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_classic_mistake_is_caught_named_and_shown(mistake: str, tmp_path: Path) -> None:
    symbol, verdict, said = MISTAKES[mistake]
    library = build(tmp_path, mistake.split()[0])
    report = judge(
        str(library), tmp_path / "out", blocks=300, limit=0.5 if mistake == "HANG" else 60, only=symbol
    )
    judgement = find(report, symbol)
    assert not report.passed and judgement.verdict == verdict
    assert said in f"{judgement.problem} {judgement.mistake}"
    if mistake == "TABLE_OF_128":
        assert judgement.smallest and judgement.smallest.startswith("129 blocks")
    elif verdict == "wrong":
        assert judgement.smallest and judgement.smallest.startswith("1 block, ")
    reproduce(judgement, library, tmp_path, verdict)


def reproduce(judgement: Judgement, library: Path, folder: Path, verdict: str) -> None:
    """The saved program fails on this library, without refimpl, and passes on a sound one."""
    program = [sys.executable, "-I", "-S", str(judgement.reproducer)]
    if "hangs" in str(judgement.problem):
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(program, timeout=1, check=False)
    else:
        done = subprocess.run(program, capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == (1 if verdict == "wrong" else -11), done.stderr
    done = subprocess.run([*program, str(build(folder))], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1][:5]) == (0, "0 of "), done.stdout + done.stderr


def test_other_functions_of_a_wrong_library_keep_their_verdict(tmp_path: Path) -> None:
    report = judge(str(build(tmp_path, "CRASH")), tmp_path / "out", blocks=300, only="dequantize_row_q")
    assert {j.symbol: j.verdict for j in report.judgements if j.verdict != "absent"} == {
        Q4: "crashed",
        Q5: "same bits",
        Q6: "same bits",
        Q8: "same bits",
    }


def test_the_json_is_of_its_schema_and_the_exit_code_tells(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = json.loads(
        importlib.resources.files("refimpl.report").joinpath("schemas/native.json").read_text()
    )
    common = ["--only", Q8, "--blocks", "100", "--reproducers", str(tmp_path / "out"), "--quiet"]
    for library, code in ((sound, 0), (build(tmp_path, "UNSIGNED_CODE"), 1)):
        assert run(["native", str(library), *common, "--json"]) == code
        document = json.loads(capsys.readouterr().out)
        jsonschema.Draft202012Validator(schema).validate(document)
        assert document["passed"] is (code == 0)
        assert run(["native", str(library), *common]) == code
        out = capsys.readouterr().out
        assert ("PASS" if code == 0 else "FAIL") in out and Q8 in out
    assert "likely    signed codes are read as unsigned" in out and str(tmp_path / "out") in out


def test_what_is_no_library_of_ggml_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library")
    other = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(other)], check=True)
    for target, code, said in (
        (str(text), 3, "cannot be loaded"),
        (str(tmp_path / "missing.so"), 3, "no such file"),
        (str(tmp_path), 2, "is a directory"),
        ("no_such_package_here", 2, "neither a file nor an installed package"),
        ("json", 2, "carries no shared library"),
        (str(other), 4, "exports no function of ggml's"),
    ):
        assert run(["native", target, "--quiet"]) == code
        out, err = capsys.readouterr()
        assert out == "" and said in err and "Traceback" not in err


# What the wheel does not export: most codebook types have no encoder of single rows, Q2_0 no generic product.
ABSENT = {f"quantize_row_{name}" for name in ("iq1_m", "iq1_m_ref", "iq2_s", "iq3_xxs", "iq3_s")}
ABSENT.add("ggml_vec_dot_q2_0_q8_0_generic")


# Of the encoders of tensors three: test_quants_native and test_grids_native compare them all, on more weights.
@pytest.mark.parametrize(
    "only",
    [
        "dequantize_row_",
        "ggml_vec_dot_",
        "quantize_row_q8_",
        "quantize_row_iq",
        "quantize_q4_K",
        "quantize_q8_0",
        "quantize_iq2_xxs",
    ],
)
def test_the_functions_of_the_wheel_are_there_and_right(only: str, tmp_path: Path) -> None:
    report = judge("xllamacpp", tmp_path / "reproducers", blocks=500, only=only)
    wrong = {j.symbol: (j.verdict, j.problem, j.case) for j in report.judgements if j.problem is not None}
    assert report.passed and not wrong, wrong
    assert {j.symbol for j in report.judgements if j.verdict == "absent"} <= ABSENT
    assert all(j.cases >= 6 and j.weights >= 1000 for j in report.judgements if j.verdict != "absent")
