"""What the commands that run a model share: opening one with an engine's conventions, and ranges of layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refimpl.errors import Usage

if TYPE_CHECKING:
    from refimpl.model.glm import Glm

File = Annotated[Path, typer.Argument(help="A .gguf, .safetensors or HF directory.")]
Engine = Annotated[
    str, typer.Option(help="Whose conventions to follow: refimpl, transformers, llama.cpp or deepseek.")
]
Dense = Annotated[
    bool, typer.Option("--dense-attention", help="Ignore the indexer, as engines before mid-2026 did.")
]
Cache = Annotated[
    str | None,
    typer.Option("--kv", help="Precision of the caches: f32, f16 or q8_0; by default the engine's."),
]
Tokens = Annotated[
    str | None, typer.Option(help="A list such as 3,1,4, or a .npy of integers [T] or [N, T].")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads; the result does not depend on them.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]


def load_model(
    file: Path, engine: str, dense: bool = False, kv: str | None = None, threads: int = 1, **more: Any
) -> "Glm":
    """Open a model to run it."""
    from refimpl.model.glm import load

    changes: dict[str, Any] = {"jobs": threads} | ({"dense": True} if dense else {})
    if kv is not None:
        if kv not in ("f32", "f16", "q8_0"):
            raise Usage(f"--kv {kv!r} is not f32, f16 or q8_0")
        changes["kv"] = kv
    return load(file, engine, **changes, **more)


def layer_range(text: str | None) -> tuple[int, int] | None:
    """Half-open layers from "3:5"; "3" is 3:4."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    try:
        return int(first), int(last) if colon else int(first) + 1
    except ValueError:
        raise Usage(f"--layers {text!r} is not a range such as 3:5") from None
