"""`refimpl native` finds the library inside the wheel and nothing wrong with it."""

from pathlib import Path

from refimpl.crosscheck.native import judge


def test_every_function_of_the_wheel_is_there_and_right(tmp_path: Path) -> None:
    report = judge("xllamacpp", tmp_path / "reproducers", blocks=1000)
    wrong = {j.symbol: (j.verdict, j.problem, j.case) for j in report.judgements if j.verdict == "wrong"}
    assert report.passed and not wrong, wrong
    assert report.counts["absent"] == 0
    assert all(j.cases >= 6 and j.weights >= 1000 for j in report.judgements)
