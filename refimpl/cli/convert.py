"""refimpl convert: a Hugging Face checkpoint as one GGUF."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from refimpl.cli.main import progress_bar


def command(
    source: Annotated[Path, typer.Argument(help="A GLM-5.1 checkpoint directory, with tokenizer.json.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    outtype: Annotated[str, typer.Option(help="bf16, f16 or f32; norms and the router stay F32.")] = "bf16",
    name: Annotated[
        str | None, typer.Option(help="general.name; by default found as convert_hf_to_gguf finds it.")
    ] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp/--no-mtp", help="Keep the multi-token-prediction block.")
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
    """Write a GLM-5.1 checkpoint as a GGUF of BF16, F16 or F32, as convert_hf_to_gguf does.

    Keys, tensor order, tokenizer and bytes are llama.cpp's; with --no-provenance the whole file is. Weights stream
    through in pieces of a few MB. OUT.gguf appears when it is whole; until then it is called .OUT.gguf.partial.

    Exit codes: 0 written · 2 usage · 3 a file that cannot be read · 4 unsupported.
    """
    from refimpl.writers.convert import convert

    start = time.monotonic()
    with progress_bar("converting", hidden=quiet) as progress:
        done = convert(
            source,
            target,
            outtype,
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
    from refimpl.report.writers import print_converted

    print_converted(done, console(), time.monotonic() - start)
