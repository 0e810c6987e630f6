"""The study's tables and plots in the README and docs/ are those of its results."""

import json
from pathlib import Path

from tools import reap_report

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reap-study"


def test_the_readmes_tables_are_those_of_the_results(tmp_path):
    readme = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in (reap_report.START, reap_report.END))
    readme.write_text(text[:start] + reap_report.START + "old" + text[end:], encoding="utf-8")
    reap_report.write(json.loads((FOLDER / "results.json").read_text()), tmp_path, readme)
    assert readme.read_text(encoding="utf-8") == text
    for name in ("methods.png", "calibration.png", "loops.png"):
        assert f"docs/reap-study/{name}" in text
        assert (tmp_path / name).stat().st_size > 10_000 and (FOLDER / name).exists()


def test_the_results_are_those_of_the_commands_defaults():
    from tools import reap_study

    document = json.loads((FOLDER / "results.json").read_text())
    assert document["size"] == reap_study.Size().__dict__
    ratios = {row["ratio"] for row in document["rows"] if row["method"] == "reap"}
    assert ratios == set(reap_study.RATIOS) == {0.125, 0.25, 0.375, 0.4, 0.5}
    assert {row["method"] for row in document["rows"]} >= {
        "reap",
        "ean_sum",
        "frequency",
        "random",
        "worst-first",
    }
