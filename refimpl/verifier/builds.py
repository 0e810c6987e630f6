"""Whose build wrote the file? A few blocks tell: those that the builds write differently (arith/builds.py).

A block tells builds apart where at least one of them, and not all, writes what is stored; it excludes the others.
The first rows of some tensors are asked before the run, which then compares everything under the build they name.
What still differs is asked again, and a tensor that another build wrote is compared anew under that build. So a file
of one build is encoded once, and what is found depends on the file alone, not on how the work was cut.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from refimpl import quants
from refimpl.arith.builds import SITED, list_builds
from refimpl.files import names
from refimpl.quants.formats import Format
from refimpl.verifier.findings import Finding
from refimpl.verifier.job import Job, Task
from refimpl.verifier.requantize import Tally

Rows = NDArray[np.uint16] | NDArray[np.float32]

Tallies = dict[str, dict[int | None, Tally]]

MIXED = "mixed"
HEAD = 1 << 16  # weights at the start of a tensor that are compared with what strict writes
HEADS = 64  # tensors of which they are
MOST = (
    0.5  # of the blocks that another build may write otherwise (Q2_K: 0.4); beyond, another search wrote them
)
STRANGE = 4  # of these tensors, how many may be another search's before the question is given up
SAMPLE = 3 << 12  # weights on which all builds are tried where strict wrote everything
SAMPLES = 2  # tensors of which they are
ROWS = 8  # rows with blocks that strict did not write, on which the others are tried
PARTS, ROWS_OF_PART = 2, 4  # of a tensor with odd blocks: experts, and rows of each, that are asked
ENOUGH = 16  # telling blocks after which the question is settled
SMALL = 1 << 15  # weights that the NumPy text encodes sooner than other kernels compile
ODD = ("search", "unruled", "scale", "off")  # classes of blocks that another build may have written


@dataclass
class Evidence:
    """What telling blocks say."""

    seen: int = 0
    against: Counter[str] = field(default_factory=Counter)  # build -> telling blocks that it writes otherwise

    def add(self, other: "Evidence") -> None:
        self.seen += other.seen
        self.against.update(other.against)

    @property
    def best(self) -> str:
        """The build that fits most of them, strict where nothing tells."""
        return min(quants.BUILDS, key=lambda build: self.against[build])


def find_build(job: Job, tasks: list[Task]) -> Evidence:
    """Ask the first rows of the file's tensors, in its order, which build wrote them."""
    evidence, strange = Evidence(), 0
    telling = [task for task in tasks if task.tensor.format.name in SITED]
    for task in telling[:HEADS]:
        raw, source = _read(job, task, 0, min(task.rows, max(1, HEAD // task.tensor.n)))
        importance = job.importance(task.tensor, 0)
        try:
            written = match_blocks(raw, source, task.tensor.format, importance, "strict")
        except quants.NotFinite:
            continue
        rows = np.flatnonzero(~written.all(axis=1))[:ROWS]
        if np.mean(~written) > MOST:
            strange += 1
        elif len(rows):
            said = ask(raw[rows], source[rows], task.tensor.format, importance)
            evidence.add(said)
        if evidence.seen >= ENOUGH or strange >= STRANGE:
            return evidence
    for task in telling[:SAMPLES] if not evidence.seen and not strange else []:
        raw, source = _read(job, task, 0, min(task.rows, max(1, SAMPLE // task.tensor.n)))
        evidence.add(ask(raw, source, task.tensor.format, job.importance(task.tensor, 0)))
        if evidence.seen:
            break
    return evidence


def _read(job: Job, task: Task, start: int, stop: int) -> tuple[NDArray[np.uint8], Rows]:
    """Rows of one slab, as stored and in the source."""
    rows = slice(start, stop)
    source = names.source_rows(job.source, task.link, job.hp_source, rows, job.kept(task.link))
    return job.f.read(task.tensor.name, rows), source


def match_blocks(
    raw: NDArray[np.uint8], source: Rows, fmt: Format, importance: NDArray[np.float32] | None, build: str
) -> NDArray[np.bool_]:
    """Blocks that a build writes as they are stored, with the imatrix or without: [R, NB] bool."""
    same = np.zeros((len(raw), source.shape[1] // fmt.weights), np.bool_)
    stored = raw.reshape(*same.shape, -1)
    for one in (None,) if importance is None else (importance, None):
        want = quants.quantize(source, fmt, one, build, reference=source.size <= SMALL)
        same |= (want.reshape(stored.shape) == stored).all(axis=2)
    return same


def ask(
    raw: NDArray[np.uint8], source: Rows, fmt: Format, importance: NDArray[np.float32] | None
) -> Evidence:
    """Encode some rows under every build; the blocks on which they differ speak."""
    try:
        same = {build: match_blocks(raw, source, fmt, importance, build) for build in quants.BUILDS}
    except quants.NotFinite:
        return Evidence()
    stack = np.stack(list(same.values()))
    telling = stack.any(axis=0) & ~stack.all(axis=0)
    return Evidence(
        int(telling.sum()), Counter({b: int((telling & ~found).sum()) for b, found in same.items()})
    )


def suspect_build(job: Job, task: Task, parts: dict[int | None, Tally]) -> str | None:
    """Another build that wrote blocks of a tensor which the one it was compared under did not; or None.

    Asked are the first odd blocks of its first two odd parts.
    """
    fmt, per_row = task.tensor.format, task.tensor.n // task.tensor.format.weights
    if fmt.name not in SITED:
        return None
    evidence, odd_parts = Evidence(), 0
    for tally in parts.values():
        odd = {suspect.block // per_row for kind in ODD for suspect in tally.suspects[kind]}
        if not odd or tally.differ > MOST * tally.blocks or odd_parts == PARTS:
            continue
        odd_parts += 1
        rows = sorted(odd)[:ROWS_OF_PART]
        raw, source = zip(*(_read(job, task, row, row + 1) for row in rows), strict=True)
        importance = job.importance(task.tensor, rows[0])
        evidence.add(ask(np.concatenate(raw), np.concatenate(source), fmt, importance))
    return evidence.best if evidence.seen and evidence.best != job.build_of(task.tensor) else None


def describe(job: Job, evidence: Evidence, tasks: list[Task]) -> list[Finding]:
    """Say which build was found, by how many blocks, and which builds they exclude."""
    if not any(task.tensor.format.name in SITED for task in tasks):
        return [
            Finding("build", "note", "no format in it is known to be written differently by different builds")
        ]
    if not evidence.seen:
        message = f"no block that was asked tells builds apart; it was compared with what {job.build} writes"
        return [Finding("build", "note", message)]
    excluded = [
        f"{b} by {evidence.against[b]:,}" for b in quants.BUILDS if evidence.against[b] and b != job.build
    ]
    words = f"{evidence.seen:,} of the first blocks tell builds apart; they exclude {' and '.join(excluded)}"
    if evidence.against[job.build]:
        words += f"; {evidence.against[job.build]:,} are not {job.build}'s either"
    return [Finding("build", "note", f"build {job.build}: {words}")]


def name_unknown(job: Job, tasks: list[Task]) -> list[Finding]:
    """Say which formats were compared with what strict writes, because the build's choices are not known for them."""
    names = dict.fromkeys(task.tensor.format.name for task in tasks)
    unknown = [name.upper() for name in names if job.build not in list_builds(name)]
    if not unknown:
        return []
    message = (
        f"what {job.build} writes is not known for {', '.join(unknown)}: compared with what strict writes"
    )
    return [Finding("build-unknown", "note", message)]


def name_build(job: Job, tasks: list[Task], tallies: Tallies) -> tuple[str, list[Finding]]:
    """The build that wrote the file: one that fits every tensor which a build can be told from, else MIXED."""
    fitting = {
        task.tensor.name: job.fitting_builds(task.tensor)
        for task in tasks
        if task.tensor.format.name in SITED
        and (task.tensor.name in job.builds or not any(t.differ for t in tallies[task.tensor.name].values()))
    }
    common = [build for build in quants.BUILDS if all(build in found for found in fitting.values())]
    if job.build in common or common:
        return (job.build if job.build in common else common[0]), []
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name, found in fitting.items():
        counts[found[0]] += 1
        first.setdefault(found[0], name)
    said = ", ".join(f"{counts[b]:,} by {b} (the first: {first[b]})" for b in quants.BUILDS if counts[b])
    return MIXED, [Finding("mixed-builds", "warning", f"different builds wrote its tensors: {said}")]
