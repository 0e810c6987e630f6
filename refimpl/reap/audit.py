"""Which experts did a pruned model keep, is it the parent in everything else, and what did it lose?

A child in the parent's own types is compared byte by byte: no tolerance is needed, an expert is a parent's
expert or it is not. A quantized child of an unquantized parent goes through verify, which knows its formats.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np

from refimpl.errors import Usage
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import Hparams
from refimpl.files.links import Link
from refimpl.files.safetensors import Checkpoint
from refimpl.quants.formats import BF16, F16, F32
from refimpl.reap import state
from refimpl.reap.compare import Comparison, compare_choice
from refimpl.reap.select import Lists
from refimpl.verifier.experts import match_rows
from refimpl.verifier.findings import Finding
from refimpl.verifier.requantize import widen

Model = Gguf | Checkpoint
PathLike = str | os.PathLike[str]
PIECE = 1 << 24
PRUNED = frozenset({"n_routed_experts", "num_nextn_predict_layers"})


@dataclass
class Audit:
    """What an audit found.

    how  : "bytes" or "verify"
    kept : {layer: parent expert of each child expert}
    lost : by criterion, where scores were given
    """

    child: str
    parent: str
    how: str
    experts: int
    parent_experts: int
    kept: Lists
    findings: list[Finding] = field(default_factory=list)
    choices: list[Comparison] = field(default_factory=list)
    mtp: str = "none"

    @property
    def passed(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        document = asdict(self) | {"passed": self.passed}
        document["kept"] = {str(layer): experts for layer, experts in self.kept.items()}
        return document


def audit(
    child: PathLike, parent: PathLike, scores: PathLike | None = None, jobs: int | None = None
) -> Audit:
    """Compare a pruned model with its parent.

    child, parent : GGUF or HF directory each
    scores        : statistics of the parent (`reap score`), to say what the child lost

    Raises Usage for statistics of another model.
    """
    with ExitStack() as stack:
        c = stack.enter_context(closing(model_files.open(child)))
        p = stack.enter_context(closing(model_files.open(parent)))
        hp, hp_parent = names.hparams(c), names.hparams(p)
        result = _compare(c, p, hp, hp_parent, jobs)
        result.findings += list(_compare_hparams(hp, hp_parent))
        result.mtp = _say_mtp(hp, hp_parent)
        result.findings += list(_check_maps(result.kept, hp_parent))
        if scores is not None:
            run, layers = state.load(scores)
            if run.model != state.identify(p, run.model.layers):
                raise Usage(f"{os.fspath(scores)}: the statistics are of another model than {p.path}")
            result.choices = compare_choice(result.kept, layers)
    return result


def _compare(c: Model, p: Model, hp: Hparams, hp_parent: Hparams, jobs: int | None) -> Audit:
    """By bytes where both are of one kind and the parent's types survive, else by verify."""
    if isinstance(c, Gguf) and not (isinstance(p, Gguf) and _same_types(c, p)):
        from refimpl.verifier.run import verify

        report = verify(c.path, p.path, jobs=jobs)
        return Audit(
            c.path,
            p.path,
            "verify",
            hp.n_routed_experts,
            hp_parent.n_routed_experts,
            report.maps,
            list(report.findings),
        )
    if type(c) is not type(p):
        raise Usage(f"{c.path} cannot be audited against {p.path}: an HF child needs an HF parent")
    result = Audit(c.path, p.path, "bytes", hp.n_routed_experts, hp_parent.n_routed_experts, {})
    for layer in range(hp.first_k_dense_replace, hp.layers):
        kept, findings = _map_layer(c, p, hp, hp_parent, layer)
        result.kept[layer] = kept
        result.findings += findings
    for name in c.tensors:
        result.findings += _compare_tensor(c, p, name, hp, hp_parent, result.kept)
    result.findings += _find_missing(c, p, hp, hp_parent, result.kept)
    return result


def _same_types(c: Gguf, p: Gguf) -> bool:
    shared = [name for name in c.tensors if name in p.tensors]
    same = sum(c.tensors[name].format == p.tensors[name].format for name in shared)
    plain = {F32.name, F16.name, BF16.name}
    return 2 * same > len(shared) or not all(t.format.name in plain for t in p.tensors.values())


def _map_layer(
    c: Model, p: Model, hp: Hparams, hp_parent: Hparams, layer: int
) -> tuple[list[int], list[Finding]]:
    """The parent expert of every expert of a layer, by its router row; -1 where there is none."""
    link = names.link(f"blk.{layer}.ffn_gate_inp.weight", hp)
    assert link is not None
    name = link.gguf if isinstance(c, Gguf) else link.hf
    if name not in c.tensors or name not in p.tensors:
        return [], [Finding("router-missing", "error", "the layer has no router in both models", name)]
    have = widen(names.source_rows(c, link, hp, slice(None)))
    rows = widen(names.source_rows(p, link, hp_parent, slice(None)))
    kept = match_rows(have, rows)
    findings = []
    for e, k in enumerate(kept):
        if k >= 0:
            continue
        twice = [j for j in np.flatnonzero((rows == have[e]).all(axis=1)).tolist() if j in kept]
        if twice:
            words = f"row {e} is the parent's expert {twice[0]}, which stands in row {kept.index(twice[0])} already"
            findings.append(Finding("expert-duplicated", "error", words, name, e))
            continue
        shifted = _find_row(p, hp_parent, have[e], layer)
        more = "" if shifted is None else f"; it is the row of expert {shifted[1]} of layer {shifted[0]}"
        words = f"row {e} is no row of the parent's router{more}"
        findings.append(Finding("router-row-unknown", "error", words, name, e))
    return kept, findings


def _find_row(p: Model, hp: Hparams, row: Any, layer: int) -> tuple[int, int] | None:
    """Where else in the parent a router row stands: (layer, expert)."""
    for other in range(hp.first_k_dense_replace, hp.layers):
        link = names.link(f"blk.{other}.ffn_gate_inp.weight", hp)
        if other == layer or link is None:
            continue
        same = (widen(names.source_rows(p, link, hp, slice(None))) == row).all(axis=1)
        if same.any():
            return other, int(same.argmax())
    return None


def _compare_tensor(
    c: Model, p: Model, name: str, hp: Hparams, hp_parent: Hparams, kept: Lists
) -> Iterator[Finding]:
    """Is a tensor of the child the parent's, after the layer's map?"""
    tensor = c.tensors[name]
    if isinstance(c, Gguf):
        link, expert = names.link(name, hp), None
    else:
        found = names.from_hf(name, hp)
        link, expert = found if found is not None else (None, None)
    mapped = kept.get(link.layer) if link is not None and link.layer is not None else None
    if link is None or mapped is None or link.role not in ("routed", "router", "router_bias"):
        if name not in p.tensors:
            yield Finding("unmatched", "error", "the parent has no such tensor", name)
        elif tensor.shape != p.tensors[name].shape or not _same(c, p, name, name, range(tensor.rows), 0):
            yield Finding(
                "tensor-changed", "error", "it is not the parent's, though pruning does not touch it", name
            )
        return
    if link.role == "router":
        return  # the map stems from it
    if expert is not None:
        if expert >= len(mapped):
            yield Finding("expert-surplus", "error", f"the router has {len(mapped)} rows only", name, expert)
        elif mapped[expert] >= 0:
            other = link.hf.format(e=mapped[expert])
            if other not in p.tensors or not _same(c, p, name, other, range(tensor.rows), 0):
                yield _explain(c, p, name, link, expert, mapped, hp_parent)
        return
    if tensor.shape[0] != len(mapped):
        words = f"it has {tensor.shape[0]} entries, the router {len(mapped)} rows"
        if tensor.shape[0] == hp_parent.n_routed_experts:
            words += ": it was left unpruned"
        yield Finding("experts-differ", "error", words, name)
    elif link.role == "router_bias":
        size = tensor.format.block.itemsize
        mine = c.read(name).reshape(-1, size)
        theirs = p.read(name).reshape(-1, size)
        for e, k in enumerate(mapped):
            if k >= 0 and (mine[e] != theirs[k]).any():
                yield Finding("bias-differs", "error", f"entry {e} is not the parent's entry {k}", name, e)
    else:
        slab = tensor.rows // len(mapped)
        for e, k in enumerate(mapped):
            if k >= 0 and not _same(c, p, name, name, range(e * slab, (e + 1) * slab), (k - e) * slab):
                yield _explain(c, p, name, link, e, mapped, hp_parent)


def _same(c: Model, p: Model, name: str, other: str, rows: range, shift: int) -> bool:
    """Are these rows of the child the parent's, `shift` rows further on? Types must agree, too."""
    mine, theirs = c.tensors[name], p.tensors[other]
    if mine.format != theirs.format or mine.n != theirs.n or rows.stop + shift > theirs.rows:
        return False
    step = max(1, PIECE // max(1, mine.row_bytes))
    for start in range(rows.start, rows.stop, step):
        stop = min(rows.stop, start + step)
        if not np.array_equal(
            c.read(name, slice(start, stop)), p.read(other, slice(start + shift, stop + shift))
        ):
            return False
    return True


def _explain(c: Model, p: Model, name: str, link: Link, e: int, mapped: list[int], hp: Hparams) -> Finding:
    """Which parent expert an expert's bytes are, where they are not the ones that the router says."""
    stacked = isinstance(c, Gguf)
    slab = c.tensors[name].rows // (len(mapped) if stacked else 1)
    want = _digest(c, name, range(e * slab, (e + 1) * slab) if stacked else range(slab))
    suffix = link.gguf.split(".", 2)[2]
    layers = [link.layer, *(n for n in range(hp.first_k_dense_replace, hp.layers) if n != link.layer)]
    for layer in layers:
        other = names.link(f"blk.{layer}.{suffix}", hp)
        for k in range(hp.n_routed_experts):
            if other is None:
                break
            there = other.gguf if stacked else other.hf.format(e=k)
            rows = range(k * slab, (k + 1) * slab) if stacked else range(slab)
            if there in p.tensors and rows.stop <= p.tensors[there].rows and _digest(p, there, rows) == want:
                where = f"expert {k}" if layer == link.layer else f"expert {k} of layer {layer}"
                words = f"expert {e} is the parent's {where}, the router says expert {mapped[e]}"
                return Finding("expert-differs", "error", words, name, e)
    words = f"expert {e} is no expert of the parent, the router says expert {mapped[e]}"
    return Finding("expert-differs", "error", words, name, e)


def _digest(model: Model, name: str, rows: range) -> bytes:
    return sha256(model.read(name, slice(rows.start, rows.stop)).data).digest()


def _find_missing(c: Model, p: Model, hp: Hparams, hp_parent: Hparams, kept: Lists) -> Iterator[Finding]:
    """Tensors of the parent that should be in the child."""
    for name in p.tensors:
        if isinstance(p, Gguf):
            link, expert = names.link(name, hp_parent), None
        else:
            found = names.from_hf(name, hp_parent)
            link, expert = found if found is not None else (None, None)
        if link is not None and link.layer is not None and link.layer >= hp.layers:
            continue  # the MTP block, dropped with its config
        if expert is not None and link is not None and link.layer is not None:
            mapped = kept.get(link.layer, [])
            if expert not in mapped:
                continue
            name = link.hf.format(e=mapped.index(expert))
        if name not in c.tensors:
            yield Finding("missing", "error", "the parent has it and the child does not", name)


def _compare_hparams(hp: Hparams, hp_parent: Hparams) -> Iterator[Finding]:
    for name, mine in asdict(hp).items():
        theirs = getattr(hp_parent, name)
        same = np.float32(mine) == np.float32(theirs) if isinstance(mine, float) else mine == theirs
        if name not in PRUNED and not same:
            yield Finding("hparam-differs", "error", f"{name} is {mine} in the child, {theirs} in the parent")


def _say_mtp(hp: Hparams, hp_parent: Hparams) -> str:
    if not hp_parent.num_nextn_predict_layers:
        return "none"
    return "kept" if hp.num_nextn_predict_layers else "dropped"


def _check_maps(kept: Lists, hp_parent: Hparams) -> Iterator[Finding]:
    """A token needs its experts in every layer."""
    for layer, experts in kept.items():
        known = sum(e >= 0 for e in experts)
        if known < hp_parent.num_experts_per_tok:
            yield Finding("too-few-experts", "error", f"layer {layer} has {known} experts of the parent")
