"""refimpl logits: what may follow each token."""

from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.models import Cache, Dense, Engine, File, Json, Threads, load_model, read_tokens
from refimpl.errors import Usage


def command(
    file: File,
    tokens: Annotated[str, typer.Option(help="A .npy of integers, or a list such as 3,1,4.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a .npy of float32 [T, V].")
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

    Exit codes: 0 fine · 2 usage · 3 bad file · 4 unsupported.
    """
    import json

    import numpy as np

    ids = read_tokens(tokens)
    model = load_model(file, engine, dense, kv, threads)
    logits = model.logits(ids, float64)
    if output is not None:
        if output.suffix != ".npy":
            raise Usage(f"{output}: logits are written as .npy")
        np.save(output, logits)
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    rows = [
        {"token": token, "next": [{"token": int(i), "logit": float(row[i])} for i in best]}
        for token, row, best in zip(ids, logits, ranked, strict=True)
    ]
    if as_json:
        print(json.dumps({"engine": engine, "float64": float64, "rows": rows}, indent=1))
    elif output is None:
        for t, (token, row, best) in enumerate(zip(ids, logits, ranked, strict=True)):
            print(f"{t:6} {token:7}  " + "  ".join(f"{i}: {row[i]:.4f}" for i in best))
