"""Plots are pictures with something in them, and the walkthrough's numbers are what its code computes."""

import builtins

import numpy as np
import pytest

import refimpl
from refimpl.cli.main import run
from refimpl.files.golden import tiny_model
from refimpl.report.plots import open_figure
from tools import walkthrough

TINY = tiny_model()
TOKENS = ",".join(str(i) for i in range(100, 180))


def colours(path):
    """How many different pixels a picture has."""
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))


def test_trace_and_compare_draw(tmp_path, capsys):
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    picture = tmp_path / "trace.png"
    assert run(["trace", str(TINY), "--tokens", TOKENS, "-o", a, "--plot", str(picture)]) == 0
    assert run(["trace", str(TINY), "--tokens", TOKENS, "-o", b, "--engine", "transformers"]) == 0
    assert colours(picture) > 20
    picture = tmp_path / "compare.png"
    options = ["--model", str(TINY), "--engine", "refimpl", "--plot", str(picture)]
    assert run(["compare", a, b, *options]) == 1  # transformers' eps is not refimpl's
    assert "first wrong: " in capsys.readouterr().out
    assert colours(picture) > 20


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(refimpl.errors.Usage, match=r"refimpl\[plot\]"):
        open_figure(tmp_path / "x.png", 1, 1, 3, 3)


@pytest.mark.parametrize("path", ["x.jpg", "missing/x.png"])
def test_a_plot_is_a_png_in_a_folder(tmp_path, path):
    with pytest.raises(refimpl.errors.Usage, match="png"):
        open_figure(tmp_path / path, 1, 1, 3, 3)


def test_the_walkthrough_runs_and_its_numbers_agree(tmp_path, capsys):
    walkthrough.main(tmp_path)
    text = capsys.readouterr().out
    assert all(f"{n}. " in text for n in range(1, 5)) and "4.5 bits" in text
    assert colours(tmp_path / "block.png") > 20 and colours(tmp_path / "selection.png") > 20


def test_the_walkthrough_stops_where_text_and_code_part(monkeypatch):
    """Must-fail control."""
    monkeypatch.setattr(
        walkthrough, "unpack_codes", lambda qs, original=walkthrough.unpack_codes: original(qs) ^ 1
    )
    with pytest.raises(AssertionError):
        walkthrough.decode_a_block(TINY / "stock.gguf")
