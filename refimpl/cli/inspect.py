"""refimpl inspect: what a model file holds."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[
        Path, typer.Argument(help="A .gguf (a shard stands for its split), .safetensors or HF folder.")
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="List every metadata key and every tensor, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Say what a model file holds: header, sizes, census, recipe, parameters and their labels.

    Reads headers only, so a file of any size takes about a second. The census counts tensors by class, with
    types, bytes and bits per weight. Active parameters are those that one token meets, without the embedding;
    labels such as "555B-A14B" in names are held against the tensors. Shapes are rows first, but with --raw as
    GGUF has them. The JSON Schema is refimpl/report/schemas/inspect.json.

    Exit codes: 0 fine · 1 metadata and tensors disagree · 2 usage · 3 bad file, also one whose regions are
    short, overlapping, misplaced or past the end · 4 unsupported.
    """
    from refimpl.cli.main import describe_error
    from refimpl.verifier.inspection import inspect

    found = inspect(file, raw)
    if as_json:
        document = found.to_json()
        if found.error is not None:
            document["error"] = describe_error(found.error)
        print(json.dumps(document, indent=1))
    else:
        from refimpl.report.inspect import print_inspection
        from refimpl.report.terminal import console

        print_inspection(found, console())
    raise typer.Exit(found.exit_code)
