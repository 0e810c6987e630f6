"""inspect: everything that a model file's header says, and what follows from it, without reading weights."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from refimpl import recipes
from refimpl.errors import BadFile, Unsupported
from refimpl.files import names
from refimpl.files import source as model_files
from refimpl.files.gguf import Gguf
from refimpl.files.metadata import Array
from refimpl.files.names import Hparams
from refimpl.files.safetensors import Checkpoint
from refimpl.quants.formats import BF16, F16, F32
from refimpl.recipes import Mismatch, Recipe
from refimpl.verifier import census, container
from refimpl.verifier.census import Census
from refimpl.verifier.findings import Finding

SHOWN_ELEMENTS = 8  # of an array in the raw listing
SHOWN_TEXT = 200


@dataclass
class Guess:
    """The known recipe that fits best."""

    recipe: Recipe
    mismatches: list[Mismatch]

    @property
    def bytes_delta(self) -> int:
        """What the file weighs more than the recipe's would."""
        return sum(m.bytes_delta for m in self.mismatches)


@dataclass
class Inspection:
    """The outcome.

    hparams : None where the architecture is not known or the keys are broken; `unknown` says why
    guess   : None where there is nothing quantized, or no hyperparameters
    """

    path: str
    kind: str
    parts: list[str]
    size: int
    model: dict[str, str | None]
    header: dict[str, int] | None
    hparams: Hparams | None
    unknown: str | None
    census: Census
    guess: Guess | None
    findings: list[Finding]
    homes: dict[str, str]  # tensor -> the file that it is in
    raw: dict[str, Any] | None = None

    @property
    def broken(self) -> list[Finding]:
        """Findings that make this a bad file: a region is not whole, the hyperparameters are absurd."""
        return [f for f in self.findings if f.code in container.BROKEN or f.code == "hyperparameters"]

    @property
    def error(self) -> BadFile | None:
        """The first defect that makes this a bad file, as an error."""
        if not self.broken:
            return None
        first = self.broken[0]
        return BadFile(self.homes.get(first.tensor or "", self.path), first.offset, first.message)

    @property
    def exit_code(self) -> int:
        """3 for a bad file, 1 where metadata and tensors disagree, else 0."""
        if self.broken:
            return BadFile.exit_code
        return int(any(f.severity == "error" for f in self.findings))

    def to_json(self) -> dict[str, Any]:
        """The document of `inspect --json`; its schema is report/schemas/inspect.json."""
        said = {
            "file": {"path": self.path, "kind": self.kind, "bytes": self.size, "parts": self.parts},
            "model": self.model,
            "header": self.header,
            "hyperparameters": asdict(self.hparams) if self.hparams else None,
            "census": self.census.to_json(),
            "recipe": _guess_json(self.guess),
            "findings": [finding.to_json() for finding in self.findings],
        }
        return said if self.raw is None else said | {"raw": self.raw}


def inspect(path: str | os.PathLike[str], raw: bool = False) -> Inspection:
    """Look at a model's header.

    raw : list every metadata key and every tensor, too

    Raises BadFile where the header cannot be read.
    """
    with model_files.open(path) as f:
        findings = container.check(f)
        hparams, unknown = None, None
        try:
            if isinstance(f, Checkpoint) and not f.config:
                raise Unsupported("no config.json with the tensors")
            hparams = names.hparams(f)
        except BadFile as error:
            unknown = error.defect
            findings.append(Finding("hyperparameters", "error", error.defect, offset=error.offset))
        except Unsupported as error:
            unknown = str(error).removeprefix(f"{f.path}: ")
        counted = census.census(f, hparams, os.path.basename(os.path.normpath(f.path)))
        return Inspection(
            path=f.path,
            kind=f.kind,
            parts=f.parts,
            size=f.size,
            model=_name(f),
            header=_header(f),
            hparams=hparams,
            unknown=unknown,
            census=counted,
            guess=_guess(f, hparams),
            findings=findings + counted.findings,
            homes={name: f.parts[tensor.part] for name, tensor in f.tensors.items()},
            raw=_list(f) if raw else None,
        )


def _name(f: Gguf | Checkpoint) -> dict[str, str | None]:
    """What the model calls itself."""
    values: Mapping[str, Any] = f.metadata if isinstance(f, Gguf) else f.config
    keys = (
        ("general.architecture", "general.name") if isinstance(f, Gguf) else ("model_type", "_name_or_path")
    )
    said = (values.get(key) for key in keys)
    return dict(zip(("architecture", "name"), (s if isinstance(s, str) else None for s in said), strict=True))


def _header(f: Gguf | Checkpoint) -> dict[str, int] | None:
    if not isinstance(f, Gguf):
        return None
    counts = {"version": f.version, "alignment": f.alignment, "keys": len(f.metadata)}
    return counts | {"tensors": len(f.tensors), "header_bytes": f.header_bytes, "data_offset": f.data_offset}


def _guess(f: Gguf | Checkpoint, hparams: Hparams | None) -> Guess | None:
    plain = {F32.name, F16.name, BF16.name}
    if hparams is None or not isinstance(f, Gguf) or all(t.format.name in plain for t in f.tensors.values()):
        return None
    return Guess(*recipes.best(hparams, f.tensors, recipes.made_with_imatrix(f.metadata)))


def _guess_json(guess: Guess | None) -> dict[str, Any] | None:
    if guess is None:
        return None
    return {
        "name": guess.recipe.name,
        "version": guess.recipe.version,
        "conforms": not guess.mismatches,
        "bytes_delta": guess.bytes_delta,
        "mismatches": [asdict(m) for m in guess.mismatches],
    }


def _list(f: Gguf | Checkpoint) -> dict[str, Any]:
    """Every key and tensor; the shape as the file has it (GGUF: innermost axis first)."""
    gguf = isinstance(f, Gguf)
    tensors = [
        {"name": t.name, "type": t.format.name, "stored_shape": list(t.shape[::-1] if gguf else t.shape),
         "offset": t.offset, "bytes": t.nbytes, "part": t.part}
        for t in f.tensors.values()
    ]  # fmt: skip
    metadata = []
    if isinstance(f, Gguf):
        metadata = [
            {"key": key, "type": f.metadata.types[key].name.lower(), "offset": f.metadata.offsets[key],
             "value": _shorten(f.metadata[key])}
            for key in f.metadata
        ]  # fmt: skip
    return {"metadata": metadata, "tensors": tensors}


def _shorten(value: Any) -> Any:
    """A value for a listing: long texts and arrays are cut, numbers that JSON lacks are text."""
    if isinstance(value, Array):
        kind = value.element.name.lower()
        return {"array": kind, "length": len(value), "first": [_shorten(v) for v in value[:SHOWN_ELEMENTS]]}
    if isinstance(value, str) and len(value) > SHOWN_TEXT:
        return value[: SHOWN_TEXT - 1] + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
