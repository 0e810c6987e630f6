"""refimpl compare: the first divergence between two traces."""

from pathlib import Path
from typing import Annotated, Any

import typer

from refimpl.cli.models import Cache, Dense, Json, load_model


def command(
    a: Annotated[Path, typer.Argument(help="A trace to compare with: .safetensors, or a folder of .npy.")],
    b: Annotated[Path, typer.Argument(help="The trace that is judged.")],
    model: Annotated[
        Path | None, typer.Option(help="The model that B ran: every operation is replayed in float64.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Whose conventions B follows; by default what its metadata says, or refimpl's."),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(
            help="B's order of products with quantized inputs: generic, generic-fma, avx2, tiled or ggml."
        ),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="B's inputs of quantized matrices: float, or ggml for quantized ones.")
    ] = None,
    dense: Dense = False,
    kv: Cache = None,
    plot: Annotated[
        Path | None, typer.Option(help="A .png of the error from layer to layer (extra `plot`).")
    ] = None,
    all_rows: Annotated[bool, typer.Option("--all", help="Print every activation.")] = False,
    as_json: Json = False,
) -> None:
    """Find the first wrong operation of trace B, and tell it from what it caused.

    Every operation of B is evaluated again in float64 on B's own recorded inputs and must lie within its own bound: the
    first that does not is where the error was made. Different but justified selections of keys and experts are flips,
    and fail nothing. Without --model only distances from A are known, and any difference fails.

    Traces: of `refimpl trace`, of Hugging Face forward hooks, of llama.cpp's eval callback, folders of .npy; B may be
    the log of llama-eval-callback, of which what it prints and the sums are compared.

    Exit codes: 0 nothing is wrong · 1 something is · 2 usage · 3 bad file · 4 unsupported.
    """
    import json

    from refimpl.crosscheck.compare import compare
    from refimpl.crosscheck.trace import read_trace
    from refimpl.dots import ORDERS
    from refimpl.errors import Usage

    left, right = read_trace(a), read_trace(b)
    loaded = None
    if model is not None:
        for value, known in (
            (activations, ("float", "ggml")),
            (order, (*ORDERS, "ggml")),
        ):
            if value is not None and value not in known:
                raise Usage(f"{value!r} is not one of {', '.join(known)}")
        given = {"activations": activations, "order": order}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        loaded = load_model(model, engine or right.metadata.get("engine", "refimpl"), dense, kv, **changes)
    found = compare(left, right, loaded)
    if plot is not None:
        from refimpl.report.plots import plot_comparison

        plot_comparison(found, plot)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        from refimpl.report.compare import print_comparison
        from refimpl.report.terminal import console

        print_comparison(found, console(), all_rows)
    raise typer.Exit(0 if found.passed else 1)
