"""refimpl loops: does a text end in a loop?"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="UTF-8 text; - is standard input.")] = Path("-"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Tell whether a text ends in a loop, as a degenerated model writes it.

    A unit of 1 to 400 characters that holds a letter or a digit must repeat over at least 4 units and 120
    characters, and reach the end of the text or cover four fifths of it (rule version 1). A table, a list of
    equal numbers or a refrain is no loop, for the text goes on after it.

    Exit codes: 0 no loop · 1 it loops · 2 usage · 3 a file that cannot be read.
    """
    from refimpl.errors import BadFile, Usage
    from refimpl.reap import loops
    from refimpl.report.terminal import clean

    name = "<stdin>" if str(file) == "-" else str(file)
    try:
        raw = (
            sys.stdin.buffer.read(4 * loops.LARGEST + 1) if name == "<stdin>" else _read(file, loops.LARGEST)
        )
        text = raw.decode("utf-8")
    except OSError as error:
        raise BadFile(name, None, (error.strerror or str(error)).lower()) from None
    except UnicodeDecodeError as error:
        raise BadFile(name, error.start, "the text is not UTF-8") from None
    if len(text) > loops.LARGEST:
        raise Usage(f"{name}: more than {loops.LARGEST:,} characters")
    loop = loops.find_loop(text)
    if as_json:
        found = None if loop is None else loop.to_json()
        print(json.dumps({"version": loops.VERSION, "characters": len(text), "loop": found}, indent=1))
    elif loop is None:
        print(f"no loop in {len(text):,} characters")
    else:
        print(
            f"loops: from character {loop.start:,} to {loop.stop:,} of {len(text):,}, "
            f"{loop.repeats:.1f} times {clean(repr(loop.unit), 120)}"
        )
    raise typer.Exit(0 if loop is None else 1)


def _read(file: Path, most: int) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(4 * most + 1)
