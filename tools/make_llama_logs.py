"""Write golden/llama.cpp/: what two programs of llama.cpp print about the tiny model, for tests that run without them.

    python -m tools.make_llama_logs FOLDER        # FOLDER: where llama.cpp is built, or shall be (tools/llama_cpp.py)

    eval-callback.log   llama-eval-callback on protected.gguf: 3 tokens, f32 caches
    perplexity.json     llama-perplexity on float32 weights: the checkpoint's, and those that stock.gguf decodes to,
                        whose KL divergence from the checkpoint's is measured; figures as they are printed

Weights are float32 because whole quantized models are chaotic: one flipped selection of keys changes every figure.
llama-perplexity keeps the base's log probabilities in 16 bits, so that its KL divergence has fewer right digits.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import refimpl
from refimpl.files import gguf
from refimpl.quants.formats import F32, find_codec
from refimpl.writers.convert import convert
from tools import llama_cpp, manifest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MODEL = GOLDEN / "tiny-glm-dsa"
CPU = ["--no-repack", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1"]
CONTEXT, CHUNKS, PROMPT = 256, 4, "In the"
_NUMBER = r"(-?[\d.]+)"
_STAMPED = re.compile(r"\d+\.\d\d\.\d{3}\.\d{3} ")  # what goes to stderr, with the time of the run


def widen(source: Path, out: Path) -> None:
    """A GGUF's tensors as float32, under the same metadata."""
    with refimpl.open(source) as file:
        assert isinstance(file, gguf.Gguf)

        def decoded(name: str, fmt: str) -> Iterator[Any]:
            yield refimpl.dequantize(file.read(name), find_codec(fmt)).view(np.uint8)

        tensors = [(name, t.shape, F32, decoded(name, t.format)) for name, t in file.tensors.items()]
        gguf.write(out, file.metadata.typed(), tensors)


def read_perplexity(printed: str) -> dict[str, Any]:
    """What llama-perplexity prints of one model: the perplexity after each piece, and the last with its error."""
    final = re.search(rf"Final estimate: PPL = {_NUMBER} \+/- +{_NUMBER}", printed)
    assert final is not None, printed[-2000:]
    return {
        "after": [m[1] for m in re.finditer(rf"\[\d+\]{_NUMBER},", printed)],
        "final": list(final.groups()),
    }


def read_divergence(printed: str) -> list[dict[str, list[str]]]:
    """What it prints after each piece when there is a base: value and error."""
    pair = rf" +{_NUMBER} ± +{_NUMBER}"
    rows = re.findall(rf"^ +\d+{pair}{pair}{pair}{pair} %{pair} %$", printed, re.MULTILINE)
    names = ("perplexity", "log_ratio", "kl", "rms", "same_top")
    return [{name: list(row[2 * i : 2 * i + 2]) for i, name in enumerate(names)} for row in rows]


def make(built: llama_cpp.LlamaCpp) -> None:
    """Run both programs, and write the folder and its entries in the manifest."""
    folder = GOLDEN / "llama.cpp"
    folder.mkdir(exist_ok=True)
    options = ["-m", str(MODEL / "protected.gguf"), "-p", PROMPT, *CPU]
    printed = built.run("llama-eval-callback", options, MODEL).splitlines(keepends=True)
    log = "".join(line for line in printed if not _STAMPED.match(line))
    (folder / "eval-callback.log").write_text(log)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        convert(MODEL, place / "base.gguf", "f32")
        widen(MODEL / "stock.gguf", place / "stock.gguf")
        options = [
            "-f",
            str(MODEL / "held-out-text.txt"),
            "-c",
            str(CONTEXT),
            "-b",
            str(CONTEXT),
            "--chunks",
            str(CHUNKS),
            *CPU,
        ]
        base = built.run(
            "llama-perplexity", ["-m", "base.gguf", "--save-all-logits", "base.kld", *options], place
        )
        other = built.run(
            "llama-perplexity",
            ["-m", "stock.gguf", "--kl-divergence-base", "base.kld", "--kl-divergence", *options],
            place,
        )
    figures = {"context": CONTEXT, "checkpoint": read_perplexity(base), "stock": read_divergence(other)}
    (folder / "perplexity.json").write_text(json.dumps(figures, indent=1) + "\n")
    entries: dict[str, Any] = {
        "about": "what llama-eval-callback and llama-perplexity print about the tiny model",
        "oracle": "llama.cpp's programs, gcc, x86-64, one thread",
        "version": llama_cpp.DATED,
        "command": "python -m tools.make_llama_logs FOLDER",
        "licence": "Apache-2.0",
        "equality": "to the digits printed",
    }
    for path in sorted(folder.iterdir()):
        entries[path.name] = manifest.describe(GOLDEN, f"llama.cpp/{path.name}")
    manifest.update(GOLDEN, "llama.cpp", entries)


if __name__ == "__main__":
    make(llama_cpp.prepare(Path(sys.argv[1])))
