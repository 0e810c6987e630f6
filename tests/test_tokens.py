"""Tokens as every command takes them, and files that come into being whole."""

import io

import numpy as np
import pytest

from refimpl.errors import BadFile, Usage
from refimpl.files.replace import replacing
from refimpl.files.tokens import read_tokens


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3), (3, 2)])
def test_an_array_is_one_sequence_or_several(tmp_path, dtype, shape):
    ids = np.arange(6, dtype=dtype).reshape(shape)
    np.save(tmp_path / "t.npy", ids)
    found = read_tokens(str(tmp_path / "t.npy"))
    assert found.dtype == np.int64 and np.array_equal(found, ids.reshape(-1, shape[-1]))


def test_a_list_is_one_sequence():
    assert read_tokens("3,1, 4").tolist() == [[3, 1, 4]]


@pytest.mark.parametrize("wrong", ["", "3,x", "3;4", "t.np", str(2**63)])
def test_no_list_is_said(wrong):
    with pytest.raises(Usage, match=r"neither a \.npy nor a list"):
        read_tokens(wrong)


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros((1, 2, 3), int), np.int64(3), np.array([True])])
def test_arrays_of_another_kind_are_refused(tmp_path, wrong):
    np.save(tmp_path / "t.npy", wrong)
    with pytest.raises(BadFile, match=r"integers \[T\] or \[N, T\]"):
        read_tokens(str(tmp_path / "t.npy"))


def archive():
    kept = io.BytesIO()
    np.savez(kept, a=np.arange(3))
    return kept.getvalue()


@pytest.mark.parametrize("raw", [None, b"", b"x", b"\x93NUMPY\x01\x00", archive()])
def test_what_is_no_array_is_one_clear_error(tmp_path, raw):
    if raw is not None:
        (tmp_path / "t.npy").write_bytes(raw)
    with pytest.raises(BadFile, match="no array of tokens"):
        read_tokens(str(tmp_path / "t.npy"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "x"
    place.write_bytes(b"old")

    def write(fail):
        with replacing(place) as temporary:
            with open(temporary, "wb") as file:
                file.write(b"new")
            assert place.read_bytes() == b"old" and fail in (True, False)
            if fail:
                raise KeyError

    with pytest.raises(KeyError):
        write(fail=True)
    assert place.read_bytes() == b"old" and list(tmp_path.iterdir()) == [place]
    write(fail=False)
    assert place.read_bytes() == b"new" and list(tmp_path.iterdir()) == [place]
    (tmp_path / "y").touch()
    assert place.stat().st_mode == (tmp_path / "y").stat().st_mode  # not mkstemp's private one
