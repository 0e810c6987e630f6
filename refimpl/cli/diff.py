"""refimpl diff: two models, tensor by tensor."""

import json
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.main import progress_bar


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A GGUF, checkpoint directory or .safetensors.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one, of any of these kinds.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Compare two models tensor by tensor, after the transforms between a checkpoint and a GGUF.

    Says of each: the same; the same values in another type; different, how much and where; only in A; only in B.
    Of two GGUFs the keys are compared, too.

    Exit codes: 0 nothing differs (between a checkpoint and a GGUF: the values do not) · 1 something does · 2 usage ·
    3 a file that cannot be read · 4 unsupported.
    """
    from refimpl.writers.diff import diff

    with progress_bar("comparing", hidden=quiet) as progress:
        found = diff(a, b, jobs, progress)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        from refimpl.report.terminal import console
        from refimpl.report.writers import print_difference

        print_difference(found, console())
    raise typer.Exit(0 if found.same else 1)
