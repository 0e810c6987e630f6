"""Turn the tallies into results: classify, look again at what fails, and find what is not there."""

from collections import defaultdict

import numpy as np

from refimpl import quants
from refimpl.files import names
from refimpl.verifier import verdict
from refimpl.verifier.findings import Finding
from refimpl.verifier.identify import Fit, identify
from refimpl.verifier.job import Job, Task
from refimpl.verifier.requantize import EXACT, Tally, widen
from refimpl.verifier.result import RANK, ExpertResult, TensorResult

Tallies = dict[str, dict[int | None, Tally]]
UNNAMED = 8  # parts that fit nothing, after which the search leaves out the experts of other layers
MTP_NOTE = "the source's {} MTP tensors are left out, consistently with nextn_predict_layers = 0"


def settle(job: Job, tasks: list[Task], tallies: Tallies) -> tuple[dict[str, TensorResult], list[Finding]]:
    """Give every compared tensor and expert its verdict.

    return : {tensor name: result}, and the findings, in the file's order
    """
    for parts in tallies.values():
        for expert, tally in parts.items():
            if tally.source_not_finite:  # how much of it was compared depends on how it was cut into units
                parts[expert] = Tally(blocks=tally.blocks, source_not_finite=tally.source_not_finite)
    rare = _formats_that_match(tasks, tallies)
    own = _is_own(job, tasks, tallies)
    foreign = _foreign(tasks, tallies)
    other_source = _is_other_source(tasks, tallies, foreign)
    results: dict[str, TensorResult] = {}
    findings: list[Finding] = []
    unnamed = 0
    if other_source:
        message = "most tensors resemble nothing in this source: it is not the checkpoint the file comes from"
        findings.append(Finding("other-source", "error", message))
    for task in tasks:
        name, fmt = task.tensor.name, task.tensor.format
        whole, experts = Tally(), []
        for expert, tally in tallies[name].items():
            sporadic = fmt.name in rare and verdict.is_sporadic(tally, fmt, own)
            said = verdict.classify(tally, fmt)
            said = "degraded" if said == "rounded" and sporadic else said
            fit = None
            if (name, expert) in foreign and said != "corrupt":
                fit = None if other_source else identify(job, task.link, expert, unnamed < UNNAMED)
                unnamed += fit is None
                said, found = _judge_foreign(job, task, tally, expert, fit)
                findings += [] if other_source else found
            elif RANK[said] > RANK["equivalent"] or fmt.name in EXACT:
                changed = said == "degraded" and sporadic
                findings += verdict.describe_damage(tally, task.tensor, expert, changed)
            elif tally.differ and not fmt.ruled:
                findings.append(verdict.describe_doubt(tally, task.tensor, expert))
            findings += _source_defects(job, task, tally, expert)
            experts.append(_expert_result(task, expert, tally, said, fit))
            whole.merge(tally)
        results[name] = _tensor_result(job, task, whole, experts)
    return results, findings


def _expert_result(task: Task, expert: int | None, tally: Tally, said: str, fit: Fit | None) -> ExpertResult:
    return ExpertResult(
        index=expert or 0,
        verdict=said,
        blocks=tally.blocks,
        blocks_differ=tally.differ,
        errors=verdict.measure(tally),
        fits=fit.expert if fit else None,
        fits_tensor=fit.source if fit else None,
    )


def _tensor_result(job: Job, task: Task, whole: Tally, experts: list[ExpertResult]) -> TensorResult:
    worst = max((e.verdict for e in experts), key=RANK.__getitem__)
    return TensorResult(
        name=task.tensor.name,
        format=task.tensor.format.name,
        shape=task.tensor.shape,
        source=job.sources(task.link),
        verdict=worst,
        build=job.fitting_builds(task.tensor) if worst == "exact" else [],
        blocks=whole.blocks,
        blocks_differ=sum(e.blocks_differ for e in experts),
        errors=verdict.measure(whole),
        experts=experts if task.link.transform == "stack" else [],
    )


def _formats_that_match(tasks: list[Task], tallies: Tallies) -> set[str]:
    """Formats whose tensors mostly equal the encoder's bytes to the last one.

    There a few odd blocks are damage. Where most tensors have some, another build or search made the file.
    """
    clean: dict[str, list[bool]] = defaultdict(list)
    for task in tasks:
        for tally in tallies[task.tensor.name].values():
            clean[task.tensor.format.name].append(tally.differ == 0)
    return {name for name, seen in clean.items() if sum(seen) > len(seen) / 2}


def _is_own(job: Job, tasks: list[Task], tallies: Tallies) -> bool:
    """Did this very encoder make the file from this very source, so that any odd block is damage?

    Another build or an imatrix shows all over the file; an F16 source has dropped the smallest weights.
    """
    quantized = [t.tensor for t in tasks if t.tensor.format.weighed]
    odd = sum(any(part.differ for part in tallies[tensor.name].values()) for tensor in quantized)
    halves = any(t.format.name == "f16" for t in job.source.tensors.values())
    return odd <= max(1, len(quantized) // 10) and not halves


def _foreign(tasks: list[Task], tallies: Tallies) -> set[tuple[str, int | None]]:
    return {
        (task.tensor.name, expert)
        for task in tasks
        for expert, tally in tallies[task.tensor.name].items()
        if verdict.looks_foreign(tally, task.tensor.format)
    }


def _is_other_source(tasks: list[Task], tallies: Tallies, foreign: set[tuple[str, int | None]]) -> bool:
    """Do most tensors hold, for the most part, what does not fit this source?

    Tensors, not weights: most of a model's weights are its experts', which one mistake can misplace.
    """
    odd = 0
    for task in tasks:
        parts = tallies[task.tensor.name]
        odd += 2 * sum((task.tensor.name, expert) in foreign for expert in parts) > len(parts)
    return len(tasks) > 1 and odd > len(tasks) / 2


def _judge_foreign(
    job: Job, task: Task, tally: Tally, expert: int | None, fit: Fit | None
) -> tuple[str, list[Finding]]:
    """Bytes that do not encode what they should: misplaced, wrong, or badly degraded."""
    name = task.tensor.name
    who = "it" if expert is None else f"expert {expert}"
    errors = verdict.measure(tally)
    if fit is not None:
        message = f"{who} does not hold what it should: {fit.how}"
        return "misplaced", [Finding("misplaced", "error", message, name, expert)]
    offset = _constant_offset(job, task)
    if offset is not None:
        message = f"every value is the source's {offset:+g}"
        return "degraded", [Finding("constant-offset", "error", message, name)]
    if tally.counts["zero"] and errors.rel_rmse == 1.0:
        block = tally.suspects["zero"][0].block
        message = f"{who} decodes to zero everywhere; the source does not"
        return "wrong", [Finding("all-zero", "error", message, name, expert, block)]
    if errors.rel_rmse is None or errors.rel_rmse > verdict.UNRELATED:
        message = f"{who} resembles nothing in the source (relative rmse {errors.rel_rmse})"
        return "wrong", [Finding("wrong", "error", message, name, expert, errors.worst_block)]
    return "degraded", verdict.describe_damage(tally, task.tensor, expert)


def _constant_offset(job: Job, task: Task) -> float | None:
    """What was added to every value of an unquantized 1-D tensor (a norm shifted by one), if anything was."""
    if task.tensor.format.name not in EXACT or len(task.tensor.shape) != 1:
        return None
    have = quants.dequantize(job.f.read(task.tensor.name), task.tensor.format)
    rows = names.source_rows(job.source, task.link, job.hp_source, slice(None), job.kept(task.link))
    want = widen(rows)
    shift = float(np.median(have - want))
    return shift if shift and np.array_equal(have, want + np.float32(shift)) else None


def _source_defects(job: Job, task: Task, tally: Tally, expert: int | None) -> list[Finding]:
    if tally.source_not_finite is None:
        return []
    row, column = tally.source_not_finite
    row -= (expert or 0) * task.rows
    name = job.sources(task.link)[expert or 0]
    message = f"the source is NaN, Inf or too large to encode at row {row}, column {column}: {name}"
    return [Finding("source-not-finite", "error", message, task.tensor.name, expert)]


def disagreeing_routers(job: Job, results: dict[str, TensorResult]) -> list[Finding]:
    """Experts whose gate, up and down all fit one source expert, but the router row says another."""
    fits: dict[tuple[int, int], list[int | None]] = defaultdict(list)
    for name, result in results.items():
        link = names.link(name, job.hp)
        if link is not None and link.transform == "stack" and link.layer is not None:
            for expert in result.experts:
                fits[link.layer, expert.index].append(expert.fits)
    said = []
    for (layer, e), found in fits.items():
        if layer in job.maps and len(found) == 3 and found[0] is not None and len(set(found)) == 1:
            row = job.maps[layer][e]
            message = f"expert {e}: gate, up and down hold source expert {found[0]}, the router row {row}"
            said.append(Finding("router-disagrees", "error", message, f"blk.{layer}.ffn_gate_inp.weight", e))
    return said


def find_missing(job: Job) -> tuple[list[TensorResult], list[Finding]]:
    """What the source has and the file has not, and notes on what was left out rightly."""
    missing: list[TensorResult] = []
    findings: list[Finding] = []
    mtp = 0
    for link, _ in names.expected(job.hp_source):
        shape = names.source_shape(job.source, link, job.hp_source)
        if link.gguf in job.f.tensors or shape is None:
            continue
        if link.layer == job.hp_source.num_hidden_layers and job.hp.num_nextn_predict_layers == 0:
            mtp += 1
            continue
        missing.append(TensorResult(link.gguf, None, tuple(shape), job.sources(link), "missing"))
        findings.append(Finding("missing", "error", "the source has it, the file does not", link.gguf))
    if mtp:
        findings.append(Finding("mtp-left-out", "note", MTP_NOTE.format(mtp)))
    kept, parent = job.hp.n_routed_experts, job.hp_source.n_routed_experts
    if kept < parent:
        message = f"{kept} of the source's {parent} experts are kept in each MoE layer"
        findings.append(Finding("experts-kept", "note", message))
    return missing, findings
