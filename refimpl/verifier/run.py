"""verify: is this quantized file faithful to the checkpoint that it claims to come from?

The stages, each a room: container → census → recipe → expert map → requantize and classify → fidelity →
verdict. A clean file and its source are read once, in order; only what fails is looked at again.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

from refimpl import engine, quants, recipes
from refimpl.arith.builds import SITED
from refimpl.errors import Unsupported, Usage
from refimpl.files import imatrix as imatrix_file
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.verifier import builds, census, container, experts, settle
from refimpl.verifier.findings import Finding
from refimpl.verifier.job import Job, Task, plan, require_decodable
from refimpl.verifier.requantize import Tally, Unit, check_rows
from refimpl.verifier.result import Report

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes of the file done, bytes in all

BYTES_PER_WEIGHT = 24  # of a unit at work: bf16 and float32 source, stored and re-encoded bytes, and slack
AUTO = "auto"
UNIT_WEIGHTS = 1 << 20  # large enough to amortise a unit's cost, small enough to stay in the cache


def verify(
    file: PathLike,
    source: PathLike,
    recipe: str | None = None,
    imatrix: PathLike | None = None,
    build: str = "auto",
    require: str | None = None,
    jobs: int | None = None,
    memory: int = 2 << 30,
    progress: Progress | None = None,
) -> Report:
    """Check a quantized GGUF against its BF16 source, tensor by tensor and expert by expert.

    file    : a .gguf (one shard of a split stands for all)
    source  : an HF checkpoint directory, a .safetensors or an unquantized GGUF
    recipe  : name or TOML file of the recipe it must conform to; None names the best-fitting one
    imatrix : the imatrix it was quantized with, if any
    build   : compiler build whose bytes count as exact; "auto" finds it out, tensor by tensor where need be
    require : "exact" to fail on anything but exact and copied tensors
    jobs    : threads, None for one per core;  memory : bound in bytes

    Raises BadFile for a header or a source that cannot be read, Unsupported for another architecture.
    """
    if require not in (None, "exact"):
        raise Usage(f"require can only be 'exact', not {require!r}")
    if build not in (AUTO, *quants.BUILDS):
        raise Usage(f"unknown build {build!r}; known: {', '.join((AUTO, *quants.BUILDS))}")
    with ExitStack() as stack:
        f = stack.enter_context(closing(model_files.open(file)))
        s = stack.enter_context(closing(model_files.open(source)))
        if not isinstance(f, Gguf):
            raise Unsupported(f"{f.path}: verify needs a GGUF, this is {f.kind}")
        job = Job(f, s, names.hparams(f), names.hparams(s), quants.BUILDS[0] if build == AUTO else build)
        require_decodable(f)
        if imatrix is not None:
            job.imatrix = stack.enter_context(imatrix_file.read(imatrix))
        declared = recipes.load(os.fspath(recipe)) if recipe is not None else None
        return _run(job, declared, build == AUTO, require, jobs or engine.cores(), memory, progress)


def _run(
    job: Job,
    declared: recipes.Recipe | None,
    auto: bool,
    require: str | None,
    jobs: int,
    memory: int,
    progress: Progress | None,
) -> Report:
    f = job.f
    counted = census.census(f, job.hp, os.path.basename(f.path))
    weighed = recipes.made_with_imatrix(f.metadata)
    recipe, mismatches = recipes.best(job.hp, f.tensors, weighed)
    if declared is not None:
        recipe, mismatches = declared, recipes.conform(declared, job.hp, f.tensors, weighed)
    job.maps, unmapped = experts.map_experts(job)
    tasks, results, unplanned = plan(job)
    evidence = builds.find_build(job, tasks) if auto else builds.Evidence()
    job.build = evidence.best if auto else job.build
    tallies = compare(job, tasks, jobs, memory, progress)
    if auto:
        _try_other_builds(job, tasks, tallies, jobs, memory)
    settled, damage = settle.settle(job, tasks, tallies)
    results |= settled
    if any(finding.code == "other-source" for finding in damage):
        unmapped = []  # a stranger's router rows say nothing
    missing, absent = settle.find_missing(job)
    routers = settle.disagreeing_routers(job, results)
    written, mixture = builds.name_build(job, tasks, tallies)
    about_build = builds.describe(job, evidence, tasks) + mixture if auto else []
    about_build += builds.name_unknown(job, tasks)
    order = [results[name] for name in f.tensors if name in results]
    return Report(
        file=f.path,
        size=f.size,
        source=job.source.path,
        source_kind=job.source.kind,
        recipe=recipe.name,
        recipe_declared=declared is not None,
        conforms=not mismatches,
        build=written,
        require=require,
        tensors=order + missing,
        stages={
            "container": container.check(f) + counted.findings + job.compare_hparams(),
            "recipe": [_say_mismatch(declared, m) for m in mismatches] if declared else [],
            "experts": unmapped + routers,
            "bytes": about_build + unplanned + job.imatrix_problems() + damage + absent,
        },
        experts=job.hp.n_routed_experts,
        source_experts=job.hp_source.n_routed_experts,
        maps=job.maps,
        census=counted,
    )


def compare(
    job: Job, tasks: list[Task], jobs: int, memory: int, progress: Progress | None = None
) -> settle.Tallies:
    """Compare tensors with their source, each once, in the file's order: a tally for each expert of each."""
    tallies: settle.Tallies = {task.tensor.name: {} for task in tasks}
    done, total = 0, sum(task.tensor.nbytes for task in tasks)
    for unit, tally in engine.map_units(units(tasks, jobs, memory), lambda u: check(job, u), jobs):
        whole = tallies[unit.task.tensor.name].setdefault(unit.expert, Tally())
        whole.merge(tally)
        if unit.last:
            whole.close()
        done += (unit.stop - unit.start) * unit.task.tensor.row_bytes
        if progress is not None:
            progress(done, total)
    return tallies


def _try_other_builds(job: Job, tasks: list[Task], tallies: settle.Tallies, jobs: int, memory: int) -> None:
    """Compare tensors anew of which another build wrote some blocks; keep what fits better."""
    for task in tasks:
        name = task.tensor.name
        build = builds.suspect_build(job, task, tallies[name])
        if build is None:
            continue
        job.builds[name] = build
        again = compare(job, [task], jobs, memory)[name]
        if sum(t.differ for t in again.values()) < sum(t.differ for t in tallies[name].values()):
            tallies[name] = again
        else:
            del job.builds[name]
    for build in sorted(set(job.builds.values())):
        for task in tasks:
            told = task.tensor.format.name in SITED and task.tensor.name not in job.builds
            if told and not any(t.differ for t in tallies[task.tensor.name].values()):
                fits = _is_written_by(job, task, build, jobs, memory)
                job.also.setdefault(task.tensor.name, []).extend([build] if fits else [])


def _is_written_by(job: Job, task: Task, build: str, jobs: int, memory: int) -> bool:
    """Are all of a tensor's bytes those of this build too? Stops at the first unit that says no."""
    other = replace(job, build=build, builds={})
    found = engine.map_units(units([task], jobs, memory), lambda unit: check(other, unit), jobs)
    with closing(found) as tallies:
        return all(tally.differ == 0 for _, tally in tallies)


def units(tasks: list[Task], jobs: int, memory: int) -> Iterator[Unit]:
    """Cut every tensor into row ranges of one expert or head each, small enough for the memory bound."""
    most = memory // 2 // (BYTES_PER_WEIGHT * (jobs + 2))
    for task in tasks:
        if task.tensor.n > most:
            raise Usage(f"a row of {task.tensor.name} alone needs more than the memory bound")
        step = max(1, min(most, UNIT_WEIGHTS) // task.tensor.n)
        for slab in range(task.slabs):
            first, expert = slab * task.rows, slab if task.stacked else None
            for start in range(first, first + task.rows, step):
                yield Unit(task, expert, start, min(start + step, first + task.rows))


def check(job: Job, unit: Unit) -> Tally:
    """Read the unit's rows from both sides and compare them."""
    task, rows = unit.task, slice(unit.start, unit.stop)
    tensor = task.tensor
    raw = job.f.read(tensor.name, rows)
    source = names.source_rows(job.source, task.link, job.hp_source, rows, job.kept(task.link))
    importance = job.importance(tensor, unit.start)
    first_block = unit.start * (tensor.n // tensor.format.weights)
    try:
        return check_rows(raw, tensor.format, source, first_block, importance, job.build_of(tensor))
    except quants.NotFinite as error:
        return Tally(
            blocks=source.size // tensor.format.weights,
            source_not_finite=(unit.start + error.row, error.column),
        )


def _say_mismatch(recipe: recipes.Recipe, m: recipes.Mismatch) -> Finding:
    message = f"is {m.found}, {recipe.name} says {m.expected} ({m.bytes_delta:+,} bytes)"
    return Finding("recipe-mismatch", "error", message, m.tensor)
