"""The disk cache of compiled kernels: never stale, found where something is writable, and said aloud."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl.arith import jit

PACKAGE = Path(jit.__file__).parent.parent
ROUND = """
import numpy as np
from refimpl.quants import q8_0_jit
out = np.zeros((1, 34), np.uint8)
q8_0_jit.quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None], np.empty((0, 32), np.float32), 1, out)
print(out.tobytes().hex())
"""


def run_in(root: Path) -> str:
    """Encode one block with the package copied to `root`, in a new process with a warm or cold cache."""
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", ROUND], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "refimpl", ignore=shutil.ignore_patterns("__pycache__", "golden"))
    return tmp_path


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="interpreted kernels have no cache")
def test_an_edit_in_arith_is_seen_by_kernels_whose_own_file_did_not_change(copied):
    before = run_in(copied)
    assert run_in(copied) == before
    assert list((copied / "refimpl" / "__pycache__").glob("numba-*/**/q8_0_jit.*.nbi"))
    bits = copied / "refimpl" / "arith" / "bits_jit.py"
    text = bits.read_text()
    assert "ONE if x > ZERO else -ONE" in text  # rounds halves away from zero; now everything a step further
    bits.write_text(text.replace("if abs(x - whole) >= HALF:", "if abs(x - whole) >= ZERO:"))
    assert run_in(copied) != before


def test_the_cache_key_of_a_module_knows_all_that_it_imports_and_nothing_else():
    closure, waiting = set(), [PACKAGE / "quants" / "q8_0_jit.py"]
    while waiting:
        closure.add(waiting[-1])
        waiting += jit.imported(waiting.pop()) - closure
    names = {path.relative_to(PACKAGE).as_posix() for path in closure}
    assert {"quants/q8_0_jit.py", "arith/bits_jit.py", "arith/jit.py", "quants/formats.py"} <= names
    assert not {"quants/q4_k_jit.py", "cli/main.py", "quants/__init__.py"} & names


def test_somebody_elses_directory_in_the_temp_dir_is_not_trusted(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no directory can be made below a file")
    monkeypatch.setattr(jit, "PACKAGE", tmp_path / "file")
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    private = tmp_path / f"refimpl-{os.getuid()}"
    assert jit.cache_root() == private
    private.chmod(0o777)  # anybody could have put a pickle there
    assert jit.cache_root() is None


def test_a_read_only_package_is_cached_elsewhere(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no directory can be made below a file")
    monkeypatch.setattr(jit, "PACKAGE", tmp_path / "file")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert jit.cache_root() == tmp_path / "home" / ".cache" / "refimpl"


def test_the_users_own_cache_directory_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert jit.cache_root() == tmp_path


def test_where_nothing_is_writable_there_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(jit, "PACKAGE", tmp_path / "file")
    monkeypatch.setattr(jit.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert jit.cache_root() is None


def test_compiling_is_announced_with_its_place_and_only_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jit, "CACHE_ROOT", tmp_path)
    jit.announce_compiling()
    assert str(tmp_path) in capsys.readouterr().err
    (tmp_path / "numba-of-another-version").mkdir()
    (tmp_path / "numba-of-another-version" / "kernel.nbi").write_text("")
    jit.announce_compiling()
    assert str(tmp_path) in capsys.readouterr().err
    mine = jit.cache_dir(PACKAGE / "quants" / "q8_0_simd.py")
    mine.mkdir()
    (mine / "kernel.nbi").write_text("")
    jit.announce_compiling()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(jit, "CACHE_ROOT", None)
    jit.announce_compiling()
    assert "compile again" in capsys.readouterr().err
