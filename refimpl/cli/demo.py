"""refimpl demo: the whole story on the embedded model."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

FILE, RECIPE = "protected.gguf", "q4_k_m-protected"
VICTIM, EXPERT, BLOCK = "blk.1.ffn_up_exps.weight", 5, 77


def command(
    keep: Annotated[
        Path | None, typer.Option(help="Directory to leave the files in, for your own tries.")
    ] = None,
) -> None:
    """The whole story on the embedded model: quantize, verify, corrupt one bit, verify again, explain.

    Exit codes: 0 the story went as it must · 1 it did not.
    """
    from refimpl.arith.jit import announce_compiling
    from refimpl.cli.verify import run_and_print
    from refimpl.files.golden import tiny_model
    from refimpl.report.explain import print_explanation
    from refimpl.report.terminal import console
    from refimpl.verifier.explain import explain
    from refimpl.verifier.mutate import Copy, requantize_all

    out = console()
    golden = tiny_model()
    announce_compiling()
    with tempfile.TemporaryDirectory(prefix="refimpl-demo-") as scratch:
        place = Path(scratch) if keep is None else keep
        place.mkdir(parents=True, exist_ok=True)

        _step(out, 1, "Quantize: encode the BF16 checkpoint by the recipe, every tensor anew")
        start = time.monotonic()
        copy = Copy(golden / FILE)
        theirs = {name: part.raw.copy() for name, part in copy.parts.items()}
        requantize_all(copy, golden)
        same = sum((theirs[name] == part.raw).all() for name, part in copy.parts.items())
        good = copy.write(place / "model.gguf")
        out.print(
            f"  {same} of {len(theirs)} tensors equal llama.cpp's bytes, {time.monotonic() - start:.1f} s"
        )

        _step(out, 2, f"Verify: refimpl verify {good} --source {golden} --recipe {RECIPE}")
        before = run_and_print(good, golden, RECIPE, out)

        _step(out, 3, f"Corrupt: flip the lowest bit of one 4-bit code in {VICTIM}, expert {EXPERT}")
        copy[VICTIM].block(BLOCK, EXPERT)["qs"][0, 100] ^= 1
        bad = copy.write(place / "corrupted.gguf")

        _step(out, 4, f"Verify again: refimpl verify {bad} --source {golden} --recipe {RECIPE}")
        after = run_and_print(bad, golden, RECIPE, out)

        found = next((f for f in after.findings if f.block is not None), None)
        if found is not None and found.block is not None:
            _step(out, 5, f"Explain: refimpl explain {bad} {VICTIM} --block {found.block} --source {golden}")
            print_explanation(explain(bad, VICTIM, found.block, golden), out)
    told = same == len(theirs) and before.verdict == "exact" and before.passed and not after.passed
    told = told and found is not None and (found.tensor, found.expert) == (VICTIM, EXPERT)
    out.print()
    out.print(
        "The one flipped bit was found and named." if told else "The story did not go as it must.",
        style="bold",
    )
    raise typer.Exit(0 if told else 1)


def _step(out: "Console", number: int, text: str) -> None:
    from rich.text import Text

    out.print()
    out.print(Text(f"{number}. {text}", "bold cyan"), soft_wrap=True)
