"""What verify returns: the file's verdict, every tensor's and expert's, and what was found."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from refimpl.verifier.findings import Finding

RANK = {
    "exact": 0, "copied": 0, "rounded": 1, "equivalent": 2, "degraded": 3, "misplaced": 4, "wrong": 5,
    "unmatched": 6, "missing": 6, "corrupt": 7,
}  # fmt: skip
PASSING = frozenset({"exact", "copied", "rounded", "equivalent"})
EXACTLY = frozenset({"exact", "copied"})


@dataclass(frozen=True)
class Errors:
    """Fidelity of a tensor or an expert against its source. None where it has no value (NaN, a zero source)."""

    rmse: float | None
    rel_rmse: float | None
    max_abs: float | None
    snr_db: float | None
    worst_block: int | None


@dataclass
class ExpertResult:
    """One expert of a stacked tensor (or the whole of a plain one)."""

    index: int
    verdict: str
    blocks: int
    blocks_differ: int
    errors: Errors
    fits: int | None = None  # source expert that the bytes encode, where it is another one
    fits_tensor: str | None = None  # source tensor that they encode, where it is another one


@dataclass
class TensorResult:
    """One tensor of the file, or one that it should have."""

    name: str
    format: str | None
    shape: tuple[int, ...]
    source: list[str]
    verdict: str
    build: list[str] = field(default_factory=list)
    blocks: int = 0
    blocks_differ: int = 0
    errors: Errors = Errors(None, None, None, None, None)
    experts: list[ExpertResult] = field(default_factory=list)


@dataclass
class Report:
    """The outcome of verify. `passed` is what the exit code says; PASS means faithful, never safe."""

    file: str
    size: int  # bytes, all parts
    source: str
    source_kind: str
    recipe: str | None
    recipe_declared: bool
    conforms: bool | None
    build: str
    require: str | None
    tensors: list[TensorResult]
    stages: dict[str, list[Finding]]  # container, recipe, experts, bytes: what each found, in order
    experts: int  # per layer in the file
    source_experts: int
    maps: dict[int, list[int]]
    census: Any = None

    @property
    def findings(self) -> list[Finding]:
        """Everything found, stage by stage."""
        return [finding for found in self.stages.values() for finding in found]

    @property
    def verdict(self) -> str:
        """The worst tensor's verdict; a file of exact and copied tensors is exact."""
        worst = max((t.verdict for t in self.tensors), key=RANK.__getitem__, default="corrupt")
        return "exact" if RANK[worst] == 0 else worst

    @property
    def passed(self) -> bool:
        """The verdict is in the pass set, a declared recipe is conformed to, and nothing found is an error."""
        allowed = EXACTLY if self.require == "exact" else PASSING
        recipe_ok = self.conforms is True or not self.recipe_declared
        return self.verdict in allowed and recipe_ok and all(f.severity != "error" for f in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Tensors per verdict, best first."""
        found = Counter(t.verdict for t in self.tensors)
        return {verdict: found[verdict] for verdict in RANK if found[verdict]}

    def to_json(self) -> dict[str, Any]:
        """The document of `verify --json`: the same bytes whatever the threads, with no time and no host in it."""
        from refimpl import __version__

        return {
            "refimpl": __version__,
            "file": {"path": self.file, "bytes": self.size, "sha256": None},
            "source": {"path": self.source, "kind": self.source_kind},
            "recipe": {"name": self.recipe, "declared": self.recipe_declared, "conforms": self.conforms},
            "verdict": self.verdict,
            "passed": self.passed,
            "build": self.build,
            "counts": self.counts,
            "experts": {
                "file": self.experts,
                "source": self.source_experts,
                "map": {str(layer): kept for layer, kept in self.maps.items()},
            },
            "tensors": [_tensor_json(t) for t in self.tensors],
            "findings": [f.to_json() for f in self.findings],
        }


def _tensor_json(t: TensorResult) -> dict[str, Any]:
    experts = [
        {"index": e.index, "verdict": e.verdict, "fits": e.fits, "fits_tensor": e.fits_tensor,
         "blocks": e.blocks, "blocks_differ": e.blocks_differ, **vars(e.errors)}
        for e in t.experts
    ]  # fmt: skip
    return {
        "name": t.name, "format": t.format, "build": t.build, "shape": list(t.shape), "source": t.source,
        "verdict": t.verdict, "blocks": t.blocks, "blocks_differ": t.blocks_differ, **vars(t.errors),
        "experts": experts,
    }  # fmt: skip
