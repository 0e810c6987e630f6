"""What every stage of one verify run shares: both files, their hyperparameters, and the plan of the work."""

from dataclasses import dataclass, field, fields
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from refimpl.arith.builds import BUILDS, SITELESS, list_builds
from refimpl.errors import Unsupported
from refimpl.files import names
from refimpl.files.gguf import Gguf
from refimpl.files.hparams import ARCHITECTURE
from refimpl.files.imatrix import Imatrix
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint
from refimpl.files.source import Tensor
from refimpl.quants.formats import formats
from refimpl.verifier.findings import Finding
from refimpl.verifier.result import TensorResult

Floats = NDArray[np.float32]

PER_EXPERT = frozenset({"routed", "router", "router_bias"})  # roles with one entry or row per expert
FREE_HPARAMS = frozenset({"n_routed_experts", "num_nextn_predict_layers"})  # pruning may change these


@dataclass(frozen=True)
class Task:
    """A tensor of the file whose every row has a counterpart in the source."""

    tensor: Tensor
    link: Link

    @property
    def stacked(self) -> bool:
        """Is its first axis the expert?"""
        return self.link.transform == "stack"

    @property
    def slabs(self) -> int:
        """Length of the first of three axes: experts, or the heads of attn_k_b. Each has its own imatrix row."""
        return self.tensor.shape[0] if len(self.tensor.shape) == 3 else 1

    @property
    def rows(self) -> int:
        """Rows of one slab."""
        return self.tensor.rows // self.slabs


@dataclass
class Job:
    """One run: the file, the source it claims to come from, and what was found out so far."""

    f: Gguf
    source: Gguf | Checkpoint
    hp: Hparams
    hp_source: Hparams
    build: str = "strict"  # the one that everything is compared under, but for ...
    builds: dict[str, str] = field(default_factory=dict)  # ... tensors that another build wrote
    also: dict[str, list[str]] = field(
        default_factory=dict
    )  # tensor -> further builds that write the same bytes
    imatrix: Imatrix | None = None
    maps: dict[int, list[int]] = field(default_factory=dict)  # layer -> source expert of each file expert
    _importance: tuple[str, Floats | None] = (
        "",
        None,
    )  # of the tensor at work; reading one can take megabytes
    _lock: Lock = field(default_factory=Lock)

    def build_of(self, tensor: Tensor) -> str:
        """The build that a tensor is compared under: strict where no other is known for its format."""
        build = self.builds.get(tensor.name, self.build)
        return build if build in list_builds(tensor.format.name) else "strict"

    def fitting_builds(self, tensor: Tensor) -> list[str]:
        """The builds that an exact tensor was shown to be the bytes of; all, where no site can make a difference."""
        if tensor.format.name in SITELESS:
            return list(BUILDS)
        fitting = {self.build_of(tensor), *self.also.get(tensor.name, [])}
        return [build for build in BUILDS if build in fitting]

    def kept(self, link: Link) -> list[int] | None:
        """The source expert of each file expert, where the tensor has experts."""
        return self.maps.get(link.layer) if link.layer is not None and link.role in PER_EXPERT else None

    def importance(self, tensor: Tensor, row: int) -> Floats | None:
        """The imatrix [n] of a tensor's row, None where there is none for it."""
        if self.imatrix is None or tensor.format.weights == 1:
            return None
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        with self._lock:
            if self._importance[0] != tensor.name:
                self._importance = (tensor.name, self.imatrix.get(tensor.name, experts, tensor.n))
            values = self._importance[1]
        return values if values is None or values.ndim == 1 else values[row // (tensor.rows // experts)]

    def imatrix_problems(self) -> list[Finding]:
        """What is doubtful about the imatrix; an expert that calibration never reached is only worth a note."""
        return [
            Finding(
                f"imatrix-{p.kind}",
                "note" if p.kind == "unused" else "warning",
                p.message,
                p.tensor,
                p.expert,
            )
            for p in (self.imatrix.problems if self.imatrix else [])
        ]

    def readable(self, name: str) -> bool:
        """Is the tensor in the file, of a type that we decode, with a whole region?"""
        broken = any(d.fatal and d.tensor == name for d in self.f.defects)
        return name in self.f.tensors and self.f.tensors[name].format.name in formats and not broken

    def sources(self, link: Link) -> list[str]:
        """Names of the source tensors behind a GGUF tensor, in the file's order."""
        if link.transform != "stack":
            return [link.hf]
        kept = self.kept(link) or range(self.hp.n_routed_experts)
        return [link.hf.format(e=e) for e in kept]

    def compare_hparams(self) -> list[Finding]:
        """Hyperparameters that the file states otherwise than the source's config."""
        said = []
        for one in fields(Hparams):
            mine, theirs = getattr(self.hp, one.name), getattr(self.hp_source, one.name)
            if isinstance(mine, float):  # GGUF stores floats as F32
                same = np.float32(mine) == np.float32(theirs)
            else:
                same = mine == theirs
            if same or one.name in FREE_HPARAMS:
                continue
            message = f"{one.name} is {mine} in the file's metadata, {theirs} in the source"
            said.append(Finding("hparam-differs", "error", message))
        mine, theirs = _normalizes_experts(self.f), _normalizes_experts(self.source)
        if mine != theirs:
            message = f"expert_weights_norm is {mine} in the file's metadata, {theirs} in the source"
            said.append(Finding("hparam-differs", "error", message))
        return said


def _normalizes_experts(model: Gguf | Checkpoint) -> bool:
    """Are the chosen experts' weights divided by their sum? llama.cpp takes a missing key for no."""
    if isinstance(model, Gguf):
        return model.metadata.get(f"{ARCHITECTURE}.expert_weights_norm", False) is True
    return model.config.get("norm_topk_prob", True) is True


def require_decodable(f: Gguf) -> None:
    """Raise Unsupported for a file with tensors of types that refimpl measures but does not decode."""
    unknown = [t for t in f.tensors.values() if t.format.name not in formats]
    if unknown:
        kinds = ", ".join(sorted({t.format.name for t in unknown}))
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise Unsupported(f"{f.path}: {unknown[0].name}{more}: refimpl does not decode {kinds}")


def plan(job: Job) -> tuple[list[Task], dict[str, TensorResult], list[Finding]]:
    """Sort the file's tensors into those to compare and those whose verdict stands already."""
    tasks: list[Task] = []
    results: dict[str, TensorResult] = {}
    findings: list[Finding] = []
    for name, tensor in job.f.tensors.items():
        link = names.link(name, job.hp)
        shape = None
        if link is not None:
            shape = names.source_shape(job.source, link, job.hp_source, job.kept(link))
        verdict = None
        if not job.readable(name):
            verdict = "corrupt"  # the container check has said why
        elif link is None or shape is None:
            verdict = "unmatched"
            findings.append(Finding("unmatched", "error", "the source has no such tensor", name))
        elif tuple(shape) != tensor.shape:
            verdict, message = _explain_shape(job, tensor, link, tuple(shape))
            findings.append(Finding("shape-differs", "error", message, name))
        else:
            tasks.append(Task(tensor, link))
            continue
        sources = job.sources(link) if link is not None and shape is not None else []
        results[name] = TensorResult(name, tensor.format.name, tensor.shape, sources, verdict)
    return tasks, results, findings


def _explain_shape(job: Job, tensor: Tensor, link: Link, want: tuple[int, ...]) -> tuple[str, str]:
    """The verdict on a tensor of another shape than the source implies, and what it most likely is."""
    message = f"its shape is {list(tensor.shape)}, the source implies {list(want)}"
    whole = names.source_shape(job.source, link, job.hp_source)
    if link.role in PER_EXPERT and whole is not None and tensor.shape == tuple(whole):
        return "misplaced", f"{message}: it still has all {whole[0]} experts of the parent, unpruned"
    if link.transform == "k_b" and sorted(tensor.shape) == sorted(want):
        return "misplaced", f"{message}: the k part of kv_b_proj was not transposed"
    if len(tensor.shape) == 2 and tensor.shape == want[::-1]:
        return "misplaced", f"{message}: it is transposed"
    return "wrong", message
