"""`refimpl vectors`: what lies in the folder is what its index and manifest say, and both texts of refimpl give it."""

import hashlib
import importlib.resources
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl import dots, quants
from refimpl.arith.builds import list_builds
from refimpl.cli.main import run
from refimpl.crosscheck import native_codecs
from refimpl.crosscheck.native_symbols import list_symbols, partner_of
from refimpl.crosscheck.vectors import EDITION, write_vectors
from refimpl.quants.formats import CODEBOOKS, activations, formats
from tests.bits import assert_same_bits

SOME = ("f16", "q8_0", "q5_0", "q4_k", *activations)  # golden/ holds all; a fresh edition of these is enough
GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "conformance"
HEADS = ["id", "op", "format", "text", "function", "equality", "rows", "n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vectors") / "compact"
    write_vectors(place, compact=True, only=SOME)
    return place


@pytest.fixture(scope="module", params=["fresh", "golden"])
def either(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A folder written now, and the one in golden/, which ggml has confirmed."""
    return folder if request.param == "fresh" else GOLDEN


def read_index(folder: Path) -> list[dict[str, str]]:
    head, *lines = (folder / "index.tsv").read_text().splitlines()
    return [dict(zip(head.removeprefix("#").split("\t"), line.split("\t"), strict=True)) for line in lines]


def read_bytes(folder: Path, case: dict[str, str], role: str) -> np.ndarray:
    file, offset, size = (case[f"{role}_{what}"] for what in ("file", "offset", "bytes"))
    return np.fromfile(folder / file, np.uint8, int(size), offset=int(offset))


def test_the_manifest_says_the_same_as_the_index_and_the_files(either: Path) -> None:
    manifest = json.loads((either / "manifest.json").read_text())
    cases = read_index(either)
    assert [c["id"] for c in cases] == [c["id"] for c in manifest["cases"]]
    assert len({c["id"] for c in cases}) == len(cases)
    tensors = {name: load_file(either / name) for name in manifest["files"]}
    for name, file in manifest["files"].items():
        data = (either / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    for case, entry in zip(cases, manifest["cases"], strict=True):
        assert all(case[key] == str(entry[key]) for key in HEADS) and len(entry["pins"]) > 20
        for role in ("x", "y", "want"):
            if role not in entry:
                assert (role, case["y_file"], case["y_bytes"]) == ("y", "-", "0")
                continue
            array = manifest["arrays"][entry[role]]
            data = read_bytes(either, case, role)
            assert hashlib.sha256(data).hexdigest() == array["sha256"]
            tensor = tensors[array["file"]][array["tensor"]]
            assert str(tensor.dtype) == array["dtype"] and data.tobytes() == tensor.tobytes()


def test_every_format_has_its_cases(either: Path) -> None:
    cases = read_index(either)
    have = {(c["op"], c["format"], c["text"]) for c in cases}
    named = {c["format"] for c in cases if c["op"] == "decode"}
    for name in named:
        fmt = formats[name]
        texts = {"strict"} if either == GOLDEN else set(list_builds(name))
        assert {("encode", name, build) for build in texts} <= have
        weighed = [c for c in cases if (c["op"], c["format"]) == ("encode", name) and c["y_file"] != "-"]
        assert bool(weighed) == (fmt.weighed and fmt.weights > 1), name
    for name in named & set(dots.PARTNERS) & {"q8_0", "q4_k"}:
        assert {("dot", name, order) for order in ("generic", "generic-fma", "avx2")} <= have
    assert {("activation", name, "reference") for name in activations} <= have


@pytest.mark.parametrize(("where", "reference"), [("fresh", False), ("golden", False), ("golden", True)])
def test_both_texts_give_what_is_written(folder: Path, where: str, reference: bool) -> None:
    either = folder if where == "fresh" else GOLDEN
    for case in read_index(either):
        fmt = formats.get(case["format"]) or activations[case["format"]]
        if reference and case["op"] == "encode" and (case["text"] != "strict" or case["y_file"] != "-"):
            continue  # slow; test_twins holds the texts together under every build and imatrix
        if reference and case["op"] == "encode" and fmt in CODEBOOKS:
            continue  # slower still
        if where == "golden" and case["text"] in ("any", "strict") and fmt not in CODEBOOKS:
            continue  # test_vectors.py
        rows, n = int(case["rows"]), int(case["n"])
        x, y, want = (
            read_bytes(either, case, r) if case[f"{r}_file"] != "-" else None for r in ("x", "y", "want")
        )
        match case["op"]:
            case "decode":
                got = quants.dequantize(x, fmt, reference=reference)
            case "encode":
                imatrix = None if y is None else y.view(np.float32)
                weights = x.view(np.float32).reshape(rows, n)
                if fmt in CODEBOOKS:  # test_grids.py holds their tuned kernels to these, which compile sooner
                    got = native_codecs.write(fmt, weights, imatrix)
                else:
                    got = quants.quantize(weights, fmt, imatrix, build=case["text"], reference=reference)
            case "activation":
                got = dots.encode(
                    x.view(np.float32).reshape(1, -1), fmt.name, case["text"], reference=reference
                )
            case "dot":
                continue  # takes floats, not blocks: the next test
        kind = np.float32 if case["equality"] == "bits" else np.uint8
        assert_same_bits(got.reshape(-1), want.view(kind), case["id"])


def test_products_are_those_of_the_stored_activations(either: Path) -> None:
    """Summed in float64 from the decoded blocks, every order's result is near: the files hold matching operands."""
    seen = 0
    for case in read_index(either):
        if case["op"] != "dot" or partner_of(formats[case["format"]]) == "q8_1":
            continue
        fmt, partner = formats[case["format"]], activations[partner_of(formats[case["format"]])]
        x, y, want = (read_bytes(either, case, role) for role in ("x", "y", "want"))
        w = quants.dequantize(x.reshape(int(case["rows"]), -1), fmt).astype(np.float64)
        blocks = y.view(partner.block).reshape(-1)
        token = (blocks["d"].astype(np.float64).reshape(-1, 1) * blocks["qs"]).reshape(-1)
        size = np.abs(w * token).sum(1)
        assert (np.abs(want.view(np.float32) - (w * token).sum(1)) <= 1e-5 * size).all(), case["id"]
        seen += 1
    assert seen >= 20


def test_the_golden_edition_is_this_one_and_small() -> None:
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    assert (manifest["edition"], manifest["compact"]) == (EDITION, True)
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 5_000_000


def test_the_command_writes_once_and_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = json.loads(
        importlib.resources.files("refimpl.report").joinpath("schemas/vectors.json").read_text()
    )
    out = tmp_path / "a" / "vectors"
    few = [symbol for symbol in list_symbols() if symbol.format.name in ("f16", "q8_0")]
    monkeypatch.setattr("refimpl.crosscheck.vectors.list_symbols", lambda: few)
    assert run(["vectors", "-o", str(out), "--compact", "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["cases"] == len(read_index(out)) and "edition" in (out / "README.md").read_text()
    assert sorted(p.name for p in out.parent.iterdir()) == ["vectors"]  # nothing half-written is left
    assert run(["vectors", "-o", str(out), "--compact", "--quiet"]) == 2
    assert "exists" in capsys.readouterr().err
