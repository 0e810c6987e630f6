"""What quantize is going to do, before it does anything: every tensor's type, its price, and what is doubtful."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from refimpl.arith.builds import list_builds
from refimpl.errors import BadFile, Unsupported, Usage
from refimpl.files import names
from refimpl.files.gguf import Gguf
from refimpl.files.imatrix import Imatrix
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint
from refimpl.quants.formats import BF16, F16, F32, Format, formats
from refimpl.recipes import Recipe, quantizing_order
from refimpl.recipes.recipe import Choice, format_of
from refimpl.writers.checkpoint import ordered_links

_FLOATS = (F32, F16, BF16)


@dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    link   : where it comes from; None for a tensor of a source GGUF that GLM-5.1 does not name
    stored : the type it has in the source GGUF; None where the source is a checkpoint
    wanted : what the recipe asked for; another than `format` where rows are no whole blocks of it
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    link: Link | None
    stored: Format | None
    wanted: str

    @property
    def copied(self) -> bool:
        """Do its bytes stay as they are?"""
        return self.stored == self.format

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])

    @property
    def slabs(self) -> int:
        """Length of the first of three axes: experts, or heads. Each has its own row of the imatrix."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Note:
    """Something about the job that its owner should know. kind: a word such as "unused" (files/imatrix.py)."""

    kind: str
    message: str
    tensor: str | None = None
    expert: int | None = None


@dataclass
class Plan:
    """All tensors in the order of the file, and notes about the imatrix."""

    tensors: list[Planned]
    notes: list[Note] = field(default_factory=list)

    @property
    def fallbacks(self) -> list[Planned]:
        """Tensors whose rows are no whole blocks of the type that the recipe wanted."""
        return [t for t in self.tensors if t.format.name != t.wanted and not t.copied]

    @property
    def weights(self) -> int:
        return sum(t.weights for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding not counted."""
        return sum(t.nbytes for t in self.tensors)

    def classes(self) -> list[dict[str, Any]]:
        """Tensors, weights, bytes and types by class (the role in links.py), as they come."""
        found: dict[str, dict[str, Any]] = {}
        for t in self.tensors:
            role = t.link.role if t.link is not None else "other"
            row = found.setdefault(
                role, {"class": role, "tensors": 0, "weights": 0, "bytes": 0, "types": Counter()}
            )
            row["tensors"] += 1
            row["weights"] += t.weights
            row["bytes"] += t.nbytes
            row["types"][t.format.name] += 1
        return [row | {"types": dict(sorted(row["types"].items()))} for row in found.values()]


def make_plan(source: Gguf | Checkpoint, hp: Hparams, recipe: Recipe, imatrix: Imatrix | None) -> Plan:
    """Choose every tensor's type. Raises Unsupported for a type that refimpl cannot write, or cannot read here."""
    found: dict[str, tuple[tuple[int, ...], Link | None, Format | None]] = {}
    if isinstance(source, Checkpoint):
        found = {link.gguf: (names.shape(link, hp), link, None) for link in ordered_links(source, hp)}
    else:
        for defect in source.defects:
            if defect.fatal:
                raise defect
        found = {t.name: (t.shape, names.link(t.name, hp), t.format) for t in source.tensors.values()}
    choices = recipe.choose(hp, {name: one[0] for name, one in found.items()}, imatrix is not None)
    plan = Plan([])
    for name in sorted(found, key=quantizing_order):
        shape, link, stored = found[name]
        plan.tensors.append(_plan_one(source, name, shape, link, stored, choices[name]))
    if imatrix is not None:
        _check_imatrix(plan, imatrix)
    return plan


def _plan_one(
    source: Gguf | Checkpoint,
    name: str,
    shape: tuple[int, ...],
    link: Link | None,
    stored: Format | None,
    choice: Choice,
) -> Planned:
    if choice.kept and stored is not None:
        return Planned(name, shape, stored, link, stored, stored.name)  # whatever it is, it stays
    fmt = format_of(choice.type)
    if stored is not None and stored != fmt and stored not in _FLOATS:
        raise Unsupported(f"{source.path}: {name} is {stored.name}; only f32, f16 and bf16 are quantized")
    return Planned(name, shape, fmt, link, stored, choice.wanted)


def require_encoders(plan: Plan, build: str) -> None:
    """Raise Unsupported where a tensor is to get a type that refimpl does not write, or not as this build does."""
    for t in plan.tensors:
        if t.copied:
            continue
        if t.format.name not in formats:
            raise Unsupported(f"{t.name} is to be {t.format.name}, which refimpl does not write")
        if build not in list_builds(t.format.name):
            known = ", ".join(list_builds(t.format.name))
            raise Unsupported(
                f"{t.name} is to be {t.format.name}: what {build} writes is not known, {known} is"
            )


def require_importance(plan: Plan, recipe: Recipe, imatrix: Imatrix | None) -> None:
    """Raise Usage where llama-quantize refuses: a very small type without importances."""
    for t in plan.tensors:
        if (
            not t.copied
            and recipe.requires_imatrix(t.name, t.format.name)
            and (imatrix is None or t.name not in imatrix)
        ):
            lacks = "there is no imatrix" if imatrix is None else f"{imatrix.path} has none"
            raise Usage(f"{t.name} is to be {t.format.name}, which needs importances: {lacks}")


def refuse_fallbacks(plan: Plan) -> None:
    """Raise Usage where there are any."""
    fell = plan.fallbacks
    if fell:
        more = f" and {len(fell) - 1:,} more" if len(fell) > 1 else ""
        raise Usage(
            f"{fell[0].name}{more} would fall back from {fell[0].wanted} to {fell[0].format.name}: "
            f"rows of {fell[0].shape[-1]} weights are no whole blocks (--no-fallback)"
        )


def _check_imatrix(plan: Plan, imatrix: Imatrix) -> None:
    """Note what is doubtful in the imatrix, and which tensors it lacks. Raises BadFile for NaN and infinity."""
    for problem in imatrix.problems:
        if problem.kind == "not-finite":
            raise BadFile(imatrix.path, None, problem.message)
        plan.notes.append(Note(problem.kind, problem.message, problem.tensor, problem.expert))
    for t in plan.tensors:
        if t.copied or t.format.weights == 1:
            continue
        if t.name not in imatrix:
            words = f"the imatrix has nothing for {t.name}: quantized as without one"
            plan.notes.append(Note("lacking", words, t.name))
        elif imatrix.get(t.name, t.slabs, t.shape[-1]) is None:
            words = f"the importances of {t.name} do not fit its rows: quantized as without, as llama-quantize does"
            plan.notes.append(Note("unfit", words, t.name))
    have = {t.name for t in plan.tensors}
    strangers = [name for name in imatrix if name not in have]
    if strangers:
        more = f" and {len(strangers) - 1:,} more" if len(strangers) > 1 else ""
        plan.notes.append(
            Note("stranger", f"the imatrix speaks of {strangers[0]}{more}, which the model lacks")
        )


def imatrix_keys(imatrix: Imatrix, given: str) -> Mapping[str, Any]:
    """What llama-quantize records of an imatrix: its name as given, its first data set, entries, chunks."""

    def cut(text: str) -> str:
        return text.encode()[:127].decode(errors="ignore")

    said: dict[str, Any] = {"quantize.imatrix.file": cut(given)}
    if imatrix.datasets:
        said["quantize.imatrix.dataset"] = cut(imatrix.datasets[0])
    said["quantize.imatrix.entries_count"] = len(imatrix)
    if imatrix.chunks > 0:
        said["quantize.imatrix.chunks_count"] = imatrix.chunks
    return said


def describe(plan: Plan, only: Sequence[Planned]) -> list[dict[str, Any]]:
    """Tensors for a report: name, wanted, type."""
    return [{"tensor": t.name, "wanted": t.wanted, "type": t.format.name} for t in only]
