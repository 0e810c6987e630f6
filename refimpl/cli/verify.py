"""refimpl verify: is this quantized file faithful to its source?"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.main import byte_count, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from refimpl.verifier.result import Report


def command(
    file: Annotated[Path, typer.Argument(help="The quantized .gguf (one shard of a split stands for all).")],
    source: Annotated[Path, typer.Option(help="Its source: an HF directory, .safetensors or BF16 .gguf.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe it must conform to: a name or a TOML file.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The imatrix it was quantized with, GGUF or .dat.")
    ] = None,
    build: Annotated[
        str,
        typer.Option(
            help="Whose compiler's bytes count as exact: strict, gcc-fma, clang-arm64; auto asks the file."
        ),
    ] = "auto",
    require: Annotated[
        str | None, typer.Option(help="'exact': fail on anything but exact and copied.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    memory: Annotated[str, typer.Option(help="Memory bound, such as 512MiB.")] = "2GiB",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Check a quantized GGUF against the BF16 checkpoint that it claims to come from.

    Reads both files once, encodes the source again and compares block by block: every tensor and every expert
    gets a verdict. PASS means faithful to the source, never safe: a faithful copy of a malicious model passes.

    Exit codes: 0 passed · 1 not · 2 usage · 3 a file that cannot be read · 4 unsupported.
    """
    from refimpl.arith.jit import announce_compiling
    from refimpl.verifier.run import verify

    start = time.monotonic()
    with progress_bar("verifying", hidden=quiet) as progress:
        if not quiet:
            announce_compiling()
        report = verify(
            file,
            source,
            recipe=recipe,
            imatrix=imatrix,
            build=build,
            require=require,
            jobs=jobs,
            memory=byte_count(memory),
            progress=progress,
        )
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        from refimpl.report.terminal import console
        from refimpl.report.verify import print_report

        print_report(report, console(), time.monotonic() - start, _peak_memory())
    raise typer.Exit(0 if report.passed else 1)


def run_and_print(file: Path, source: Path, recipe: str, console: "Console") -> "Report":
    """Verify and print the report, for the demo."""
    from refimpl.report.verify import print_report
    from refimpl.verifier.run import verify

    start = time.monotonic()
    report = verify(file, source, recipe=recipe)
    print_report(report, console, time.monotonic() - start, _peak_memory())
    return report


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes, 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    import sys

    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)
