"""The census: what a model consists of, by class, and how many parameters that makes, all and per token.

total   all weights but those of the multi-token-prediction (MTP) layer, which no trunk forward pass runs
active  the same, without the embedding (a lookup), and of each layer's E routed experts only the K of a token

Both follow from the tensors that are there, not from what metadata promise.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from refimpl.files import names
from refimpl.files.gguf import Gguf
from refimpl.files.names import Hparams
from refimpl.files.source import Model, Tensor
from refimpl.verifier import labels
from refimpl.verifier.findings import Finding
from refimpl.verifier.labels import Claim, Numbers

CLASSES = (
    "routed", "shared", "dense", "attention", "indexer", "router", "embed", "head", "norm", "mtp", "other",
)  # fmt: skip
LABELLED = ("general.name", "general.basename", "general.size_label")


@dataclass
class Class:
    """Tensors of one kind; `types` counts tensors by format name."""

    name: str
    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    types: Counter[str] = field(default_factory=Counter)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def add(self, tensor: Tensor) -> None:
        self.tensors += 1
        self.weights += prod(tensor.shape)
        self.bytes += tensor.nbytes
        self.types[tensor.format.name] += 1

    def to_json(self) -> dict[str, Any]:
        types = dict(sorted(self.types.items()))
        return {"class": self.name, "tensors": self.tensors, "weights": self.weights, "bytes": self.bytes,
                "bits_per_weight": round(self.bits_per_weight, 4), "types": types}  # fmt: skip


@dataclass
class Census:
    """The outcome.

    classes  : those that have tensors, in the order of CLASSES
    total    : parameters without the MTP layer
    mtp      : those of the MTP layer in the file, 0 where it has none
    active   : per token with head, without embedding and MTP layer; None where E or K is unknown
    numbers  : both under every convention that people use
    claims   : labels in names, and whether they fit
    findings : one for each claim that does not fit
    """

    classes: list[Class]
    total: int
    mtp: int
    active: int | None
    numbers: Numbers
    claims: list[Claim]
    findings: list[Finding]

    @property
    def tensors(self) -> int:
        return sum(one.tensors for one in self.classes)

    @property
    def weights(self) -> int:
        return sum(one.weights for one in self.classes)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.classes)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        conventions = {"total": dict(self.numbers.total), "active": dict(self.numbers.active)}
        parameters = {"total": self.total, "mtp": self.mtp, "active": self.active, "conventions": conventions}
        return {
            "tensors": self.tensors,
            "weights": self.weights,
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "classes": [one.to_json() for one in self.classes],
            "parameters": parameters,
            "labels": [claim.to_json() for claim in self.claims],
        }


def census(f: Model, hp: Hparams | None, file_name: str) -> Census:
    """Count a model's tensors, and hold the labels in its names against the counts.

    hp : None where the architecture is not known: everything is of class "other" then
    """
    found = {name: Class(name) for name in CLASSES}
    count = _Count()
    for tensor in f.tensors.values():
        role, layer, expert = _place(f, tensor, hp)
        found[role].add(tensor)
        if layer is not None:
            count.add(tensor, layer, expert)
    total = sum(one.weights for one in found.values()) - found["mtp"].weights
    numbers = Numbers({"in all": total}, {}, {}, None)
    if hp is not None:
        numbers = count.numbers(hp, total, found)
    claims = labels.judge(_named(f, file_name), numbers)
    return Census(
        classes=[one for one in found.values() if one.tensors],
        total=total,
        mtp=found["mtp"].weights,
        active=numbers.active.get("with head"),
        numbers=numbers,
        claims=claims,
        findings=[_object(claim) for claim in claims if claim.fits is None],
    )


def _named(f: Model, file_name: str) -> dict[str, str]:
    """The texts that may carry a label."""
    metadata: Mapping[str, Any] = f.metadata if isinstance(f, Gguf) else {}
    said = {key: metadata[key] for key in LABELLED if isinstance(metadata.get(key), str)}
    return said | {"the file name": os.path.basename(file_name)}


def _object(claim: Claim) -> Finding:
    return Finding(f"label-{claim.kind}", "warning", labels.describe(claim))


def _place(f: Model, tensor: Tensor, hp: Hparams | None) -> tuple[str, int | None, int | None]:
    """A tensor's class, its layer, and the last routed expert that it holds."""
    if hp is None:
        return "other", None, None
    link, expert = None, None
    if isinstance(f, Gguf):
        link = names.link(tensor.name, hp)
        if link is not None and link.role == "routed":
            expert = tensor.shape[0] - 1
    elif found := names.from_hf(tensor.name, hp):
        link, expert = found
    if link is None:
        return "other", None, None
    if link.layer is not None and link.layer >= hp.num_hidden_layers:
        return "mtp", link.layer, expert
    return ("router" if link.role == "router_bias" else link.role), link.layer, expert


class _Count:
    """Weights by layer, and per layer the routed ones with the number of experts that share them."""

    def __init__(self) -> None:
        self.layers: Counter[int] = Counter()
        self.routed: Counter[int] = Counter()
        self.experts: Counter[int] = Counter()

    def add(self, tensor: Tensor, layer: int, expert: int | None) -> None:
        self.layers[layer] += prod(tensor.shape)
        if expert is not None:
            self.routed[layer] += prod(tensor.shape)
            self.experts[layer] = max(self.experts[layer], expert + 1)

    def idle(self, layer: int, used: int) -> int:
        """Routed weights of a layer that one token does not use."""
        if not self.routed[layer]:
            return 0
        experts = self.experts[layer]
        return self.routed[layer] - self.routed[layer] * min(used, experts) // experts

    def numbers(self, hp: Hparams, total: int, found: Mapping[str, Class]) -> Numbers:
        """Total, active and E x (shared + expert) under every convention."""
        used, trunk = hp.num_experts_per_tok, range(hp.num_hidden_layers)
        head, embed = found["head"].weights, found["embed"].weights
        bare = total - sum(self.idle(layer, used) for layer in trunk) - head - embed
        mtp, mtp_idle = found["mtp"].weights, sum(self.idle(i, used) for i in range(len(trunk), hp.layers))
        last = hp.num_hidden_layers - 1
        if not mtp and self.routed[last]:
            # a layer like the last one, and eh_proj [D, 2D] with three norms: what the MTP layer would be
            mtp = self.layers[last] + 2 * hp.hidden_size**2 + 3 * hp.hidden_size
            mtp_idle = self.idle(last, used)
        totals = {"without MTP layer": total}
        active = {"with head": bare + head, "without head": bare,
                  "with head and embedding": bare + head + embed}  # fmt: skip
        if mtp:
            totals["with an MTP layer"] = total + mtp
            active["with head, embedding and MTP layer"] = bare + head + embed + mtp - mtp_idle
        per_expert = {}
        experts = self.experts[last]
        if experts:
            share = sum(self.routed[layer] - self.routed[layer] // experts for layer in trunk)
            per_expert["without MTP layer"] = total - share
            if mtp:
                own = self.routed[last + 1] or self.routed[last]
                per_expert["with an MTP layer"] = total - share + mtp - (own - own // experts)
        return Numbers(totals, active, per_expert, experts or None)
