"""Two tools can write the manifest without losing what the other wrote."""

import tomllib
from pathlib import Path

import pytest

from tools import manifest


def test_an_update_replaces_its_own_table_only(tmp_path: Path) -> None:
    manifest.update(tmp_path, "vectors", {"q4_k": {"file": "vectors/q4_k.npz", "sha256": "00"}})
    manifest.update(tmp_path, "tiny", {"oracle": "x", "stock": {"file": "tiny/stock.gguf", "sha256": "11"}})
    manifest.update(tmp_path, "vectors", {"q6_k": {"file": "vectors/q6_k.npz", "sha256": "22"}})
    read = manifest.read(tmp_path)
    assert read["tiny"]["oracle"] == "x"
    assert [f["file"] for f in manifest.files(read)] == ["tiny/stock.gguf", "vectors/q6_k.npz"]


def test_awkward_names_and_values_survive(tmp_path: Path) -> None:
    table = {
        "a.b c": {"s": 'quote " back \\ \n\x7f é', "n": -3, "f": 1.5, "t": True, "l": ["x", 2]},
        "empty": {},
    }
    manifest.update(tmp_path, "odd", table)
    assert tomllib.loads((tmp_path / manifest.NAME).read_text(encoding="utf-8")) == {"odd": table}


def test_a_value_that_toml_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        manifest.update(tmp_path, "odd", {"n": None})
    assert not (tmp_path / manifest.NAME).exists()


def test_an_entry_states_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    entry = manifest.describe(tmp_path, "a.bin", oracle="hand")
    assert entry["bytes"] == 3 and entry["oracle"] == "hand"
    assert entry["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
