"""Write golden/vectors/: what ggml itself encodes and decodes, so that the codecs can be tested without it.

    python -m tools.make_vectors          (needs the extra `oracle`: the library inside the xllamacpp wheel)

inputs.npz      kinds [K] and importances [I]: names; x [K, rows, n] float32; imatrix [I, n] float32, where
                importance 0 is "none" and its row means nothing
<format>.npz    encoded [K, I, rows, bytes] uint8; I = 1 where the format takes no imatrix;
                raw [R, bytes] uint8 and decoded [R, n] float32: random bytes and what they decode to, NaN and
                infinite scales among them (any NaN is as good as another)
"""

from pathlib import Path
from typing import Any

import numpy as np

from refimpl.quants.formats import CODEBOOKS, formats
from tests.weights import IMPORTANCES, KINDS, make_importance, make_weights
from tools import ggml, manifest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
ROWS, N = 2, 512
SEED = 1


def main() -> None:
    """Draw the inputs, have ggml encode and decode, write the files and their entries in the manifest."""
    (GOLDEN / "vectors").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    x = np.stack([make_weights(kind, rng, ROWS, N) for kind in KINDS])
    rows = [make_importance(name, rng, N) for name in IMPORTANCES]
    imatrix = np.stack([np.zeros(N, np.float32) if row is None else row for row in rows])
    files = {"inputs": {"kinds": list(KINDS), "importances": list(IMPORTANCES), "x": x, "imatrix": imatrix}}
    for fmt, kind in formats.items():
        if fmt == "f32" or kind in CODEBOOKS:
            continue
        weighed = rows if kind.weighed else rows[:1]
        encoded = [[ggml.quantize(group, fmt, row) for row in weighed] for group in x]
        raw = np.random.default_rng([SEED, kind.id]).integers(0, 256, (16, kind.row_bytes(N)), dtype=np.uint8)
        files[fmt] = {"encoded": np.array(encoded), "raw": raw, "decoded": ggml.dequantize(raw, fmt)}
    entries: dict[str, Any] = {
        "oracle": "ggml, the library inside the xllamacpp wheel",
        "version": ggml.VERSION,
        "command": "python -m tools.make_vectors",
        "licence": "Apache-2.0",
        "equality": "exact",
    }
    for name, arrays in files.items():
        np.savez_compressed(GOLDEN / "vectors" / f"{name}.npz", **arrays)
        entries[name] = manifest.describe(GOLDEN, f"vectors/{name}.npz")
    manifest.update(GOLDEN, "vectors", entries)


if __name__ == "__main__":
    main()
