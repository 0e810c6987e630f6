"""refimpl quantize: a model by a recipe, with llama-quantize's bytes."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.main import progress_bar


def command(
    source: Annotated[
        Path, typer.Argument(help="A GGUF of F32, F16 and BF16, or a GLM-5.1 checkpoint directory.")
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT.gguf", help="The file to write; needless with --dry-run.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A mix of llama.cpp's, such as q4_k_m, or a TOML file.")] = "",
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix, GGUF or legacy .dat.")] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=TYPE",
            help="A type for tensors whose name holds a match of PATTERN; may be repeated, the first wins.",
        ),
    ] = None,
    build: Annotated[str, typer.Option(help="Whose compiler's bytes: see README.")] = "strict",
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback/--no-fallback",
            help="Take another type, or fail, where rows are no whole blocks of the recipe's.",
        ),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Price the result; write nothing.")] = False,
    name: Annotated[str | None, typer.Option(help="general.name, of a checkpoint's GGUF.")] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp/--no-mtp", help="Keep a checkpoint's multi-token-prediction block.")
    ] = True,
    provenance: Annotated[
        bool,
        typer.Option(
            "--provenance/--no-provenance", help="Add the key refimpl.provenance: who made it, from what."
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.gguf.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Quantize a GLM-5.1 model by a recipe, with llama-quantize's bytes.

    From a GGUF or straight from a Hugging Face checkpoint; with --no-provenance the whole file is the one that
    llama-quantize writes. OUT.gguf appears when it is whole; until then it is called .OUT.gguf.partial. Bytes do
    not depend on --jobs.

    Exit codes: 0 written, or priced · 2 usage, an unwanted fallback, a missing imatrix · 3 a file that cannot
    be read · 4 unsupported.
    """
    from refimpl.arith.jit import announce_compiling
    from refimpl.errors import Usage
    from refimpl.writers.quantize import quantize

    if not recipe:
        raise Usage("quantize needs --recipe: a mix of llama.cpp's, such as q4_k_m, or a TOML file")
    if target is None and not dry_run:
        raise Usage("quantize needs OUT.gguf, or --dry-run")
    start = time.monotonic()
    with progress_bar("quantizing", hidden=quiet or dry_run) as progress:
        if not quiet and not dry_run:
            announce_compiling()
        done = quantize(
            source,
            None if dry_run else target,
            recipe,
            imatrix=imatrix,
            build=build,
            tensor_types=tensor_type or (),
            fallback=fallback,
            name=name,
            mtp=mtp,
            provenance=provenance,
            force=force,
            resume=resume,
            jobs=jobs,
            progress=progress,
        )
    if as_json:
        print(json.dumps(done.to_json(), indent=1))
        return
    from refimpl.report.terminal import console
    from refimpl.report.writers import print_quantized

    print_quantized(done, console(), time.monotonic() - start)
