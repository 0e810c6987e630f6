"""refimpl logits: what may follow each token."""

from pathlib import Path
from typing import Annotated, Any

import typer

from refimpl.cli.models import Cache, Dense, Engine, File, Json, Threads, load_model
from refimpl.errors import Usage


def command(
    file: File,
    tokens: Annotated[str, typer.Option(help="A list such as 3,1,4, or a .npy of integers [T] or [N, T].")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a .npy of float32 [T, V] or [N, T, V].")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest to print for each token.")] = 5,
    engine: Engine = "refimpl",
    dense: Dense = False,
    kv: Cache = None,
    float64: Annotated[bool, typer.Option("--float64", help="Compute in float64: the truth.")] = False,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Print the likeliest next tokens after each token, or write all logits.

    The rows of a .npy of [N, T] are sequences of their own, that do not see each other.

    Exit codes: 0 fine · 2 usage · 3 bad file · 4 unsupported.
    """
    import json

    import numpy as np

    from refimpl.files.replace import replacing
    from refimpl.files.tokens import read_tokens

    if output is not None and (output.suffix != ".npy" or not output.parent.is_dir()):
        raise Usage(f"{output}: logits are written as a .npy in a folder that exists")
    sequences = read_tokens(tokens)
    model = load_model(file, engine, dense, kv, threads)
    logits = np.stack([model.logits(ids, float64) for ids in sequences])
    if output is not None:
        with replacing(output) as temporary, open(temporary, "wb") as out:
            np.save(out, logits if len(logits) > 1 else logits[0])
    ranked = np.argsort(-logits, axis=2, kind="stable")[..., :top]
    rows = [
        ({"sequence": i} if len(sequences) > 1 else {})
        | {"token": int(sequences[i, t]), "next": [_name(logits[i, t], n) for n in ranked[i, t]]}
        for i, t in np.ndindex(*sequences.shape)
    ]
    if as_json:
        print(json.dumps({"engine": engine, "float64": float64, "rows": rows}, indent=1))
    elif output is None:
        for (i, t), row in zip(np.ndindex(*sequences.shape), rows, strict=True):
            if len(sequences) > 1 and t == 0:
                print(f"sequence {i}")
            best = "  ".join(f"{n['token']}: {n['logit']:.4f}" for n in row["next"])
            print(f"{t:6} {row['token']:7}  {best}")


def _name(logits: Any, token: Any) -> dict[str, int | float]:
    return {"token": int(token), "logit": float(logits[token])}
