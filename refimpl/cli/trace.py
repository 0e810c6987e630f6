"""refimpl trace: every named activation of a forward pass."""

from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.models import Cache, Dense, Engine, File, Threads, Tokens, layer_range, load_model
from refimpl.errors import BadFile, Usage


def command(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace to write, .safetensors.")],
    tokens: Tokens = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers A:B only (half-open): hidden states in, hidden states out.")
    ] = None,
    hidden: Annotated[
        Path | None, typer.Option(help="Hidden states [T, D] that go into the first of them, a .npy.")
    ] = None,
    engine: Engine = "refimpl",
    dense: Dense = False,
    kv: Cache = None,
    float64: Annotated[bool, typer.Option("--float64", help="Compute in float64: the truth.")] = False,
    threads: Threads = 1,
    plot: Annotated[
        Path | None,
        typer.Option(help="A .png of expert usage and of what each query selected (extra `plot`)."),
    ] = None,
) -> None:
    """Write every named activation of a forward pass.

    The file is a .safetensors with one entry for each activation, named after llama.cpp's callbacks ("attn_norm-0");
    its metadata says which file (sha256), tokens, engine and versions made it. With --layers only those layers' bytes
    are read, so that one layer of a huge file can be checked alone.

    Exit codes: 0 fine · 2 usage · 3 bad file · 4 unsupported.
    """
    import numpy as np

    from refimpl.crosscheck.trace import describe, write_trace
    from refimpl.files.tokens import read_tokens

    if (tokens is None) == (hidden is None):
        raise Usage("give either --tokens or --hidden")
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise Usage(f"{output}: a trace is a .safetensors in a folder that exists")
    model = load_model(file, engine, dense, kv, threads, layers=layer_range(layers))
    ids = None if tokens is None else read_tokens(tokens)
    if ids is not None and len(ids) != 1:
        raise Usage(f"{tokens} holds {len(ids)} sequences; a trace is of one: give one row")
    states = None
    if hidden is not None:
        try:
            states = np.load(hidden, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadFile(hidden, None, f"no array of hidden states: {error}") from None
    values = model.trace(None if ids is None else ids[0], states, float64)
    write_trace(
        output,
        values,
        describe(model, engine, None if ids is None else ids[0].tolist(), whole=layers is None),
    )
    if plot is not None:
        from refimpl.report.plots import plot_trace

        plot_trace(values, plot)
    print(f"{output}: {len(values)} activations of {len(next(iter(values.values())))} tokens")
