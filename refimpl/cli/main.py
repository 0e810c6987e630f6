"""The command line: finds the command, turns errors into one line and an exit code.

A command is one module, refimpl/cli/<name>.py, with a function `command` whose signature and docstring typer
reads, and which leaves with `raise typer.Exit(code)` unless the code is 0; a family of commands (`reap`) is a
typer.Typer of that name. To add one, write that module and
one line in COMMANDS: its name, and the first line of the docstring (a test holds them together). The module
is imported only when the command is called, and its heavy imports belong inside the function; so is `--help`.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from refimpl import __version__
from refimpl.errors import BadFile, RefimplError, Usage
from refimpl.report.progress import progress_bar

__all__ = ["byte_count", "main", "progress_bar"]

COMMANDS = {
    "demo": "The whole story on the embedded model: quantize, verify, corrupt one bit, verify again, explain.",
    "inspect": "Say what a model file holds: header, sizes, census, recipe, parameters and their labels.",
    "verify": "Check a quantized GGUF against the BF16 checkpoint that it claims to come from.",
    "convert": "Write a GLM-5.1 checkpoint as a GGUF of BF16, F16 or F32, as convert_hf_to_gguf does.",
    "quantize": "Quantize a GLM-5.1 model by a recipe, with llama-quantize's bytes.",
    "slice": "Cut a small, whole model out of a big file, without touching the rest.",
    "diff": "Compare two models tensor by tensor, after the transforms between a checkpoint and a GGUF.",
    "explain": "Show one block byte by byte: fields, scales, codes, values, and the source's beside them.",
    "run": "Generate text or tokens, streaming.",
    "trace": "Write every named activation of a forward pass.",
    "compare": "Find the first wrong operation of trace B, and tell it from what it caused.",
    "logits": "Print the likeliest next tokens after each token, or write all logits.",
    "perplexity": "Measure perplexity, and KL divergence and top-1 agreement against a base model.",
    "reap": "Score a mixture's experts, select, prune and audit: which ones can a model lose?",
    "loops": "Tell whether a text ends in a loop, as a degenerated model writes it.",
    "native": "Judge a ggml shared library: every encoder, decoder and dot product that it exports.",
    "vectors": "Write conformance vectors: inputs and the bytes or bits that they must give, for any language.",
    "selftest": "Break the embedded model in every known way, and check that verify names the damage.",
}

_CODES = {1: "failed", 2: "usage", 3: "bad-file", 4: "unsupported"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if args is None else list(args)))


def run(args: list[str]) -> int:
    """Run the command line; the exit code (0 fine, 1 failed, 2 usage, 3 bad file, 4 unsupported, 130)."""
    try:
        wanted = next((arg for arg in args if not arg.startswith("-")), None)
        code = _app(wanted)(args or ["--help"], prog_name="refimpl", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _fail(error.format_message(), args, Usage.exit_code)
    except RefimplError as error:
        return _fail(str(error), args, error.exit_code, error)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read us has gone; nothing more can be written, also not by the interpreter at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def describe_error(error: RefimplError) -> dict[str, Any]:
    """The object that `--json` prints under "error" when the exit code is 2, 3 or 4."""
    where = {"file": error.path, "offset": error.offset} if isinstance(error, BadFile) else {}
    message = error.defect if isinstance(error, BadFile) else str(error)
    return {"code": _CODES[error.exit_code], "file": None, "offset": None, **where, "message": message}


def byte_count(text: str) -> int:
    """Bytes from text such as "2GiB", "500MB" or "4096"."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([KMG]?I?)B?\s*", text.upper(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise Usage(f"{text!r} is no size such as 2GiB, 500MB or 4096")
    return int(float(match[1]) * _UNITS[match[2]])


def _app(wanted: str | None) -> typer.Typer:
    """The app, with the wanted command in full and the others as lines of the help."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_root)
    for name, line in COMMANDS.items():
        if name == wanted:
            command = import_module(f"refimpl.cli.{name}").command
            if isinstance(command, typer.Typer):  # a family of commands
                app.add_typer(command, name=name, help=_reflow(command.info.help or ""))
            else:
                app.command(name, help=_reflow(command.__doc__))(command)
        else:
            app.command(name, help=line)(_not_wanted)
    return app


def _reflow(doc: str) -> str:
    """A docstring's paragraphs, each as one line: the help breaks lines by itself."""
    return "\n\n".join(" ".join(part.split()) for part in doc.split("\n\n"))


def _not_wanted() -> None:
    """Stands for a command that was not called."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


_VERSION = typer.Option(
    "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
)


def _root(version: Annotated[bool, _VERSION] = False) -> None:
    """Reference for GGUF k-quants and GLM-5.1, and the verifier of quantized models that stands on it.

    Exit codes: 0 fine · 1 a check failed · 2 usage · 3 bad file · 4 unsupported · 130 interrupted.
    """


def _fail(message: str, args: list[str], code: int, error: RefimplError | None = None) -> int:
    """Say what is wrong: as JSON on stdout where that was asked for, always on stderr."""
    from refimpl.report.terminal import clean

    if "--json" in args and code in (2, 3, 4):
        told = describe_error(error if error is not None else Usage(message))
        print(json.dumps({"error": told}, indent=1))
    hint = "\ntry: refimpl --help" if error is None else ""
    print(f"refimpl: {clean(message, 2000)}{hint}", file=sys.stderr)
    return code
