"""Hold every mix of llama-quantize to ours, file against file: the tiny model, with an imatrix and without.

    python -m tools.check_mixes --llama build/llama            # builds llama-quantize there first (5 minutes)
    python -m tools.check_mixes --mix Q4_K_M --mix IQ2_XS      # only these

The mixes are those that llama-quantize itself lists. Ours is made with the key refimpl.provenance, the one that
the README documents; without it header and data must be the same bytes. Prints a table of same, refuse (both
sides refuse) and what differs; ends with 1 where anything but same and refuse stands in it. Before that a file
with one wrong bit is compared with the right one, and must be told from it.
"""

import argparse
import contextlib
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from refimpl.errors import RefimplError, Usage
from refimpl.files import encode, gguf
from refimpl.files.golden import tiny_model
from refimpl.recipes.read import ALIASES
from refimpl.writers import keys
from refimpl.writers.convert import convert
from refimpl.writers.quantize import quantize
from tools import llama_cpp

REFUSES = ("equires an importance matrix", "issing importance matrix", "no tensor type fallback is defined")
UNQUANTIZED = {"f32", "f16", "bf16", "copy"}
LISTED = re.compile(r"^ *\d+ +or +(\w+) *:", re.MULTILINE)
CHUNK = 1 << 24


def list_mixes(llama: llama_cpp.LlamaCpp) -> list[str]:
    """What llama-quantize says that it can write, aliases and unquantized types left out."""
    try:
        said = llama.run("llama-quantize", ["--help"], Path.cwd())
    except RuntimeError as error:  # it prints its help and fails
        said = str(error)
    found = [mix.lower() for mix in LISTED.findall(said)]
    return [mix for mix in found if mix not in UNQUANTIZED and mix not in ALIASES]


def compare(ours: Path, theirs: Path) -> str:
    """ "same", or what differs: keys, the table of tensors, or bytes of the first tensor that differs."""
    with gguf.Gguf(ours) as a, gguf.Gguf(theirs) as b:
        left, right = ([(t.name, t.shape, t.format.name) for t in f.tensors.values()] for f in (a, b))
        if left != right:
            return next((f"table: {x} for {y}" for x, y in zip(left, right, strict=False) if x != y), "table")
        head, _, size = encode.header_bytes(
            a.metadata.typed((keys.PROVENANCE,)), [(t.name, t.shape, t.format) for t in a.tensors.values()]
        )
        if b.sources[0].read(0, len(head)) != head:
            return "keys"
        shift = a.sources[0].size - size
        if b.sources[0].size != size:
            return f"{a.sources[0].size - shift:,} bytes for {b.sources[0].size:,}"
        for at in range(len(head), size, CHUNK):
            count = min(CHUNK, size - at)
            if a.sources[0].read(at + shift, count) != b.sources[0].read(at, count):
                wrong = (t.name for t in a.tensors.values() if (a.read(t.name) != b.read(t.name)).any())
                return f"bytes of {next(wrong, 'the padding')}"
    return "same"


def control(work: Path) -> str:
    """What is said of the golden file that llama-quantize made, beside a copy with one wrong bit."""
    right = tiny_model() / "stock.gguf"
    raw = bytearray(right.read_bytes())
    raw[len(raw) // 2] ^= 1
    (work / "wrong.gguf").write_bytes(raw)
    assert compare(right, right) == "same"
    return compare(work / "wrong.gguf", right)


def check(llama: llama_cpp.LlamaCpp, work: Path, mix: str, imatrix: str | None) -> tuple[str, float, float]:
    """Write one mix on both sides; return what came out and the seconds of llama-quantize and of ours."""
    theirs, ours, start = work / "theirs.gguf", work / "ours.gguf", time.perf_counter()
    refused = False
    try:
        flags = ["--imatrix", imatrix] if imatrix else []
        llama.run("llama-quantize", [*flags, "bf16.gguf", theirs.name, mix.upper(), "2"], work)
    except RuntimeError as error:
        refused = any(words in str(error) for words in REFUSES)
        if not refused:
            raise
    middle = time.perf_counter()
    try:
        with contextlib.chdir(work):  # both record the imatrix by the name that they are given
            quantize("bf16.gguf", ours.name, mix, imatrix, force=True)
    except RefimplError as error:
        found = "refuse" if refused and isinstance(error, Usage) else f"ours refuses: {error}"
    else:
        found = "theirs refuses" if refused else compare(ours, theirs)
    return found, middle - start, time.perf_counter() - middle


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", type=Path, default=Path("build/llama"), help="llama.cpp's folder")
    parser.add_argument(
        "--mix", action="append", help="only this mix; by default all that llama-quantize lists"
    )
    given = parser.parse_args()
    llama = llama_cpp.prepare(given.llama, ["llama-quantize"])
    mixes = [mix.lower() for mix in given.mix] if given.mix else list_mixes(llama)
    counts: Counter[str] = Counter()
    print("| mix | plain | imatrix | llama-quantize | refimpl |\n|---|---|---|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        convert(tiny_model(), work / "bf16.gguf", provenance=False, name="tiny-glm-dsa")
        (work / "imatrix.gguf").symlink_to(tiny_model() / "imatrix.gguf")
        if control(work) == "same":
            print("no table: one wrong bit was not seen", file=sys.stderr)
            return 1
        for mix in mixes:
            rows = [check(llama, work, mix, imatrix) for imatrix in (None, "imatrix.gguf")]
            counts.update(found for found, _, _ in rows)
            seconds = [f"{sum(row[i] for row in rows):.1f} s" for i in (1, 2)]
            print(f"| {mix} | {rows[0][0]} | {rows[1][0]} | {' | '.join(seconds)} |", flush=True)
    print(", ".join(f"{n} {what}" for what, n in counts.most_common()))
    return 0 if counts.keys() <= {"same", "refuse"} and counts["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
