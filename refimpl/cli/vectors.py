"""refimpl vectors: conformance vectors for runners in other languages."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it must not exist yet.")],
    compact: Annotated[
        bool, typer.Option("--compact", help="A few blocks and rows of each case only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Write conformance vectors: inputs and the bytes or bits that they must give, for any language.

    For every format: decode, encode in each build (with and without an imatrix), encode activations, and dot
    products in each named order, on random and on edge inputs. index.tsv is a flat table of cases, with the
    offsets of their inputs and results in .safetensors files; manifest.json says the same with shapes, sha256
    and what each case pins down; README.md there shows how to write a runner. --json prints a summary of the
    schema refimpl/report/schemas/vectors.json.

    Exit codes: 0 written · 2 usage, also a folder that exists.
    """
    from refimpl.arith.jit import announce_compiling
    from refimpl.crosscheck.vectors import write_vectors
    from refimpl.report.progress import item_bar

    if not quiet:
        announce_compiling()
    with item_bar("writing", hidden=quiet) as progress:
        manifest = write_vectors(out, compact, tell=lambda name, done, of: progress(done, of, name))
    size = sum(file["bytes"] for file in manifest["files"].values())
    summary = {key: manifest[key] for key in ("refimpl", "edition", "compact", "files")}
    if as_json:
        print(json.dumps({**summary, "folder": str(out), "cases": len(manifest["cases"])}, indent=1))
    else:
        from refimpl.report.terminal import clean, gigabytes

        files = len(manifest["files"])
        print(f"{clean(str(out))}: {len(manifest['cases']):,} cases in {files} files, {gigabytes(size)}")
