"""refimpl selftest: every must-fail control, on this machine."""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the summary only.")] = False,
) -> None:
    """Break the embedded model in every known way, and check that verify names the damage.

    Takes under a minute; needs nothing but the installed package.

    Exit codes: 0 every control holds · 1 one does not.
    """
    from rich.text import Text

    from refimpl.arith.jit import announce_compiling
    from refimpl.report.terminal import console
    from refimpl.verifier.controls import run_controls

    out = console()
    out.quiet = as_json
    announce_compiling()
    results = []
    with tempfile.TemporaryDirectory(prefix="refimpl-selftest-") as scratch:
        for name, what, problem in run_controls(Path(scratch)):
            results.append({"control": name, "what": what, "holds": problem is None, "problem": problem})
            if problem is not None:
                out.print(Text("FAILED  ", "bold red"), f"{name}: {what}\n        {problem}", sep="")
            elif not quiet:
                out.print(Text("ok      ", "green"), what, sep="")
    failed = sum(not r["holds"] for r in results)
    if as_json:
        print(json.dumps({"passed": failed == 0, "controls": results}, indent=1))
    out.print(f"{len(results) - failed} controls hold, {failed} failed", style="bold")
    raise typer.Exit(1 if failed else 0)
