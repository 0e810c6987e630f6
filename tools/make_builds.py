"""Write golden/builds.npz and golden/builds.json: what ggml writes when other compilers build it.

    python -m tools.make_builds ARCHIVE.npz

ARCHIVE holds `kind/weights_bf16` [R, n] uint16, `kind/imatrix` [n] float32 and, for each kind, type, flavour (plain,
imatrix) and build, the bytes that the build wrote: `kind/type/flavour/build` [blocks, bytes] uint8.

builds.npz    the inputs
builds.json   digests: "kind/type/flavour/build" -> sha256 of the bytes
              differ: the same names -> blocks that the build writes otherwise than strict
              control: "type/flavour" -> [blocks in all, blocks in which clang with FMA on x86 differs from clang-arm64,
              from strict]: the archive's fourth build, which nobody publishes
              witnesses: "build/SITE" -> [type, flavour, kind, row]: were the site computed otherwise than the build
              does, the bytes of that row would change, so the archive proves the site
              unproven: sites of which none of the rows that were tried says anything, for each build
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.arith.builds import BUILDS, FUSED, ROUNDED, SECOND, SITES, Build, Form, find_build
from refimpl.quants.formats import find_codec, find_reference
from tools import manifest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CONTROL = "clang-x86-fma"
ENTRY = {
    "oracle": "ggml-quants.c, compiled by gcc 12.2 and clang 14.0.6 at -O3 for x86-64 and arm64",
    "version": "llama.cpp 0c1e570",
    "command": "python -m tools.make_builds ARCHIVE.npz",
    "licence": "Apache-2.0",
    "equality": "exact",
}
# Where a site shows most readily, and how many rows of each kind are tried: the definition is slow.
TRIED = (
    ("q4_0", "plain"),
    ("q3_k", "plain"),
    ("q6_k", "imatrix"),
    ("q2_k", "plain"),
    ("iq4_nl", "plain"),
    ("iq4_xs", "plain"),
    ("q4_k", "imatrix"),
)
ROWS = 24
Array = np.ndarray[Any, Any]


class Recorder(Build):
    """A build that remembers which of its sites an encoder asked for."""

    def __init__(self, build: Build) -> None:
        super().__init__(build.name, build.forms)
        self.asked: set[str] = set()

    def __getattr__(self, site: str) -> Form:
        self.__dict__["asked"].add(site)
        return super().__getattr__(site)


def encode(archive: Any, kind: str, fmt: str, flavour: str, build: Build) -> Array:
    """The rows of a kind under a build: [R, bytes] uint8, by the definition."""
    x = (archive[f"{kind}/weights_bf16"].astype(np.uint32) << 16).view(np.float32)
    imatrix = np.broadcast_to(archive[f"{kind}/imatrix"], x.shape) if flavour == "imatrix" else None
    with np.errstate(all="ignore"):
        blocks = find_reference(find_codec(fmt)).quantize(x, imatrix, build)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(len(x), -1)


def flip(build: Build, site: str) -> list[Build]:
    """The build with another form at one site."""
    others = (ROUNDED, FUSED, SECOND) if site in ("QK_D", "QK_TS", "QK_TM") else (ROUNDED, FUSED)
    return [build.replace(**{site: form}) for form in others if form is not getattr(build, site)]


def find_witnesses(archive: Any, kinds: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For every site of every build a row that would change, and the sites without one among the rows tried."""
    witnesses: dict[str, Any] = {}
    for fmt, flavour in TRIED:
        for name in BUILDS[1:]:
            recorder = Recorder(find_build(name, fmt))
            true = {kind: encode(archive, kind, fmt, flavour, recorder) for kind in kinds}
            for site in sorted(recorder.asked & set(SITES)):
                for kind in kinds if f"{name}/{site}" not in witnesses else []:
                    changed = [
                        (encode(archive, kind, fmt, flavour, other) != true[kind]).any(1)
                        for other in flip(find_build(name, fmt), site)
                    ]
                    rows = np.flatnonzero(np.logical_and.reduce(changed))
                    if len(rows):
                        witnesses[f"{name}/{site}"] = [fmt, flavour, kind, int(rows[0])]
                        break
            print(name, fmt, flavour, len(witnesses), flush=True)
    unproven = {b: [s for s in SITES if f"{b}/{s}" not in witnesses] for b in BUILDS[1:]}
    return witnesses, unproven


def main() -> None:
    """Read the archive, write the inputs, digests and witnesses, and their entries in the manifest."""
    archive = np.load(sys.argv[1])
    keys = [key.split("/") for key in archive.files if key.count("/") == 3]
    kinds = list(dict.fromkeys(key[0] for key in keys))
    digests, differ, control = {}, {}, {}
    for kind, fmt, flavour, build in keys:
        raw, strict = archive[f"{kind}/{fmt}/{flavour}/{build}"], archive[f"{kind}/{fmt}/{flavour}/strict"]
        odd = int((raw != strict).any(1).sum())
        if build in BUILDS:
            digests[f"{kind}/{fmt}/{flavour}/{build}"] = hashlib.sha256(raw.tobytes()).hexdigest()
            differ[f"{kind}/{fmt}/{flavour}/{build}"] = odd
        elif build == CONTROL:
            near = archive[f"{kind}/{fmt}/{flavour}/clang-arm64"]
            counts = control.setdefault(f"{fmt}/{flavour}", [0, 0, 0])
            for i, count in enumerate((len(raw), int((raw != near).any(1).sum()), odd)):
                counts[i] += count
    some = {
        key: archive[key][:ROWS] if key.endswith("bf16") else archive[key]
        for key in archive.files
        if key.count("/") == 1
    }
    witnesses, unproven = find_witnesses(some, kinds)
    inputs = {key: archive[key] for key in some}
    np.savez_compressed(GOLDEN / "builds.npz", **{key.replace("/", "."): a for key, a in inputs.items()})
    text = {
        "digests": digests,
        "differ": differ,
        "control": control,
        "witnesses": witnesses,
        "unproven": unproven,
    }
    (GOLDEN / "builds.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    entries = {name: manifest.describe(GOLDEN, f"builds.{name}") for name in ("npz", "json")}
    manifest.update(GOLDEN, "builds", {**ENTRY, **entries})


if __name__ == "__main__":
    main()
