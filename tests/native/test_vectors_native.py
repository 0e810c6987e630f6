"""The conformance vectors hold for ggml itself, and runners in C and Rust see what is wrong."""

import shutil
import subprocess
from pathlib import Path

import pytest

from refimpl.quants.formats import CODEBOOKS
from tests.native.test_library import build
from tools import ggml
from tools.make_conformance import run_vectors

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS, GOLDEN = ROOT / "tools", ROOT / "golden" / "conformance"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden edition without the encoders of codebook types.

    ggml takes 10 s to build their tables; tools.make_conformance ran them, and test_grids_native does on more.
    """
    folder = tmp_path_factory.mktemp("vectors")
    for path in GOLDEN.iterdir():
        (folder / path.name).symlink_to(path)
    lines = (GOLDEN / "index.tsv").read_text().splitlines(keepends=True)
    (folder / "index.tsv").unlink()
    slow = tuple(f"encode/{fmt.name}/" for fmt in CODEBOOKS)
    (folder / "index.tsv").write_text("".join(line for line in lines if not line.startswith(slow)))
    return folder


def count_cases(folder: Path, *texts: str) -> int:
    """Of these texts, where the wheel exports the function: it has no generic product of Q2_0."""
    lines = [line.split("\t") for line in (folder / "index.tsv").read_text().splitlines()[1:]]
    absent = {line[5] for line in lines if not hasattr(ggml.LIBRARY, line[5])}
    assert absent <= {"ggml_vec_dot_q2_0_q8_0_generic", "-"}
    return sum(line[4] in ("any", *texts) and line[5] not in absent for line in lines)


def test_ggml_passes_every_case_that_it_has_a_function_for(vectors: Path, tmp_path: Path) -> None:
    status, said = run_vectors(tmp_path / "runner.so", ggml.LIBRARY._name, vectors)
    wanted = count_cases(vectors, "strict", "reference", "generic-fma", "avx2")
    assert status == 0 and said.startswith(f"{wanted} passed, 0 failed, "), said
    assert wanted > 100


def test_a_text_that_the_library_does_not_have_is_seen(vectors: Path, tmp_path: Path) -> None:
    """The wheel's generic products are fused: against the unfused text they must fail."""
    status, said = run_vectors(tmp_path / "runner.so", ggml.LIBRARY._name, vectors, "generic")
    assert status == 1 and "differs: dot/q4_k/" in said


@pytest.mark.parametrize(
    ("mistake", "status", "said"),
    [
        ("NONE", 0, " passed, 0 failed, "),
        ("NIBBLES", 1, "differs: decode/q4_k/one-block/any"),
        ("ROUNDING", 1, "differs: encode/q8_0/24-kinds/strict"),
    ],
)
def test_the_c_runner_sees_a_classic_mistake(
    vectors: Path, tmp_path: Path, mistake: str, status: int, said: str
) -> None:
    got = run_vectors(tmp_path / "runner.so", str(build(tmp_path, mistake)), vectors, "strict")
    assert got[0] == status and said in got[1], got


def test_the_rust_runner_decodes_and_sees_a_wrong_bit(vectors: Path, tmp_path: Path) -> None:
    assert shutil.which("rustc"), "this test compiles tools/run_vectors.rs: it needs rustc"
    program = tmp_path / "runner"
    options = ["--edition", "2021", "-O", "-D", "warnings"]
    subprocess.run(["rustc", *options, "-o", str(program), str(TOOLS / "run_vectors.rs")], check=True)
    done = subprocess.run([program, vectors], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "8 passed, 0 failed\n"), done.stderr
    copy = shutil.copytree(vectors, tmp_path / "copy")
    line = next(x for x in (copy / "index.tsv").read_text().splitlines() if x.startswith("decode/q4_k/257"))
    file, offset = line.split("\t")[15:17]
    data = bytearray((copy / file).read_bytes())
    data[int(offset) + 5] ^= 1
    (copy / file).write_bytes(data)
    done = subprocess.run([program, copy], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "differs: decode/q4_k/257-blocks/any\n7 passed, 1 failed\n")
    (copy / "index.tsv").write_text("#nothing\n")
    assert subprocess.run([program, copy], capture_output=True).returncode == 2
