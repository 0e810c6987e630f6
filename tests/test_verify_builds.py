"""verify finds the build that wrote a file: all of it, a part of it, or none that is known; damage stays damage."""

import json
from pathlib import Path

import numpy as np
import pytest

from refimpl import quants
from refimpl.arith.builds import SITED
from refimpl.errors import Usage
from refimpl.files.golden import tiny_model
from refimpl.quants.formats import IQ2_S
from refimpl.verifier import builds, mutate
from refimpl.verifier.damage import UP
from refimpl.verifier.mutate import Copy
from refimpl.verifier.result import Report
from refimpl.verifier.run import verify

GOLDEN = tiny_model()
STOCK = GOLDEN / "stock.gguf"
OTHERS = ["gcc-fma", "clang-arm64"]


def rewrite(copy: Copy, build: str, names: list[str]) -> list[str]:
    """Encode tensors anew under a build. Returns those whose bytes that changed."""
    changed = []
    for name in names:
        part = copy[name]
        values = mutate.source_values(GOLDEN, name)
        raw = quants.quantize(values.reshape(-1, values.shape[-1]), part.format, build=build)
        if not np.array_equal(raw, part.raw):
            changed.append(name)
        part.raw = raw
    return changed


def told(copy: Copy) -> list[str]:
    return [name for name, part in copy.parts.items() if part.format.name in SITED]


def say(report: Report) -> str:
    [note] = [f for f in report.findings if f.code == "build"]
    assert note.severity == "note"
    return note.message


@pytest.fixture(scope="module", params=OTHERS)
def built(request, tmp_path_factory) -> tuple[str, Path]:
    """The tiny model as another build would have quantized it."""
    copy = Copy(STOCK)
    assert len(rewrite(copy, request.param, told(copy))) > 5
    return request.param, copy.write(tmp_path_factory.mktemp("built") / f"{request.param}.gguf")


def test_a_file_of_another_build_is_exact_and_its_build_is_named(built):
    build, path = built
    report = verify(path, GOLDEN)
    assert report.passed and report.verdict == "exact" and report.build == build
    assert f"build {build}: " in say(report) and "exclude strict by " in say(report)
    assert {tuple(t.build) for t in report.tensors if t.format in SITED} == {(build,)}


def test_a_given_build_is_not_looked_for(built):
    build, path = built
    assert verify(path, GOLDEN, build=build, require="exact").passed
    for other in {*quants.BUILDS} - {build}:
        report = verify(path, GOLDEN, build=other)
        assert report.build == other and report.verdict != "exact"
        assert not [f for f in report.findings if f.code == "build"]
    with pytest.raises(Usage, match="auto, strict, gcc-fma, clang-arm64"):
        verify(path, GOLDEN, build="gcc")


def test_formats_whose_choices_are_not_known_are_named(tmp_path):
    copy = Copy(STOCK)
    small = "blk.0.attn_kv_a_mqa.weight"
    mutate.replace_values(copy[small], mutate.source_values(GOLDEN, small), IQ2_S)
    path = copy.write(tmp_path / "points.gguf")
    [note] = [f for f in verify(path, GOLDEN, build="gcc-fma").findings if f.code == "build-unknown"]
    assert note.severity == "note" and "gcc-fma writes is not known for IQ2_S:" in note.message
    assert not [f for f in verify(path, GOLDEN, build="strict").findings if f.code == "build-unknown"]


def test_a_strict_file_excludes_the_others():
    report = verify(STOCK, GOLDEN)
    assert report.build == "strict" and "exclude gcc-fma by " in say(report)
    assert {tuple(t.build) for t in report.tensors if t.format in SITED} == {("strict",)}


def test_a_format_without_sites_is_every_builds():
    report = verify(GOLDEN / "protected.gguf", GOLDEN)
    assert {tuple(t.build) for t in report.tensors if t.format == "q8_0"} == {quants.BUILDS}


def test_a_file_of_two_builds_is_reported_as_such(tmp_path):
    copy = Copy(STOCK)
    [name] = rewrite(copy, "gcc-fma", [UP])
    report = verify(copy.write(tmp_path / "mixed.gguf"), GOLDEN)
    assert report.passed and report.verdict == "exact" and report.build == builds.MIXED
    [mixture] = [f for f in report.findings if f.code == "mixed-builds"]
    assert mixture.severity == "warning" and f"1 by gcc-fma (the first: {name})" in mixture.message
    assert {t.name: t.build for t in report.tensors}[name] == ["gcc-fma"]


def test_a_build_that_the_first_rows_do_not_show_is_found_by_what_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(builds, "HEADS", 0)
    monkeypatch.setattr(builds, "SAMPLES", 0)
    copy = Copy(STOCK)
    rewrite(copy, "gcc-fma", told(copy))
    report = verify(copy.write(tmp_path / "late.gguf"), GOLDEN)
    assert report.verdict == "exact" and report.build == "gcc-fma"


def test_damage_in_a_file_of_another_build_is_still_named(built, tmp_path):
    """The control: one byte of one block, and a block of zeros, in a file that strict explains nowhere near."""
    build, path = built
    copy = Copy(path)
    copy[UP].block(5, expert=3)["qs"][0, 7] ^= 0x80
    report = verify(copy.write(tmp_path / "damaged.gguf"), GOLDEN)
    assert not report.passed and report.build == build
    assert {t.name for t in report.tensors if t.verdict not in ("exact", "copied")} == {UP}
    [finding] = [f for f in report.findings if f.severity == "error"]
    assert (finding.tensor, finding.expert) == (UP, 3)


def test_the_json_does_not_depend_on_threads_or_memory(tmp_path):
    copy = Copy(STOCK)
    rewrite(copy, "gcc-fma", [UP])
    rewrite(copy, "clang-arm64", [UP.replace("up", "gate")])
    path = copy.write(tmp_path / "mixed.gguf")
    runs = {
        json.dumps(verify(path, GOLDEN, jobs=jobs, memory=memory).to_json())
        for jobs, memory in ((1, 2 << 30), (3, 2 << 30), (2, 16 << 20))
    }
    assert len(runs) == 1


def test_another_search_is_not_taken_for_another_build():
    report = verify(GOLDEN / "imatrix-quantized.gguf", GOLDEN)
    assert report.verdict == "rounded" and report.build == "strict"
    assert "no block" in say(report)
