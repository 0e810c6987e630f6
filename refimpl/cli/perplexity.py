"""refimpl perplexity: how well a model predicts a text, and how far it is from another."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.cli.main import progress_bar
from refimpl.cli.models import Cache, Dense, Engine, File, Json, Threads, load_model
from refimpl.errors import BadFile

if TYPE_CHECKING:
    from refimpl.model.perplexity import Scores
    from refimpl.report.progress import Progress


def command(
    file: File,
    text: Annotated[
        list[Path], typer.Option(help="A UTF-8 text; may be given several times, each is a row.")
    ],
    base: Annotated[
        Path | None, typer.Option(help="A model to compare with: KL divergence, top-1 agreement.")
    ] = None,
    context: Annotated[int, typer.Option("-c", "--context", min=4, help="Tokens of a piece of text.")] = 512,
    chunks: Annotated[int, typer.Option(min=0, help="Pieces of each text at most; 0: all.")] = 0,
    engine: Engine = "refimpl",
    dense: Dense = False,
    kv: Cache = None,
    threads: Threads = 1,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure perplexity, and KL divergence and top-1 agreement against a base model.

    Counted like llama-perplexity: pieces of --context tokens that do not overlap, of which the second half is
    predicted; errors are standard errors of the mean. Text has no prefix.

    Exit codes: 0 fine · 2 usage · 3 bad file · 4 unsupported.
    """
    from refimpl.model.perplexity import join, score_pieces
    from refimpl.model.tokenizer import read_tokenizer

    model = load_model(file, engine, dense, kv, threads)
    other = None if base is None else load_model(base, engine, dense, kv, threads)
    tokenizer, rows = read_tokenizer(model.weights.source), {}
    for path in text:
        whole = _read(path)
        ids = tokenizer.encode(whole)
        ids = ids[: chunks * context] if chunks else ids
        with progress_bar(path.name, hidden=quiet or as_json) as progress:
            parts = _watch(
                score_pieces(model, ids, context, other), len(ids) // context, len(whole), progress
            )
        rows[str(path)] = join(parts).to_json()
    if as_json:
        print(json.dumps({"engine": engine, "context": context, "texts": rows}, indent=1))
    else:
        for name, found in rows.items():
            _print(name, found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, None, f"no UTF-8 text: {error}") from None


def _watch(pieces: Any, count: int, size: int, progress: "Progress") -> list["Scores"]:
    found = []
    for part in pieces:
        found.append(part)
        progress(len(found) * size // count, size)
    return found


def _print(name: str, found: dict[str, Any]) -> None:
    from refimpl.report.terminal import clean

    print(f"{clean(name)}: {found['tokens']:,} tokens predicted")
    print(
        f"  perplexity   {found['perplexity']:.4f} ± {found['error']:.4f}   {found['bits_per_token']:.4f} bits a token"
    )
    if "kl" in found:
        kl, base, top = found["kl"], found["base"], found["top1"]
        ratio = found["perplexity"] / base["perplexity"]
        print(f"  of the base  {base['perplexity']:.4f} ± {base['error']:.4f}   ratio {ratio:.5f}")
        print(
            f"  KL           {kl['mean']:.6f} ± {kl['error']:.6f}   median {kl['median']:.6f}"
            f"   99 % {kl['p99']:.6f}   max {kl['max']:.4f}"
        )
        print(f"  same top-1   {100 * top['share']:.2f} ± {100 * top['error']:.2f} %")
