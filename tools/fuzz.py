"""Mutate small valid files and open them: nothing but a RefimplError may come out, and soon.

    python tools/fuzz.py [--seconds 60] [--seed 0] [--keep DIR]

A case is a kind of file, a seed and a number; the same three give the same bytes. A failure is kept as a file
and ends the run with exit code 1.
"""

import argparse
import json
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

import refimpl
from refimpl.errors import RefimplError
from refimpl.files import imatrix, names
from refimpl.files.gguf import GGUFValueType as V
from refimpl.files.gguf import write
from refimpl.files.metadata import Array
from refimpl.quants.formats import BF16, F32, Q4_K, Q8_0

ODD = [0, 1, 2, 3, 7, 8, 9, 12, 31, 32, 33, 63, 64, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31,
2**32 - 1,
       2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]  # fmt: skip
JSON_ODD = [
    b"0",
    b"-1",
    b"1.5",
    b"true",
    b"null",
    b'"x"',
    b"[]",
    b"{}",
    b"9" * 30,
    b"1e9",
    b"NaN",
    b'"F16"',
    b'"../x"',
]
SECONDS = 2.0


def make_gguf(folder: Path) -> Path:
    """A GGUF with every value type, hyperparameters, a vocabulary, nested arrays and three formats."""
    numbers = {f"n.{kind.name.lower()}": (kind, 1) for kind in V if kind not in (V.STRING, V.ARRAY)}
    metadata = numbers | {
        "general.architecture": (V.STRING, "glm-dsa"), "general.alignment": (V.UINT32, 32),
        "glm-dsa.block_count": (V.UINT32, 3), "glm-dsa.expert_count": (V.UINT32, 4), "long": (V.STRING,
        "é" * 300),
        "tokenizer.ggml.tokens": (V.ARRAY, ["a", "b", "ç", ""]), "nested": (V.ARRAY, [[[1], [2, 3]],
        [["x"]]]),
        "bools": (V.ARRAY, [True, False]), "floats": (V.ARRAY, np.ones(3)),
    }  # fmt: skip
    tensors = [("blk.0.a.weight", (2, 2, 256), Q4_K, [bytes(576)]), ("b", (3, 64), Q8_0, [bytes(204)]),
               ("c", (7,), F32, [bytes(28)]), ("d", (2, 3), BF16, [bytes(12)])]  # fmt: skip
    write(folder / "a.gguf", metadata, tensors)
    return folder / "a.gguf"


def make_shard(folder: Path) -> Path:
    """The second of two shards; the first lies beside it and is not mutated."""
    for i in range(2):
        metadata = {
            "split.no": (V.UINT16, i),
            "split.count": (V.UINT16, 2),
            "split.tensors.count": (V.INT32, 2),
        }
        write(folder / f"s-{i + 1:05}-of-00002.gguf", metadata, [(f"t{i}", (4,), F32, [bytes(16)])])
    return folder / "s-00002-of-00002.gguf"


def make_safetensors(folder: Path) -> Path:
    """A .safetensors of three tensors."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [32, 33]},
    }
    raw = json.dumps(header).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(33))
    return folder / "a.safetensors"


def make_index(folder: Path) -> Path:
    """The index of a directory with one shard and a config."""
    shard = make_safetensors(folder)
    config = {"model_type": "glm_moe_dsa", "hidden_size": 32, "mlp_layer_types": ["dense", "sparse"]}
    (folder / "config.json").write_text(json.dumps(config))
    mapped = {"metadata": {"total_size": 33}, "weight_map": dict.fromkeys("abc", shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(mapped))
    return folder / "model.safetensors.index.json"


def make_config(folder: Path) -> Path:
    """The config.json of that directory."""
    make_index(folder)
    return folder / "config.json"


def make_imatrix(folder: Path) -> Path:
    """An imatrix in GGUF."""
    keys = {"imatrix.datasets": (V.ARRAY, ["a"]), "imatrix.chunk_count": (V.UINT32, 2),
            "imatrix.chunk_size": (V.UINT32, 512)}  # fmt: skip
    tensors = [
        ("w.in_sum2", (2, 4), F32, [np.ones(8, "<f4")]),
        ("w.counts", (2, 1), F32, [np.ones(2, "<f4")]),
    ]
    write(folder / "imatrix.gguf", keys, tensors)
    return folder / "imatrix.gguf"


def make_legacy(folder: Path) -> Path:
    """A legacy imatrix."""
    entry = struct.pack("<i", 1) + b"w" + struct.pack("<ii", 3, 4) + np.ones(4, "<f4").tobytes()
    (folder / "imatrix.dat").write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 1) + b"t")
    return folder / "imatrix.dat"


def use_model(path: Path) -> None:
    """Open a model and read all of it: metadata, tensors, hyperparameters."""
    with refimpl.open(path if path.suffix != ".json" else path.parent) as model:
        for value in getattr(model, "metadata", {}).values():
            use_value(value)
        for name, tensor in model.tensors.items():
            if tensor.nbytes < 1 << 20:
                try:
                    model.read(name)
                except RefimplError:
                    continue
        hp = names.hparams(model)
        if hp.layers < 100:
            names.expected(hp)


def use_value(value: object) -> None:
    """Decode a value and, in arrays, all below it."""
    if isinstance(value, Array):
        for element in value:
            use_value(element)


def use_imatrix(path: Path) -> None:
    """Open an imatrix, read every entry, look for problems."""
    with imatrix.read(path) as matrix:
        for name in matrix:
            matrix.get(name)
        list(matrix.problems)


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], None]]] = {
    "gguf": (make_gguf, use_model), "shard": (make_shard, use_model), "safetensors": (make_safetensors,
    use_model),
    "index": (make_index, use_model), "config": (make_config, use_model), "imatrix": (make_imatrix,
    use_imatrix),
    "legacy": (make_legacy, use_imatrix),
}  # fmt: skip


def mutate(raw: bytes, random: np.random.Generator) -> bytes:
    """One to four changes: bits, bytes, odd numbers, cuts, copies and moves of pieces, odd JSON values."""
    out = bytearray(raw)
    for _ in range(random.integers(1, 5)):
        at, kind = int(random.integers(0, len(out) + 1)), random.integers(0, 9)
        length = int(random.choice([1, 2, 4, 8, 16, 40]))
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(random.integers(0, 8))
        elif kind == 1:
            out[at : at + 1] = random.bytes(1)
        elif kind in (2, 3):
            size = int(random.choice([1, 2, 4, 8]))
            odd = ODD[random.integers(0, len(ODD))] % (1 << 8 * size)
            out[at : at + size] = odd.to_bytes(size, "little")
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            del out[at : at + length]
        elif kind == 6:
            out[at:at] = out[at : at + length]
        elif kind == 7:
            start = int(random.integers(0, len(out) + 1))
            out[at : at + length] = out[start : start + length]
        else:
            out[at : at + int(random.integers(0, 9))] = JSON_ODD[random.integers(0, len(JSON_ODD))]
        if not out:
            break
    return bytes(out)


def prepare(folder: Path) -> dict[str, tuple[Path, bytes]]:
    """The valid files, each kind in its own directory, and their bytes."""
    made = {}
    for kind, (make, _) in KINDS.items():
        (folder / kind).mkdir()
        path = make(folder / kind)
        made[kind] = path, path.read_bytes()
    return made


def run_case(kind: str, path: Path, raw: bytes) -> str | None:
    """Open and use a mutated file; return the traceback of what should not have happened."""
    path.write_bytes(raw)
    start = time.process_time()
    try:
        KINDS[kind][1](path)
    except RefimplError:
        pass
    except Exception:  # whatever else comes out is what we look for
        return traceback.format_exc()
    seconds = time.process_time() - start
    return None if seconds < SECONDS else f"it took {seconds:.1f} s"


def run(seconds: float, seed: int, keep: Path) -> str:
    """Run cases of all kinds in turn until the time is up; return a summary. Trouble exits."""
    end, number = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(Path(folder))
        while time.monotonic() < end:
            for kind, (path, valid) in made.items():
                raw = mutate(valid, np.random.default_rng([seed, number, *kind.encode()]))
                trouble = run_case(kind, path, raw)
                if trouble is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{kind}-{seed}-{number}").write_bytes(raw)
                    raise SystemExit(f"{keep / f'{kind}-{seed}-{number}'}\n{trouble}")
            number += 1
    return f"{number:,} mutations of each of {len(KINDS)} kinds of file: only RefimplError came out"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    print(run(options.seconds, options.seed, options.keep))


if __name__ == "__main__":
    main()
