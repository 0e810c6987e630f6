"""The command line: one line and an exit code for every error, and nothing imported that is not needed."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module

import models
import pytest
import typer

from refimpl.cli import main as cli
from refimpl.cli.main import COMMANDS, byte_count, run
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.report import progress
from refimpl.report.terminal import clean, console, gigabytes

REFIMPL = [sys.executable, "-m", "refimpl"]


@pytest.fixture
def fails(monkeypatch):
    """Makes the inspection raise something."""

    def arrange(error):
        def raise_it(*_):
            raise error

        monkeypatch.setattr("refimpl.verifier.inspection.inspect", raise_it)

    return arrange


def test_help_names_every_command():
    done = subprocess.run([*REFIMPL, "--help"], capture_output=True, text=True, check=True)
    assert all(re.search(rf"^\W*{name} ", done.stdout, re.MULTILINE) for name in COMMANDS)


def test_help_imports_neither_commands_nor_numpy():
    code = (
        "import sys; from refimpl.cli.main import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"numpy", "numba", "scipy", "gguf", "safetensors"}
    assert not loaded & {f"refimpl.cli.{name}" for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_line_in_the_help_say_the_same(name):
    command = import_module(f"refimpl.cli.{name}").command
    if isinstance(command, typer.Typer):
        assert command.info.help == COMMANDS[name]
        docs = [one.callback.__doc__ for one in command.registered_commands]
    else:
        assert command.__doc__.splitlines()[0] == COMMANDS[name]
        docs = [command.__doc__]
    assert docs and all("Exit codes: " in doc for doc in docs)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(capsys, name):
    assert run([name, "--help"]) == 0
    assert f"Usage: refimpl {name}" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert run([]) == 0
    assert "Usage: refimpl" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "args", [["nonsense"], ["--nonsense"], ["inspect"], ["inspect", "a", "b"], ["inspect", "a", "--nonsense"]]
)
def test_wrong_usage_is_2(capsys, args):
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("refimpl: ")


def test_wrong_usage_is_json_where_that_was_asked_for(capsys):
    assert run(["inspect", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "usage"
    assert "file" in error["message"].lower()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            BadFile("m.gguf", 24, "the magic is gone"),
            3,
            {"code": "bad-file", "file": "m.gguf", "offset": 24, "message": "the magic is gone"},
        ),
        (
            BadFile("m.gguf", None, "no such file"),
            3,
            {"code": "bad-file", "file": "m.gguf", "offset": None, "message": "no such file"},
        ),
        (
            Unsupported("version 9"),
            4,
            {"code": "unsupported", "file": None, "offset": None, "message": "version 9"},
        ),
        (
            Usage("no such recipe"),
            2,
            {"code": "usage", "file": None, "offset": None, "message": "no such recipe"},
        ),
    ],
)
def test_an_error_about_the_input_is_one_line_and_an_exit_code(capsys, fails, error, code, told):
    fails(error)
    assert run(["inspect", "m.gguf"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"refimpl: {error}\n"
    assert run(["inspect", "m.gguf", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {"error": told}


def test_an_error_of_our_own_is_not_hidden(fails):
    fails(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run(["inspect", "m.gguf"])


def test_an_interrupt_is_130(fails, capsys):
    fails(KeyboardInterrupt())
    assert run(["inspect", "m.gguf", "--json"]) == 130
    assert capsys.readouterr().out == ""


def test_an_error_cannot_steer_the_terminal(capsys, fails):
    fails(BadFile("\x1b[2J.gguf", 3, "the name '\x9b2J\u202e' occurs\ntwice"))
    run(["inspect", "m.gguf"])
    err = capsys.readouterr().err
    assert err == "refimpl: \\x1b[2J.gguf: byte 3: the name '\\x9b2J\\u202e' occurs\\ntwice\n"


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    path = models.write(tmp_path / "a.gguf")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*REFIMPL, "inspect", path], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_without_utf_8_still_gets_its_report(tmp_path):
    path = models.write(tmp_path / "a.gguf")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*REFIMPL, "inspect", path], capture_output=True, env=ascii_only)
    assert done.returncode == 0
    assert b"67 tensors" in done.stdout


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("512 mib", 512 << 20),
        ("1.5k", 1500),
        ("3GB", 3 * 10**9),
        ("7B", 7),
    ],
)
def test_sizes_have_decimal_and_binary_units(text, want):
    assert byte_count(text) == want


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 TiB", "2 i", "nan", "99999999999", "²"])
def test_other_sizes_are_wrong_usage(text):
    with pytest.raises(Usage):
        byte_count(text)


def test_text_from_files_shows_what_it_hides():
    assert clean("plain text, [bold] and ünïcode · 你好") == "plain text, [bold] and ünïcode · 你好"
    assert clean("a\x00\x1b\x7f\x9b\n\u200b\u2028\ufeff\ud800\U000e0041") == (
        "a\\x00\\x1b\\x7f\\x9b\\n\\u200b\\u2028\\ufeff\\ud800\\U000e0041"
    )
    assert clean("x" * 1000) == "x" * 499 + "…"
    assert len(clean("\x1b" * 10**7)) == 500


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (348_128_184_576, "348.13 GB"), (7_765_664, "7.77 MB")]
)
def test_sizes_are_told_in_decimal_units(size, text):
    assert gigabytes(size) == text


def test_a_pipe_gets_no_colours_and_no_narrow_lines(capsys):
    console().print("x" * 150, style="red")
    assert capsys.readouterr().out == "x" * 150 + "\n"


def test_progress_elsewhere_than_on_a_terminal_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with cli.progress_bar("verifying") as show:
        for second in range(1, 12):
            now[0] = float(second)
            show(second * 10**9, 20 * 10**9)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "verifying: 5.00 GB of 20.00 GB (25%), 1.00 GB/s, 15 s left",
        "verifying: 10.00 GB of 20.00 GB (50%), 1.00 GB/s, 10 s left",
    ]


def test_progress_can_be_hidden(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with cli.progress_bar("verifying", hidden=True) as show:
        show(1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with cli.progress_bar("verifying") as show:
        show(1, 2)
    assert "verifying" in capsys.readouterr().err
