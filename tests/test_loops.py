"""The repetition detector: what loops, and what only looks like it."""

import io
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refimpl.report
from refimpl.cli.main import run
from refimpl.reap.loops import LEAST_SPAN, LONGEST_PERIOD, UNITS, find_loop

TINY = Path(__file__).resolve().parent.parent / "golden" / "tiny-glm-dsa"
PROSE = "In the beginning God created the heaven and the earth. And the earth was without form, and void. "
TABLE = "| step | loss |\n|---:|---:|\n" + "".join(f"| {i} | {4 / i:.3f} |\n" for i in range(1, 60))
ZEROS = (
    "int table[64] = {\n"
    + "    0, 0, 0, 0, 0, 0, 0, 0,\n" * 30
    + "};\nint main(void) { return table[0]; }\n"
    + PROSE * 4
)
REFRAIN = "".join(f"{PROSE[i : i + 60]}\nand the mome raths outgrabe.\n\n" for i in range(40))
RULES = PROSE + "\n" + "-" * 600
BLANK = PROSE + "\n" * 600
CODE = "".join(f"        elif kind == {i}:\n            return handle_{i}(value)\n" for i in range(60))


@pytest.mark.parametrize(
    ("text", "period"),
    [
        (PROSE + "and the " * 40, 8),
        (PROSE * 3 + "a" * 130, 1),
        (PROSE + "The answer is that the answer is not known. " * 9, 44),
        ("x" * 600 + PROSE, 1),  # most of the text, though it goes on after
        (PROSE + "  return x\n\n  return x\n\n" * 30, 12),
        (PROSE + "ἐν ἀρχῇ " * 40, 8),
    ],
)
def test_a_text_that_ends_in_a_loop_is_told_with_its_unit(text, period):
    loop = find_loop(text)
    assert loop is not None and loop.period == period
    assert loop.unit == text[loop.start : loop.start + period]
    stretch = text[loop.start : loop.stop]
    assert all(a == b for a, b in zip(stretch, stretch[period:], strict=False))


@pytest.mark.parametrize("text", ["", "a", PROSE, TABLE, ZEROS, REFRAIN, RULES, BLANK, CODE, "so " * 40])
def test_tables_code_poetry_and_layout_do_not_loop(text):
    assert find_loop(text) is None


@pytest.mark.parametrize("kind", ["text", "code"])
def test_no_held_out_text_loops(kind):
    text = (TINY / f"held-out-{kind}.txt").read_text(encoding="utf-8")
    assert [at for at in range(0, len(text), 500) if find_loop(text[at : at + 1000])] == []


@settings(deadline=None, max_examples=60)
@given(st.text("abcdefgh 123\n", min_size=1, max_size=LONGEST_PERIOD), st.text(max_size=300))
def test_any_unit_that_says_something_loops_when_it_is_repeated_to_the_end(unit, before):
    text = before + unit * (UNITS + LEAST_SPAN // len(unit) + 1)
    loop = find_loop(text)
    if any(c.isalnum() for c in unit):
        assert loop is not None and loop.period <= len(unit)
    if loop is not None:
        assert loop.stop - loop.start >= UNITS * loop.period + LEAST_SPAN
        assert text[loop.start : loop.stop - loop.period] == text[loop.start + loop.period : loop.stop]


def test_the_span_decides_to_the_character():
    enough = UNITS * 8 + LEAST_SPAN
    text = PROSE.strip() + "\n" + ("and the " * 40)[:enough]
    assert find_loop(text) is not None
    assert find_loop(text[:-1]) is None


def test_a_text_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("refimpl.reap.loops.LARGEST", 10)
    with pytest.raises(ValueError, match="longer than 10"):
        find_loop("a" * 11)


def test_the_command_says_so_by_its_exit_code_and_as_json(capsys, tmp_path):
    schema = json.loads((Path(refimpl.report.__file__).parent / "schemas" / "loops.json").read_text())
    sound, looping = tmp_path / "sound.txt", tmp_path / "looping.txt"
    sound.write_text(PROSE)
    looping.write_text(PROSE + "and \x1b[31m " * 40)
    assert run(["loops", str(sound), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, schema)
    assert document == {"version": 1, "characters": len(PROSE), "loop": None}
    assert run(["loops", str(looping), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, schema)
    assert (document["loop"]["period"], document["loop"]["repeats"]) == (10, 40.1)
    assert run(["loops", str(looping)]) == 1
    said = capsys.readouterr().out
    assert "times" in said and "\x1b" not in said


def test_the_command_reads_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"so it goes on and on and on, " * 40)))
    assert run(["loops"]) == 1
    assert "<stdin>" not in capsys.readouterr().out


@pytest.mark.parametrize(("content", "word"), [(b"\xff", "byte 0"), (None, "no such file")])
def test_the_command_names_a_file_that_is_no_text(capsys, tmp_path, content, word):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert run(["loops", str(path)]) == 3
    said = capsys.readouterr().err
    assert word in said and str(path) in said
