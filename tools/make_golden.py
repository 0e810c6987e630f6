"""Make golden/tiny-glm-dsa from a finished training run, with llama.cpp's converter, imatrix and quantizer.

python -m tools.make_golden --work build/tiny --llama build/llama

--work is train_tiny.py's folder. --llama is where llama.cpp is fetched and built, or where it already lies
(see llama_cpp.py). Every file's oracle, command and sha256 go to golden/MANIFEST.toml.
"""

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import gguf

from tools import llama_cpp, manifest

MODEL = "tiny-glm-dsa"

# The card's protection: all but the routed experts in Q8_0. Norms and router stay F32 whatever is asked.
PROTECTION = (
    *("--tensor-type", "attn_=q8_0"),
    *("--tensor-type", "indexer=q8_0"),
    *("--tensor-type", "shexp=q8_0"),
    *("--tensor-type", r"ffn_(gate|up|down)\.weight=q8_0"),
    *("--token-embedding-type", "q8_0"),
    *("--output-tensor-type", "q8_0"),
)
CHECKPOINT = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TEXTS = {
    "held-out-text.txt": {
        "oracle": "King James Version of 1611",
        "version": "Debian package bible-kjv-text 4.38",
        "licence": "public domain",
    },
    "held-out-code.txt": {"oracle": "CPython's Lib/", "licence": "PSF-2.0, see LICENSE-python.txt"},
    "LICENSE-python.txt": {"oracle": "CPython's LICENSE", "licence": "PSF-2.0"},
}


def convert(llama: llama_cpp.LlamaCpp, work: Path) -> str:
    """Write work/bf16.gguf, which is never kept, only described."""
    arguments = ["checkpoint", "--outtype", "bf16", "--outfile", "bf16.gguf", "--model-name", MODEL]
    llama.convert(arguments, work)
    return "convert_with_glm4.py <llama.cpp> " + " ".join(arguments)


def digest(path: Path) -> dict[str, Any]:
    """Describe a GGUF by the sha256 of the whole and of each tensor's bytes."""
    tensors = {
        t.name: {
            "type": t.tensor_type.name.lower(),
            "shape": [int(n) for n in reversed(t.shape)],
            "sha256": hashlib.sha256(t.data.tobytes()).hexdigest(),
        }
        for t in gguf.GGUFReader(path).tensors
    }
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tensors": tensors}


def quantize(llama: llama_cpp.LlamaCpp, work: Path, out: str, flags: tuple[str, ...]) -> str:
    """Write work/<out> from work/bf16.gguf as Q4_K_M with extra flags."""
    arguments = [*flags, "bf16.gguf", out, "Q4_K_M", "2"]
    llama.run("llama-quantize", arguments, work)
    return "llama-quantize " + " ".join(arguments)


def measure_importance(llama: llama_cpp.LlamaCpp, work: Path) -> str:
    """Write work/imatrix.gguf over the calibration text, with the BF16 model."""
    arguments = ["-m", "bf16.gguf", "-f", "calibration.txt", "-o", "imatrix.gguf", "-c", "512", "-t", "1"]
    llama.run("llama-imatrix", arguments, work)
    return "llama-imatrix " + " ".join(arguments)


def portray(golden: Path, commands: dict[str, str]) -> dict[str, Any]:
    """Say of every file who made it, with what version and command, and under which licence it stands."""
    versions = json.loads((golden / MODEL / "training.json").read_text())["versions"]
    table: dict[str, Any] = {
        "about": "a trained GLM-5.1 of 12.9 million parameters, and llama.cpp's files of it"
    }
    for path in sorted((golden / MODEL).iterdir()):
        if path.name in commands:
            facts = {"oracle": "llama.cpp", "version": llama_cpp.DATED, "command": commands[path.name]}
            facts |= {"machine": platform.machine(), "licence": "Apache-2.0"}
        else:
            facts = {"oracle": "transformers' GlmMoeDsaForCausalLM", "command": "python -m tools.train_tiny"}
            facts |= {"version": f"transformers {versions['transformers']}, torch {versions['torch']}"}
            facts |= {"licence": "Apache-2.0"}
        if path.name in TEXTS:
            facts |= {"version": f"CPython {versions['python']}"} | TEXTS[path.name]
        table[path.name] = manifest.describe(golden, f"{MODEL}/{path.name}", **facts)
    return table


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--work", type=Path, default=Path("build/tiny"), help="train_tiny.py's folder")
    options.add_argument("--llama", type=Path, default=Path("build/llama"), help="llama.cpp's folder")
    options.add_argument("--golden", type=Path, default=Path("golden"), help="where the result goes")
    given = options.parse_args()
    work, llama = given.work.resolve(), llama_cpp.prepare(given.llama)

    commands = {"bf16-tensors.json": convert(llama, work)}
    commands["imatrix.gguf"] = measure_importance(llama, work)
    commands["stock.gguf"] = quantize(llama, work, "stock.gguf", ())
    commands["protected.gguf"] = quantize(llama, work, "protected.gguf", PROTECTION)
    commands["imatrix-quantized.gguf"] = quantize(
        llama, work, "imatrix-quantized.gguf", ("--imatrix", "imatrix.gguf")
    )

    folder = given.golden / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in CHECKPOINT:
        shutil.copyfile(work / "checkpoint" / name, folder / name)
    for name in ("training.json", *TEXTS):
        shutil.copyfile(work / name, folder / name)
    (folder / "bf16-tensors.json").write_text(json.dumps(digest(work / "bf16.gguf"), indent=1) + "\n")
    for name in commands:
        if name.endswith(".gguf"):
            shutil.copyfile(work / name, folder / name)

    manifest.update(given.golden, MODEL, portray(given.golden, commands))
    total = sum(path.stat().st_size for path in given.golden.rglob("*") if path.is_file())
    print(f"golden/ holds {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
