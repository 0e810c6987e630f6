"""Errors quote what strangers wrote, and never act on it."""

import pytest
from test_hostile_gguf import DATA, gguf, tensor

import refimpl
from refimpl.errors import BadFile, Unsupported, Usage, printable

NASTY = "a\x1b[2J\r\n\x9b31m\u202egnp\u2028\ud800 é 漢"


@pytest.mark.parametrize(
    "make", [Unsupported, Usage, lambda text: BadFile(text, 1, text), lambda t: BadFile(t, None, t)]
)
def test_a_message_holds_nothing_that_a_terminal_acts_on(make):
    message = str(make(NASTY))
    assert message.isprintable()
    assert "\\x1b[2J\\r\\n\\x9b31m\\u202egnp\\u2028\\ud800 é 漢" in message


def test_a_long_message_is_cut_in_the_middle():
    assert printable("a" * 70_000 + "b") == "a" * 500 + "…" + "a" * 499 + "b"
    assert printable("a" * 1000) == "a" * 1000


def test_a_tensor_with_a_nasty_name_is_named_safely(tmp_path):
    name = b"\x1b]0;x\x07"
    (tmp_path / "a.gguf").write_bytes(gguf([], [tensor(name, dims=(64,))], DATA))
    with refimpl.open(tmp_path / "a.gguf") as f:
        assert list(f.tensors) == [name.decode()]
        assert f.defects[0].tensor == name.decode()
        assert f.defects[0].defect.startswith("\\x1b]0;x\\x07: ")
        with pytest.raises(BadFile) as caught:
            f.read(name.decode())
        assert str(caught.value).isprintable()
