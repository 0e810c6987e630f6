"""The fuzzer, for a few seconds: nothing but a RefimplError comes out of a mutated file."""

import numpy as np
import pytest

from tools import fuzz


def test_mutated_files_raise_nothing_else(tmp_path):
    assert "only RefimplError came out" in fuzz.run(4.0, seed=1, keep=tmp_path)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_the_valid_files_are_read_and_most_mutations_are_refused(tmp_path, kind):
    path, valid = fuzz.prepare(tmp_path)[kind]
    try:
        fuzz.KINDS[kind][1](path)
    except fuzz.RefimplError as error:
        assert any(
            word in str(error) for word in ("architecture", "model_type", "is missing")
        )  # hyperparameters
    changed = [fuzz.mutate(valid, np.random.default_rng(i)) for i in range(50)]
    assert sum(raw != valid for raw in changed) > 40
    assert fuzz.mutate(valid, np.random.default_rng(7)) == changed[7]


def test_the_fuzzer_notices_what_is_no_refimpl_error(tmp_path, monkeypatch):
    def broken(path):
        raise struct_error

    struct_error = IndexError("a bug")
    monkeypatch.setitem(fuzz.KINDS, "gguf", (fuzz.make_gguf, broken))
    with pytest.raises(SystemExit, match="a bug"):
        fuzz.run(1.0, seed=0, keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
