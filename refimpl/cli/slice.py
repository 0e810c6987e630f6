"""refimpl slice: some layers and experts of a big model, as a small one."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.main import progress_bar


def command(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF, or a checkpoint directory.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    layers: Annotated[
        str | None,
        typer.Option(help='Layers to keep, half-open ranges such as "0,3:5"; the last is an MTP block.'),
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help='Routed experts to keep in every layer, such as "0:8".')
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Cut a small, whole model out of a big file, without touching the rest.

    Layers are numbered anew, router rows and bias follow the experts, and the key refimpl.provenance says which
    layers and experts of which file these are. A GGUF's bytes are copied; a checkpoint's weights become BF16.

    Exit codes: 0 written · 2 usage · 3 a file that cannot be read · 4 unsupported.
    """
    from refimpl.writers.slice import slice_model

    start = time.monotonic()
    with progress_bar("slicing", hidden=quiet) as progress:
        done = slice_model(source, target, layers, experts, force, jobs, progress)
    if as_json:
        print(json.dumps(done.to_json(), indent=1))
        return
    from refimpl.report.terminal import console
    from refimpl.report.writers import print_sliced

    print_sliced(done, console(), time.monotonic() - start)
