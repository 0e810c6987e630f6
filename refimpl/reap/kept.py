"""Lists of kept experts as JSON: what `reap select` writes, `reap prune` obeys and carries into its output.

    {"refimpl": "0.1.0", "model": {"experts", "top_k", "layers", "fingerprint"}, "criterion": "reap",
     "preset": {…}, "scope": "layer", "kept": {"3": [0, 1, 5], …}, "cuts": [{"layer", "kept", "pruned", "margin",
     "near_tie"}, …]}

Only model and kept are needed to prune. The fingerprint ties a list to the routers that it was made for.
"""

import json
import os
from typing import Any

from refimpl.errors import BadFile, Usage
from refimpl.files.safetensors import parse_json
from refimpl.files.source import LocalFile
from refimpl.reap.select import Lists
from refimpl.reap.state import Identity

LARGEST = 1 << 25  # bytes


def read(path: str | os.PathLike[str]) -> tuple[Identity, Lists, dict[str, Any]]:
    """Read a list: the model it is for, {layer: experts, ascending}, and the whole document."""
    file = LocalFile(path)
    try:
        if file.size > LARGEST:
            raise BadFile(file.path, 0, f"{file.size:,} bytes are more than a list of experts has")
        document = parse_json(file.path, file.read(0, file.size))
    finally:
        file.close()
    return parse(document, file.path)


def parse(document: dict[str, Any], path: str) -> tuple[Identity, Lists, dict[str, Any]]:
    """The parts of a document. Raises BadFile where it is none."""
    model, kept = document.get("model"), document.get("kept")
    try:
        assert isinstance(model, dict) and isinstance(kept, dict)
        layers = tuple(model["layers"])
        identity = Identity(model["experts"], model["top_k"], layers, model["fingerprint"])
        lists = {int(layer): list(experts) for layer, experts in kept.items()}
        numbers = [identity.experts, identity.top_k, *layers, *(e for one in lists.values() for e in one)]
        assert all(type(n) is int and 0 <= n < 1 << 16 for n in numbers)
        assert isinstance(identity.fingerprint, str)
    except (AssertionError, KeyError, TypeError, ValueError):
        raise BadFile(path, 0, "no list of kept experts: model or kept are missing or malformed") from None
    for layer, experts in lists.items():
        if experts != sorted(set(experts)) or not experts or experts[-1] >= identity.experts:
            raise BadFile(
                path, 0, f"layer {layer}: not an ascending list of experts below {identity.experts}"
            )
    return identity, lists, document


def require_same(identity: Identity, model: Identity, path: str) -> None:
    """Raise Usage where a list was made for other routers than the model's."""
    if identity != model:
        raise Usage(
            f"{path}: the list is for another model ({identity.experts} experts, routers "
            f"{identity.fingerprint[:12]}; this one has {model.experts}, {model.fingerprint[:12]})"
        )


def dump(document: dict[str, Any]) -> str:
    """A document as text: lists of experts on one line each."""
    kept = document["kept"]
    lines = ",\n".join(
        f"  {json.dumps(str(layer))}: {json.dumps(kept[layer])}" for layer in sorted(kept, key=int)
    )
    text = json.dumps(document | {"kept": None}, indent=1)
    return text.replace('"kept": null', '"kept": {\n' + lines + "\n }", 1) + "\n"
