"""refimpl explain: one block, byte by byte."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="A .gguf, .safetensors or HF directory.")],
    tensor: Annotated[str, typer.Argument(help="Name of the tensor, such as blk.3.ffn_up_exps.weight.")],
    block: Annotated[int, typer.Option(min=0, help="Index of the block within the whole tensor.")] = 0,
    source: Annotated[Path | None, typer.Option(help="The source, to lay its values beside.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")] = False,
) -> None:
    """Show one block byte by byte: fields, scales, codes, values, and the source's beside them.

    With a source the bytes that the reference encoder (build strict, no imatrix) would have written are laid
    beside the stored ones, and the weights farthest from their source are listed; --json has every weight.

    Exit codes: 0 fine · 2 no such tensor or block · 3 bad file · 4 unsupported.
    """
    from refimpl.report.explain import print_explanation
    from refimpl.report.terminal import console
    from refimpl.verifier.explain import explain

    found = explain(file, tensor, block, source)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_explanation(found, console())
