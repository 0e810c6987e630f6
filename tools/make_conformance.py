"""Write golden/conformance/: the compact edition of `refimpl vectors`, once ggml itself has confirmed it.

    python -m tools.make_conformance          (needs the extra `oracle`, and gcc for tools/run_vectors.c)

Every case that a function of the wheel's library decides has run through tools/run_vectors.c: decoders, strict
encoders, activations, and the orders generic-fma and avx2. The other builds and the order `generic` have no
function there; tests prove them against archives and against C compiled without contraction.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from refimpl.crosscheck.vectors import write_vectors
from tools import ggml, manifest

TOOLS = Path(__file__).resolve().parent
GOLDEN = TOOLS.parent / "golden"


def run_vectors(runner: Path, library: str, folder: Path, *texts: str) -> tuple[int, str]:
    """Compile run_vectors.c to `runner` and run it inside a Python process: the wheel's library needs Python's symbols.

    return : its exit status and what it printed
    """
    source = TOOLS / "run_vectors.c"
    subprocess.run(["gcc", "-O1", "-Wall", "-shared", "-fPIC", str(source), "-o", str(runner)], check=True)
    words = [str(runner), library, str(folder), *texts]
    done = subprocess.run(
        [sys.executable, "-m", "tools.make_conformance", *words],
        capture_output=True,
        text=True,
        cwd=GOLDEN.parent,
    )
    return done.returncode, done.stdout + done.stderr


def call_main(runner: str, *words: str) -> int:
    """Call the main function of a C program that was compiled as a shared library."""
    program = [word.encode() for word in ("run_vectors", *words)]
    main = ctypes.CDLL(runner).main
    return int(main(len(program), (ctypes.c_char_p * (len(program) + 1))(*program, None)))


def make() -> None:
    """Write the folder anew, and its entries in the manifest."""
    folder = GOLDEN / "conformance"
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "conformance"
        write_vectors(fresh, compact=True)
        status, said = run_vectors(Path(scratch) / "runner.so", ggml.LIBRARY._name, fresh)
        print(said, end="")
        if status:
            sys.exit(f"ggml does not confirm these vectors: status {status}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(fresh, folder)
    entries: dict[str, Any] = {
        "about": "the compact edition of `refimpl vectors`",
        "oracle": "ggml, the library inside the xllamacpp wheel, for every case that it has a function for",
        "version": ggml.VERSION,
        "command": "python -m tools.make_conformance",
        "licence": "Apache-2.0",
        "equality": "exact",
    }
    for path in sorted(folder.iterdir()):
        entries[path.name] = manifest.describe(GOLDEN, f"conformance/{path.name}")
    manifest.update(GOLDEN, "conformance", entries)


if __name__ == "__main__":
    sys.exit(call_main(*sys.argv[1:]) if len(sys.argv) > 1 else make())
