"""Which source experts did the file keep, and whose bytes are these?

The router rows say it first: a file keeps them in F32, so a kept row equals its source row bit for bit. Rows
that equal none are matched by distance, and where the router says nothing the experts' own content decides.
"""

from functools import partial

import numpy as np

from refimpl import quants
from refimpl.files import names
from refimpl.verifier.findings import Finding
from refimpl.verifier.identify import NEAR, Matrix, fits, relative_distance, row_from, sample
from refimpl.verifier.job import Job
from refimpl.verifier.requantize import widen


def map_experts(job: Job) -> tuple[dict[int, list[int]], list[Finding]]:
    """Find the source expert of every file expert, layer by layer.

    return : {layer: [source expert of file expert 0, 1, …]}, and findings about rows that fit nothing
    """
    maps: dict[int, list[int]] = {}
    findings: list[Finding] = []
    for name, tensor in job.f.tensors.items():
        link = names.link(name, job.hp)
        if link is None or link.role != "router" or link.layer is None or not job.readable(name):
            continue
        shape = names.source_shape(job.source, link, job.hp_source)
        if shape is None or len(tensor.shape) != 2 or tensor.shape[1:] != shape[1:]:
            continue  # the plan reports it
        have = quants.dequantize(job.f.read(name), tensor.format)
        want = widen(names.source_rows(job.source, link, job.hp_source, slice(None)))
        kept = match_rows(have, want)
        unknown = [e for e, k in enumerate(kept) if k < 0]
        alike = find_alike(want)
        guesses = {e: k for e, k in enumerate(kept) if k in alike}
        for e in guesses:
            kept[e] = -1
        if unknown or guesses:
            _match_content(job, link.layer, kept)
        for e, guess in guesses.items():
            if kept[e] < 0 and guess not in kept:
                kept[e] = guess
        for e in unknown:
            fit = (
                f"its content is source expert {kept[e]}" if kept[e] >= 0 else "its content fits none either"
            )
            message = f"router row {e} equals no row of the source's router; {fit}"
            findings.append(Finding("router-row-unknown", "error", message, name, expert=e))
        free = sorted(set(range(len(want))) - set(kept), reverse=True)
        maps[link.layer] = [k if k >= 0 else (free.pop() if free else 0) for k in kept]
    return maps, findings


def match_rows(have: Matrix, want: Matrix) -> list[int]:
    """Match each row of `have` with a different row of `want`: equal bits first, then the nearest; -1 is none.

    have : [A, n] float32;  want : [B, n] float32
    Rows that are equal in the source are handed out in ascending order.
    """
    places: dict[bytes, list[int]] = {}
    for j in range(len(want) - 1, -1, -1):
        places.setdefault(want[j].tobytes(), []).append(j)
    kept = [places[row.tobytes()].pop() if places.get(row.tobytes()) else -1 for row in have]
    used = {j for j in kept if j >= 0}
    left = [j for j in range(len(want)) if j not in used]
    for i, j in enumerate(kept):
        if j < 0 and left:
            distance = relative_distance(have[i], want[left])
            best = int(np.argmin(distance))
            if distance[best] < NEAR:
                kept[i] = left.pop(best)
    return kept


def find_alike(want: Matrix) -> set[int]:
    """Rows that are not the only ones of their kind: what they stand for, the router cannot tell."""
    places: dict[bytes, list[int]] = {}
    for j, row in enumerate(want):
        places.setdefault(row.tobytes(), []).append(j)
    return {j for group in places.values() if len(group) > 1 for j in group}


def _match_content(job: Job, layer: int, kept: list[int]) -> None:
    """Fill the unknown places of `kept` by the gate matrices' own rows."""
    name = f"blk.{layer}.ffn_gate_exps.weight"
    link = names.link(name, job.hp)
    if link is None or not job.readable(name) or len(job.f.tensors[name].shape) != 3:
        return
    rows = job.f.tensors[name].shape[1]
    free = sorted(set(range(job.hp_source.n_routed_experts)) - set(kept))
    for e, known in enumerate(kept):
        if known >= 0:
            continue
        have = sample(job.f, name, e * rows, rows)
        for j in free:
            if fits(have, partial(row_from, job.source, link, job.hp_source, j * rows)):
                kept[e] = j
                free.remove(j)
                break
