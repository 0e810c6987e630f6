"""refimpl native: a ggml shared library against the reference."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from refimpl.crosscheck.native import Judgement


def command(
    library: Annotated[
        str, typer.Argument(help="A shared library, or an installed package that carries one.")
    ],
    only: Annotated[str, typer.Option(help="Judge only functions whose name contains this.")] = "",
    blocks: Annotated[int, typer.Option(min=1, max=1_000_000, help="Blocks of the largest trial.")] = 100_000,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds that one call may take.")] = 60.0,
    reproducers: Annotated[
        Path, typer.Option(help="Folder for the programs that show what is wrong; made when needed.")
    ] = Path("native-reproducers"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Judge a ggml shared library: every encoder, decoder and dot product that it exports.

    Each function runs in a process of its own on random and on edge inputs: steps of 0, subnormal and at
    fp16's limit, codes and scales all 0 and all 1, one block, odd counts, many blocks, pointers of the least
    alignment. Its verdict: "same bits" as the definition (encoders: as one of the builds named); "inside the
    bound" that rounding can be proven to stay in; "wrong", with the smallest input found, saved as a Python
    program that needs ctypes alone; "crashed", which a hang is too; "absent". The library's code is run on
    this machine with your rights, so judge only what you would run anyway; a package is not imported.
    The JSON Schema is refimpl/report/schemas/native.json.

    Exit codes: 0 nothing is wrong · 1 something is · 2 usage · 3 a library that cannot be loaded · 4 a
    library without a function of ggml's.
    """
    from refimpl.arith.jit import announce_compiling
    from refimpl.crosscheck.native import judge
    from refimpl.report.native import print_judgements
    from refimpl.report.progress import item_bar
    from refimpl.report.terminal import console

    if not quiet:
        announce_compiling()
    with item_bar("judging", hidden=quiet) as progress:

        def tell(judgement: "Judgement", done: int, of: int) -> None:
            progress(done, of, judgement.symbol)

        report = judge(library, reproducers, blocks, limit, only, tell)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_judgements(report, console())
    raise typer.Exit(0 if report.passed else 1)
