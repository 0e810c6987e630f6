"""Merging instead of pruning: the two baselines that REAP is compared with, on a checkpoint of small size.

A merged group keeps its router rows; each member becomes a copy of the group's average, weighted by how often
its members were routed to, so that the model keeps its shape and only loses what merging loses.

    hc_smoe  groups by average linkage on the experts' mean outputs over all tokens
    m_smoe   the most frequent experts lead (over all layers, at least one each); the others join the leader
             whose router logits are most alike, after their hidden units are lined up with the leader's
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment

import refimpl
from refimpl.model.moe import run_expert
from refimpl.reap.saliency import Saliency

Array = NDArray[Any]
Groups = dict[int, list[list[int]]]  # layer -> groups of experts, leader first
MATRICES = ("gate_proj", "up_proj", "down_proj")


def observe(model: Path, sequences: list[Array]) -> dict[int, tuple[Array, Array]]:
    """{layer: (mean output of every expert over all tokens [E, D], router logits [T, E])}"""
    m = refimpl.load(model)
    found: dict[int, tuple[list[Array], list[Array]]] = {}
    for tokens in sequences:
        seen = m.trace(tokens)
        for layer in range(m.hp.first_k_dense_replace, m.hp.num_hidden_layers):
            x = seen[f"ffn_norm-{layer}"]
            outputs = [
                run_expert(e, x, m.layer[layer], m.conv).sum(axis=0) for e in range(m.hp.n_routed_experts)
            ]
            sums, logits = found.setdefault(layer, ([], []))
            sums.append(np.stack(outputs))
            logits.append(seen[f"ffn_moe_logits-{layer}"])
    count = sum(len(tokens) for tokens in sequences)
    return {layer: (np.sum(s, axis=0) / count, np.concatenate(g)) for layer, (s, g) in found.items()}


def group_by_outputs(observed: dict[int, tuple[Array, Array]], keep: int) -> Groups:
    """hc_smoe's groups."""
    groups: Groups = {}
    for layer, (means, _) in observed.items():
        labels = fcluster(linkage(means, "average"), keep, "maxclust")
        groups[layer] = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return groups


def group_by_leaders(
    observed: dict[int, tuple[Array, Array]], saliency: dict[int, Saliency], keep: int
) -> Groups:
    """m_smoe's groups."""
    count = {layer: s.sums["frequency"] / max(1, s.tokens) for layer, s in saliency.items()}
    leaders = {layer: [int(values.argmax())] for layer, values in count.items()}
    rest = sorted(
        (-values[e], layer, e)
        for layer, values in count.items()
        for e in range(len(values))
        if e not in leaders[layer]
    )
    for _, layer, e in rest[: (keep - 1) * len(count)]:
        leaders[layer].append(e)
    groups: Groups = {}
    for layer, first in leaders.items():
        logits = observed[layer][1]
        alike = logits.T @ logits
        norm = np.sqrt(np.diag(alike))
        alike = alike / norm[:, None] / norm
        made = {e: [e] for e in first}
        for e in range(len(norm)):
            if e not in made:
                made[first[int(alike[e, first].argmax())]].append(e)
        groups[layer] = list(made.values())
    return groups


def merge(
    model: Path, out: Path, groups: Groups, saliency: dict[int, Saliency], align: bool
) -> dict[str, int]:
    """Write a checkpoint whose groups are averaged; {layer: different experts left}."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.gguf", "*.safetensors"))
    tensors = load_file(model / "model.safetensors")
    for layer, parts in groups.items():
        weight = np.maximum(saliency[layer].sums["frequency"], 1).astype(np.float64)
        for part in parts:
            names = [[f"model.layers.{layer}.mlp.experts.{e}.{m}.weight" for m in MATRICES] for e in part]
            units = [_units([tensors[name].astype(np.float32) for name in one]) for one in names]
            if align:
                units = [units[0], *(u[_line_up(units[0], u)] for u in units[1:])]
            merged = np.average(units, axis=0, weights=weight[part])
            for one in names:
                for name, value in zip(one, _matrices(merged), strict=True):
                    tensors[name] = value.astype(tensors[name].dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return {str(layer): len(parts) for layer, parts in groups.items()}


def _units(matrices: list[Array]) -> Array:  # gate [I, D], up [I, D], down [D, I] -> [I, 3, D]
    gate, up, down = matrices
    return np.stack([gate, up, down.T], axis=1)


def _matrices(units: Array) -> tuple[Array, Array, Array]:
    return units[:, 0], units[:, 1], np.ascontiguousarray(units[:, 2].T)


def _line_up(leader: Array, other: Array) -> Array:
    """The order of the other's hidden units in which they are most like the leader's."""
    a, b = leader.reshape(len(leader), -1), other.reshape(len(other), -1)
    return np.asarray(linear_sum_assignment(a @ b.T, maximize=True)[1])


def describe(groups: Groups) -> str:
    return json.dumps({str(layer): parts for layer, parts in groups.items()})
