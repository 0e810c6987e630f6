"""Take experts out of a model: an HF directory into an HF directory, a GGUF into a GGUF.

Whatever stays keeps its bytes: quantized experts are not quantized anew. In every layer the experts, the
router's rows and the selection bias are cut by one list, and the experts that stay are numbered from 0 on.
"""

import json
import os
from pathlib import Path
from typing import Any

from refimpl import __version__
from refimpl.errors import Unsupported, Usage
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.safetensors import Checkpoint
from refimpl.reap import kept as kept_file
from refimpl.reap.select import Lists
from refimpl.reap.shards import PROVENANCE, PROVENANCE_FILE, Progress, write_directory, write_gguf
from refimpl.reap.state import identify

PathLike = str | os.PathLike[str]
MTP = ("drop", "alike")


def prune(
    source: PathLike,
    out: PathLike,
    kept: PathLike,
    mtp: str = "drop",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model without the experts that a list leaves out; returns its provenance.

    source : a GGUF (one shard of a split stands for all) or an HF directory
    out    : .gguf or directory, of the source's kind
    kept   : JSON of `reap select`, for this very model
    mtp    : an MTP block that the list does not name is dropped with its config ("drop"), or keeps the
             experts of the last layer's list ("alike")

    Raises Usage for a list of another model or lists of different lengths, which no config can state.
    """
    if mtp not in MTP:
        raise Usage(f"mtp is one of {', '.join(MTP)}, not {mtp!r}")
    if os.path.lexists(out) and not force:
        raise Usage(f"{os.fspath(out)} exists; --force replaces it")
    with model_files.open(source) as model:
        if os.path.lexists(out) and os.path.realpath(out) in map(
            os.path.realpath, [model.path, *model.parts]
        ):
            raise Usage(f"{os.fspath(out)} is the source itself")
        identity, lists, document = kept_file.read(kept)
        kept_file.require_same(identity, identify(model, identity.layers), os.fspath(kept))
        lists, dropped = _complete(model, lists, mtp)
        provenance = _describe(model, lists, dropped, document)
        if isinstance(model, Gguf):
            write_gguf(model, Path(out), lists, dropped, provenance, progress)
        else:
            write_directory(model, Path(out), lists, dropped, provenance, progress)
    return provenance


def _complete(model: Gguf | Checkpoint, lists: Lists, mtp: str) -> tuple[Lists, set[int]]:
    """A list for every MoE layer of one length, and the MTP layers that are dropped."""
    hp = names.hparams(model)
    trunk = range(hp.first_k_dense_replace, hp.num_hidden_layers)
    missing = [layer for layer in trunk if layer not in lists]
    if missing:
        raise Usage(f"the list has no experts for layer {missing[0]}")
    strangers = [layer for layer in lists if layer not in trunk and not trunk.stop <= layer < hp.layers]
    if strangers:
        raise Usage(f"layer {strangers[0]} of the list has no experts in {model.path}")
    dropped = set()
    for layer in range(trunk.stop, hp.layers):
        if layer in lists:
            continue
        if mtp == "drop":
            dropped.add(layer)
        else:
            lists = lists | {layer: lists[trunk.stop - 1]}
    lengths = sorted({len(experts) for experts in lists.values()})
    if len(lengths) > 1:
        raise Unsupported(
            f"layers keep {lengths[0]} to {lengths[-1]} experts: expert_count is one number for all layers"
        )
    if lengths[0] < hp.num_experts_per_tok:
        raise Usage(f"{lengths[0]} experts are fewer than the {hp.num_experts_per_tok} that a token needs")
    size = hp.n_routed_experts // hp.n_group
    for layer, experts in lists.items():
        shares = {sum(e // size == group for e in experts) for group in range(hp.n_group)}
        if len(shares) > 1:
            raise Usage(
                f"layer {layer} keeps {min(shares)} to {max(shares)} experts of a group; the router needs groups of "
                f"one size (select --groups {hp.n_group})"
            )
    if dropped and dropped != set(range(trunk.stop, hp.layers)):
        raise Usage("some MTP layers have a list and others have not")
    return lists, dropped


def _describe(
    model: Gguf | Checkpoint, lists: Lists, dropped: set[int], document: dict[str, Any]
) -> dict[str, Any]:
    """The provenance document: maps are given in the experts of the first ancestor that is known."""
    before = read_provenance(model)
    ancestor = None if before is None else {int(k): v for k, v in before["kept"].items()}
    composed = lists if ancestor is None else {
        layer: [ancestor[layer][e] for e in experts] if layer in ancestor else experts
        for layer, experts in lists.items()
    }  # fmt: skip
    return {
        "refimpl": __version__,
        "source": os.path.basename(os.path.normpath(model.path)),
        "model": document["model"] if before is None else before["model"],
        "criterion": document.get("criterion"),
        "preset": document.get("preset"),
        "kept": {str(layer): experts for layer, experts in composed.items()},
        "steps": ([] if before is None else before["steps"]) + [{str(k): v for k, v in lists.items()}],
        "mtp_dropped": bool(dropped) or bool(before and before["mtp_dropped"]),
    }


def read_provenance(model: Gguf | Checkpoint) -> dict[str, Any] | None:
    """The document that an earlier prune left in a model; None where there is none or it is not ours."""
    try:
        if isinstance(model, Gguf):
            text = model.metadata.get(PROVENANCE)
        else:
            path = Path(model.path) / PROVENANCE_FILE
            text = (
                path.read_text(encoding="utf-8") if path.is_file() and path.stat().st_size < 1 << 25 else None
            )
        document = json.loads(text) if isinstance(text, str) else None
        if document is None:
            return None
        kept_file.parse(document, model.path)
        return document if isinstance(document["steps"], list) and "mtp_dropped" in document else None
    except (OSError, ValueError, KeyError):
        return None
